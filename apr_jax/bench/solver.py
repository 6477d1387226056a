"""Demonstrations a second: all cores against one."""

from collections.abc import Iterator
from contextlib import contextmanager

from apr_jax.bench.demos import make_recipe
from apr_jax.bench.measure import Contestant
from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Workers, demonstrations

_COUNT = 2_048  # Demonstrations a repeat: about a second on one core at nano scale.


@contextmanager
def contest(config: Experiment) -> Iterator[list[Contestant]]:
    """Both solve, verify and tokenize the same problems."""
    recipe, problems = make_recipe(config, _COUNT)

    def run(workers: Workers) -> float:
        return sum(counts.made for _, counts in demonstrations(recipe, problems, _COUNT, workers))

    with Workers() as many, Workers(1) as one:
        yield [
            Contestant(f"{many.count} cores", lambda: run(many), "demonstrations"),
            Contestant("one core", lambda: run(one), "demonstrations"),
        ]
