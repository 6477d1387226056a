"""Evaluation of checkpoints on problems: the trees that they grow, scores with intervals, kinds of
failure.
"""
