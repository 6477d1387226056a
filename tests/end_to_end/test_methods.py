"""A task that is not the paper's: its methods are trained, evaluated and compared by one command."""

import contextlib
import dataclasses
import io
import json
import re

import pytest

from apr_jax.cli import main
from apr_jax.config import EvalConfig
from apr_jax.errors import UsageError
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.folder import read_answers
from apr_jax.paper import methods, pipeline
from apr_jax.paper.results import Answered
from apr_jax.paper.suite import Evaluation
from apr_jax.tasks import TaskConfig
from apr_jax.threads.limits import Limits


@pytest.fixture(scope="module")
def config(config):
    return dataclasses.replace(
        config,
        task=TaskConfig("arithmetic", height=2, fullness=1.0),
        limits=Limits(window=48, max_thread_tokens=56, max_threads=3, children=2, max_depth=1),
        evaluate=EvalConfig(batch=8, problems=6, samples=3, windows=(24,), methods=METHODS),
    )


METHODS = ("serial", "nested")


@pytest.fixture(scope="module")
def run_and_screen(config, tmp_path_factory):
    """A finished run, and what it wrote on standard error."""
    out = tmp_path_factory.mktemp("methods") / "run"
    screen = io.StringIO()
    with contextlib.redirect_stderr(screen):
        pipeline.reproduce(config, out)
    return out, screen.getvalue()


@pytest.fixture(scope="module")
def run(run_and_screen):
    return run_and_screen[0]


@pytest.mark.thorough
def test_one_command_trains_evaluates_and_compares(run, config, capsys):
    results = json.loads((run / "results.json").read_text())
    models = [f"{method}-{stage}" for method in METHODS for stage in ("sft", "rl")]
    assert list(results["main"]) == [*models, *(f"{model}-w24" for model in models)]
    assert results["main"]["nested-rl-w24"]["label"] == "nested after RL, window 24"
    assert {row["n"] for row in results["main"].values()} == {config.data.heldout}
    assert results["missing"] == [] and set(results["seconds"]) > {"data", "serial/sft"}

    rows = results["comparisons"]
    assert [row["stage"] for row in rows] == ["sft"] * 5 + ["rl"] * 5
    assert all(row["methods"] == ["nested", "serial"] for row in rows)
    equal = [row["equal"] for row in rows[:5]]
    assert equal == ["window", "window", "tokens", "parallel chain", "serial chain"]
    assert [row["limit"] for row in rows[:3]] == [48, 24, None]
    for row in rows:
        assert row["low"] <= row["gap"] <= row["high"]
        assert row["gap"] == pytest.approx(row["one"] - row["other"])

    # The samples that vote are those of the first problems, at temperature 1.
    summary, traces = read_answers(run / "eval" / "serial-rl-t1-n3-p6")
    assert (summary["temperature"], summary["samples"], len(traces)) == (1.0, 3, 18)

    pipeline.show_results(run)
    shown = capsys.readouterr().out
    assert "same total tokens: nested, serial" in shown and "the paper" not in shown


@pytest.mark.thorough
def test_the_screen_says_what_each_stage_gained(run_and_screen):
    run, screen = run_and_screen
    stages = json.loads((run / "stages.json").read_text())
    gained = {"sft": "loss ", "eval": "% right, "}
    for number, name in enumerate(stages, start=1):
        line_of = rf"^ *{number}/{len(stages)}  {name}  .*\d\.\d min\b.*$"
        (line,) = re.findall(line_of, screen, re.M)
        kind = "eval" if name.startswith("eval/") else name.partition("/")[2]
        assert gained.get(kind, "") in line


@pytest.mark.thorough
def test_apr_report_makes_the_results_anew(run):
    path = run / "results.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert main.run(["report", str(run)]) == 0
    after = json.loads(path.read_text())
    assert before["seconds"].items() <= after["seconds"].items()
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


def trace(problem, sample, correct, chain, total, vote="a"):
    return {
        "id": problem,
        "sample": sample,
        "correct": correct,
        "vote": vote if correct else "wrong",
        "sequential_tokens": chain,
        "total_tokens": total,
        "children": 0,
        "max_thread_tokens": chain,
    }


