"""What a rollout may do (`Limits`: part of the result) and how it is scheduled (`Schedule`: never
part of the result).
"""

import dataclasses

_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a thread tree; the same in the device engine and in the reference interpreter.

    Attributes:
      window: most positions that one thread may occupy.
      max_thread_tokens: L, most tokens of one thread, hidden spawn blocks included; at least
        `window`.
      max_threads: T, threads a tree, the root included.
      children: C, most children of one spawn.
      max_depth: deepest thread that may exist; 0 means that nobody spawns, 1 that only the root
        does.
      max_tokens: sampled tokens a tree.
      max_sequential: sampled tokens on the longest chain of a tree.
      constrain: tokens that the protocol does not allow at a point are not drawn there, so that no
        stream is malformed and no message refused (docs/protocol.md); log-probs are those of the
        masked distribution.
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
            ("max_depth", 0, "0 means that nobody spawns"),
            ("max_tokens", 1, "a tree needs a token"),
            ("max_sequential", 1, "a tree needs a token"),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"limits.{field}={value} must be at least {low}: {rule}")
            if value > _MOST:
                raise ValueError(
                    f"limits.{field}={value} must be at most {_MOST}: counts are 32 bits wide"
                )
        if self.max_depth > 0 and self.children > self.max_threads - 1:
            raise ValueError(
                f"limits.children={self.children} must be at most limits.max_threads - 1 ="
                f" {self.max_threads - 1}: a spawn's children need an index each"
            )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the device works through the trees. No field changes a sampled token.

    Attributes:
      slots: W, decode slots: rows of the decode batch.
      prefill_batch: threads that are prefilled together; decoding stops for it when that share of
        the running decode slots has ended or waits.
      prefill_chunk: context tokens that one prefill step reads.
      context_buckets: lengths of context below the window for which the loop is compiled apart, so
        that a step reads no more of the cache than the longest running thread needs; increasing. On
        TPU each decode slot's own length decides that; there they are for reading contexts.
      small_batch_sizes: numbers of decode slots below `slots` for which the loop is compiled apart,
        so that a lone thread does not pay for a step of all decode slots; increasing. For latency:
        while a batch lasts its decode slots are full.
    """

    slots: int = 64
    prefill_batch: int = 8
    prefill_chunk: int = 16
    context_buckets: tuple[int, ...] = ()
    small_batch_sizes: tuple[int, ...] = ()

    def bounds(self, window: int) -> tuple[int, ...]:
        """The buckets below the window, and the window."""
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
