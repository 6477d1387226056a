"""How much data is built."""

import dataclasses

LARGEST_SEED = 2**32 - 1  # The same bound as for the seed of a run, see `threads.keys`.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How much data is built, and from which seed.

    Attributes:
      demonstrations: training demonstrations of each method.
      heldout: number of problems kept out of training for validation, and the same number for test.
        No training problem is of the group of one of them (`Task.group`): in Countdown none has
        its numbers, whatever the target.
      seed: all that is built follows from the seed and the config.
      correct_only: leave out demonstrations that do not find the answer (rejection sampling); there
        are fewer of them then.
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
