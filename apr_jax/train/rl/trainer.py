"""Reinforcement learning over whole thread trees.

The life of a tree:
1. `TrainingProblems.draw` picks the problems of the step, a function of (seed, step). Each problem
   gets G trees.
2. The jitted rollout decodes all trees on the device, with keys folded from (seed, step, tree).
   With `max_staleness` it returns as many groups as a step begins, those that must not become older
   first, and leaves the others in the state of training, for the next step
   (`threads/carry_over.py`).
3. Each host fetches the trees of its own devices. It reads the answers off the recorded token ids,
   and the task verifies them in a process of its own. During this and the next step the device
   idles (metric `idle_share`).
4. All hosts learn the verdicts and costs of all trees, a few numbers each. These become rewards,
   and rewards become advantages. Each host packs those of its trees that can change the gradient
   into the rows of its own devices (`packed_trees.py`). No text is tokenized again.
5. The update rescores the rows and follows the gradient of the sum over whole trees, `ppo_epochs`
   times. With KL, the reference model has scored the same rows once before. Nobody waits for the
   update: the next rollout is queued behind it (`train/metrics/step_times.py`).
6. From time to time the same rollout answers validation problems greedily. The step that does best
   is kept; the state before the first step competes too.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.data.build import check_built, check_files, problem_file, training_sum
from apr_jax.data.packing import Rows
from apr_jax.errors import UsageError
from apr_jax.io.storage import as_path, local_copy
from apr_jax.model.sharding import batch_shards
from apr_jax.tasks import Problem, load_problems, make_task
from apr_jax.threads import CarriedTrees, ThreadForest, Work
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.checkpoint import Run, load_checkpoint, version_error
from apr_jax.train.checkpoint.checksum import digest
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.distributed import HeldRows, fetch_held
from apr_jax.train.grader import (
    MEASURES,
    Grader,
    Grades,
    first_trees,
    grading,
    mean_measures,
    rollout_batch,
    tree_measures,
)
from apr_jax.train.loop import LastBatches, Stage, Stopping
from apr_jax.train.lora import new_adapters, place_frozen
from apr_jax.train.metrics.flops import measure_peak, training_flops
from apr_jax.train.metrics.step_times import LazyMetric, StepTimes
from apr_jax.train.metrics.trackers import require_tracker
from apr_jax.train.optimizer import clipped_updates, make_optimizer
from apr_jax.train.rl.advantages import ADVANTAGES, count_zero_std
from apr_jax.train.rl.objective import (
    MEANS,
    ROLLOUT_ERRORS,
    token_weights,
    zero_advantage_trees,
)
from apr_jax.train.rl.packed_trees import PackedTrees, balance, pack_held_trees
from apr_jax.train.rl.rewards import TreeCosts, counted_trees, next_price, tree_rewards
from apr_jax.train.session import adopt_network, adopt_positions, build_mesh, train
from apr_jax.train.state import TrainState, init_state
from apr_jax.train.step import (
    ForestBatch,
    check_divides,
    make_rescore,
    make_rl_step,
    make_tree_kl,
    most_chunks,
    place_everywhere,
    place_forest,
    place_whole,
)


def train_rl(
    config: Experiment,
    data_dir: Path,
    workdir: Path,
    init: Path | str,
    progress: bool = True,
    profile: int | None = None,
) -> TrainState:
    """Trains the checkpoint `init` by reinforcement learning, or resumes such a run.

    Checkpoints of every method learn from the same training problems.

    Args:
      config: the experiment. Its model must be that of `init`, or be left open.
      data_dir: folder that `apr data build` wrote.
      workdir: folder of the run, for checkpoints, metrics and config.
      init: the supervised checkpoint. It is also the reference of the KL penalty.
      progress: whether the terminal shows a progress bar.
      profile: step of which a profile is written, or None.

    Raises:
      UsageError: `init` holds another model, the devices do not divide the batch, the tracker is
        not installed, or the run has no such step to profile.
      UserError: there are no data, `init` cannot be loaded, the workdir belongs to another run, the
        disk is full, or too many updates were skipped or answers stayed unknown.
      KeyboardInterrupt, SystemExit: the run was interrupted; it is saved.
    """
    require_tracker(config.train.tracker)
    rl = config.train.rl
    start = load_checkpoint(init)
    network = start.config.model
    if config.model.is_open:
        config = adopt_network(config, network, start.path)
    else:
        config = adopt_positions(config, network)
    _check_init(config, start)
    # RL reads problems and no demonstrations, so its limits may differ from those of the data.
    check_built(config, as_path(data_dir), demonstrations=False)
    here = local_copy(as_path(data_dir), "data.json")
    check_files(here)
    mesh = build_mesh(config)
    check_divides("train.rl.micro_batch_rows", rl.micro_batch_rows, mesh)
    if rl.max_staleness:
        check_divides("train.rl.problems", rl.problems, mesh)
    optimizer = make_optimizer(rl.optimizer, rl.steps * rl.ppo_epochs)
    task = make_task(config.task)
    training = load_problems(here / problem_file("train"), task)
    validation = load_problems(here / problem_file("validation"), task)[: rl.validation]
    run = Run(
        config,
        start.method,
        "rl",
        start.tokenizer,
        origin=digest(start.params),
        file_method=start.file_method,
        data=training_sum(here),
    )
    with grading(config, start.tokenizer, validation, mesh, training) as grader:
        update = make_rl_step(config, optimizer, mesh)
        trainer = _Trainer(config, start, training, workdir, mesh, update, grader)
        adapters = new_adapters(start.params, rl.lora, config.seed)
        state = init_state(place_whole(start.params, mesh), optimizer, mesh, adapters)
        # `train` gets the only reference to the first state, so that it can free its memory, and
        # nobody keeps the weights on the host.
        first = [dataclasses.replace(state, carried=trainer.first_carried())]
        del start, state
        stage = Stage(
            name="rl",
            steps=rl.steps,
            advance=trainer.advance,
            save_every=rl.save_every,
            max_consecutive_skipped=config.train.max_consecutive_skipped,
            data_state=trainer.data_state,
            batch=trainer.last_batches.of,
            host_seconds=lambda: trainer.host_seconds,
            validate=grader.validate if rl.validate_every else None,
            sample=grader.sample,
            validate_every=rl.validate_every,
        )
        return train(
            run,
            as_path(workdir),
            first.pop(),
            stage,
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


@dataclasses.dataclass(frozen=True)
class _Rollout:
    """What the rollout of a step returned: b of the B trees are those of this process.

    Attributes:
      problems: the problem of each of the b trees.
      forest: the b trees, on the host.
      measures: what each of the B trees shows and costs, int32 [B] each: `tree_measures`, and
        `_age_measures` with carry-over.
      work: decode steps and live decode slots of all shards.
      carried: the trees that are left to the next step; None without carry-over.
      staleness: int32 [b, T, L], how many steps ago each sampled token was drawn; 0 elsewhere. None
        without carry-over.
    """

    problems: list[Problem]
    forest: ThreadForest
    measures: dict[str, np.ndarray]
    work: Work
    carried: CarriedTrees | None = None
    staleness: np.ndarray | None = None

    @property
    def costs(self) -> TreeCosts:
        """Returns what the rewards of the B trees follow from."""
        names = [field.name for field in dataclasses.fields(TreeCosts)]
        return TreeCosts(**{name: self.measures[name] for name in names})


@dataclasses.dataclass(frozen=True)
class _RewardedTrees:
    """What the B trees of a step earned.

    Attributes:
      rewards: float64 [B].
      unmasked: bool [B], False for trees that are masked because they are overlong.
      counted: bool [B], trees that have a part in means and gradients: unmasked trees whose answer
        got a verdict.
      advantages: float32 [B].
      zero_std_groups: number of groups in which all counted trees earned the same.
    """

    rewards: np.ndarray
    unmasked: np.ndarray
    counted: np.ndarray
    advantages: np.ndarray
    zero_std_groups: float


class _Trainer:
    """What a step of RL needs besides the state of training.

    Two of its numbers change during a run and are saved in each checkpoint: the current price of a
    token, and the mean tokens of a tree in the first step, by which all losses are divided.
    Everything else follows from the number of the step and, with carry-over, from the trees that
    the state of training holds.
    """

    def __init__(
        self,
        config: Experiment,
        start: Restored,
        training: Sequence[Problem],
        workdir: Path,
        mesh: Mesh,
        update: Any,  # RlStep, with the argument `base` if adapters are trained.
        grader: Grader,
    ):
        self._config = config
        self._rl = config.train.rl
        self._workdir = workdir
        self._mesh = mesh
        self._vocabulary = start.tokenizer.vocab_size
        self._grader = grader
        self._training_problems = TrainingProblems(training)

        trees = self._rl.problems * self._rl.group
        self._trees = HeldRows.of(rollout_batch(config, mesh), mesh, trees)
        self._chunk_rows = HeldRows.of(self._rl.micro_batch_rows, mesh)
        self._shards = HeldRows.of(batch_shards(mesh), mesh)

        self._peak = measure_peak(mesh, config.model.dtype)

        # The reference is as large as the model: without a KL term no device holds it.
        self._reference = place_whole(start.params, mesh) if self._rl.objective.kl else None
        # Adapters are added to the reference's own arrays, if there is one.
        base = place_frozen(self._reference or start.params, self._rl.lora, mesh)
        self._update_once = update if base is None else functools.partial(update, base=base)
        self._rescore = make_rescore(config, mesh)
        self._tree_kl = make_tree_kl(trees, mesh)
        advantage = ADVANTAGES[self._rl.objective.advantage]
        self._compare = jax.jit(
            lambda rewards, counted: (advantage(rewards, counted), count_zero_std(rewards, counted))
        )

        self._price = self._rl.reward.token_price
        self._tokens_per_tree: float | None = None  # Measured in the first step.
        self._times: StepTimes | None = None
        self.last_batches = LastBatches()
        # For how long this process verified and packed its own trees in the last step.
        self.host_seconds = 0.0

    def data_state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds besides the state; JSON keeps every bit of a float."""
        return {"token_price": self._price, "tokens_per_tree": self._tokens_per_tree}

    def restore_data(self, saved: dict[str, Any]) -> None:
        """Goes on from what `data_state` returned.

        Raises:
          UserError: another version of this library saved it.
        """
        if "tokens_per_tree" not in saved:
            raise version_error(self._workdir)
        self._price = float(saved["token_price"])
        self._tokens_per_tree = saved["tokens_per_tree"]

    def advance(
        self, state: TrainState, step: int, stopping: Stopping
    ) -> tuple[TrainState, dict[str, Any] | None]:
        """Takes one step of reinforcement learning.

        If the run is to stop, the step ends after the rollout: the state is returned as it was, and
        None in place of metrics.
        """
        times = self._times = StepTimes(before=self._times)

        rollout = self._roll_out(state, step, times)
        if stopping():
            return state, None

        grades = self._grader.verify(rollout.problems, rollout.forest, self._trees)
        rewarded = self._reward(rollout.costs, grades)
        packed = self._pack(rollout, rewarded)
        advantages, kl_metric = self._subtract_kl(rewarded, packed, times)

        self.last_batches.keep(
            step + 1, vars(packed.held.rows) | {"weights": packed.weights, "advantages": advantages}
        )
        state, update_metrics = self._update(state, packed.batch, advantages, times)
        state = dataclasses.replace(state, carried=rollout.carried)

        measured = self._measure(rollout, grades, rewarded, packed) | kl_metric
        self._price = next_price(self._price, measured["total_tokens"], self._rl.reward)
        # Means over no token say nothing.
        undefined: tuple[str, ...] = ()
        if not measured["rows"]:
            undefined = MEANS
        elif not packed.has_current_tokens:
            undefined = ROLLOUT_ERRORS
        update_metrics = {
            name: value for name, value in update_metrics.items() if name not in undefined
        }
        return state, update_metrics | measured | self._time_metrics(packed.flops, times)

    def first_carried(self) -> CarriedTrees | None:
        """Returns what the first step goes on with: as many new trees as it begins itself."""
        if not self._rl.max_staleness:
            return None
        count = self._rl.problems * self._rl.group
        key = run_key(self._config.seed, Domain.RL_STEP, 0)
        return self._grader.begin(self._sample_problems(0)[count:], count, key)

    def _sample_problems(self, step: int) -> list[Problem]:
        """Draws the problems of the trees that begin in a step, each as often as a group has trees.

        These are problems x G trees. With carry-over, the first step draws as many more, for the
        trees of `first_carried`.
        """
        count = self._rl.problems
        if self._rl.max_staleness and step == 0:
            count *= 2
        problems = self._training_problems.draw(self._config.seed, step, count)
        return [problem for problem in problems for _ in range(self._rl.group)]

    def _roll_out(self, state: TrainState, step: int, times: StepTimes) -> _Rollout:
        """Grows one tree for each problem with the current policy, and fetches this process's."""
        key = run_key(self._config.seed, Domain.RL_STEP, step)
        problems = self._sample_problems(step)
        if state.carried is not None:
            return self._carry_over(state, step, problems, key, times)

        rolled = self._grader.ask(state.params, problems, self._rl.temperature, key)
        times.queued()

        forest, work = first_trees(fetch_held(rolled), len(self._trees.mine))
        measures = self._trees.gather(self._tree_measures(forest))
        times.fetched()  # All processes have their trees: the gathering waits for the last one.
        return _Rollout(
            problems=[problems[tree] for tree in self._trees.mine],
            forest=forest,
            measures=measures,
            work=self._all_work(work),
        )

    def _tree_measures(self, forest: ThreadForest) -> dict[str, np.ndarray]:
        """Returns what all processes are to know of the trees of this one, int32 [b] each."""
        measures = tree_measures(forest)
        if self._rl.objective.loss_aggregation == "sequence":
            measures["sampled_threads"] = forest.sampled.any(axis=2).sum(axis=1, dtype=np.int32)
        return measures

    def _all_work(self, work: Work) -> Work:
        """Returns the work of the shards of all processes."""
        return Work(**self._shards.gather(vars(work)))

    def _carry_over(
        self,
        state: TrainState,
        step: int,
        problems: list[Problem],
        key: jax.Array,
        times: StepTimes,
    ) -> _Rollout:
        """Goes on with the carried trees, begins one for each problem, and fetches finished ones.

        The version of a policy is the number of its step.
        """
        # In step 0 the rest of the problems are those of `first_carried`.
        begun = problems[: self._rl.problems * self._rl.group]
        rolled = self._grader.go_on(state.params, state.carried, begun, key, step)
        times.queued()

        grown, carried, work = rolled
        grown, work = fetch_held((grown, work))
        staleness = np.where(grown.forest.sampled, step - grown.version, 0)  # [b, T, L]
        ages = _age_measures(staleness, grown.begun < step)
        measures = self._trees.gather(self._tree_measures(grown.forest) | ages)
        times.fetched()

        # The identity of a tree is its place among the trees that began with it.
        problems_of = {first: self._sample_problems(first) for first in set(grown.begun.tolist())}
        return _Rollout(
            problems=[
                problems_of[first][tree]
                for first, tree in zip(grown.begun.tolist(), grown.tree.tolist(), strict=True)
            ],
            forest=grown.forest,
            measures=measures,
            work=self._all_work(work),
            carried=carried,
            staleness=staleness,
        )

    def _reward(self, costs: TreeCosts, grades: Grades) -> _RewardedTrees:
        """Turns verdicts and costs into rewards, and compares the rewards."""
        rewards = tree_rewards(
            grades.rewards, grades.correct, costs, self._price, self._rl.reward
        )  # [B]
        unmasked = counted_trees(costs, self._rl.reward)  # [B]
        counted = unmasked & grades.known  # What an answer without a verdict is worth is unknown.
        advantages, zero_std_groups = self._advantages(rewards, counted)
        return _RewardedTrees(rewards, unmasked, counted, advantages, zero_std_groups)

    def _advantages(self, rewards: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, float]:
        """Returns the advantages [B], and the number of zero-std groups."""
        shape = (self._rl.problems, self._rl.group)
        grouped_rewards = rewards.reshape(shape).astype(np.float32)  # [problems, G]
        grouped_counted = counted.reshape(shape)  # [problems, G]
        advantages, zero_std = jax.device_get(self._compare(grouped_rewards, grouped_counted))
        return advantages.reshape(-1), float(zero_std)

    def _pack(self, rollout: _Rollout, rewarded: _RewardedTrees) -> PackedTrees:
        """Packs the trees that can change the gradient into rows, and lays these on the devices."""
        rl = self._rl
        zero_advantage = zero_advantage_trees(
            rewarded.advantages, rewarded.counted, rl.objective
        )  # [B]

        # This process packs its own trees.
        left_out = zero_advantage[self._trees.mine, None]  # [b, 1]
        length = np.where(left_out, 0, rollout.forest.length)  # [b, T]
        began = time.perf_counter()
        held = pack_held_trees(
            dataclasses.replace(rollout.forest, length=length),
            None if rollout.staleness is None else rollout.staleness > 0,
            self._trees,
            self._chunk_rows,
            self._config.limits.max_thread_tokens,
        )
        self.host_seconds = self._grader.host_seconds + time.perf_counter() - began
        balanced = balance(
            held, functools.partial(training_flops, self._config.model, self._vocabulary)
        )

        held = balanced.held
        weights = self._weights(rollout, rewarded.counted, held.rows)
        batch = place_forest(
            held.rows,
            weights,
            rl.micro_batch_rows,
            self._mesh,
            most_chunks(self._config, self._mesh),
            recompute=rl.objective.importance_cap > 0,
            older=held.older,
            used=balanced.chunks,
        )
        return PackedTrees(
            held=held,
            weights=weights,
            batch=batch,
            zero_advantage=zero_advantage,
            rows=balanced.chunks * rl.micro_batch_rows,
            tokens=balanced.tokens,
            flops=balanced.flops,
            has_current_tokens=balanced.has_current_tokens,
        )

    def _weights(self, rollout: _Rollout, counted: np.ndarray, rows: Rows) -> np.ndarray:
        """Returns what each token of this process's rows weighs in the loss."""
        measures = rollout.measures
        threads = measures.get("sampled_threads")
        return token_weights(
            rows,
            counted,
            self._rl.objective.loss_aggregation,
            self._divisor(measures["total_tokens"]),
            tokens=int(measures["total_tokens"][counted].sum()),
            threads=None if threads is None else int(threads[counted].sum()),
        )

    def _divisor(self, total_tokens: np.ndarray) -> float:
        """Returns the mean sampled tokens of a tree in the first step of the run.

        The first call measures and keeps it (`data_state`), so it is the same number in all steps
        and processes. The mean is over all trees, also those that cannot change the gradient: which
        trees these are changes from step to step, and a divisor that changed with them would weigh
        the steps against each other.

        Args:
          total_tokens: [B] of this step.
        """
        if self._tokens_per_tree is None:
            self._tokens_per_tree = max(1.0, float(np.mean(total_tokens, dtype=np.float64)))
        return self._tokens_per_tree

    def _subtract_kl(
        self, rewarded: _RewardedTrees, packed: PackedTrees, times: StepTimes
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Takes the KL of each tree off its reward, where the objective says so.

        Returns:
          the advantages [B], and the mean KL as the metric `kl`; without KL in the reward the
          advantages as they were, and no metric.
        """
        objective = self._rl.objective
        if not objective.kl_in_reward:
            return rewarded.advantages, {}

        with times.rescoring():
            reference = self._rescore(self._reference, packed.batch)  # [chunks, R, L]
            kl = np.asarray(jax.device_get(self._tree_kl(reference, packed.batch)))  # [B]

        # The zero-std groups stay those of the rewards alone: no two trees have the same KL.
        advantages, _ = self._advantages(rewarded.rewards - objective.kl * kl, rewarded.counted)
        return advantages, {"kl": float(kl.mean())}

    def _update(
        self, state: TrainState, batch: ForestBatch, advantages: np.ndarray, times: StepTimes
    ) -> tuple[TrainState, dict[str, Any]]:
        """Queues `ppo_epochs` updates on the trees of a step; does not wait for them.

        Returns:
          the state with `step` + 1, and the metrics of the last epoch. The measures of error in
          them are of the first epoch: only there is the policy the one that sampled.
        """
        placed_advantages = place_everywhere(advantages, self._mesh)
        times.resumed()
        if self._rl.objective.kl_in_loss:
            batch = dataclasses.replace(batch, reference=self._rescore(self._reference, batch))

        # No update changes the carried trees, so they stay outside the jitted step.
        state = dataclasses.replace(state, carried=None)
        metrics_of_epochs = []
        for _ in range(self._rl.ppo_epochs):
            state, metrics, behaviour = self._update_once(state, batch, placed_advantages)
            batch = dataclasses.replace(batch, behaviour=behaviour)
            metrics_of_epochs.append(metrics)

        first = metrics_of_epochs[0]
        last = metrics_of_epochs[-1]
        times.updating(last["loss"])
        state = dataclasses.replace(state, step=state.step + 1)

        norms = [metrics["grad_norm"] for metrics in metrics_of_epochs]
        return state, {
            **last,
            **{name: first[name] for name in ROLLOUT_ERRORS},
            "clipped_updates": clipped_updates(norms, self._rl.optimizer.clip),
        }

    def _measure(
        self,
        rollout: _Rollout,
        grades: Grades,
        rewarded: _RewardedTrees,
        packed: PackedTrees,
    ) -> dict[str, float]:
        """Returns what the trees of a step show, cost and earned, and how much is rescored."""
        measures = rollout.measures
        work = rollout.work
        tokens = float(measures["total_tokens"].sum())
        shown = {name: values for name, values in measures.items() if name in MEASURES}
        measured = {"accuracy": grades.accuracy} | mean_measures(shown) | grades.metrics
        slots = work.steps.sum() * self._config.schedule.slots
        measured |= {
            "slot_occupancy": float(work.live.sum() / max(1, slots)),
            "rows": float(packed.rows),
            "trees": float(len(grades.codes)),
            "tokens": tokens,
        }
        if packed.rows:
            columns = packed.rows * self._config.limits.max_thread_tokens
            measured["padding"] = (columns - packed.tokens) / columns
        if rollout.staleness is not None:
            measured |= {
                "staleness": float(measures["staleness"].sum() / tokens),
                "staleness_worst": float(measures["staleness_worst"].max()),
                "older_tokens": float(measures["older_tokens"].sum() / tokens),
                "carried_trees": float(measures["carried"].sum()),
            }
        return measured | {
            "zero_std_groups": rewarded.zero_std_groups,
            "reward": float(rewarded.rewards[grades.known].mean()),
            "token_price": self._price,
            "masked_trees": float(np.sum(~rewarded.unmasked)),
            "zero_advantage_trees": float(packed.zero_advantage.sum()),
        }

    def _time_metrics(self, flops: float, times: StepTimes) -> dict[str, Any]:
        """Returns how the seconds of the step divide, and the update's use of the device.

        Args:
          flops: of one pass over the rows, see `PackedTrees`.
          times: those of the step.
        """
        rl = self._rl
        # The reference makes one pass in all, which is forward only: a third of an epoch's pass.
        reference_pass = 1 / 3 if rl.objective.kl else 0.0
        passes = rl.ppo_epochs + reference_pass
        mfu = LazyMetric(lambda: flops * passes / times.update_seconds() / self._peak)
        return times.metrics() | {"mfu": mfu}


def _age_measures(staleness: np.ndarray, is_carried: np.ndarray) -> dict[str, np.ndarray]:
    """Returns how old the sampled tokens of b trees are, int32 [b] each.

    Args:
      staleness: int [b, T, L], see `_Rollout`.
      is_carried: bool [b], trees that began in an earlier step.
    """
    ages = {
        "staleness": staleness.sum(axis=(1, 2)),
        "staleness_worst": staleness.max(axis=(1, 2)),
        "older_tokens": np.sum(staleness > 0, axis=(1, 2)),
        "carried": is_carried,
    }
    return {name: values.astype(np.int32) for name, values in ages.items()}


class TrainingProblems:
    """The problems that RL draws from: all training problems of the split.

    They are not only those whose demonstrations were kept: solvers fail on hard problems, or exceed
    the limits on them, each method on other ones, and RL has to see hard problems too.
    """

    def __init__(self, problems: Sequence[Problem]):
        self._problems = problems

    def draw(self, seed: int, step: int, count: int) -> list[Problem]:
        """Draws `count` problems, by (seed, step) alone.

        They are all different if there are that many. Otherwise none comes again before all others
        have come.
        """
        rng = np.random.default_rng([seed, step])
        total = len(self._problems)
        full_rounds = [rng.permutation(total) for _ in range(count // total)]
        rest = rng.choice(total, count % total, replace=False)
        return [self._problems[index] for index in np.concatenate([*full_rounds, rest])]


def _check_init(config: Experiment, start: Restored) -> None:
    """Raises UsageError if the initial checkpoint is not of the config's model.

    What its training kept for the backward pass (`remat`) and the longest text for other programs
    (`max_positions`) are no part of the model.
    """
    differing = []
    for field in dataclasses.fields(config.model):
        if field.name in ("remat", "max_positions"):
            continue
        trained = getattr(start.config.model, field.name)
        wanted = getattr(config.model, field.name)
        if trained != wanted:
            differing.append(f"model.{field.name}={trained!r}, not {wanted!r}")
    if differing:
        raise UsageError(
            f"init {start.path}: was trained with {', '.join(differing)}; RL needs the same model"
        )
