"""What RL draws its problems from: all that the split drew, whatever became of their
demonstrations.
"""

import contextlib
import dataclasses
import shutil

import pytest
from helpers.puzzles import read_problems

from apr_jax.data import dataset
from apr_jax.errors import UserError
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.tasks.countdown.solvers import METHODS
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.rl import trainer
from apr_jax.train.rl.trainer import TrainingProblems, train_rl

STEPS = 4


class Asked(Exception):
    """Raised in place of a rollout."""


@pytest.fixture
def problems_of_rl(config, data_dir, checkpoint, tmp_path, monkeypatch):
    """Method -> the problems that its first steps ask for; from a folder that holds no
    demonstration.
    """
    lone = tmp_path / "data"
    shutil.copytree(data_dir, lone, ignore=shutil.ignore_patterns("demonstrations"))
    with pytest.raises(UserError):
        dataset.read(lone, "apr", "train")
    start = load_checkpoint(checkpoint)
    asked = []

    class Grader:
        host_seconds = 0.0
        validate = None
        sample = None

        def ask(self, params, problems, *others):
            asked.append(problems)
            raise Asked

    def first_steps(run, workdir, state, stage, **others):
        for step in range(STEPS):
            with contextlib.suppress(Asked):
                stage.advance(state, step, lambda: False)

    def problems_of(method):
        asked.clear()
        restored = dataclasses.replace(start, method=method)
        monkeypatch.setattr(trainer, "load_checkpoint", lambda path: restored)
        monkeypatch.setattr(trainer, "grading", lambda *others: contextlib.nullcontext(Grader()))
        monkeypatch.setattr(trainer, "measure_peak", lambda *others: 1.0)
        monkeypatch.setattr(trainer, "train", first_steps)
        train_rl(config, lone, tmp_path / "run", checkpoint, progress=False)
        return list(asked)

    return problems_of


def test_every_method_learns_from_the_same_problems(problems_of_rl, config, data_dir):
    of_each = [problems_of_rl(method) for method in METHODS]
    assert of_each == [of_each[0]] * len(METHODS)
    written = read_problems(data_dir / "train.jsonl")
    group = config.train.rl.group
    wanted = config.train.rl.problems
    for problems in of_each[0]:
        different = problems[::group]
        assert problems == [problem for problem in different for _ in range(group)]
        assert set(different) <= set(written) and len(set(different)) == len(different) == wanted
    assert len({tuple(problems) for problems in of_each[0]}) == STEPS


def test_draw_depends_on_seed_and_step_alone():
    """It leaves no problem out."""
    problems = [make_problem(f"train-{k}", (k + 1, 2), 10) for k in range(30)]
    drawn = TrainingProblems(problems)
    assert drawn.draw(1, 2, 5) == TrainingProblems(list(problems)).draw(1, 2, 5)
    assert len({tuple(drawn.draw(seed, step, 5)) for seed in range(3) for step in range(3)}) == 9
    assert sorted(drawn.draw(0, 0, 30), key=problems.index) == problems
    # More than there are: all of them before any comes again.
    many = drawn.draw(0, 0, 65)
    assert sorted(many[:30], key=problems.index) == sorted(many[30:60], key=problems.index)
    assert len(set(many[60:])) == 5
