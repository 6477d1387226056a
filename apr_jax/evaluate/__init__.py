"""Evaluation of checkpoints on problems, and what is drawn from it: scores, figures, the report with its viewer."""
