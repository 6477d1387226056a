"""The grader: puts problems to a policy, and verifies the answers of the trees that it grows.

Both stages validate with it, and RL puts its training problems to the policy with it. All use one
rollout, whose batches are of one shape, so that it is compiled once.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Experiment, to_dict
from apr_jax.errors import UnknownAnswers, UsageError
from apr_jax.model.sharding import batch_shards
from apr_jax.tasks import Failure, Problem, SandboxedVerifier, Score, Task, make_task
from apr_jax.text.tokenizer import BOS, Tokenizer
from apr_jax.threads import (
    CarriedTrees,
    CarryOver,
    GrownTrees,
    Prompts,
    ThreadForest,
    Work,
    check_prompts,
    make_prompts,
    place_new_trees,
)
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.answers import extract_answers
from apr_jax.train.checkpoint.checksum import array_sums, json_sum
from apr_jax.train.config import RewardConfig
from apr_jax.train.distributed import HeldRows, exchange, fetch_held, of_first
from apr_jax.train.loop import Stopping
from apr_jax.train.metrics.sample_tree import tree_text
from apr_jax.train.policy import make_policy_carry_over, make_policy_rollout
from apr_jax.train.state import TrainState
from apr_jax.train.validation_file import ValidationFile


@contextmanager
def grading(
    config: Experiment,
    tokenizer: Tokenizer,
    validation: list[Problem],
    mesh: Mesh,
    training: Sequence[Problem] = (),
) -> Iterator["Grader"]:
    """Opens a grader, together with the processes of its verifier."""
    task = make_task(config.task, config.limits)
    reward = config.train.rl.reward
    host = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    with SandboxedVerifier(
        task, reward.time_limit, reward.memory_limit, reward.workers, name=f"{host}verifier"
    ) as verifier:
        yield Grader(config, task, tokenizer, verifier, validation, mesh, training)


@dataclasses.dataclass(frozen=True)
class Grades:
    """The verdicts on the answers of a batch.

    Attributes:
      codes: int [B], indices into `_CODES`.
      rewards: float32 [B], from 0 to 1; 0 where there is no verdict.
    """

    codes: np.ndarray
    rewards: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Returns which answers, bool [B], got a verdict; the others are counted nowhere."""
        return self.codes < len(_VERDICTS)

    @property
    def correct(self) -> np.ndarray:
        """Returns 1 for each right answer, float32 [B], and 0 for wrong and unknown ones."""
        return (self.codes == _CODES.index(True)).astype(np.float32)

    @property
    def accuracy(self) -> float:
        """Returns the share of right answers among those that got a verdict."""
        return float(np.mean(self.correct[self.known]))

    @property
    def reward(self) -> float:
        """Returns the mean reward of the answers that got a verdict."""
        return float(np.mean(self.rewards[self.known]))

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the number of unknown answers, by reason."""
        names = {
            "reward_errors": Failure.RAISED,
            "reward_timeouts": Failure.TIMED_OUT,
            "reward_unverified": Failure.UNVERIFIED,
        }
        return {
            name: float(np.sum(self.codes == _CODES.index(failure)))
            for name, failure in names.items()
        }

    def unknown(self) -> int:
        """Returns the number of unknown answers."""
        return int(np.sum(~self.known))

    def of(self, tree: int) -> bool | None:
        """Returns whether the answer of one tree is right; None if that is unknown."""
        return bool(self.correct[tree]) if self.known[tree] else None

    def check(self, reward: RewardConfig) -> None:
        """Raises UnknownAnswers if more answers are unknown than `allowed_unknown`."""
        count = len(self.codes)
        unknown = self.unknown()
        if unknown <= allowed_unknown(count, reward):
            return

        reasons = ("failed", "took too long", "were not verified")
        numbers = self.metrics.values()
        parts = [f"{number:.0f} {reason}" for reason, number in zip(reasons, numbers, strict=True)]
        raise UnknownAnswers(
            f"{unknown} of {count} answers have no verdict ({', '.join(parts)}), more than"
            f" train.rl.reward.max_unknown={reward.max_unknown:g} allows"
        )


# The codes of the answers: the two verdicts, and then the reasons why there is none.
_VERDICTS = (False, True)
_CODES = (*_VERDICTS, *Failure)


def allowed_unknown(count: int, reward: RewardConfig) -> int:
    """Returns how many of `count` answers may stay unknown.

    It is the share that the config allows, but at least one, and never all.
    """
    return min(max(1, int(reward.max_unknown * count)), count - 1)


@dataclasses.dataclass(frozen=True)
class _Answered:
    """The trees of a validation that have answered so far, in the order of the problems.

    Attributes:
      grades: the verdicts on their answers.
      measures: what each of them shows and costs, int32 [B] each, see `tree_measures`.
      sample: the tree of the first problem, as text.
    """

    grades: Grades
    measures: dict[str, np.ndarray]
    sample: str

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> "_Answered":
        """Restores what `to_json` returned; None stands for no answers yet."""
        values = values or {
            "codes": [],
            "rewards": [],
            "measures": {name: [] for name in MEASURES},
            "sample": "",
        }
        return cls(
            Grades(np.array(values["codes"], np.int32), np.array(values["rewards"], np.float32)),
            {name: np.array(values["measures"][name], np.int32) for name in MEASURES},
            values["sample"],
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the same as JSON values, which keep every bit of a float."""
        return {
            "codes": self.grades.codes.tolist(),
            "rewards": self.grades.rewards.tolist(),
            "measures": {name: values.tolist() for name, values in self.measures.items()},
            "sample": self.sample,
        }

    @property
    def count(self) -> int:
        """Returns the number of trees, B."""
        return len(self.grades.codes)

    def followed_by(self, other: "_Answered") -> "_Answered":
        """Returns these trees and those of the next batch."""
        return _Answered(
            Grades(
                np.concatenate([self.grades.codes, other.grades.codes]),
                np.concatenate([self.grades.rewards, other.grades.rewards]),
            ),
            {
                name: np.concatenate([self.measures[name], other.measures[name]])
                for name in MEASURES
            },
            self.sample or other.sample,
        )

    def of_first(self) -> "_Answered":
        """Returns what the first process has, in all processes."""
        count = int(of_first(np.array(self.count, np.int32)))
        if count == 0:
            return _Answered.from_json(None)

        def sent(values: np.ndarray) -> np.ndarray:
            # A broadcast needs equal shapes in all processes; only the first one's values count.
            return of_first(values if len(values) == count else np.zeros(count, values.dtype))

        return _Answered(
            Grades(sent(self.grades.codes), sent(self.grades.rewards)),
            {name: sent(self.measures[name]) for name in MEASURES},
            self.sample,
        )


