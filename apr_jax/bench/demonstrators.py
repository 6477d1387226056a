"""Measures how fast demonstrations are made, and how accurate and long they are.

The speed is that of all cores against one core. No data are built.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from apr_jax.bench.demos import make_recipe
from apr_jax.bench.paired import Contestant
from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Counts, Workers, demonstrations
from apr_jax.data.statistics import statistics
from apr_jax.errors import UsageError

_COUNT = 2_048  # Demonstrations of a repeat: about a second on one core at scale nano.


def check_demonstrator(config: Experiment) -> None:
    """Raises UsageError if the demonstrations are a file's, which nothing here makes."""
    if config.data.file:
        raise UsageError(
            f"bench solver: data.demonstrations={config.data.file!r} is a file, so there is no"
            " solver to measure; give a number, as in --set data.demonstrations=1000"
        )


@contextmanager
def contest(config: Experiment) -> Iterator[list[Contestant]]:
    """Makes the contestants: all cores, and one core, which demonstrate the same problems."""
    recipe, problems = make_recipe(config, _COUNT)

    def run(workers: Workers) -> float:
        return sum(counts.made for _, counts in demonstrations(recipe, problems, _COUNT, workers))

    with Workers() as many, Workers(1) as one:
        yield [
            Contestant(f"{many.count} cores", lambda: run(many), "demonstrations"),
            Contestant("one core", lambda: run(one), "demonstrations"),
        ]


def rate(config: Experiment, methods: Sequence[str], count: int) -> dict[str, dict[str, Any]]:
    """Demonstrates `count` random problems by each method.

    Returns:
      for each method the `statistics` of its demonstrations.
    """
    rates = {}
    with Workers() as workers:
        for method in methods:
            recipe, problems = make_recipe(config, count, method)
            parts = (part for _, part in demonstrations(recipe, problems, count, workers))
            rates[method] = statistics(sum(parts, Counts()), recipe)
    return rates
