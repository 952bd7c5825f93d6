"""Tests of the book."""

# Chapters that do not have the form of the others yet: answer, captions, task, little code.
EARLIER = {
    *("imagenet", "lagrangian-smoothing", "prune-your-own", "scale-out", "schedules"),
    *("what-goes-wrong", "what-matters", "what-moves"),
}
