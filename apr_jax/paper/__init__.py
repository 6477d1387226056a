"""The reproduction of APR: the suite of evaluations, comparisons with the paper, ablations."""

import enum
from typing import Literal


class Question(enum.StrEnum):
    """What `apr ablation` answers."""

    SEEDS = "seeds"
    EARLY = "early"
    PRICE = "price"
    SERIAL = "serial"
    SCRATCH = "scratch"
    NESTED = "nested"


Only = Literal["training", "figures"]  # Parts of `apr reproduce`.
