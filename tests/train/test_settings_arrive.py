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
    monkeypatch.setattr(sft, "held_rows", lambda rows, mesh: None)
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


def test_all_processes_take_the_verdicts_of_the_first(config, monkeypatch):
    """Time runs out in one process and not in another: with verdicts of their own they would train
    different models.
    """
    right = Score(1.0, correct=True, stated="1")
    sent = []

    def broadcast_one_to_all(codes):
        """What the first process sends to this one, to which it said nothing of its own."""
        sent.append(codes.tolist())
        return of_first[len(sent) - 1]

    def verify(*outcomes):
        one._verifier = types.SimpleNamespace(verify=lambda pairs, most_unknown: list(outcomes))
        return one.verify(["a problem"] * 3, "a forest")

    one = object.__new__(Grader)
    one._config = config
    one._tokenizer = None
    monkeypatch.setattr(grader, "extract_answers", lambda forest, tokenizer: [""] * 3)
    alone = verify(right, Score(0.0, correct=False, stated="1"), Failure.TIMED_OUT)
    assert alone.known.tolist() == [True, True, False] and alone.correct.tolist() == [1, 0, 0]
    assert not sent, "one process has nobody to ask"

    of_first = [alone.codes, alone.rewards]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast_one_to_all)
    grades = verify(Failure.TIMED_OUT, right, right)
    np.testing.assert_array_equal(grades.codes, alone.codes)
    np.testing.assert_array_equal(grades.rewards, alone.rewards)
    assert len(sent) == 2 and sent[0] != alone.codes.tolist()
