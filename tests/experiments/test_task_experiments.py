"""The experiments that compare the methods of a task can be run as they are."""

from pathlib import Path

import pytest

from apr_jax.cli import main
from apr_jax.config import load
from apr_jax.paper import methods, suite

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = ("arithmetic", "countdown_all", "path_star", "sudoku")


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_compared_on_a_thousand_problems(name):
    config = load(FOLDER / f"{name}.py")
    assert config.name == name
    assert not suite.is_of_the_paper(config)
    methods.check(config)
    declared = methods.declare(config)
    assert len({evaluation.name for evaluation in declared}) == len(declared)
    assert {evaluation.problems or config.data.heldout for evaluation in declared} == {1_000}
    # Each method, before and after RL, in each window; and votes of the serial ones.
    assert any(evaluation.decoding.samples > 1 for evaluation in declared)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_the_task_is_without_faults_within_the_limits(name, capsys):
    assert main.run(["task", "check", "--config", str(FOLDER / f"{name}.py")]) == 0
    assert "FAULT" not in capsys.readouterr().out.upper()