class Grader:
    """Puts problems to a policy, verifies its answers, and validates.

    Args:
      config: the experiment.
      task: says what the prompts are.
      tokenizer: the tokenizer of the policy.
      verifier: verifies answers.
      validation: the problems of every validation.
      mesh: the devices.
      training: other problems that may be put to the policy.

    Attributes:
      host_seconds: seconds that the last verification took this process.

    Raises:
      UsageError: the prompts leave no room in the window.
    """

    def __init__(
        self,
        config: Experiment,
        task: Task,
        tokenizer: Tokenizer,
        verifier: SandboxedVerifier,
        validation: list[Problem],
        mesh: Mesh,
        training: Sequence[Problem] = (),
    ):
        self._config = config
        self._task = task
        self._tokenizer = tokenizer
        self._verifier = verifier
        self._validation = validation
        self._width = _prompt_width(config, task, tokenizer, [*validation, *training])
        self._rollout = make_policy_rollout(config.model, config.limits, config.schedule, mesh)
        self._mesh = mesh
        self._batch = rollout_batch(config, mesh)
        rl = config.train.rl
        if rl.max_staleness:
            self._carry_over_rollout = make_policy_carry_over(
                config.model,
                config.limits,
                config.schedule,
                CarryOver(rl.group, rl.max_staleness),
                mesh,
            )
        self.host_seconds = 0.0
        self._sample = ""

    def ask(
        self, params: Any, problems: list[Problem], temperature: float, key: jax.Array
    ) -> tuple[ThreadForest, Work]:
        """Queues the rollout of one batch; copies of the first problem fill it up.

        `first_trees` removes the trees of the copies.
        """
        return self._rollout(params, self._prompts(problems, temperature), key)

    def begin(self, problems: list[Problem], first: int, key: jax.Array) -> CarriedTrees:
        """Makes trees for a first call of `go_on`, which draws their first tokens.

        Args:
          problems: the problem of each tree, group by group.
          first: identity of the first tree; the others follow it.
          key: the key of the trees.
        """
        prompts = self._prompts_of(problems, self._config.train.rl.temperature, first)
        return place_new_trees(prompts, key, self._config.limits, self._mesh)

    def go_on(
        self,
        params: Any,
        carried: CarriedTrees,
        problems: list[Problem],
        key: jax.Array,
        version: int,
    ) -> tuple[GrownTrees, CarriedTrees, Work]:
        """Queues a rollout that goes on with carried trees and begins one tree for each problem.

        It returns as many trees as it begins; see `threads.carry_over_rollout`.
        """
        prompts = self._prompts_of(problems, self._config.train.rl.temperature)
        return self._carry_over_rollout(params, carried, prompts, key, version)

    def verify(
        self, problems: list[Problem], forest: ThreadForest, trees: HeldRows | None = None
    ) -> Grades:
        """Verifies the answers of the trees.

        Args:
          problems: the problem of each tree that this process holds.
          forest: these trees, numpy leaves.
          trees: which trees of the batch they are; by default all.

        Returns:
          the verdicts on the whole batch, in all processes.

        Raises:
          UnknownAnswers: too many answers got no verdict; all processes of the run raise it.
        """
        trees = trees or HeldRows.alone(len(problems))
        reward = self._config.train.rl.reward
        grades = self._grade(problems, forest, trees, allowed_unknown(trees.count, reward))
        grades.check(reward)
        return grades

    def _grade(
        self, problems: list[Problem], forest: ThreadForest, trees: HeldRows, most_unknown: int
    ) -> Grades:
        """Verifies answers, see `verify`.

        The verifier may give up once more than `most_unknown` of this process's are unknown.
        """
        began = time.perf_counter()
        answers = zip(problems, extract_answers(forest, self._tokenizer), strict=True)
        # One process verifies an answer: it may exceed its time in one and not in another.
        owned = list(itertools.compress(answers, trees.is_owner))
        outcomes = self._verifier.verify(owned, most_unknown)
        self.host_seconds = time.perf_counter() - began

        codes = np.zeros(len(problems), np.int32)
        rewards = np.zeros(len(problems), np.float32)
        codes[trees.is_owner] = [
            _CODES.index(outcome.correct if isinstance(outcome, Score) else outcome)
            for outcome in outcomes
        ]
        rewards[trees.is_owner] = [
            outcome.reward if isinstance(outcome, Score) else 0.0 for outcome in outcomes
        ]
        return Grades(**trees.gather({"codes": codes, "rewards": rewards}))

    def validate(
        self, state: TrainState, stopping: Stopping, file: ValidationFile
    ) -> dict[str, float] | None:
        """Answers the validation problems greedily, from where an earlier start was stopped.

        Args:
          state: the state of training.
          stopping: asked before each batch.
          file: where the answers are kept after each batch.

        Returns:
          the metrics; None if it gave up because the run is to stop.

        Raises:
          UnknownAnswers: too many answers got no verdict.
        """
        reward = self._config.train.rl.reward
        allowed = allowed_unknown(len(self._validation), reward)
        identity = self._identity(state)
        # The first process alone writes the file, so it alone reads it: it may be ahead of others.
        kept = file.read(identity) if jax.process_index() == 0 else None
        answered = _Answered.from_json(kept).of_first()

        for begin in range(answered.count, len(self._validation), self._batch):
            if stopping():
                return None
            most_unknown = max(0, allowed - answered.grades.unknown())
            answered = answered.followed_by(self._answer(state, begin, most_unknown))
            # What made answers fail may be mended before the next start, which then tries again.
            if answered.grades.unknown() <= allowed:
                file.write(identity, answered.to_json())

        grades = answered.grades
        grades.check(reward)
        self._sample = answered.sample
        scores = {"accuracy": grades.accuracy, "reward": grades.reward}
        return scores | mean_measures(answered.measures) | grades.metrics

    def _answer(self, state: TrainState, begin: int, most_unknown: int) -> _Answered:
        """Answers a batch of the validation problems greedily.

        Args:
          state: the state of training.
          begin: index of the first problem of the batch.
          most_unknown: see `_grade`.
        """
        problems = self._validation[begin : begin + self._batch]
        key = run_key(self._config.seed, Domain.VALIDATION, begin)
        rolled = self.ask(state.params, problems, 0.0, key)
        trees = HeldRows.of(self._batch, self._mesh, len(problems))
        forest, _ = first_trees(fetch_held(rolled), len(trees.mine))
        held = [problems[tree] for tree in trees.mine]
        grades = self._grade(held, forest, trees, most_unknown)

        sample = ""
        if begin == 0:
            if 0 in trees.mine:  # Then it is the first one of this process, too.
                shown = self._task.show(problems[0])
                sample = tree_text(forest, 0, shown, grades.of(0), self._tokenizer)
            sample = next(filter(None, exchange(sample)), "")
        return _Answered(grades, trees.gather(tree_measures(forest)), sample)

    def _identity(self, state: TrainState) -> str:
        """Returns what tells the validation of a state from every other one; see `ValidationFile`.

        All processes must call it, and all get the same.
        """
        problems = [problem.to_json() for problem in self._validation]
        return json_sum(array_sums(state.params), problems, to_dict(self._config))

    def sample(self) -> str:
        """Returns, as text, the tree of the first problem in the last validation."""
        return self._sample

    def _prompts(self, problems: list[Problem], temperature: float) -> Prompts:
        """Makes the prompts of a whole batch, which the first problem fills up."""
        problems = problems + problems[:1] * (self._batch - len(problems))
        return self._prompts_of(problems, temperature)

    def _prompts_of(self, problems: list[Problem], temperature: float, first: int = 0) -> Prompts:
        """Makes the prompts of trees whose identities are counted from `first`."""
        ids = [[BOS, *self._tokenizer.encode(self._task.prompt(problem))] for problem in problems]
        prompts = make_prompts(
            ids,
            self._width,
            tree=range(first, first + len(ids)),
            temperature=temperature,
        )
        check_prompts(prompts, self._config.limits)
        return prompts


