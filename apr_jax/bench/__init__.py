"""`apr bench`: each part against a named alternative, as a ratio of medians.

A part offers two functions that do the same work; they run by turns, so that a busy machine slows both.
"""

from pathlib import Path

from apr_jax.bench.measure import Result, measure, show
from apr_jax.config import Experiment

__all__ = ["Result", "measure", "run_bench"]


def run_bench(part: str, config: Experiment, repeats: int, path: Path | None = None) -> Result:
    """Measures "rollout", "train" or "solver", prints the table and writes it as JSON if a path is given."""
    if part == "rollout":
        from apr_jax.bench.rollout import contest
    elif part == "train":
        from apr_jax.bench.train import contest
    else:
        from apr_jax.bench.solver import contest
    with contest(config) as (ours, other):
        result = measure(part, ours, other, repeats)
    show(result, path)
    return result
