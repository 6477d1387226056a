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
        if self.clip <= 0:
            raise ValueError(f"optimizer.clip={self.clip} must be positive")


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised training: `steps` steps of `rows` packed rows; a row is `limits.stream` tokens long."""

    steps: int
    rows: int
    optimizer: OptimizerConfig
    save_every: int = 200
    log_every: int = 10


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning over whole trees.

    Attributes:
      steps: rollout batches.
      problems: problems a step.
      group: G, trees a problem.
      inner_steps: passes over a step's forest (minibatch updates see ratios away from 1 only when > 1).
      temperature: of the sampling.
      advantage: see `learn/advantages.py`.
      clip: PPO clip range.
      kl: weight of the KL penalty to the supervised model.
      token_price: subtracted from the reward, a sampled token.
      rows: packed rows of the first bucket; the row count doubles from there.
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
        if self.advantage in ("group", "group_std", "leave_one_out") and self.group < 2:
            raise ValueError(f"learn.rl.group={self.group} must be at least 2 for advantage {self.advantage!r}")


@dataclasses.dataclass(frozen=True)
class LearnConfig:
    """Both stages, and after how many bad steps (NaN or Inf) in a row a run ends."""

    sft: SftConfig
    rl: RlConfig
    bad_steps: int = 20
