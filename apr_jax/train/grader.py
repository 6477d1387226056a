"""Problems put to a policy: the trees that it grows for them, and which of those are right.

Both stages validate with it; RL asks its training problems here too. One rollout serves all:
batches are of one shape, so nothing is compiled twice."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.errors import UnknownAnswers, UsageError
from apr_jax.tasks import Countdown, Failure, Problem, SandboxedVerifier, Task, Verdict
from apr_jax.text.tokenizer import BOS, Tokenizer
from apr_jax.threads import Prompts, ThreadForest, Work, check_prompts, make_prompts
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.answers import extract_answers
from apr_jax.train.config import RewardConfig
from apr_jax.train.distributed import fetch, of_first
from apr_jax.train.loop import Stopping
from apr_jax.train.metrics.sample_tree import tree_text
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.state import TrainState
from apr_jax.train.step import batch_shards


@contextmanager
def grading(
    config: Experiment, tokenizer: Tokenizer, validation: list[Problem], mesh: Mesh
) -> Iterator["Grader"]:
    """An grader on Countdown, with the verifier's process that it needs."""
    task = Countdown(config.task, config.solver)
    reward = config.train.rl.reward
    with SandboxedVerifier(task, reward.time_limit, reward.memory_limit) as verifier:
        yield Grader(config, task, tokenizer, verifier, validation, mesh)


