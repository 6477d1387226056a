"""Countdown as tests use it."""

import dataclasses

from apr_jax.tasks import Bounds, load_problems
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.task import Countdown


def countdown(config=None, solver=None, children=1_000, depth=2):
    """The task of these settings, whose demonstrations may have so many children and levels."""
    config = config or CountdownConfig()
    if solver is not None:
        values = {**vars(config), "solver": solver}
        config = CountdownConfig(**values)
    return Countdown(config, Bounds(children=children, max_depth=depth))


def read_problems(path):
    """The Countdown problems of a file."""
    return load_problems(path, Countdown())


def with_solver(config, **changes):
    """The experiment whose demonstrations are made in another way."""
    solver = dataclasses.replace(config.task.options.solver, **changes)
    return dataclasses.replace(config, task=config.task.replace(solver=solver))
