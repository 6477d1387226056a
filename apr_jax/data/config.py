"""How much data is built."""

import dataclasses

LARGEST_SEED = 2**32 - 1  # The same bound as for the seed of a run, see `threads.keys`.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How much data is built, and from which seed.

    Attributes:
      demonstrations: training demonstrations of each method.
      heldout: number of problems kept out of training for validation, and the same number for test.
        No training problem has the numbers of one of them, whatever its target.
      seed: all that is built follows from the seed and the config.
    """

    demonstrations: int
    heldout: int = 1_000
    seed: int = 0

    def __post_init__(self):
        for field in ("demonstrations", "heldout"):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field}={getattr(self, field)} must be at least 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"data.seed={self.seed} must be from 0 to {LARGEST_SEED}")
