"""How good the solvers are, from the command line: the figures and the table."""

import json
from pathlib import Path

import pytest

from apr_jax.cli.main import run

NANO = str(Path(__file__).parents[2] / "experiments" / "nano.py")
COMMAND = ["bench", "solver", "--config", NANO, "--problems", "60"]


def test_success_and_length_of_each_method(tmp_path, capsys):
    figures = tmp_path / "rates.json"
    narrow = ["--set", "limits.window=120", "--set", "limits.max_thread_tokens=200"]
    assert (
        run([*COMMAND, "--method", "apr", "--method", "sos+", "--json", str(figures), *narrow]) == 0
    )
    rates = json.loads(figures.read_text())
    apr = rates["apr"]
    serial = rates["sos+"]
    assert apr["solver_success"] > serial["solver_success"]
    assert apr["mean_children"] > 3 and serial["mean_children"] == 0
    assert apr["mean_thread_tokens"] < apr["mean_sequential_tokens"] < apr["mean_total_tokens"]
    assert (
        serial["mean_thread_tokens"]
        == serial["mean_sequential_tokens"]
        == serial["mean_total_tokens"]
    )
    assert apr["mean_longest_thread"] <= 120
    said = capsys.readouterr().out
    low, high = (f"{100 * bound:.1f}" for bound in apr["ci95"])
    assert f"{100 * apr['solver_success']:.1f} ({low}-{high})" in said
    assert (
        apr["dropped"]["window"] > 0 and apr["demonstrations"] + sum(apr["dropped"].values()) == 60
    )
    assert f"apr: dropped {apr['dropped']['window']} for limits.window" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "bfs"], "method='bfs': task 'countdown' has no such method"),
        (
            ["--method", "apr-nested"],
            "limits.max_depth=1 must be at least 2 for method 'apr-nested'",
        ),
        (
            ["--method", "apr", "--set", "limits.window=6", "--set", "limits.max_thread_tokens=6"],
            "none of the 60 demonstrations of 'apr' fits",
        ),
    ],
)
def test_wrong_use_is_said(arguments, message, capsys):
    assert run([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "rest", [[], ["--problems", "60"], ["--problems", "60", "--method", "apr"]]
)
def test_a_file_of_demonstrations_has_no_solver(rest, capsys):
    command = ["bench", "solver", "--config", NANO, "--set", "data.demonstrations=trees.jsonl"]
    assert run([*command, *rest]) == 2
    error = capsys.readouterr().err
    assert "bench solver: data.demonstrations='trees.jsonl' is a file" in error
