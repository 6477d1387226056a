"""How much data is built."""

import dataclasses

LARGEST_SEED = 2**32 - 1  # The same bound as for the seed of a run, see `threads.keys`.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How much data is built, and from which seed.

    Attributes:
      demonstrations: number of training demonstrations of each method of the task; or a file of
        thread trees (`data.tree_files`), whose trees are then the only demonstrations, of the
        method "file", and whose problems are the training problems. The name ends in `.jsonl`.
      heldout: number of validation problems, and of test problems. No training problem is in the
        same group as one of them (`Task.group`).
      seed: decides, together with the other settings, all that is built.
      correct_only: whether demonstrations with a wrong answer are left out (rejection sampling).
        Then there are fewer than `demonstrations`.
    """

    demonstrations: int | str
    heldout: int = 1_000
    seed: int = 0
    correct_only: bool = False

    def __post_init__(self):
        if isinstance(self.demonstrations, str):
            if not self.demonstrations.endswith(".jsonl"):
                raise ValueError(
                    f"data.demonstrations={self.demonstrations!r} must be a number of at least 1,"
                    " or a file of thread trees, whose name ends in .jsonl"
                )
        elif self.demonstrations < 1:
            raise ValueError(f"data.demonstrations={self.demonstrations} must be at least 1")
        if self.heldout < 1:
            raise ValueError(f"data.heldout={self.heldout} must be at least 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"data.seed={self.seed} must be from 0 to {LARGEST_SEED}")

    @property
    def file(self) -> str | None:
        """The file of thread trees; None if the task makes the demonstrations."""
        return self.demonstrations if isinstance(self.demonstrations, str) else None
