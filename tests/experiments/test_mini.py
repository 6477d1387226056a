"""The exported models of scale mini: of this version, small, at work, and as accurate as their
results say.
"""

import json
import math
import re
from pathlib import Path

import pytest
from helpers.traces import scored_trace

from apr_jax.config import load
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.runner import answer_one, evaluate
from apr_jax.paper import suite
from apr_jax.tasks import make_task
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.train.answers import extract_answers
from apr_jax.train.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "mini"
FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kept_model_is_small_and_of_this_version(path):
    restored = load_checkpoint(path)
    folder, _, stage = path.stem.rpartition("-")
    method, settings = suite.ABLATIONS.get(folder, (folder, ()))
    assert (restored.method, restored.stage) == (method, stage) and path.stat().st_size < 12 << 20
    now = load("experiments/mini.py", settings)
    then = restored.config
    assert (then.task, then.model, then.limits) == (now.task, now.model, now.limits)


@pytest.mark.thorough
def test_the_tree_that_make_solve_shows():
    restored = load_checkpoint(FOLDER / "apr-rl.safetensors")
    problem = make_problem("shown", (54, 2, 93, 34), 53)
    task = make_task(restored.config.task)
    forest = answer_one(restored, problem)
    (answer,) = extract_answers(forest, restored.tokenizer)
    trace = scored_trace(forest, 0, problem, answer, task, restored.tokenizer)
    assert (
        trace["correct"]
        and trace["children"] > 15
        and trace["max_thread_tokens"] < restored.config.limits.window / 2
    )


def test_the_exported_models_are_those_that_the_documents_list():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert set(re.findall(r"^\| `(\S+\.safetensors)` \|", page, re.MULTILINE)) == {
        path.name for path in FILES
    }


# Evaluations that the suite has got since the results were made, or asks more samples of, and what
# it had in place of the latter.
SINCE = {
    "apr+drawn-sft-c16-p160",
    "apr+drawn-sft-t1-c16-p160",
    "sos+beam15-sft-t0.1-n10-p160",
    "sos+beam15-sft-t0.5-n10-p160",
}
BEFORE = {"sos+beam15-sft-t0.1-p160", "sos+beam15-sft-t0.5-p160"}


def test_results_are_of_the_current_suite():
    """Of all nine models, and nothing else: no other name of an older suite, no other hole."""
    results = _results()
    declared = suite.declare(load("experiments/mini.py").evaluate)
    evaluated = results["main"].keys()
    names = {one.name for one in declared if one.model.replace("/", "-") in evaluated}
    assert len(evaluated) == 9
    assert {path.stem for path in FILES} < evaluated
    assert len(names) > 40
    kept = {row["name"] for row in results["scores"]}
    assert names - SINCE <= kept <= {one.name for one in declared} | BEFORE
    assert not [line for line in results["missing"] if "not evaluated yet" in line]
    assert results["warnings"] == []


def test_the_results_bear_what_the_documents_conclude():
    comparisons = {row["comparison"]: row for row in _results()["comparisons"]}

    def interval(start):
        (row,) = (row for name, row in comparisons.items() if name.startswith(start))
        return row["low"], row["high"]

    wider = ", SoS+ with beams 1 to 15 too: "
    for question in ("same window, after RL: ", "same window, supervised: "):
        assert interval(question)[0] > 0, "the tree wins in the same window"
    assert interval(f"same seconds of one problem{wider}")[0] > 0
    for model in ("APR, ", "APR after RL, "):
        low, high = interval(f"same total tokens{wider}{model}")
        assert low < 0 < high, "wide beams leave little of the gap at equal total tokens"
    assert interval(f"at most 1,024 total tokens{wider}APR, ")[1] < 0

    gain = {
        name: (row["gap"], row["low"])
        for name, row in comparisons.items()
        if name.startswith("RL's gain")
    }
    assert gain["RL's gain, APR"][1] < 0, "who was shown every first step learns next to nothing"
    assert gain["RL's gain, APR, random parent beam"][1] > 0
    assert gain["RL's gain, APR, random parent beam, T = 1"][1] > 0
    assert (
        gain["RL's gain, APR, random parent beam, T = 1"]
        > gain["RL's gain, APR, random parent beam"]
    )


def _results():
    return json.loads((FOLDER / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stated_accuracy_holds_on_fresh_problems(path, tmp_path):
    """The 95% interval of the difference of two shares."""
    stated = _results()["main"][path.stem]
    restored = load_checkpoint(path)
    first, count = 10**9, 400  # Training, validation and test are drawn from small seeds.
    problems = [draw(restored.config.task.options, first + place) for place in range(count)]
    found = evaluate(restored, problems, tmp_path / path.stem, Decoding(), progress=False)
    share = stated["accuracy"]
    error = math.sqrt(share * (1 - share) * (1 / count + 1 / stated["n"]))
    assert abs(found["accuracy"] - share) < 1.96 * error
