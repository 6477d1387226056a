"""How much data is built."""

import dataclasses

LARGEST_SEED = 2**32 - 1  # The same as of a run's seed, see `threads.keys`.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Attributes:
    demonstrations: training demonstrations a method.
    heldout: problems kept out of training for validation, and as many again for test; no training
      problem has the numbers of one, with whatever target.
    seed: everything built follows from it and the config.
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
