"""Tasks by name: what is found, and how each mistake is named."""

import dataclasses
import importlib.metadata
import json
import pickle
import textwrap

import pytest

from apr_jax.config import ConfigError, from_dict, load, override, to_dict
from apr_jax.errors import UsageError
from apr_jax.tasks import Failure, Problem, SandboxedVerifier, TaskConfig, make_task
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.tasks.registry import config_of, files_beside
from apr_jax.tasks.toy import HiddenDigit

OWN = textwrap.dedent(
    '''
    import dataclasses
    from apr_jax.tasks import Problem, Score, Task


    @dataclasses.dataclass(frozen=True)
    class Config:
        last: int = 9

        def __post_init__(self):
            if self.last < 1:
                raise ValueError(f"task.last={self.last} must be at least 1")


    class Successor(Task):
        """Which number comes next?"""

        Config = Config

        def draw(self, seed):
            return Problem(f"n-{seed}", {"number": seed % self.config.last})

        def prompt(self, problem, condition=None):
            return f"{problem.data['number']}+1="

        def score(self, problem, answer):
            correct = answer == str(problem.data["number"] + 1)
            return Score(float(correct), correct, answer or None)


    class Half(Task):
        def draw(self, seed):
            return Problem("", {})


    class NoTask:
        pass
    '''
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a file of tasks in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_short_names_modules_and_files_are_found(folder):
    assert type(make_task(TaskConfig("countdown"))) is Countdown
    assert type(make_task(TaskConfig("hidden_digit"))) is HiddenDigit
    assert type(make_task(TaskConfig("apr_jax.tasks.toy:HiddenDigit"))) is HiddenDigit
    own = make_task(TaskConfig("own.py:Successor", last=3))
    assert own.prompt(own.draw(5)) == "2+1=" and own.score(own.draw(5), "3").correct


def test_equal_configs_have_equal_hashes():
    first, second, other = (
        TaskConfig("reasoning_gym", options={"max_animals": most}) for most in (4, 4, 5)
    )
    assert {first, second, other} == {first, other} and first != other


def test_a_task_travels_to_other_processes(folder):
    own = TaskConfig("own.py:Successor", last=3)
    assert pickle.loads(pickle.dumps(own)) == own
    assert config_of(pickle.loads(pickle.dumps(make_task(own)))) == own
    with SandboxedVerifier(make_task(own), time_limit=5.0) as verifier:
        right, wrong = verifier.verify([(Problem("p", {"number": 1}), answer) for answer in "23"])
    assert (right.correct, wrong.correct, wrong.stated) == (True, False, "3")


def test_a_file_is_looked_for_beside_the_experiment(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(other)
    with pytest.raises(UsageError, match="there is no file .*own.py"):
        TaskConfig("own.py:Successor")
    with files_beside(folder):
        config = TaskConfig("own.py:Successor")
    # As seen from the current folder: so a checkpoint finds it again.
    assert (other / config.kind.partition(":")[0]).resolve() == folder / "own.py"
    assert TaskConfig(config.kind) == config


def test_an_installed_package_registers_a_short_name(monkeypatch):
    point = importlib.metadata.EntryPoint(
        "digits", "apr_jax.tasks.toy:HiddenDigit", "apr_jax.tasks"
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    assert type(make_task(TaskConfig("digits"))) is HiddenDigit


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        (
            "countdwon",
            {},
            r"task.kind='countdwon': no task has this name; did you mean 'countdown'",
        ),
        ("none.py:Task", {}, r"there is no file .*none.py; run the command in the folder"),
        ("no_module:Task", {}, r"module no_module cannot be imported: ModuleNotFoundError"),
        (
            "own.py:Succesor",
            {},
            r"no class 'Succesor'; of tasks there are Half, Successor in it",
        ),
        ("own.py:NoTask", {}, r"'NoTask' does not inherit from apr_jax.tasks.Task; of tasks"),
        ("own.py:Half", {}, r"class Half lacks the method prompt, score"),
        (
            "own.py:Successor",
            {"last": 0},
            r"config task.last=0 must be at least 1",
        ),
        (
            "own.py:Successor",
            {"lats": 1},
            r"task.lats=1: the task has no such setting; it has last",
        ),
        (
            "own.py:Successor",
            {"last": "x"},
            r"config task.last='x': Input should be a valid integer",
        ),
        ("bad.py:Task", {}, r"bad.py, line 2 cannot be run: ZeroDivisionError: division by zero"),
        ("syntax.py:Task", {}, r"syntax.py, line 1 cannot be run: SyntaxError"),
    ],
)
def test_mistakes_are_named_in_one_line(folder, kind, options, line):
    (folder / "bad.py").write_text("x = 1\nx / 0\n")
    (folder / "syntax.py").write_text("class\n")
    with pytest.raises(UsageError, match=line) as caught:
        TaskConfig(kind, **options)
    assert "\n" not in str(caught.value)


def test_a_stored_config_names_its_task(folder, config):
    own = dataclasses.replace(config, task=TaskConfig("own.py:Successor", last=5))
    stored = json.loads(json.dumps(to_dict(own)))
    assert stored["task"] == {"kind": "own.py:Successor", "last": 5}
    assert from_dict(stored) == own
    assert override(own, ["task.last=7"]).task.options.last == 7
    with pytest.raises(ConfigError, match="task.last=0"):
        override(own, ["task.last=0"])
    with pytest.raises(ConfigError, match="config task.kind=None: must be the name of a task"):
        from_dict(stored | {"task": {"last": 5}})


def test_an_experiment_file_brings_its_task(folder, tmp_path_factory, monkeypatch, config):
    values = to_dict(config) | {"task": {"kind": "own.py:Successor", "last": 9}}
    (folder / "experiment.py").write_text(
        "from apr_jax.config import from_dict\n\n\n"
        f"def experiment():\n    return from_dict({values!r})\n"
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    loaded = load(folder / "experiment.py")
    assert make_task(loaded.task).score(Problem("p", {"number": 8}), "9").reward == 1


def test_task_breaking_its_promise_costs_only_the_answer(folder, capfd):
    (folder / "liar.py").write_text(
        OWN.replace("Score(float(correct), correct, answer or None)", "0.5")
    )
    task = make_task(TaskConfig("liar.py:Successor"))
    with SandboxedVerifier(task, time_limit=5.0, name="process 3: verifier") as verifier:
        assert verifier.verify([(Problem("p", {"number": 1}), "2")]) == [Failure.RAISED]
    assert "process 3: verifier: returned float, no Score" in capfd.readouterr().err
