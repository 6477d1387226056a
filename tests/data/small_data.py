"""The experiment that the tests of this folder build."""

import dataclasses
from pathlib import Path

from apr_jax.config import Experiment, load

NANO = Path(__file__).parents[2] / "experiments" / "nano.py"


def small(**fields) -> Experiment:
    """The nano experiment with few demonstrations; `fields` replace groups of it."""
    config = load(NANO)
    data = dataclasses.replace(config.data, demonstrations=150, heldout=40, seed=3)
    return dataclasses.replace(config, **{"data": data, **fields})