def rollout_batch(config: Experiment, mesh: Mesh) -> int:
    """Returns the trees of one rollout: those of a step, rounded up to a multiple of the shards."""
    trees = config.train.rl.problems * config.train.rl.group
    shards = batch_shards(mesh)
    return math.ceil(trees / shards) * shards


def first_trees(rolled: tuple[ThreadForest, Work], count: int) -> tuple[ThreadForest, Work]:
    """Returns the first `count` trees of a rollout, and the work of all its trees.

    The copies that fill up a batch are its last trees, and so the last trees of each process.
    """
    forest, work = rolled
    return jax.tree.map(lambda x: x[:count], forest), work


# What `tree_measures` tells of each tree.
MEASURES = ("refusals", "total_tokens", "sequential_tokens", "children", "truncations")


def tree_measures(forest: ThreadForest) -> dict[str, np.ndarray]:
    """Returns what each tree shows and costs, int32 [B] each, whatever its answer is worth.

    Args:
      forest: numpy leaves.
    """
    measured = {name: getattr(forest, name) for name in MEASURES}
    measured["refusals"] = np.sum(forest.refusals, axis=1)
    return {name: np.asarray(values).astype(np.int32) for name, values in measured.items()}


def mean_measures(measures: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the mean of each measure over the trees."""
    return {name: float(np.mean(values)) for name, values in measures.items()}


def _prompt_width(
    config: Experiment, task: Task, tokenizer: Tokenizer, problems: list[Problem]
) -> int:
    """Returns the tokens of the longest prompt that can come up, `<bos>` included.

    The rollout is compiled for prompts of this width.

    Raises:
      UsageError: such a prompt leaves no room in the window.
    """
    width = 1 + max(len(tokenizer.encode(task.prompt(problem))) for problem in problems)
    if width >= config.limits.window:
        raise UsageError(
            f"config limits.window={config.limits.window}: must be more than {width}, the longest"
            " prompt"
        )
    return width
