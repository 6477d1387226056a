"""What a rollout may do (`Limits`: part of the result) and how it is scheduled (`Schedule`: never part of the result)."""

import dataclasses

_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a thread tree; the same in the device engine and in the reference interpreter.

    Attributes:
      window: most positions that one thread may occupy.
      stream: L, most tokens of one thread's stream, hidden spawn blocks included; at least `window`.
      slots: T, threads a tree, the root included.
      children: C, most children of one spawn.
      max_depth: deepest thread that may exist; 0 means that nobody spawns, 1 that only the root does.
      max_tokens: sampled tokens a tree.
      max_sequential: sampled tokens on the longest chain of a tree.
      constrain: tokens that the protocol does not allow at a point are not drawn there, so that no stream is malformed and no
        message refused (docs/protocol.md); log-probs are those of the masked distribution.
    """

    window: int
    stream: int
    slots: int
    children: int
    max_depth: int = 1
    max_tokens: int = 1_000_000
    max_sequential: int = 1_000_000
    constrain: bool = False

    def __post_init__(self):
        for field, low, rule in (
            ("window", 2, "a prompt and one token must fit"),
            ("stream", self.window, f"at least window={self.window}"),
            ("slots", 1, "the root needs a slot"),
            ("children", 1, "a spawn makes at least one child"),
            ("max_depth", 0, "0 means that nobody spawns"),
            ("max_tokens", 1, "a tree needs a token"),
            ("max_sequential", 1, "a tree needs a token"),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"limits.{field}={value} must be at least {low}: {rule}")
            if value > _MOST:
                raise ValueError(f"limits.{field}={value} must be at most {_MOST}: counts are 32 bits wide")
        if self.max_depth > 0 and self.children > self.slots - 1:
            raise ValueError(
                f"limits.children={self.children} must be at most limits.slots - 1 = {self.slots - 1}: "
                "a spawn's children need a slot each"
            )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the device works through the trees. No field changes a sampled token.

    Attributes:
      lanes: W, rows of the decode batch.
      admit: threads that are prefilled together; decoding stops for it when that share of the running lanes has ended or waits.
      chunk: context tokens that one prefill step reads.
      buckets: lengths of context below the window for which the loop is compiled apart, so that a step reads no more of the
        cache than the longest running thread needs; increasing. On TPU each lane's own length decides that; there they are
        for reading contexts.
      few: numbers of lanes below `lanes` for which the loop is compiled apart, so that a lone thread does not pay for a step
        of all lanes; increasing. For latency: while a batch lasts its lanes are full.
    """

    lanes: int = 64
    admit: int = 8
    chunk: int = 16
    buckets: tuple[int, ...] = ()
    few: tuple[int, ...] = ()

    def bounds(self, window: int) -> tuple[int, ...]:
        """The buckets below the window, and the window."""
        return (*(bucket for bucket in self.buckets if bucket < window), window)

    def __post_init__(self):
        for field in ("lanes", "admit", "chunk"):
            if getattr(self, field) < 1:
                raise ValueError(f"schedule.{field}={getattr(self, field)} must be at least 1")
        for field in ("buckets", "few"):
            values = getattr(self, field)
            if any(low >= high for low, high in zip((0, *values), values, strict=False)):
                raise ValueError(f"schedule.{field}={values} must be positive and increasing")
        if self.few and self.few[-1] >= self.lanes:
            raise ValueError(
                f"schedule.few={self.few} must be below schedule.lanes={self.lanes}: they are some of the lanes"
            )
        if self.admit > self.lanes:
            raise ValueError(f"schedule.admit={self.admit} must be at most schedule.lanes={self.lanes}")
