"""How much data is built."""

import dataclasses

LARGEST_SEED = 2**32 - 1  # The same bound as for the seed of a run, see `threads.keys`.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How much data is built, and from which seed.

    Attributes:
      demonstrations: number of training demonstrations of each method.
      heldout: number of validation problems, and of test problems. No training problem is in the
        same group as one of them (`Task.group`).
      seed: decides, together with the other settings, all that is built.
      correct_only: whether demonstrations with a wrong answer are left out (rejection sampling).
        Then there are fewer than `demonstrations`.
    """

    demonstrations: int
    heldout: int = 1_000
    seed: int = 0
    correct_only: bool = False

    def __post_init__(self):
        for field in ("demonstrations", "heldout"):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field}={getattr(self, field)} must be at least 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"data.seed={self.seed} must be from 0 to {LARGEST_SEED}")
