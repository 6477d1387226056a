"""The kept models of scale mini: of this version, small, at work, and as accurate as their results say."""

import json
import math
from pathlib import Path

import pytest

from apr_jax.config import load
from apr_jax.evaluate.run import Decoding, answer_one, evaluate
from apr_jax.evaluate.trace import to_trace
from apr_jax.learn.answers import extract_answers
from apr_jax.learn.checkpoint import load_checkpoint
from apr_jax.tasks import Countdown, Problem
from apr_jax.tasks.problems import draw

FOLDER = Path(__file__).parents[2] / "experiments" / "mini"
FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kept_model_is_small_and_of_this_version(path):
    restored = load_checkpoint(path)
    assert path.stem == f"{restored.method}-{restored.stage}" and path.stat().st_size < 12 << 20
    now, then = load("experiments/mini.py"), restored.config
    assert (then.task, then.solver, then.model, then.limits) == (now.task, now.solver, now.model, now.limits)


def test_the_tree_that_make_solve_shows():
    restored = load_checkpoint(FOLDER / "apr-rl.safetensors")
    problem, task = Problem("shown", (54, 2, 93, 34), 53), Countdown(restored.config.task, restored.config.solver)
    forest = answer_one(restored, problem)
    (answer,) = extract_answers(forest, restored.tokenizer)
    trace = to_trace(forest, 0, problem, 0, answer, task, restored.tokenizer)
    assert (
        trace["correct"] and trace["children"] > 15 and trace["max_thread_tokens"] < restored.config.limits.window / 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_stated_accuracy_holds_on_problems_that_nobody_drew_before(path, tmp_path):
    """The 95% interval of the difference of two shares."""
    stated = json.loads((FOLDER / "results.json").read_text())["main"][path.stem]
    restored = load_checkpoint(path)
    first, count = 10**9, 400  # Training, validation and test are drawn from small seeds.
    problems = [draw(restored.config.task, first + place) for place in range(count)]
    found = evaluate(restored, problems, tmp_path / path.stem, Decoding(), progress=False)
    share = stated["accuracy"]
    error = math.sqrt(share * (1 - share) * (1 / count + 1 / stated["n"]))
    assert abs(found["accuracy"] - share) < 1.96 * error
