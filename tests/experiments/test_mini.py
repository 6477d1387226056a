"""The kept models of scale mini: of this version, small, at work, and as accurate as their results
say.
"""

import json
import math
import re
from pathlib import Path

import pytest

from apr_jax.config import load
from apr_jax.evaluate.cells import SPENT, comparison_cells
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.runner import answer_one, evaluate
from apr_jax.evaluate.trace import to_trace
from apr_jax.paper import suite
from apr_jax.tasks import make_task
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.train.answers import extract_answers
from apr_jax.train.checkpoint.manager import load_checkpoint

ROOT = Path(__file__).parents[2]
FOLDER, RESULTS = ROOT / "experiments" / "mini", ROOT / "docs" / "results.md"
FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kept_model_is_small_and_of_this_version(path):
    restored = load_checkpoint(path)
    folder, _, stage = path.stem.rpartition("-")
    method, settings = suite.ABLATIONS.get(folder, (folder, ()))
    assert (restored.method, restored.stage) == (method, stage) and path.stat().st_size < 12 << 20
    now, then = load("experiments/mini.py", settings), restored.config
    assert (then.task, then.model, then.limits) == (now.task, now.model, now.limits)


def test_the_tree_that_make_solve_shows():
    restored = load_checkpoint(FOLDER / "apr-rl.safetensors")
    problem, task = make_problem("shown", (54, 2, 93, 34), 53), make_task(restored.config.task)
    forest = answer_one(restored, problem)
    (answer,) = extract_answers(forest, restored.tokenizer)
    trace = to_trace(forest, 0, problem, 0, answer, task, restored.tokenizer)
    assert (
        trace["correct"]
        and trace["children"] > 15
        and trace["max_thread_tokens"] < restored.config.limits.window / 2
    )


def test_the_results_are_of_the_suite_as_it_is_declared_now():
    """Of all models that are kept, and nothing else: no name of an older suite, no hole."""
    results = _results()
    kept = {path.stem for path in FILES}
    declared = suite.declare(load("experiments/mini.py").evaluate)
    names = {one.name for one in declared if one.model.replace("/", "-") in kept}
    assert len(names) > 40 and names <= {row["name"] for row in results["scores"]} <= {
        one.name for one in declared
    }
    assert not [line for line in results["missing"] if "not evaluated yet" in line]
    assert results["warnings"] == []


_BEST = "no more sequential tokens than SoS+ on published beams at its best"
COMPARISONS = {  # How docs/results.md calls them -> how results.json does.
    "same window, after RL": "same window, after RL: ",
    "same window, supervised, SoS+ with beams 1 to 15 too": "same window, supervised, SoS+ with",
    "same seconds of one problem (means of 10)": "same seconds of one problem: ",
    "the same seconds, SoS+ with beams 1 to 15 too": "same seconds of one problem, ",
    "same total tokens, temperature 1, supervised": "same total tokens: APR, ",
    "the same, SoS+ with beams 1 to 15 too": (
        "same total tokens, SoS+ with beams 1 to 15 too: APR, "
    ),
    "same total tokens, temperature 1, after RL": "same total tokens: APR after RL, ",
    "the same, after RL, SoS+ with beams 1 to 15 too": (
        "same total tokens, SoS+ with beams 1 to 15 too: APR after RL, "
    ),
    "same total tokens, supervised, each at its best temperature": (
        "same total tokens, each at its best temperature:"
    ),
    "the same, best temperatures, SoS+ with beams 1 to 15 too": (
        "same total tokens, each at its best temperature, "
    ),
    "sequential tokens of the best point": "sequential tokens of the best point",
    "no more sequential tokens than SoS+ at its best": f"{_BEST}:",
    "the same sequential tokens, SoS+ with beams 1 to 15 too": f"{_BEST},",
    "at most 1,024 total tokens, supervised": "at most 1,024 total tokens: APR, ",
    "at most 1,024 total tokens, SoS+ with beams 1 to 15 too": (
        "at most 1,024 total tokens, SoS+ with beams 1 to 15 too: APR, "
    ),
    "RL's gain of APR": "RL's gain, APR",
    "RL's gain of APR with a random parent beam": "RL's gain, APR, random parent beam",
    "RL's gain of SoS+": "RL's gain, SoS+",
    "RL's gain of APR with a random parent beam, 12 forced children": (
        "RL's gain, APR, random parent beam, 12 forced"
    ),
    "RL's gain of APR, temperature 1": "RL's gain, APR, T = 1",
    "RL's gain of APR with a random parent beam, temperature 1": (
        "RL's gain, APR, random parent beam, T = 1"
    ),
    "RL's gain of SoS+, temperature 1": "RL's gain, SoS+, T = 1",
}


