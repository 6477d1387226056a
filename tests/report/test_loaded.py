"""A model in Python: what it solves is what the command line shows."""

import dataclasses
import json

import pytest
from helpers.whole_runs import changed

import apr_jax
from apr_jax.errors import UsageError, UserError
from apr_jax.report.solve import solve
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.train.config import RewardConfig

PROBLEM = "2 3 5 -> 11"
PARSED = Countdown().parse(PROBLEM)


@pytest.fixture(scope="module")
def model(checkpoint):
    return apr_jax.load(checkpoint)


def test_a_tree_prints_what_apr_solve_shows(model, capsys):
    tree = model.solve(PROBLEM)
    trace = solve(model.restored, PARSED, None)
    shown = capsys.readouterr().out
    assert str(tree) == repr(tree) == shown.rstrip("\n")
    assert "root" in shown and "\x1b" not in shown
    assert (tree.correct, tree.stated) == (trace["correct"], trace["stated"])
    assert tree.trace["threads"] == trace["threads"]
    assert tree.trace["threads"][0]["text"].endswith(tree.answer)
    assert tree.forest.tokens.shape[0] == 1


def test_a_scorer_that_hangs_or_raises_gives_no_verdict(model, capsys):
    """The answer is scored in a process of its own, for at most the time that RL allows it."""
    config = changed(model.restored.config, rl={"reward": RewardConfig(time_limit=0.5)})
    task = TaskConfig("helpers.misbehaving:Misbehaves", **vars(config.task.options))
    config = dataclasses.replace(config, task=task)
    restored = dataclasses.replace(model.restored, config=config)
    for problem, reason in ((PROBLEM, "timed out"), ("2 3 4 -> 10", "raised")):
        tree = apr_jax.Model(restored).solve(problem)
        assert (tree.correct, tree.reward, tree.stated) == (None, None, None)
        assert f"? no verdict: {reason}" in str(tree).splitlines()
        assert solve(restored, tree.problem, None)["failure"] == ""
    capsys.readouterr()


def test_a_tree_is_written_as_a_page(model, tmp_path):
    model.solve(PARSED).write_html(str(tmp_path / "tree.html"))
    assert "<html" in (tmp_path / "tree.html").read_text()


def test_an_evaluation_is_that_of_the_command(model, tmp_path):
    """Greedy, of one problem: the program that `solve` compiled serves it."""
    problem = PARSED
    summary = model.evaluate([problem], tmp_path / "eval", progress=False)
    assert (summary["n"], summary["samples"]) == (1, 1)
    assert summary["accuracy"] == model.solve(problem).correct
    assert json.loads((tmp_path / "eval" / "summary.json").read_text()) == summary


def test_an_evaluation_takes_the_fields_of_decoding(model, tmp_path):
    with pytest.raises(UsageError, match="--samples 2"):
        model.evaluate([PARSED], tmp_path / "eval", samples=2)


def test_what_is_wrong_is_said(model, tmp_path):
    with pytest.raises(UsageError, match="many"):
        model.solve("many")
    with pytest.raises(UserError, match="nothing"):
        apr_jax.load(tmp_path / "nothing")


def test_a_model_tells_what_it_is(model, checkpoint):
    assert model.name == "apr-sft"
    assert str(checkpoint) in repr(model)
