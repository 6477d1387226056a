"""Settings of supervised and reinforcement learning.

Each class checks its values when it is made, and raises a ValueError that names the setting.
"""

import dataclasses
import math
from typing import Any, Literal

# Each worker is a Python process, so a slip of the finger must not start thousands of them.
_MOST_WORKERS = 256


def _require(config: Any, group: str, fields: tuple[str, ...], low: int) -> None:
    """Raises ValueError if a field is below `low` or not finite."""
    for field in fields:
        value = getattr(config, field)
        if value == math.inf:
            raise ValueError(f"{group}.{field}={value} must be at least {low} and finite")
        if not low <= value:
            raise ValueError(f"{group}.{field}={value} must be at least {low}")


def _require_positive(config: Any, group: str, fields: tuple[str, ...]) -> None:
    """Raises ValueError if a field is not above 0 or not finite."""
    for field in fields:
        value = getattr(config, field)
        if value == math.inf:
            raise ValueError(f"{group}.{field}={value} must be positive and finite")
        if not value > 0:
            raise ValueError(f"{group}.{field}={value} must be positive")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rates.

    Attributes:
      name: AdamW, or Muon on the matrices and AdamW on the rest (both by optax).
      lr: peak learning rate.
      warmup: steps of linear warm-up.
      decay: final learning rate as a share of the peak, reached by a cosine; 1 keeps it constant.
      weight_decay: decoupled weight decay.
      clip: global norm to which longer gradients are cut.
      b2: decay of the second moment.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    b2: float = 0.95

    def check(self, group: str) -> None:
        """Raises ValueError if a value cannot be used.

        Args:
          group: where these settings are in the experiment, for the message.
        """
        _require_positive(self, group, ("lr", "clip"))
        _require(self, group, ("warmup", "weight_decay"), 0)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"{group}.decay={self.decay} must be in 0..1")
        if not 0 < self.b2 < 1:
            raise ValueError(f"{group}.b2={self.b2} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: what a training changes in place of all weights.

    To each chosen matrix W of the frozen model alpha / rank x A B is added, A [in, rank] and B
    [rank, out]; docs/your_model.md says more.

    Attributes:
      rank: columns of A and rows of B; 0 trains all weights.
      alpha: what the products A B are multiplied with, times the rank.
      targets: the matrices of each layer that get adapters. "control" stands for rows that are
        trained whole: those of the ten control pieces, in the embedding and the output projection.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down", "control"], ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
        "control",
    )

    @property
    def scale(self) -> float:
        """The factor of the products A B."""
        return self.alpha / self.rank

    def check(self, group: str) -> None:
        """Raises ValueError if a value cannot be used.

        Args:
          group: where these settings are in the experiment, for the message.
        """
        _require(self, group, ("rank",), 0)
        _require_positive(self, group, ("alpha",))
        matrices = [name for name in self.targets if name != "control"]
        if not matrices or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"{group}.targets={','.join(self.targets)!r} must name each target once, and at"
                " least one of q, k, v, o, gate, up, down"
            )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised training on packed rows, each `limits.max_thread_tokens` tokens long.

    Attributes:
      batch_rows: packed rows of one step.
      optimizer: the optimizer and its learning rates.
      lora: adapters to train in place of all weights.
      steps: number of steps, whatever the method; 0 if `epochs` is given.
      epochs: how often every demonstration is read; 0 if `steps` is given. The number of steps
        depends on the method, whose demonstrations are packed into rows:
        `data.pipeline.steps_of_an_epoch`.
      streams: number of independent streams of demonstrations from which the rows of a batch come,
        in equal parts. A process reads only the streams in which its rows lie, so give as many
        streams as there are processes. The order of the data depends on `streams`, and not on the
        number of processes or devices.
      save_every: steps between checkpoints.
      log_every: steps between lines of metrics.
      validate_every: steps between validations, in which the model answers `validation` problems
        greedily with the rollout of RL. The best step by these is kept. 0: no validation.
      validation: number of problems of a validation.
    """

    batch_rows: int
    optimizer: OptimizerConfig
    lora: LoraConfig = LoraConfig()
    steps: int = 0
    epochs: float = 0.0
    streams: int = 1
    save_every: int = 200
    log_every: int = 10
    validate_every: int = 0
    validation: int = 128

    def __post_init__(self):
        self.optimizer.check("train.sft.optimizer")
        self.lora.check("train.sft.lora")
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
    """What the updates maximise.

    docs/objective.md has the formulas, and what each choice does to the gradient.

    Attributes:
      advantage: how rewards are compared, see `train/rl/advantages.py`.
      loss_aggregation: what a token weighs, see `objective.token_weights`; only "tree" is unbiased.
      clip: PPO's clip range.
      dual_clip: bounds the loss of a token with a negative advantage to this many advantages; 0
        turns the bound off.
      kl: weight of the KL penalty to the supervised model.
      kl_estimator: k1, k2 or k3 of each token as a term of the loss; or "reward": k1 of the whole
        tree, taken off its reward.
      entropy: weight of the entropy bonus.
      importance_cap: 0 takes the recorded log-probs for those of the sampling policy. Otherwise
        they are recomputed by the training pass before the first PPO epoch, and a token weighs
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
            # Where all trees earned the same, only their KL would deviate. Divided by its own
            # deviation, this noise would be as large as a reward.
            raise ValueError(
                "train.rl.objective.advantage='group_std' with kl_estimator='reward': would divide"
                " KL by its own deviation; take advantage 'group' or 'leave_one_out', or"
                " kl_estimator 'k2' or 'k3'"
            )

    @property
    def kl_in_reward(self) -> bool:
        """Returns whether the KL of a tree is taken off its reward."""
        return self.kl > 0 and self.kl_estimator == "reward"

    @property
    def kl_in_loss(self) -> bool:
        """Returns whether the loss has a KL term, which needs the reference's log-probs."""
        return self.kl > 0 and self.kl_estimator != "reward"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a tree earns: the score of its answer, less what the tree cost, and a bonus for width.

    Attributes:
      token_price: price of a sampled token, counted over all threads. With a budget it is the price
        in the first step.
      sequential_price: price of a sequential token.
      critical_path: bonus of a tree whose answer is right, times 1 - sequential tokens / total
        tokens: how much shorter its longest chain is than all of its tokens. A wrong answer gets no
        bonus, however wide its tree is.
      token_budget: mean total tokens of a tree to which the token price is led; 0 keeps the price
        fixed.
      price_step: by how much the price rises in a step whose trees took twice the budget. It falls
        in the same way, but never below 0.
      overlong: what happens to a tree in which a thread ran out of window or budget. It is "scored"
        like any other, "masked" (it has no gradient and no part in any mean of the objective), or
        "penalised".
      overlong_penalty: what is taken off the reward of a penalised tree.
      time_limit: seconds that the verification of one answer may take. Then it is stopped, the
        answer stays unknown, and its tree is not counted, as if it were masked.
      memory_limit: GiB of address space that each worker of the verifier may take.
      workers: number of processes that score the answers of a batch side by side; 0 for one on each
        core that the run may use. It decides how fast answers are scored, and not what they earn.
      max_unknown: share of a batch's answers that may stay unknown. One may in any case, unless it
        is the only answer; all of them never may. If more are unknown, the run ends.
    """

    token_price: float = 0.0
    sequential_price: float = 0.0
    critical_path: float = 0.0
    token_budget: int = 0
    price_step: float = 0.0
    overlong: Literal["scored", "masked", "penalised"] = "scored"
    overlong_penalty: float = 1.0
    time_limit: float = 5.0
    memory_limit: float = 4.0
    workers: int = 1
    max_unknown: float = 0.1

    def __post_init__(self):
        group = "train.rl.reward"
        not_negative = (
            "token_price",
            "sequential_price",
            "critical_path",
            "token_budget",
            "price_step",
            "overlong_penalty",
        )
        _require(self, group, not_negative, 0)
        _require_positive(self, group, ("time_limit", "memory_limit"))
        if not 0 <= self.workers <= _MOST_WORKERS:
            raise ValueError(f"{group}.workers={self.workers} must be in 0..{_MOST_WORKERS}")
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
      steps: number of steps, each with one rollout.
      problems: problems of a step.
      group: G, trees of a problem.
      optimizer: the optimizer and its learning rates.
      lora: adapters to train in place of all weights.
      objective: what the updates maximise.
      reward: what a tree earns.
      ppo_epochs: updates on the trees of one step. Ratios differ from 1 only from the second epoch
        on.
      temperature: temperature of the sampling.
      max_staleness: 0: every step waits for the last token of its trees. Otherwise twice the trees
        of a step are under way, and those that a step leaves unfinished go on in the next one, with
        the new policy (docs/rollout.md). A token is learned from at most so many steps after it was
        drawn.
      micro_batch_rows: packed rows that are rescored at once. The update takes as many such chunks
        as the trees of a step need.
      validate_every: steps between validations, in which the model answers `validation` problems
        greedily. The best step by these is kept. 0: no validation; then the last step counts as the
        best.
      validation: number of problems of a validation.
      save_every: steps between checkpoints.
      difference_bound: a step is reported if rollout and training disagree by more than this about
        the log-prob of any token. In float32 they agree to 1e-4. A difference of 1e-2 moves a ratio
        by 1%, a twentieth of the usual clip range: rounding never does that.
      mean_difference_bound: the same bound for the mean over the step's tokens.
      outside_clip_bound: the same for the share of tokens whose ratio is outside of the clip range
        before the first update.
    """

    steps: int
    problems: int
    group: int
    optimizer: OptimizerConfig
    lora: LoraConfig = LoraConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig = RewardConfig()
    ppo_epochs: int = 1
    temperature: float = 1.0
    max_staleness: int = 0
    micro_batch_rows: int = 64
    validate_every: int = 25
    validation: int = 200
    save_every: int = 10
    difference_bound: float = 1e-2
    mean_difference_bound: float = 1e-3
    outside_clip_bound: float = 1e-3

    def __post_init__(self):
        self.optimizer.check("train.rl.optimizer")
        self.lora.check("train.rl.lora")
        counts = (
            "steps",
            "problems",
            "group",
            "ppo_epochs",
            "micro_batch_rows",
            "validation",
            "save_every",
        )
        _require(self, "train.rl", counts, 1)
        _require(self, "train.rl", ("validate_every", "max_staleness"), 0)
        bounds = ("difference_bound", "mean_difference_bound", "outside_clip_bound")
        _require_positive(self, "train.rl", ("temperature", *bounds))
        advantage = self.objective.advantage
        if advantage in ("group", "group_std", "leave_one_out") and self.group < 2:
            raise ValueError(
                f"train.rl.group={self.group} must be at least 2 for advantage {advantage!r}"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Both stages of training.

    Attributes:
      sft: supervised training.
      rl: reinforcement learning.
      max_consecutive_skipped: the run ends when so many updates in a row were skipped, because
        their loss or gradient was NaN or Inf.
      hang_factor: the run counts as hung, and ends with status 75, when it has not moved for this
        many median steps, and for at least `hang_seconds`.
      hang_seconds: the longest single operation must fit into these seconds: compiling a program, a
        rollout, verifying a batch, a save.
      tracker: what shows the metrics beside metrics.jsonl: TensorBoard, from files in the run's
        folder, or Weights & Biases.
    """

    sft: SftConfig
    rl: RlConfig
    max_consecutive_skipped: int = 20
    hang_factor: float = 20.0
    hang_seconds: float = 1800.0
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    def __post_init__(self):
        _require(self, "train", ("max_consecutive_skipped", "hang_factor", "hang_seconds"), 1)
