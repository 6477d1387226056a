"""Hyper-parameters of supervised and reinforcement learning."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    name: AdamW, or Muon on the matrices and AdamW on the rest (both optax).
    lr: peak learning rate.
    warmup: steps of linear warm-up.
    decay: final learning rate as a share of the peak (cosine); 1 keeps it constant.
    weight_decay: decoupled.
    clip: global gradient norm.
    b2: second-moment decay.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    b2: float = 0.95

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr={self.lr} must be positive")
        if not self.clip > 0:
            raise ValueError(f"optimizer.clip={self.clip} must be positive")
        if self.warmup < 0:
            raise ValueError(f"optimizer.warmup={self.warmup} must be at least 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"optimizer.decay={self.decay} must be in 0..1")
        if not 0 < self.b2 < 1:
            raise ValueError(f"optimizer.b2={self.b2} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised training: `steps` steps of `rows` packed rows; a row is `limits.stream` tokens long.

    Attributes:
      streams: independent streams of demonstrations that a batch's rows come from, in equal parts. A process reads only
        the streams in which its rows lie: give it as many as there are processes. It decides the order of the data; the
        number of processes and devices does not.
    """

    steps: int
    rows: int
    optimizer: OptimizerConfig
    streams: int = 1
    save_every: int = 200
    log_every: int = 10

    def __post_init__(self):
        for field in ("steps", "rows", "streams", "save_every", "log_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"learn.sft.{field}={getattr(self, field)} must be at least 1")
        if self.rows % self.streams:
            raise ValueError(f"learn.sft.rows={self.rows} must be a multiple of learn.sft.streams={self.streams}")


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning over whole trees.

    Attributes:
      steps: rollout batches.
      problems: problems a step.
      group: G, trees a problem.
      inner_steps: updates on a step's forest; only from the second on are ratios away from 1.
      temperature: of the sampling.
      advantage: see `learn/advantages.py`.
      clip: PPO clip range.
      kl: weight of the KL penalty to the supervised model.
      token_price: subtracted from the reward, a sampled token.
      rows: packed rows that are replayed at once; a forest takes as many such chunks as it needs.
      validate_every: steps between greedy answers to `validation` problems; the best step by them is kept.
      save_every: steps between checkpoints.
    """

    steps: int
    problems: int
    group: int
    optimizer: OptimizerConfig
    inner_steps: int = 1
    temperature: float = 1.0
    advantage: Literal["none", "batch", "group", "group_std", "leave_one_out"] = "group_std"
    clip: float = 0.2
    kl: float = 0.001
    token_price: float = 0.0
    rows: int = 64
    validate_every: int = 25
    validation: int = 200
    save_every: int = 10

    def __post_init__(self):
        for field in (
            "steps",
            "problems",
            "group",
            "inner_steps",
            "rows",
            "validate_every",
            "validation",
            "save_every",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"learn.rl.{field}={getattr(self, field)} must be at least 1")
        for field in ("temperature", "clip"):
            if not getattr(self, field) > 0:
                raise ValueError(f"learn.rl.{field}={getattr(self, field)} must be positive")
        for field in ("kl", "token_price"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"learn.rl.{field}={getattr(self, field)} must be at least 0")
        if self.advantage in ("group", "group_std", "leave_one_out") and self.group < 2:
            raise ValueError(f"learn.rl.group={self.group} must be at least 2 for advantage {self.advantage!r}")


@dataclasses.dataclass(frozen=True)
class LearnConfig:
    """Both stages, and after how many bad steps (NaN or Inf) in a row a run ends."""

    sft: SftConfig
    rl: RlConfig
    bad_steps: int = 20

    def __post_init__(self):
        if self.bad_steps < 1:
            raise ValueError(f"learn.bad_steps={self.bad_steps} must be at least 1")
