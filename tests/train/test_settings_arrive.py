"""Settings that once could be lost on their way without any test noticing: each is seen where it
arrives.
"""

import types

import jax
import numpy as np
import pytest
from helpers.whole_runs import changed
from jax.experimental import multihost_utils

from apr_jax.evaluate import runner
from apr_jax.tasks import Failure, Score
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.train import grader, sft
from apr_jax.train.config import RewardConfig
from apr_jax.train.distributed import HeldRows
from apr_jax.train.grader import Grader
from apr_jax.train.rl import trainer
from apr_jax.train.validation_file import ValidationFile


class Arrived(Exception):
    """Carries what a function was called with; nothing after that call is run."""


def stop(*arguments, **named):
    raise Arrived(arguments, named)


def test_the_order_of_demonstrations_follows_the_seed(config, monkeypatch):
    monkeypatch.setattr(sft, "sft_batches", stop)
    monkeypatch.setattr(sft, "steps_of_an_epoch", lambda *arguments: 1)
    monkeypatch.setattr(sft, "LocalRows", lambda open_stream, *rest: open_stream(0))
    with pytest.raises(Arrived) as found:
        sft._Trainer(changed(config, seed=11), None, "apr", None)
    assert 11 in found.value.args[0]


def test_the_schedule_of_rl_counts_ppo_epochs(config, monkeypatch):
    start = types.SimpleNamespace(config=config)
    monkeypatch.setattr(trainer, "load_checkpoint", lambda path: start)
    monkeypatch.setattr(trainer, "check_built", lambda *arguments, **options: None)
    monkeypatch.setattr(trainer, "local_copy", lambda folder, stamp: folder)
    monkeypatch.setattr(trainer, "make_optimizer", stop)
    with pytest.raises(Arrived) as found:
        trainer.train_rl(changed(config, rl={"steps": 7, "ppo_epochs": 3}), "data", "run", "start")
    assert found.value.args[0][1] == 21


REWARD = RewardConfig(time_limit=7.0, memory_limit=3.0, workers=5)


def test_the_verifier_of_training_has_its_limits_and_workers(config, monkeypatch):
    monkeypatch.setattr(grader, "SandboxedVerifier", stop)
    opened = grader.grading(changed(config, rl={"reward": REWARD}), None, [], None)
    with pytest.raises(Arrived) as found:
        opened.__enter__()
    assert found.value.args[0][1:] == (7.0, 3.0, 5)


def test_the_verifier_of_an_evaluation_has_the_same(config, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "SandboxedVerifier", stop)
    monkeypatch.setattr(runner, "task_of", lambda restored: None)
    monkeypatch.setattr(runner, "make_runner", lambda *arguments: _Streams())
    restored = types.SimpleNamespace(config=changed(config, rl={"reward": REWARD}))
    mirror = types.SimpleNamespace(local=tmp_path)
    with pytest.raises(Arrived) as found:
        runner._answer_rest(restored, ["a sample"], None, None, 0, mirror, None, False)
    assert found.value.args[0][1:] == (7.0, 3.0, 5)


class _Streams:
    """A rollout of no trees."""

    def stream(self, *arguments):
        return []


def test_validation_is_greedy(config, tmp_path):
    one = object.__new__(Grader)
    one._config = config
    one._validation = [make_problem("p", (1, 2), 3)]
    one._batch = 1
    one.ask = stop
    with pytest.raises(Arrived) as found:
        one.validate(types.SimpleNamespace(params=None), lambda: 0, ValidationFile(tmp_path))
    assert found.value.args[0][2] == 0.0


def test_an_answer_is_verified_by_one_process_for_all(config, monkeypatch):
    """Time runs out in one process and not in another: with verdicts of their own they would train
    different models.

    Of five answers the first process holds four, and this one, the second, holds three.
    """
    right = Score(1.0, correct=True, stated="1")
    wrong = Score(0.0, correct=False, stated="1")
    trees = HeldRows(5, (np.array([0, 1, 2, 3]), np.array([2, 3, 4])))
    asked = []

    def verify(pairs, most_unknown):
        asked.append([problem for problem, _ in pairs])
        return [wrong] * len(pairs)

    def process_allgather(values):
        """What both processes send: the first one has the verdicts of `alone`."""
        first = {"codes": alone.codes, "rewards": alone.rewards}
        return {name: np.stack([first[name], each]) for name, each in values.items()}

    one = object.__new__(Grader)
    one._config = config
    one._tokenizer = None
    one._verifier = types.SimpleNamespace(
        verify=lambda pairs, most_unknown: [right, wrong, Failure.TIMED_OUT, right]
    )
    monkeypatch.setattr(grader, "extract_answers", lambda forest, tokenizer: [""] * forest)
    alone = one.verify(["a problem"] * 4, 4)
    assert alone.known.tolist() == [True, True, False, True]
    assert alone.correct.tolist() == [1, 0, 0, 1]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    one._verifier = types.SimpleNamespace(verify=verify)
    grades = one.verify(["2", "3", "4"], 3, trees)
    assert asked == [["3", "4"]], "of the two that both hold, each owns one"
    np.testing.assert_array_equal(grades.codes, [*alone.codes[:3], 0, 0])
    np.testing.assert_array_equal(grades.rewards, [*alone.rewards[:3], 0.0, 0.0])