def answered(name, traces, samples=1):
    decoding = Decoding(samples=samples, temperature=1.0 if samples > 1 else 0.0)
    evaluation = Evaluation(f"{name}/sft", decoding, 20 if samples > 1 else None)
    return evaluation.name, Answered(evaluation, traces, {"samples": samples})


@pytest.fixture
def made(config):
    """Twenty problems: trees of 100 tokens, 40 in a row, but one of 90; answers of 30 tokens."""
    names = [f"p{k}" for k in range(20)]
    trees = [trace(name, 0, True, 90 if k == 0 else 40, 100) for k, name in enumerate(names)]
    answers = [trace(name, 0, k % 2 == 0, 30, 30) for k, name in enumerate(names)]
    # Two of three samples are right, but the second takes longer than any tree but one.
    samples = [
        trace(name, sample, sample > 0, 50 if sample == 1 else 30, 40)
        for name in names
        for sample in range(3)
    ]
    evaluations = [
        answered("nested", trees),
        answered("serial", answers),
        answered("serial", samples, 3),
    ]
    rows = methods._comparisons(config, dict(evaluations))
    return {row["equal"]: row for row in rows}


def test_each_comparison_makes_one_cost_equal(made):
    assert [row["comparison"] for row in made.values()] == [
        "same window (48): nested, serial",
        "same total tokens: nested, serial cons@3",
        "within 40 sequential tokens, those of nested: nested, serial cons@3",
        "within 30 sequential tokens, those of serial: nested, serial",
    ]
    window = made["window"]
    assert (window["one"], window["other"], window["note"]) == (1.0, 0.5, "")

    # Three samples of 40 tokens are the fewest that take the 100 of a tree.
    tokens = made["tokens"]
    assert (tokens["other"], tokens["note"], tokens["other_spent"]["total_tokens"]) == (
        1.0,
        "cons@3",
        120,
    )

    # 95% of the trees end in 40: the slow one is wrong, and each second sample has no vote.
    # Then one sample is right and one is wrong, and a tie goes to the first.
    chain = made["parallel chain"]
    assert (chain["one"], chain["other"]) == (0.95, 0.0)
    serial = made["serial chain"]
    assert (serial["one"], serial["other"]) == (0.0, 0.5)


def test_a_greedy_answer_of_as_many_tokens_needs_no_votes(config):
    names = ["a", "b"]
    rows = methods._comparisons(
        config,
        dict(
            [
                answered("nested", [trace(name, 0, False, 20, 30) for name in names]),
                answered("serial", [trace(name, 0, True, 30, 30) for name in names]),
                answered("serial", [trace(n, s, False, 9, 9) for n in names for s in (0, 1)], 2),
            ]
        ),
    )
    tokens = next(row for row in rows if row["equal"] == "tokens")
    assert (tokens["one"], tokens["other"], tokens["note"]) == (0.0, 1.0, "")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"methods": ("serial", "slow")}, "task 'arithmetic' has no such method"),
        ({"methods": ("serial",)}, r"evaluate.methods are serial\. "),
        ({"windows": (48,)}, r"evaluate.windows=\(48,\): each must be from 2 to 47"),
        ({"forced": (2,)}, r"evaluate.forced=\(2,\): is about the methods of the paper's task"),
    ],
)
def test_what_cannot_be_compared_is_refused(config, evaluate, message, tmp_path):
    wanted = dataclasses.replace(config.evaluate, **evaluate)
    with pytest.raises(UsageError, match=message):
        pipeline.reproduce(dataclasses.replace(config, evaluate=wanted), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_window_without_room_for_the_prompts_is_refused_before_training(config, tmp_path):
    small = dataclasses.replace(config.evaluate, windows=(6,))
    with pytest.raises(UsageError, match=r"evaluate.windows=\(6,\): the prompt of test problem"):
        pipeline.reproduce(dataclasses.replace(config, evaluate=small), tmp_path)
    assert (tmp_path / "data" / "data.json").is_file() and not (tmp_path / "serial").exists()
