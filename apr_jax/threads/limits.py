"""What a rollout may do, and how it is scheduled.

`Limits` change the trees that come out, `Schedule` only the time that they take.
"""

import dataclasses

_LARGEST_COUNT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a thread tree, the same in the device engine and in the reference interpreter.

    Attributes:
      window: the most positions that one thread may occupy at a time.
      max_thread_tokens: L, the most tokens of one thread, hidden blocks included; at least
        `window`.
      max_threads: T, the most threads of one tree, the root included.
      children: C, the most children of one spawn.
      max_depth: depth of the deepest thread that may exist; at 0 no thread may spawn, at 1 only the
        root may.
      max_tokens: the most sampled tokens of one tree.
      max_sequential: the most sampled tokens on the longest chain of one tree.
      constrain: whether tokens that the protocol does not allow next are excluded from sampling.
        Then no thread is malformed and no message is refused (docs/protocol.md), and log-probs are
        those of the masked distribution.
    """

    window: int
    max_thread_tokens: int
    max_threads: int
    children: int
    max_depth: int = 1
    max_tokens: int = 1_000_000
    max_sequential: int = 1_000_000
    constrain: bool = False

    def __post_init__(self):
        for field, low, rule in (
            ("window", 2, "a prompt and one token must fit"),
            ("max_thread_tokens", self.window, f"at least window={self.window}"),
            ("max_threads", 1, "the root is a thread"),
            ("children", 1, "a spawn makes at least one child"),
            ("max_depth", 0, "0 means that no thread may spawn"),
            ("max_tokens", 1, "a tree needs a token"),
            ("max_sequential", 1, "a tree needs a token"),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"limits.{field}={value} must be at least {low}: {rule}")
            if value > _LARGEST_COUNT:
                raise ValueError(
                    f"limits.{field}={value} must be at most {_LARGEST_COUNT}: counts are 32 bits"
                    " wide"
                )

        if self.max_depth > 0 and self.children > self.max_threads - 1:
            raise ValueError(
                f"limits.children={self.children} must be at most limits.max_threads - 1 ="
                f" {self.max_threads - 1}: every child of a spawn is a thread, and so is the root"
            )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the device works through the trees. No field changes a sampled token.

    Attributes:
      slots: W, the decode slots, that is, the rows of the decode batch.
      prefill_batch: threads whose contexts are read into the cache together. Decoding stops for a
        prefill when the share `prefill_batch / slots` of the running decode slots has stopped.
      prefill_chunk: context tokens that one prefill step reads.
      context_buckets: increasing lengths of context, below the window, for which the decode loop is
        compiled apart, so that a step reads no more of the cache than the longest running thread
        needs. On TPU the decode kernel reads each decode slot's own length in any case; there the
        buckets make the blocks of the cache smaller and serve prefill.
      small_batch_sizes: increasing numbers of decode slots, below `slots`, for which the decode
        loop is compiled apart, so that a single thread does not pay for a step of all decode slots.
        They help latency; a large batch keeps its decode slots full.
    """

    slots: int = 64
    prefill_batch: int = 8
    prefill_chunk: int = 16
    context_buckets: tuple[int, ...] = ()
    small_batch_sizes: tuple[int, ...] = ()

    def cache_lengths(self, window: int) -> tuple[int, ...]:
        """Returns the lengths that the decode loop is compiled for: buckets, then the window."""
        return (*(bucket for bucket in self.context_buckets if bucket < window), window)

    def __post_init__(self):
        for field in ("slots", "prefill_batch", "prefill_chunk"):
            if getattr(self, field) < 1:
                raise ValueError(f"schedule.{field}={getattr(self, field)} must be at least 1")

        for field in ("context_buckets", "small_batch_sizes"):
            values = getattr(self, field)
            if any(low >= high for low, high in zip((0, *values), values, strict=False)):
                raise ValueError(f"schedule.{field}={values} must be positive and increasing")

        if self.small_batch_sizes and self.small_batch_sizes[-1] >= self.slots:
            raise ValueError(
                f"schedule.small_batch_sizes={self.small_batch_sizes} must be below"
                f" schedule.slots={self.slots}: they are some of the decode slots"
            )
        if self.prefill_batch > self.slots:
            raise ValueError(
                f"schedule.prefill_batch={self.prefill_batch} must be at most"
                f" schedule.slots={self.slots}"
            )
