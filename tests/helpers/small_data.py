"""The experiment that the tests of this folder build, and what a stored demonstration says of its
problem.
"""

import dataclasses
from pathlib import Path

from apr_jax.config import Experiment, load
from apr_jax.data.demonstrate import Example, unflatten
from apr_jax.data.encode import read_thread
from apr_jax.tasks import Problem
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.text.tokenizer import Tokenizer

NANO = Path(__file__).parents[2] / "experiments" / "nano.py"
PAPER = NANO.with_name("paper.py")


def small(**fields) -> Experiment:
    """The nano experiment with few demonstrations; `fields` replace groups of it."""
    config = load(NANO)
    data = dataclasses.replace(config.data, demonstrations=150, heldout=40, seed=3)
    return dataclasses.replace(config, **{"data": data, **fields})


def problem_of(example: Example, tokenizer: Tokenizer) -> Problem:
    """The problem in the root's prompt, `22,26,2:46` or `22,26,2:46#3`."""
    prompt = read_thread(unflatten(example), tokenizer).prompt
    numbers, _, target = prompt.partition("#")[0].partition(":")
    return make_problem("", tuple(map(int, numbers.split(","))), int(target))
