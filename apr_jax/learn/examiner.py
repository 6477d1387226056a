"""Problems put to a policy: the trees that it grows for them, and which of those are right.

Both stages validate with it; RL asks its training problems here too. One rollout serves all: batches are of one shape, so
nothing is compiled twice.
"""

import collections
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.data.tokenizer import BOS, Tokenizer
from apr_jax.errors import UsageError
from apr_jax.learn.answers import extract_answers
from apr_jax.learn.loop import Stopping
from apr_jax.learn.policy import make_policy_rollout
from apr_jax.learn.processes import fetch, of_first
from apr_jax.learn.sample import tree_text
from apr_jax.learn.state import TrainState
from apr_jax.learn.steps import batch_shards
from apr_jax.tasks import BoxedVerifier, Countdown, Failure, Problem, Task, Verdict
from apr_jax.threads import Prompts, ThreadForest, Work, check_prompts, make_prompts


@contextmanager
def examining(config: Experiment, tokenizer: Tokenizer, validation: list[Problem], mesh: Mesh) -> Iterator["Examiner"]:
    """An examiner on Countdown, with the verifier's process that it needs."""
    task = Countdown(config.task, config.solver)
    with BoxedVerifier(task, config.learn.rl.reward.time_limit) as verifier:
        yield Examiner(config, task, tokenizer, verifier, validation, mesh)


class Examiner:
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
        verifier: BoxedVerifier,
        validation: list[Problem],
        mesh: Mesh,
    ):
        self._config, self._task, self._tokenizer, self._verifier = config, task, tokenizer, verifier
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

    def verify(self, problems: list[Problem], forest: ThreadForest) -> tuple[np.ndarray, dict[str, float]]:
        """Which trees are right, float32 [B]; how many verifications raised and how many ran out of time."""
        began = time.perf_counter()
        answers = extract_answers(forest, self._tokenizer)
        outcomes = self._verifier.verify(list(zip(problems, answers, strict=True)))
        self.host_seconds = time.perf_counter() - began
        correct = [isinstance(outcome, Verdict) and outcome.correct for outcome in outcomes]
        return of_first(np.array(correct, np.float32)), {  # Time runs out in one process, and not in another.
            "reward_errors": float(outcomes.count(Failure.RAISED)),
            "reward_timeouts": float(outcomes.count(Failure.TIMED_OUT)),
        }

    def validate(self, state: TrainState, stopping: Stopping) -> dict[str, float] | None:
        """Greedy answers to the validation problems; None if it gave up because the run is to stop."""
        forests, correct = [], []
        failures: collections.Counter[str] = collections.Counter()
        for begin in range(0, len(self._validation), self._batch):
            if stopping():
                return None
            problems = self._validation[begin : begin + self._batch]
            rolled = self.ask(state.params, problems, 0.0, jax.random.key(self._config.seed))
            forests.append(first_trees(fetch(rolled), len(problems))[0])
            right, failed = self.verify(problems, forests[-1])
            if begin == 0:
                self._sample = tree_text(forests[0], 0, problems[0], bool(right[0]), self._tokenizer)
            correct.append(right)
            failures.update(failed)
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *forests)
        return forest_metrics(joined, np.concatenate(correct)) | dict(failures)

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
    """Trees of one rollout: those of a step, and as many more as give every shard of the mesh the same number."""
    trees = config.learn.rl.problems * config.learn.rl.group
    return trees + -trees % batch_shards(mesh)


def first_trees(rolled: tuple[ThreadForest, Work], count: int) -> tuple[ThreadForest, Work]:
    """The first `count` trees; the work is that of all."""
    forest, work = rolled
    return jax.tree.map(lambda x: x[:count], forest), work


def forest_metrics(forest: ThreadForest, correct: np.ndarray) -> dict[str, float]:
    """Means a tree of what a forest (numpy leaves) shows."""
    names = ("total_tokens", "sequential_tokens", "children", "truncations")
    measured = {"accuracy": correct, "refusals": np.sum(forest.refusals, axis=1)}
    return {
        name: float(np.mean(values)) for name, values in (measured | {n: getattr(forest, n) for n in names}).items()
    }


def _prompt_width(config: Experiment, task: Task, tokenizer: Tokenizer, problems: list[Problem]) -> int:
    """P, tokens of the longest prompt that can come up, `<bos>` included; the rollout compiles for it."""
    widest = Problem("widest", (config.task.high,) * config.task.numbers, config.task.target_high)
    width = 1 + max(len(tokenizer.encode(task.prompt(problem))) for problem in (widest, *problems))
    if width >= config.limits.window:
        raise UsageError(f"config limits.window={config.limits.window}: must be more than {width}, the longest prompt")
    return width
