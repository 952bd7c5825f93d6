// A slider over pictures: a button beside it plays them. Those marked `data-play` play once by
// themselves when they come into sight, unless the reader wants no motion.
"use strict";

document.querySelectorAll(".swd-frames").forEach((figure) => {
  const EVERY = 450; // milliseconds a picture
  const slider = figure.querySelector("input");
  const show = (k) => {
    slider.value = k;
    slider.oninput();
  };
  const button = document.createElement("button");
  slider.closest("label").before(button);
  const player = swdWidgets.player(button, Number(slider.max), EVERY, () => Number(slider.value), show);
  const watch = new IntersectionObserver(([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    watch.disconnect();
    player.play(0);
  }, { threshold: 0.6 });
  for (const touched of ["focus", "input"]) {
    slider.addEventListener(touched, () => {
      watch.disconnect();
      player.stop();
    });
  }
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if ("play" in figure.dataset && !still) watch.observe(figure);
});
