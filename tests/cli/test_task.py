"""`apr task check` from the command line: its findings, its exit status, its refusals."""

from pathlib import Path

import pytest

from apr_jax.cli.main import run

ROOT = Path(__file__).parents[2]
FAULTY = '''
import random

from apr_jax.tasks import Problem, Score, Task


class Sums(Task):
    """Its scorer reads numbers only."""

    def draw(self, seed):
        rng = random.Random(f"sums {seed}")
        return Problem("any", {"a": rng.randrange(99), "b": rng.randrange(99)})

    def prompt(self, problem, condition=None):
        return f"{problem.data['a']}+{problem.data['b']}="

    def score(self, problem, answer):
        correct = int(answer) == problem.data["a"] + problem.data["b"]
        return Score(float(correct), correct, answer)
'''


def test_a_good_task_ends_with_status_0(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run(["task", "check", "examples/anagrams.py:Anagrams", "--problems", "20"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "ok     problems: 20 drawn, " in lines[0]
    assert any("limits that hold them all: window=" in line for line in lines)


def test_task_check_fails_with_status_1_and_remedy(capfd, tmp_path):
    (tmp_path / "sums.py").write_text(FAULTY)
    assert run(["task", "check", f"{tmp_path}/sums.py:Sums", "--problems", "20"]) == 1
    captured = capfd.readouterr()
    assert "fault  scores: no verdict on the empty text ('')" in captured.out
    assert "ValueError" in captured.out
    assert "-> have `score` return Score(0.0, correct=False" in captured.out
    assert captured.err.strip().endswith("1 fault; see above")


def test_an_experiment_holds_its_task_to_its_limits(capfd):
    settings = ["--set", "limits.window=40", "--set", "limits.max_thread_tokens=40"]
    assert run(["task", "check", "--config", "nano", "--problems", "20", *settings]) == 1
    said = capfd.readouterr().out
    assert "of 20 would be dropped: " in said
    assert "-> limits that hold them all: window=" in said


def test_a_setting_reaches_the_task(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["task", "check", "examples/anagrams.py:Anagrams", "--problems", "20"]
    assert run([*command, "--set", "task.letters=2"]) == 0
    assert "prompts: 3 to 3 characters" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either the task, or the experiment with --config"),
        (["countdown", "--config", "nano"], "give either the task, or the experiment"),
        (["countdow"], "no task has this name; did you mean 'countdown'?"),
        (["countdown", "--set", "task.number=3"], "no field 'task.number'; did you mean 'task.num"),
        (["countdown", "--set", "limits.window=3"], "no field 'limits.window'"),
        (["countdown", "--set", "task.numbers=0"], "task.numbers=0"),
    ],
)
def test_a_wrong_call_is_one_line(capfd, arguments, words):
    assert run(["task", "check", *arguments]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert words in line
