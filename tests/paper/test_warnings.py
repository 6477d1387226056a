"""What a reader must not overlook beside a score is said loudly: in the terminal, in the report's
numbers, on its page.

A finished evaluation is read, not run again: the tests write what the trees of one should have
done, and ask for it once more.
"""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from helpers.browsing import chromium, needs_browser, tabs
from helpers.puzzles import read_problems

from apr_jax.config import to_dict
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.folder import SUMMARY, TRACES
from apr_jax.evaluate.runner import evaluate
from apr_jax.evaluate.scores import summarize
from apr_jax.paper import controls, figures, run_report
from apr_jax.paper.suite import Evaluation
from apr_jax.train.checkpoint import load_checkpoint

SERIAL = "NO TREE SPAWNED A SINGLE CHILD: this is a serial score, not one of parallel reasoning"
CUT = "OF THE TREES WERE TRUNCATED: the window or a budget is too small"
LOUD = {"weight": "600", "edge": "solid 4px"}


@pytest.fixture(scope="module")
def restored(checkpoint):
    """Weights of nothing but zeros: every token is as likely, the first one is taken, and that is
    no spawn.
    """
    trained = load_checkpoint(checkpoint)
    return dataclasses.replace(trained, params=jax.tree.map(np.zeros_like, trained.params))


@pytest.fixture(scope="module")
def problems(data_dir):
    return read_problems(data_dir / "test.jsonl")


@pytest.fixture(scope="module")
def evaluated(restored, problems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(restored, problems, folder, progress=False)
    return folder


def tell(folder, *, spawning, cut, status="OUT_OF_WINDOW", count=None):
    """Rewrites the traces: so many trees spawned, so many were cut short, none did anything else
    wrong; returns them.
    """
    path = folder / TRACES
    told = []
    for place, line in enumerate(map(json.loads, path.read_text().splitlines()[:count])):
        root, *_ = line["threads"]
        root["status"] = status if place < cut else "DONE"
        told.append(line | {"children": int(place < spawning)})
    path.write_text("".join(json.dumps(line) + "\n" for line in told))
    return told


def test_the_terminal_says_that_a_model_spawned_nothing(restored, problems, capsys, tmp_path):
    """On standard error, as soon as it is known, and again whenever the finished evaluation is
    asked for.
    """
    folder = tmp_path / "again"
    capsys.readouterr()
    summary = evaluate(restored, problems, folder, progress=False)
    said = capsys.readouterr()
    assert summary["spawned"] == 0
    assert f"warning: {SERIAL}" in said.err.splitlines() and SERIAL not in said.out
    evaluate(restored, problems, folder, progress=False)
    assert capsys.readouterr().err == said.err


@pytest.mark.parametrize(
    ("spawning", "cut", "said"),
    [
        (1, 0, []),
        (0, 0, [SERIAL]),
        (1, 4, []),
        (1, 5, [f"62% {CUT}"]),
        (0, 8, [SERIAL, f"100% {CUT}"]),
    ],
)
@pytest.mark.parametrize("status", ["OUT_OF_WINDOW", "OUT_OF_BUDGET"])
def test_the_terminal_says_what_most_trees_did(
    restored, problems, evaluated, tmp_path, capsys, spawning, cut, said, status
):
    """One tree that spawned is no serial score any more; half of the trees may be cut short without
    a word.
    """
    folder = shutil.copytree(evaluated, tmp_path / "told")
    assert len(tell(folder, spawning=spawning, cut=cut, status=status)) == len(problems) == 8
    capsys.readouterr()
    evaluate(restored, problems, folder, progress=False)
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in said]


