"""The training benchmark counts what its rows hold, and every contestant takes the same rows."""

import re

import jax
import numpy as np
import pytest

from apr_jax.bench import reinforce, train_step
from apr_jax.model import transformer
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import init_params
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.grader import Grader

TINY = ModelConfig(layers=1, width=8, heads=1, kv_heads=1, head_size=8, mlp=8)


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, train_step.VOCAB, jax.random.key(0))


@pytest.mark.thorough
def test_a_step_counts_the_tokens_of_its_rows(params, monkeypatch):
    monkeypatch.setattr(train_step, "LENGTH", 32)
    rows = train_step.dense(8, 32)
    assert (
        train_step.ours(TINY, params, rows).run() == train_step.products(TINY, rows).run() == 8 * 32
    )
    threads = [train_step._random_thread(length) for length in (30, 5, 17, 20, 9)]
    for contestant in (
        train_step._packed(TINY, params, threads),
        train_step._padded(TINY, params, threads),
    ):
        assert contestant.run() == 81


@pytest.mark.thorough
def test_a_step_without_attention_is_traced_without_it(params, monkeypatch):
    """And the model has its attention back afterwards."""

    def attended(*_):
        raise AssertionError("attention was traced")

    rows = train_step.dense(8, 32)
    step = train_step.ours(TINY, params, rows)
    monkeypatch.setattr(transformer, "attend_packed", attended)
    with pytest.raises(AssertionError, match="attention was traced"):
        step.run()
    bare = train_step.without_attention(TINY, params, rows)
    assert bare.run() == bare.run() == 8 * 32
    assert transformer.attend_packed is attended


@pytest.mark.slow
def test_work_doubles(params, monkeypatch):
    """The rows hold what the names of the growth table say.

    All of them divide over the eight devices of the tests.
    """
    held = []
    ours = train_step.ours
    monkeypatch.setattr(
        train_step,
        "ours",
        lambda model, params, rows: held.append(rows) or ours(model, params, rows),
    )
    assert [contestant.run() for contestant in train_step.growth(TINY, params)] == [1, 1, 1, 1]
    tokens = [int(np.sum(rows.segment > 0)) for rows in held]
    assert tokens == [8192, 16384, 16384, 16384]
    assert [rows.tree.max() + 1 for rows in held] == [16, 32, 16, 16]
    # Threads twice as long, not twice as many.
    threads = [sum(len(np.unique(row[row > 0])) for row in rows.segment) for rows in held]
    assert threads == [128, 256, 256, 128]


@pytest.mark.slow
def test_parts_of_an_rl_step_share_one_forest(config, checkpoint, data_dir, monkeypatch):
    """Each works through the trees of a step, again and again: an update donates its state."""
    restored = load_checkpoint(checkpoint)
    rl = config.train.rl
    rolled = []
    ask = Grader.ask

    def watched(*arguments):
        forest, work = ask(*arguments)
        rolled.append(len(forest.length))
        return forest, work

    monkeypatch.setattr(Grader, "ask", watched)
    with reinforce.contest(restored, data_dir / "test.jsonl") as parts:
        names = [
            "rollout",
            "host",
            "rescoring alone",
            "update",
            "rollout, half the trees",
            "update, half the trees",
        ]
        assert [re.sub(r":[^:]*?(, half.*)?$", r"\1", part.name) for part in parts] == names
        for part, problems in zip(parts, [rl.problems] * 4 + [rl.problems // 2] * 2, strict=True):
            del rolled[:]
            assert [part.run(), part.run()] == [problems * rl.group] * 2
            assert rolled == [problems * rl.group] * 2 * part.name.startswith("rollout")
