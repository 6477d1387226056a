"""`apr bench`: measures each part against named alternatives, as ratios of medians.

A part offers contestants: ways to do the same work, ours first. They run by turns, so that a busy
machine slows all of them alike.
"""