def test_the_page_has_the_results_that_are_kept():
    """Its table of scale mini, and the paper's comparisons beside it, to the digit."""
    page, results = RESULTS.read_text(), _results()
    names = {
        "SoS+ (serial)": "sos+",
        "APR (thread tree)": "apr",
        "APR (random parent beam)": suite.RANDOM_PARENT_BEAM,
    }
    rows = re.findall(r"^\| (.*\(.*\)), (supervised|after RL) \| (.*) \|$", page, re.M)
    assert len(rows) == 6
    for name, stage, cells in rows:
        row = results["main"][f"{names[name]}-{'sft' if stage == 'supervised' else 'rl'}"]
        low, high = (100 * bound for bound in row["ci95"])
        measured = [f"{100 * row['accuracy']:.1f}% ({low:.1f} to {high:.1f})"]
        measured += [f"{row[measure]:,.0f}" for measure in ("total_tokens", "sequential_tokens")]
        measured += [f"{row['children']:.1f}", f"{row['max_thread_tokens']:,.0f}"]
        assert cells.split(" | ") == measured, (name, stage)
    _, *rows = _table(page, "| the paper's comparisons")
    assert [name for name, *_ in rows] == list(COMPARISONS)
    for name, scores, gap, paper, problems in rows:
        comparison = next(
            row for row in results["comparisons"] if row["comparison"].startswith(COMPARISONS[name])
        )
        cells = comparison_cells(comparison)
        assert cells["one"] in re.split("[ ,]", scores) and cells["other"] in re.split(
            "[ ,]", scores
        ), name
        assert gap == f"{cells['gap']} ({cells['interval'].replace('+', '')})", name
        assert (problems.replace(",", ""), paper.partition(": ")[2]) == (
            cells["n"],
            cells["verdict"],
        ), name
        spent = {
            f"{comparison[side][key]:,.0f}"
            for side in ("one_spent", "other_spent")
            for key in SPENT
        }
        told = re.findall(r"[\d,]{3,}(?= tokens|\))", scores)
        assert set(told) <= spent, name


def test_readme_has_three_of_the_results():
    shown = _table((ROOT / "README.md").read_text(), "| | right answers |")[1:]
    rows = [_results()["main"][name] for name in ("sos+-rl", "sos+beam15-sft", "apr+drawn-rl")]
    assert [cells for _, *cells in shown] == [
        [
            f"{100 * row['accuracy']:.1f}%",
            f"{row['total_tokens']:,.0f}",
            f"{row['sequential_tokens']:,.0f}",
        ]
        for row in rows
    ]


def test_the_page_has_every_comparison_as_it_is_kept():
    page, comparisons = (ROOT / "docs" / "evaluation.md").read_text(), _results()["comparisons"]
    _, *rows = _table(page, "| comparison: APR, SoS+ |")
    for (name, scores, tokens, gap, paper, problems), comparison in zip(
        rows, comparisons, strict=True
    ):
        cells = comparison_cells(comparison)
        assert (name, scores) == (comparison["comparison"], f"{cells['one']}, {cells['other']}")
        assert tokens == ", ".join(
            f"{comparison[side]['total_tokens']:,.0f}" for side in ("one_spent", "other_spent")
        ), name
        assert gap == f"{cells['gap']} ({cells['interval'].replace('+', '')})", name
        assert paper == ": ".join(filter(None, (comparison["paper"], cells["verdict"]))), name
        assert problems.replace(",", "") == cells["n"], name


def test_the_page_has_tables_1_and_2_as_they_are_kept():
    page, tables = (ROOT / "docs" / "evaluation.md").read_text(), _results()["tables"]
    ours = {row["model"]: row for name in ("table1", "table2") for row in tables[name]}
    _, *rows = _table(page, "| | solved by the demonstrations | supervised steps |")
    assert len(rows) == len(ours) == 4
    for row, model in zip(
        rows, ("sos/sft", "sos+/sft", "sos+beam15/sft", "sos+rejection/sft"), strict=True
    ):
        _, _, steps, greedy, tokens, sampled, paper = (cell.strip("*") for cell in row)
        first, last = (ours[model]["cells"][temperature] for temperature in ("0", "1"))
        mean, low, high = (100 * first["ours"][key] for key in ("mean", "low", "high"))
        assert (steps, greedy) == (
            f"{ours[model]['step']:,}",
            f"{mean:.1f}% ({low:.1f} to {high:.1f})",
        ), model
        assert (tokens, sampled) == (
            f"{first['ours']['total_tokens']:,.0f}",
            f"{100 * last['ours']['mean']:.1f}%",
        ), model
        assert paper == f"{first['paper']}; {last['paper']}", model


def test_the_page_says_what_is_wrong_as_it_is_kept():
    page, rows = (ROOT / "docs" / "evaluation.md").read_text(), _results()["main"].values()
    (_, _, *kinds), *lines = _table(page, "| | wrong |")
    told = {
        name: dict(zip(["wrong", *kinds], map(int, (cell or 0 for cell in cells)), strict=True))
        for name, *cells in lines
    }
    assert told == {
        row["label"]: (
            {"wrong": sum(row["failures"].values())} | dict.fromkeys(kinds, 0) | row["failures"]
        )
        for row in rows
    }


def _table(page, start):
    """The cells of the table that begins so, a list a line; the first is the head."""
    head, _, *lines = page[page.index(start) :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]


def _results():
    return json.loads((FOLDER / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_stated_accuracy_holds_on_problems_that_nobody_drew_before(path, tmp_path):
    """The 95% interval of the difference of two shares."""
    stated = _results()["main"][path.stem]
    restored = load_checkpoint(path)
    first, count = 10**9, 400  # Training, validation and test are drawn from small seeds.
    problems = [draw(restored.config.task.options, first + place) for place in range(count)]
    found = evaluate(restored, problems, tmp_path / path.stem, Decoding(), progress=False)
    share = stated["accuracy"]
    error = math.sqrt(share * (1 - share) * (1 / count + 1 / stated["n"]))
    assert abs(found["accuracy"] - share) < 1.96 * error
