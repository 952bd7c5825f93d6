// A page opened from disk may not fetch the pages it found, so search shows titles only there.
if (location.protocol === "file:") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
