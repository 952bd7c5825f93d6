"""Tests of the book."""

# Chapters that do not have all of the others' form yet: a figure with the answer at the top, a task
# to fill in, a page that is not too long.
EARLIER = {"imagenet", "scale-out", "what-matters", "what-moves"}
