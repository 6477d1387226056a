"""Evaluation of checkpoints: the trees that they grow for problems, and what those are worth.

- `decoding`: how trees are decoded, checked against what the model can be asked.
- `runner`: decodes, verifies and writes all trees of an evaluation.
- `stream`: batches of trees through one compiled rollout.
- `trace`: a decoded tree as one JSON line.
- `folder`: the files of an evaluation, read and continued.
- `scores`: accuracies and other means of the trees, from their traces.
- `intervals`: 95% intervals, and gaps between two evaluations.
- `failures`: what went wrong in a tree.
- `cost`: what trees cost on a given number of decode slots.
- `latency`: measured seconds of one problem.
- `cells`: how scores are written in tables.
"""
