"""Reinforcement learning over whole thread trees.

The life of a tree:
1. `TrainingProblems.draw` picks the step's problems, a function of (seed, step); each gets G trees.
2. The jitted rollout decodes all trees on the device, with keys folded from (seed, step, tree).
3. The host reads the answers off the recorded token ids and the task verifies them, in a box that a
   bad verifier can't leave: the only time at which the device idles (metric `idle_share`), together
   with 4.
4. Verdicts and costs become rewards, rewards advantages; the trees that teach are packed into rows,
   nothing is ever tokenised again.
5. The update rescores the rows and follows the tree-sum gradient, `ppo_epochs` times; with KL the
   reference has scored them once before. Nobody waits for it: the next rollout is queued behind it
   (`train/metrics/step_times.py`).
6. Now and then the same rollout answers validation problems greedily; the best step by that is
   kept, the first one included.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.data.build import check_built, check_files, problem_file
from apr_jax.data.packing import Rows, pack_forest, padding_share
from apr_jax.errors import UsageError, UserError
from apr_jax.io.storage import as_path, local_copy
from apr_jax.tasks import Problem, load_problems
from apr_jax.threads import ThreadForest, Work
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.checkpoint.checksum import digest
from apr_jax.train.checkpoint.manager import Run, load_checkpoint
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.distributed import fetch
from apr_jax.train.grader import Grader, Grades, first_trees, forest_metrics, grading
from apr_jax.train.loop import LastBatches, Stage, Stopping
from apr_jax.train.metrics.flops import measure_peak, training_flops
from apr_jax.train.metrics.step_times import LazyMetric, StepTimes
from apr_jax.train.optimizer import clipped_updates, make_optimizer
from apr_jax.train.rl.advantages import ADVANTAGES, count_zero_std
from apr_jax.train.rl.objective import MEANS, token_weights, zero_advantage_trees
from apr_jax.train.rl.rewards import counted_trees, next_price, tree_rewards
from apr_jax.train.session import build_mesh, train
from apr_jax.train.state import TrainState, init_state
from apr_jax.train.step import (
    RlStep,
    check_divides,
    make_rescore,
    make_rl_step,
    make_tree_kl,
    place_everywhere,
    place_forest,
    place_whole,
    rescored_rows,
)


def train_rl(
    config: Experiment,
    data_dir: Path,
    workdir: Path,
    init: Path | str,
    progress: bool = True,
    profile: int | None = None,
) -> TrainState:
    """Trains, or goes on training, the checkpoint `init` on the training problems, the same ones
    for every method.

    Args:
      config: its model must be that of `init`.
      data_dir: written by `apr data build`.
      workdir: of the run; checkpoints, metrics and config go there.
      init: the supervised checkpoint; also the reference of the KL penalty.
      progress: show the bar.
      profile: step of which a profile is written.

    Raises:
      UsageError: an `init` of another model, devices that don't divide the batch, no such step to
        profile.
      UserError: no data, no or another `init`, a workdir of another run, a full disk, too many bad
        steps or unknown answers.
      KeyboardInterrupt, SystemExit: interrupted; the run is saved.
    """
    rl = config.train.rl
    start = load_checkpoint(init)
    _check_init(config, start)
    # RL takes problems only: its limits may be its own.
    check_built(config, as_path(data_dir), ("task", "data"))
    here = local_copy(as_path(data_dir), "data.json")
    check_files(here)
    mesh = build_mesh(config)
    check_divides("train.rl.micro_batch_rows", rl.micro_batch_rows, mesh)
    optimizer = make_optimizer(rl.optimizer, rl.steps * rl.ppo_epochs)
    validation = load_problems(here / problem_file("validation"))[: rl.validation]
    with grading(config, start.tokenizer, validation, mesh) as grader:
        trainer = _Trainer(config, start, here, mesh, make_rl_step(config, optimizer, mesh), grader)
        return train(
            Run(config, start.method, "rl", start.tokenizer, origin=digest(start.params)),
            as_path(workdir),
            init_state(start.params, optimizer, mesh),
            Stage(
                name="rl",
                steps=rl.steps,
                advance=trainer.advance,
                save_every=rl.save_every,
                max_consecutive_skipped=config.train.max_consecutive_skipped,
                data_state=trainer.data_state,
                batch=trainer.last_batches.of,
                host_seconds=lambda: grader.host_seconds,
                validate=grader.validate,
                sample=grader.sample,
                validate_every=rl.validate_every,
            ),
            restore_data=trainer.restore_data,
            log_every=1,
            counted=("trees", "tokens"),
            shown=("reward", "children", "total_tokens", "validation_accuracy"),
            progress=progress,
            profile=profile,
            bounds={
                "logprob_difference_worst": rl.difference_bound,
                "logprob_difference": rl.mean_difference_bound,
                "outside_clip_share": rl.outside_clip_bound,
            },
        )


class _Trainer:
    """What a step of RL needs besides the state.

    Two numbers of it are the run's own, and are saved with it: the price of a token as it stands,
    and the tokens of a tree in the first step, by which all losses are divided. All else follows
    from the step."""

    def __init__(
        self,
        config: Experiment,
        start: Restored,
        data_dir: Path,
        mesh: Mesh,
        step: RlStep,
        grader: Grader,
    ):
        self._config, self._rl, self._mesh = config, config.train.rl, mesh
        self._vocabulary = start.tokenizer.vocab_size
        self._grader = grader
        self._train = TrainingProblems(load_problems(data_dir / problem_file("train")))
        self._step = step
        # As large as the model: without a KL term no device holds it.
        self._reference = place_whole(start.params, mesh) if self._rl.objective.kl else None
        self.last_batches = LastBatches()
        self._rescore = make_rescore(config, mesh)
        self._tree_kl = make_tree_kl(self._rl.problems * self._rl.group, mesh)
        advantage = ADVANTAGES[self._rl.objective.advantage]
        self._compare = jax.jit(
            lambda rewards, counted: (advantage(rewards, counted), count_zero_std(rewards, counted))
        )
        self._price = self._rl.reward.token_price
        self._tokens_per_tree: float | None = None  # Measured in the first step.
        self._peak = measure_peak(mesh, config.model.dtype)
        self._times: StepTimes | None = None

    def data_state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the state: JSON gives a float back to the bit."""
        return {"token_price": self._price, "tokens_per_tree": self._tokens_per_tree}

    def restore_data(self, saved: dict[str, Any]) -> None:
        """Goes on from a `data_state`."""
        if "tokens_per_tree" not in saved:
            raise UserError(
                "checkpoint: this run is of another version of apr_jax; use another --workdir"
            )
        self._price = float(saved["token_price"])
        self._tokens_per_tree = saved["tokens_per_tree"]

    def advance(
        self, state: TrainState, step: int, stopping: Stopping
    ) -> tuple[TrainState, dict[str, Any] | None]:
        """One step: rollout, rewards, updates; only the rollout, and nothing of it, if the run is
        to stop.
        """
        rl = self._rl
        times = self._times = StepTimes(before=self._times)
        problems = self._train.draw(self._config.seed, step, rl.problems)
        problems = [problem for problem in problems for _ in range(rl.group)]
        key = run_key(self._config.seed, Domain.RL_STEP, step)
        rolled = self._grader.ask(state.params, problems, rl.temperature, key)
        times.queued()
        forest, work = first_trees(fetch(rolled), len(problems))
        times.fetched()
        if stopping():
            return state, None
        grades = self._grader.verify(problems, forest)
        rewards = tree_rewards(grades.correct, forest, self._price, rl.reward)
        whole = counted_trees(forest, rl.reward)
        counted = whole & grades.known  # What an answer without a verdict is worth is unknown.
        advantages, flat = self._advantages(rewards, counted)
        without_advantage = zero_advantage_trees(advantages, counted, rl.objective)
        taught = dataclasses.replace(
            forest, length=np.where(without_advantage[:, None], 0, forest.length)
        )
        rows = pack_forest(taught, rl.micro_batch_rows, self._config.limits.max_thread_tokens)
        weights = token_weights(rows, counted, rl.objective.loss_aggregation, self._divisor(forest))
        batch = place_forest(
            rows,
            weights,
            rl.micro_batch_rows,
            self._mesh,
            recompute=rl.objective.importance_cap > 0,
        )
        learned = {"zero_std_groups": flat}
        if rl.objective.kl_in_reward:
            with times.rescoring():
                reference = self._rescore(self._reference, batch)
                kl = np.asarray(jax.device_get(self._tree_kl(reference, batch)))
            # Which groups are flat was counted before: KL is never the same for two trees.
            advantages, _ = self._advantages(rewards - rl.objective.kl * kl, counted)
            learned["kl"] = float(kl.mean())
        self.last_batches.keep(
            step + 1, vars(rows) | {"weights": weights, "advantages": advantages}
        )
        placed = place_everywhere(advantages, self._mesh)
        times.resumed()
        if rl.objective.kl_in_loss:
            batch = dataclasses.replace(batch, reference=self._rescore(self._reference, batch))
        at_first: dict[str, Any] = {}
        norms = []
        for _ in range(rl.ppo_epochs):
            state, metrics, behaviour = self._step(state, batch, placed)
            batch = dataclasses.replace(batch, behaviour=behaviour)
            norms.append(metrics["grad_norm"])
            at_first = at_first or metrics
        times.updating(metrics["loss"])
        state = dataclasses.replace(state, step=state.step + 1)
        # The first inner step sees the policy that sampled: there the difference of log-probs is a
        # measure of error.
        errors = ("logprob_difference", "logprob_difference_worst", "outside_clip_share")
        metrics |= {name: at_first[name] for name in errors}
        metrics["clipped_updates"] = clipped_updates(norms, rl.optimizer.clip)
        measured = self._measure(forest, work, grades, rows) | learned
        measured |= {
            "reward": float(rewards[grades.known].mean()),
            "token_price": self._price,
            "masked_trees": float(np.sum(~whole)),
            "zero_advantage_trees": float(without_advantage.sum()),
        }
        self._price = next_price(self._price, measured["total_tokens"], rl.reward)
        if not measured["rows"]:  # Means over no token say nothing.
            metrics = {name: value for name, value in metrics.items() if name not in MEANS}
        flops = self._update_flops(rows)
        share = LazyMetric(lambda: flops / times.update_seconds() / self._peak)
        return state, metrics | measured | times.metrics() | {"mfu": share}

    def _divisor(self, forest: ThreadForest) -> float:
        """Mean sampled tokens of a tree of the run's first step, the same in all steps and
        processes.

        It is over all trees, also those that teach nothing: which of them do changes from step to
        step, and a divisor that changed with it would weigh the steps against each other."""
        if self._tokens_per_tree is None:
            self._tokens_per_tree = max(1.0, float(np.mean(forest.total_tokens, dtype=np.float64)))
        return self._tokens_per_tree

    def _measure(
        self, forest: ThreadForest, work: Work, grades: Grades, rows: Rows
    ) -> dict[str, float]:
        """What the trees of a step show, what they cost, and what is rescored of them."""
        rescored = rescored_rows(rows, self._rl.micro_batch_rows)
        measured = {"accuracy": grades.accuracy} | forest_metrics(forest) | grades.metrics
        measured |= {
            "slot_occupancy": float(
                work.live.sum() / max(1, work.steps.sum() * self._config.schedule.slots)
            ),
            "rows": float(len(rescored.tokens)),
            "trees": float(len(grades.codes)),
            "tokens": float(forest.total_tokens.sum()),
        }
        return measured | ({"padding": padding_share(rescored)} if len(rescored.tokens) else {})

    def _update_flops(self, rows: Rows) -> float:
        """What the updates on a forest need; the reference's one pass, which is forward only, costs
        a third of one.
        """
        rl = self._rl
        passes = 3.0 * rl.ppo_epochs + (1.0 if rl.objective.kl else 0.0)
        return float(training_flops(self._config.model, self._vocabulary, rows)) * passes / 3.0

    def _advantages(self, rewards: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, float]:
        """[B], and how many groups are flat."""
        shape = self._rl.problems, self._rl.group
        grouped, part = rewards.reshape(shape).astype(np.float32), counted.reshape(shape)
        advantages, flat = jax.device_get(self._compare(grouped, part))
        return advantages.reshape(-1), float(flat)


class TrainingProblems:
    """What RL draws its problems from.

    All training problems of the split, not those of the demonstrations that were kept: solvers fail
    on hard problems and overrun the limits on them, each method's on others, and RL is to see these
    too."""

    def __init__(self, problems: Sequence[Problem]):
        self._problems = problems

    def draw(self, seed: int, step: int, count: int) -> list[Problem]:
        """`count` of them, different ones as far as there are; a function of the arguments."""
        total = len(self._problems)
        chosen = np.random.default_rng([seed, step]).choice(total, count, replace=count > total)
        return [self._problems[index] for index in chosen]


def _check_init(config: Experiment, start: Restored) -> None:
    if config.model != start.config.model:
        differing = [
            f"model.{field.name}={getattr(start.config.model, field.name)!r}, not"
            f" {getattr(config.model, field.name)!r}"
            for field in dataclasses.fields(config.model)
            if getattr(config.model, field.name) != getattr(start.config.model, field.name)
        ]
        raise UsageError(
            f"init {start.path}: was trained with {', '.join(differing)}; RL needs the same model"
        )
