"""`apr bench`: each part against a named alternative, as a ratio of medians.

A part offers contests: ways to do the same work, ours first. They run by turns, so that a busy
machine slows all of them."""
