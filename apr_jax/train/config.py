"""Hyper-parameters of supervised and reinforcement learning."""

import dataclasses
import math
from typing import Any, Literal

_FINITE = " and finite"


def _require(config: Any, group: str, fields: tuple[str, ...], low: int) -> None:
    for field in fields:
        value = getattr(config, field)
        if not low <= value < math.inf:
            raise ValueError(
                f"{group}.{field}={value} must be at least {low}{_FINITE * (value == math.inf)}"
            )


def _require_positive(config: Any, group: str, fields: tuple[str, ...]) -> None:
    for field in fields:
        value = getattr(config, field)
        if not 0 < value < math.inf:
            raise ValueError(
                f"{group}.{field}={value} must be positive{_FINITE * (value == math.inf)}"
            )


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

    def check(self, group: str) -> None:
        """Raises ValueError if a value cannot be used; `group` is where the config has these."""
        _require_positive(self, group, ("lr", "clip"))
        _require(self, group, ("warmup", "weight_decay"), 0)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"{group}.decay={self.decay} must be in 0..1")
        if not 0 < self.b2 < 1:
            raise ValueError(f"{group}.b2={self.b2} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised training: steps of `batch_rows` packed rows; a row is `limits.max_thread_tokens`
    tokens long.

    Attributes:
      steps: how many, whatever the method; 0 where `epochs` says how long it takes.
      epochs: so often every demonstration is read; 0 where `steps` says how long it takes. How many
        steps these are depends on the method, whose demonstrations are packed into rows:
        `data.pipeline.steps_of_an_epoch`.
      streams: independent streams of demonstrations that a batch's rows come from, in equal parts.
        A process reads only the streams in which its rows lie: give it as many as there are
        processes. It decides the order of the data; the number of processes and devices does not.
      validate_every: steps between greedy answers to `validation` problems, with the rollout of RL;
        the best step by them is kept. 0: never.
    """

    batch_rows: int
    optimizer: OptimizerConfig
    steps: int = 0
    epochs: float = 0.0
    streams: int = 1
    save_every: int = 200
    log_every: int = 10
    validate_every: int = 0
    validation: int = 128

    def __post_init__(self):
        self.optimizer.check("train.sft.optimizer")
        _require(
            self, "train.sft", ("batch_rows", "streams", "save_every", "log_every", "validation"), 1
        )
        _require(self, "train.sft", ("steps", "epochs", "validate_every"), 0)
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(
                f"train.sft.steps={self.steps} with train.sft.epochs={self.epochs:g}: one must be"
                " positive, the other 0"
            )
        if self.batch_rows % self.streams:
            raise ValueError(
                f"train.sft.batch_rows={self.batch_rows} must be a multiple of"
                f" train.sft.streams={self.streams}"
            )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What an update follows; docs/objective.md has the formulas, and what each choice does to the
    gradient.

    Attributes:
      advantage: see `train/rl/advantages.py`.
      normalisation: what a token weighs, see `objective.token_weights`; only "tree" is unbiased.
      clip: PPO clip range.
      dual_clip: bounds the loss of a token with a negative advantage to so many advantages; 0 is
        off.
      kl: weight of the KL penalty to the supervised model.
      kl_estimator: k1, k2 or k3 of each token as a term of the loss, or "reward": k1 of the tree,
        taken off its reward.
      entropy: weight of the entropy bonus.
      importance_cap: 0 takes the recorded log-probs for those of the sampling policy. Else they are
        recomputed in the training pass before the first PPO epoch, and a token weighs
        min(exp(recomputed - recorded), importance_cap).
    """

    advantage: Literal["none", "batch", "group", "group_std", "leave_one_out"] = "group_std"
    loss_aggregation: Literal["tree", "token", "sequence"] = "tree"
    clip: float = 0.2
    dual_clip: float = 0.0
    kl: float = 0.001
    kl_estimator: Literal["k1", "k2", "k3", "reward"] = "k3"
    entropy: float = 0.0
    importance_cap: float = 0.0

    def __post_init__(self):
        _require(self, "train.rl.objective", ("kl", "entropy", "dual_clip", "importance_cap"), 0)
        _require_positive(self, "train.rl.objective", ("clip",))
        if 0 < self.dual_clip <= 1 + self.clip:
            raise ValueError(
                f"train.rl.objective.dual_clip={self.dual_clip} must be 0 (off) or above 1 + clip ="
                f" {1 + self.clip}"
            )
        if 0 < self.importance_cap < 1:
            raise ValueError(
                f"train.rl.objective.importance_cap={self.importance_cap} must be 0 (off) or at"
                " least 1: a token that was recorded without error weighs 1"
            )
        if self.advantage == "group_std" and self.kl_in_reward:
            # Where all trees earned the same, the deviation would be that of KL, and its noise as
            # large as a reward.
            raise ValueError(
                "train.rl.objective.advantage='group_std' with kl_estimator='reward': would divide"
                " KL by its own deviation; take advantage 'group' or 'leave_one_out', or"
                " kl_estimator 'k2' or 'k3'"
            )

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL of a tree is taken off its reward."""
        return self.kl > 0 and self.kl_estimator == "reward"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term, for which every update needs the reference's
        log-probs.
        """
        return self.kl > 0 and self.kl_estimator != "reward"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a tree earns: 1 if its answer is right, less what it cost.

    Attributes:
      token_price: a sampled token, of all threads; with a budget, the price of the first step.
      sequential_price: a sequential token.
      token_budget: mean total tokens a tree that the price of a token is led to; 0 leaves it fixed.
      price_step: what the price rises in a step whose trees took twice the budget; it falls alike,
        never below 0.
      overlong: what becomes of a tree in which a thread ran out of window or budget: "scored" like
        any other, "masked" (no gradient, no part in any mean), or "penalised".
      overlong_penalty: taken off the reward of a penalised tree.
      time_limit: seconds that the verification of one answer may take; then it is stopped, and
        whether the answer is right stays unknown: its tree is not counted, as a masked one is not.
      memory_limit: GiB of address space that the verifier may take.
      max_unknown: share of a batch's answers that may stay unknown; a run ends with more, if they
        are more than one.
    """

    token_price: float = 0.0
    sequential_price: float = 0.0
    token_budget: int = 0
    price_step: float = 0.0
    overlong: Literal["scored", "masked", "penalised"] = "scored"
    overlong_penalty: float = 1.0
    time_limit: float = 5.0
    memory_limit: float = 4.0
    max_unknown: float = 0.1

    def __post_init__(self):
        group = "train.rl.reward"
        _require(
            self,
            group,
            ("token_price", "sequential_price", "token_budget", "price_step", "overlong_penalty"),
            0,
        )
        _require_positive(self, group, ("time_limit", "memory_limit"))
        if not 0 <= self.max_unknown <= 1:
            raise ValueError(f"{group}.max_unknown={self.max_unknown} must be in 0..1")
        if (self.token_budget > 0) != (self.price_step > 0):
            raise ValueError(
                f"{group}.price_step={self.price_step} with token_budget={self.token_budget}: must"
                " both be positive (the price follows the budget) or both 0"
            )


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning over whole trees.

    Attributes:
      steps: rollout batches.
      problems: problems a step.
      group: G, trees a problem.
      ppo_epochs: updates on a step's forest; only from the second on are ratios away from 1.
      temperature: of the sampling.
      micro_batch_rows: packed rows that are rescored at once; a forest takes as many such chunks as
        it needs.
      validate_every: steps between greedy answers to `validation` problems; the best step by them
        is kept.
      save_every: steps between checkpoints.
      difference_bound: a step in which rollout and training disagree about any token's log-prob by
        more is reported. In float32 they agree to 1e-4; 1e-2 moves a ratio by 1%, a twentieth of
        the usual clip range: no rounding does that.
      mean_difference_bound: the same for the mean over the step's tokens.
      outside_clip_bound: the same for the share of tokens whose ratio is outside of the clip range
        before the first update.
    """

    steps: int
    problems: int
    group: int
    optimizer: OptimizerConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig = RewardConfig()
    ppo_epochs: int = 1
    temperature: float = 1.0
    micro_batch_rows: int = 64
    validate_every: int = 25
    validation: int = 200
    save_every: int = 10
    difference_bound: float = 1e-2
    mean_difference_bound: float = 1e-3
    outside_clip_bound: float = 1e-3

    def __post_init__(self):
        self.optimizer.check("train.rl.optimizer")
        counts = (
            "steps",
            "problems",
            "group",
            "ppo_epochs",
            "micro_batch_rows",
            "validate_every",
            "validation",
            "save_every",
        )
        _require(self, "train.rl", counts, 1)
        bounds = ("difference_bound", "mean_difference_bound", "outside_clip_bound")
        _require_positive(self, "train.rl", ("temperature", *bounds))
        advantage = self.objective.advantage
        if advantage in ("group", "group_std", "leave_one_out") and self.group < 2:
            raise ValueError(
                f"train.rl.group={self.group} must be at least 2 for advantage {advantage!r}"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Both stages, and after how many bad updates (NaN or Inf) in a row a run ends."""

    sft: SftConfig
    rl: RlConfig
    max_consecutive_skipped: int = 20

    def __post_init__(self):
        _require(self, "train", ("max_consecutive_skipped",), 1)