def test_serial_model_gets_no_warning_about_spawning(
    restored, problems, evaluated, tmp_path, capsys
):
    folder = shutil.copytree(evaluated, tmp_path / "serial")
    tell(folder, spawning=0, cut=0)
    capsys.readouterr()
    evaluate(dataclasses.replace(restored, method="sos+"), problems, folder, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asked", [{"condition": 0}, {"forced": 0}], ids=str)
def test_zero_requested_children_are_no_reason_for_a_warning(
    restored, problems, tmp_path, capsys, asked
):
    evaluate(restored, problems, tmp_path, Decoding(**asked), progress=False)
    tell(tmp_path, spawning=0, cut=0)
    capsys.readouterr()  # Drops what the first call said.
    evaluate(restored, problems, tmp_path, Decoding(**asked), progress=False)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def written(restored, evaluated, tmp_path_factory):
    """(a report, its numbers) of a run in which some evaluations are fine and some are not."""
    run = tmp_path_factory.mktemp("run")
    asked = dataclasses.replace(
        restored.config.evaluate, children=(0, 1, 2), temperatures=(0.5, 1.0)
    )
    (run / "config.json").write_text(
        json.dumps(to_dict(dataclasses.replace(restored.config, evaluate=asked)))
    )
    few = asked.problems
    assert few == 3
    for one, told in {
        Evaluation("apr/sft"): {"spawning": 0, "cut": 0},
        Evaluation("apr/rl"): {"spawning": 8, "cut": 5},
        Evaluation("sos+/sft"): {"spawning": 0, "cut": 4},
        Evaluation("apr/sft", Decoding(condition=0), few): {"spawning": 0, "cut": 0},
        Evaluation("apr/sft", Decoding(condition=1), few): {"spawning": 0, "cut": 1},
        Evaluation("apr/sft", Decoding(condition=2), few): {"spawning": 1, "cut": 1},
        Evaluation("apr/sft", Decoding(temperature=0.5), few): {"spawning": 1, "cut": 2},
        Evaluation("apr/sft", Decoding(temperature=1.0, condition=0), few): {
            "spawning": 0,
            "cut": 3,
        },
    }.items():
        folder = shutil.copytree(evaluated, run / "eval" / one.name)
        traces = tell(folder, **told, count=one.problems)
        summary = summarize(traces) | {"method": one.model.partition("/")[0], "step": 6}
        # What an older version left says nothing of what went wrong.
        (folder / SUMMARY).write_text(json.dumps(summary | {"spawned": 1.0, "truncated": 0.0}))
    with pytest.MonkeyPatch.context() as patch:  # They take the most time, and no part in this.
        patch.setattr(figures, "FIGURES", ())
        patch.setattr(controls, "CONTROLS", ())
        return run / "report.html", run_report.write_run_report(run, run / "data", run)


WARNED = {
    "APR": SERIAL,
    "APR after RL": f"62% {CUT}",
    "APR, T = 0.5": f"67% {CUT}",
    "APR, 1 requested children": SERIAL,
    "APR, T = 1, 0 requested children": f"100% {CUT}",
}


def test_report_numbers_name_every_evaluation_with_a_warning(written):
    """Whoever has 0 requested children is not told that it spawned none, but all else."""
    _, numbers = written
    assert sorted(numbers["warnings"]) == sorted(
        f"{label}: {text}" for label, text in WARNED.items()
    )


def test_report_page_warns_before_any_score(written):
    path, numbers = written
    text = path.read_text()
    assert re.findall(r'<p class="warning">([^<]*)</p>', text) == numbers["warnings"]
    assert text.rindex('<p class="warning">') < text.index("<h2 ") < text.index("<table>")


@pytest.mark.thorough
@needs_browser
def test_the_warnings_of_a_report_are_loud(written):
    """Heavier than text, with a red edge, in view when the page opens, in either scheme."""
    path, numbers = written
    look = """(e) => { const style = getComputedStyle(e), [r, g, b] = style.borderLeftColor.match(/\\d+/g).map(Number); return {
      weight: style.fontWeight, edge: `${style.borderLeftStyle} ${style.borderLeftWidth}`, red: r - Math.max(g, b) > 80 }; }"""
    with chromium() as browser, tabs(browser) as open_file:
        for scheme in ("light", "dark"):
            tab = open_file(path, scheme=scheme)
            lines = tab.locator(".report > .warning")
            assert lines.all_inner_texts() == numbers["warnings"]
            for line in lines.all():
                assert line.is_visible() and line.bounding_box()["y"] < tab.viewport_size["height"]
                assert line.evaluate(look) == LOUD | {"red": True}, scheme