@dataclasses.dataclass(frozen=True)
class Grades:
    """What the verifier says about the answers of a batch.

    Attributes:
      codes: int [B], places in `_CODES`.
    """

    codes: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Answers, bool [B], on which there is a verdict; the others have no part in anything."""
        return self.codes < len(_VERDICTS)

    @property
    def correct(self) -> np.ndarray:
        """1 for a right answer, float32 [B]; 0 where that is unknown."""
        return (self.codes == _CODES.index(True)).astype(np.float32)

    @property
    def accuracy(self) -> float:
        """The share of right answers among the known ones."""
        return float(np.mean(self.correct[self.known]))

    @property
    def metrics(self) -> dict[str, float]:
        """How many answers are unknown, by reason."""
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
        """How many answers are unknown."""
        return int(np.sum(~self.known))

    def of(self, tree: int) -> bool | None:
        """Whether one answer is right; None if that is unknown."""
        return bool(self.correct[tree]) if self.known[tree] else None

    def check(self, reward: RewardConfig) -> None:
        """Raises UnknownAnswers if more answers are unknown than `allowed_unknown`."""
        count, unknown = len(self.codes), self.unknown()
        if unknown > allowed_unknown(count, reward):
            reasons = zip(
                ("failed", "took too long", "were not verified"), self.metrics.values(), strict=True
            )
            raise UnknownAnswers(
                f"{unknown} of {count} answers have no verdict "
                f"({', '.join(f'{number:.0f} {reason}' for reason, number in reasons)}), "
                f"more than train.rl.reward.max_unknown={reward.max_unknown:g} allows"
            )


_VERDICTS = (False, True)
_CODES = (*_VERDICTS, *Failure)


def allowed_unknown(count: int, reward: RewardConfig) -> int:
    """How many of `count` answers may stay unknown: one, or the share that the config allows; but
    one is known in the end.
    """
    return min(max(1, int(reward.max_unknown * count)), count - 1)


class Grader:
    """Asks, verifies, and validates.

    Args:
      validation: problems that every validation asks.

    Attributes:
      host_seconds: that the last verification took this process.

    Raises:
      UsageError: prompts that leave no room in the window.
    """

    def __init__(
        self,
        config: Experiment,
        task: Task,
        tokenizer: Tokenizer,
        verifier: SandboxedVerifier,
        validation: list[Problem],
        mesh: Mesh,
    ):
        self._config, self._task, self._tokenizer, self._verifier = (
            config,
            task,
            tokenizer,
            verifier,
        )
        self._validation = validation
        self._width = _prompt_width(config, task, tokenizer, validation)
        self._rollout = make_policy_rollout(config.model, config.limits, config.schedule, mesh)
        self._batch = rollout_batch(config, mesh)
        self.host_seconds = 0.0
        self._sample = ""

    def ask(
        self, params: Any, problems: list[Problem], temperature: float, key: jax.Array
    ) -> tuple[ThreadForest, Work]:
        """Queues the rollout; its trees are those of a whole batch, see `first_trees`."""
        return self._rollout(params, self._prompts(problems, temperature), key)

    def verify(self, problems: list[Problem], forest: ThreadForest) -> Grades:
        """What the verifier says about the answers.

        Raises:
          UnknownAnswers: about too many of them nothing; in all processes of the run.
        """
        grades = self._grade(
            problems, forest, allowed_unknown(len(problems), self._config.train.rl.reward)
        )
        grades.check(self._config.train.rl.reward)
        return grades

    def _grade(self, problems: list[Problem], forest: ThreadForest, most_unknown: int) -> Grades:
        began = time.perf_counter()
        answers = extract_answers(forest, self._tokenizer)
        outcomes = self._verifier.verify(list(zip(problems, answers, strict=True)), most_unknown)
        self.host_seconds = time.perf_counter() - began
        codes = [
            _CODES.index(outcome.correct if isinstance(outcome, Verdict) else outcome)
            for outcome in outcomes
        ]
        # Time runs out in one process, and not in another.
        return Grades(of_first(np.array(codes, np.int32)))

    def validate(self, state: TrainState, stopping: Stopping) -> dict[str, float] | None:
        """Greedy answers to the validation problems; None if it gave up because the run is to stop.

        Raises:
          UnknownAnswers: too many of them are without a verdict.
        """
        reward = self._config.train.rl.reward
        forests = []
        graded = Grades(np.zeros(0, np.int32))  # Of all batches so far.
        allowed = allowed_unknown(len(self._validation), reward)
        for begin in range(0, len(self._validation), self._batch):
            if stopping():
                return None
            problems = self._validation[begin : begin + self._batch]
            key = run_key(self._config.seed, Domain.VALIDATION, begin)
            rolled = self.ask(state.params, problems, 0.0, key)
            forests.append(first_trees(fetch(rolled), len(problems))[0])
            grades = self._grade(problems, forests[-1], max(0, allowed - graded.unknown()))
            if begin == 0:
                self._sample = tree_text(forests[0], 0, problems[0], grades.of(0), self._tokenizer)
            graded = Grades(np.concatenate([graded.codes, grades.codes]))
        graded.check(reward)
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *forests)
        return {"accuracy": graded.accuracy} | forest_metrics(joined) | graded.metrics

    def sample(self) -> str:
        """The tree of the first problem of the last validation, as text."""
        return self._sample

    def _prompts(self, problems: list[Problem], temperature: float) -> Prompts:
        """Of a whole batch: past the last problem the first one again."""
        problems = problems + problems[:1] * (self._batch - len(problems))
        ids = [[BOS, *self._tokenizer.encode(self._task.prompt(problem))] for problem in problems]
        prompts = make_prompts(ids, self._width, temperature=temperature)
        check_prompts(prompts, self._config.limits)
        return prompts


def rollout_batch(config: Experiment, mesh: Mesh) -> int:
    """Trees of one rollout: those of a step, and as many more as give every shard of the mesh the
    same number.
    """
    trees = config.train.rl.problems * config.train.rl.group
    return trees + -trees % batch_shards(mesh)


def first_trees(rolled: tuple[ThreadForest, Work], count: int) -> tuple[ThreadForest, Work]:
    """The first `count` trees; the work is that of all."""
    forest, work = rolled
    return jax.tree.map(lambda x: x[:count], forest), work


def forest_metrics(forest: ThreadForest) -> dict[str, float]:
    """Means a tree of what a forest (numpy leaves) shows, whatever its answers are worth."""
    names = ("total_tokens", "sequential_tokens", "children", "truncations")
    measured = {"refusals": np.sum(forest.refusals, axis=1)} | {
        name: getattr(forest, name) for name in names
    }
    return {name: float(np.mean(values)) for name, values in measured.items()}


def _prompt_width(
    config: Experiment, task: Task, tokenizer: Tokenizer, problems: list[Problem]
) -> int:
    """P, tokens of the longest prompt that can come up, `<bos>` included; the rollout compiles for
    it.
    """
    widest = Problem("widest", (config.task.high,) * config.task.numbers, config.task.target_high)
    width = 1 + max(len(tokenizer.encode(task.prompt(problem))) for problem in (widest, *problems))
    if width >= config.limits.window:
        raise UsageError(
            f"config limits.window={config.limits.window}: must be more than {width}, the longest"
            " prompt"
        )
    return width
