"""The kept models of scale mini: of this version, small, and at work."""

from pathlib import Path

import pytest

from apr_jax.config import load
from apr_jax.evaluate.run import answer_one
from apr_jax.evaluate.trace import to_trace
from apr_jax.learn.answers import extract_answers
from apr_jax.learn.checkpoint import load_checkpoint
from apr_jax.tasks import Countdown, Problem

FOLDER = Path(__file__).parents[2] / "experiments" / "mini"
FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kept_model_is_small_and_of_this_version(path):
    restored = load_checkpoint(path)
    assert path.stem == f"{restored.method}-{restored.stage}" and path.stat().st_size < 12 << 20
    now, then = load("experiments/mini.py"), restored.config
    assert (then.task, then.solver, then.model, then.limits) == (now.task, now.solver, now.model, now.limits)


def test_the_tree_that_make_solve_shows():
    restored = load_checkpoint(FOLDER / "apr-sft.safetensors")
    problem, task = Problem("shown", (84, 19, 96, 2), 55), Countdown(restored.config.task, restored.config.solver)
    forest = answer_one(restored, problem)
    (answer,) = extract_answers(forest, restored.tokenizer)
    trace = to_trace(forest, 0, problem, 0, answer, task, restored.tokenizer)
    assert (
        trace["correct"] and trace["children"] > 15 and trace["max_thread_tokens"] < restored.config.limits.window / 2
    )
