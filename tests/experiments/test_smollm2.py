"""The long run of a pretrained model: its task, its stages, and that it goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import foreign

from apr_jax.cli import main
from apr_jax.config import load
from apr_jax.evaluate.scores import MEASURES, summarize
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import Spawn, Thread, make_task
from apr_jax.train.checkpoint import import_folder, save_pretrained

FOLDER = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(FOLDER))
import smollm2  # noqa: E402  # experiments/ is a folder of scripts, no package.

ONE_DEVICE = "--xla_force_host_platform_device_count=1"
MODEL = ModelConfig(layers=1, width=32, heads=4, kv_heads=2, head_size=8, mlp=48)


@pytest.fixture(scope="module")
def legs():
    return make_task(load(FOLDER / "smollm2_legs.py").task)


def test_both_methods_count_legs_item_by_item(legs):
    problem = legs.draw(3)
    assert " if you have 15 lobsters, 14 ducks, 8 beetles, " in problem.data["question"]

    serial = legs.demonstrate(problem, "serial", 0)
    assert serial.body[0].startswith("15 lobsters*10=150;14 ducks*2=28+150=178;8 beetles*6=48+178=")
    tree = legs.demonstrate(problem, "parallel", 0)
    spawn, sums = tree.body
    assert spawn.children[1] == Thread("14 ducks", ("*2=",), "28")
    assert sums.startswith("150+28=178+48=226")
    assert serial.answer == tree.answer == "256"


@pytest.mark.parametrize("method", ["serial", "parallel"])
def test_demonstrations_are_right_and_without_fault(legs, method):
    for seed in range(30):
        problem = legs.draw(seed)
        thread = legs.demonstrate(problem, method, 0)
        assert legs.score(problem, thread.answer).correct
        assert not _kinds(legs, problem, thread)


@pytest.mark.parametrize(
    ("thread", "kind"),
    [
        (Thread("", ("15 lobsters*8=120",), "120"), "legs"),
        (Thread("", ("15 lobsters*10=140",), "140"), "product"),
        (Thread("", ("15 lobsters*10=150;14 ducks*2=28+150=188",), "188"), "sum"),
        (Thread("", (Spawn((Thread("14 lobsters", (), ""),)),), ""), "message"),
        (Thread("14 ducks", ("*4=",), "56"), "legs"),
        (Thread("14 ducks", ("*2=",), "38"), "product"),
        (Thread("", ("150+28=168",), "168"), "sum"),
        (Thread("", ("150+28=178+48=236",), "236"), "sum"),
    ],
)
def test_faults_are_told_apart(legs, thread, kind):
    assert _kinds(legs, legs.draw(3), thread) == [kind]


@pytest.mark.parametrize(
    ("thread", "kinds"),
    [
        (Thread("", ("15 lobsters*10=1",), ""), []),
        (Thread("", ("15 lobsters*10=150;14 ducks*2=28+150=1",), ""), []),
        (Thread("", ("150+28=178+48=2",), ""), []),
        (Thread("14 ducks", ("*2=",), ""), []),
        # What stands before the half number is whole.
        (Thread("14 ducks", ("*4=",), ""), ["legs"]),
        (Thread("", ("15 lobsters*10=140;14 ducks*2=2",), ""), ["product"]),
        (Thread("", ("150+28=168+48=2",), ""), ["sum"]),
    ],
)
def test_half_a_number_of_a_cut_thread_is_no_fault(legs, thread, kinds):
    assert _kinds(legs, legs.draw(3), thread, cut=True) == kinds


def test_a_question_of_another_form_is_refused(legs, monkeypatch):
    problem = legs.draw(3)
    entry = legs._entry(problem.data["seed"])
    other = {**entry, "question": entry["question"].replace(", 14 ducks", " and 14 ducks")}
    monkeypatch.setattr(legs, "_entry", lambda seed: other)
    with pytest.raises(ValueError, match=r"problem entry-3: its question lists \d animals and its"):
        legs.demonstrate(problem, "serial", 0)


def _kinds(task, problem, thread, cut=False):
    """Lists the faults of a tree: those of the root, then of its children."""
    own = [fault.kind for fault in task.diagnose(problem, thread, cut).faults]
    spawns = [part for part in thread.body if isinstance(part, Spawn)]
    if not own:
        own = [
            kind
            for spawn in spawns
            for child in spawn.children
            for kind in _kinds(task, problem, child)
        ]
    return own


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["countdown", "legs"])
def test_the_tasks_are_without_faults(name, capsys):
    # The window is one of SmolLM2's tokens, of which a question has fewer than letters.
    wide = ["--set", "limits.window=600", "--set", "limits.max_thread_tokens=700"]
    command = ["task", "check", "--config", str(FOLDER / f"smollm2_{name}.py"), *wide]
    assert main.run(command) == 0
    assert "FAULT" not in capsys.readouterr().out.upper()


def test_the_report_is_made_of_the_answers_and_metrics(tmp_path):
    run = smollm2.Run(tmp_path)
    for folder, evaluation in run.evaluations():
        before_rl = folder == "legs" and evaluation.decoding.temperature
        answers = {"right": 2 if before_rl else 3}
        if (folder, evaluation.model) == ("rl", "tree/rl"):
            answers = {"right": 4, "children": 9, "total_tokens": 5}
        elif evaluation.model == "lora/sft":
            answers = {"right": 1, "children": 8, "total_tokens": 6}
        _write_answers(tmp_path / folder / "eval" / evaluation.name, **answers)
    _run_stage(run, "rl/choice")
    assert run.chosen() == "countdown"  # Its samples are right 3 times in 4, those of legs twice.

    for training in smollm2.TRAININGS:
        lines = [
            {"step": step, "loss": 9 - step, "epochs": step / 4}
            | ({"validation_accuracy": 0.5} if step == 2 else {})
            for step in range(1, 5)
        ]
        _write_lines(tmp_path / training.name / "metrics.jsonl", lines)
        methods = {method: {"train": {"demonstrations": 80}} for method in _METHODS}
        built = tmp_path / training.data / "data"
        built.mkdir(exist_ok=True)
        (built / "data.json").write_text(json.dumps({"methods": methods}))
    _write_lines(tmp_path / "rl/tree/rl/metrics.jsonl", [{"step": 1, "accuracy": 0.5}])

    _run_stage(run, "report")
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["main"]) == len(run.evaluations())
    assert found["main"]["rl-tree-rl"]["label"] == "Countdown, a tree of threads, after RL"
    gains = {name: gap["gap"] for name, gap in found["rl"]["gains"]["greedy"].items()}
    assert gains == {"accuracy": 0.25, "children": 2, "total_tokens": -2}
    by_adapters = {name: gap["gap"] for name, gap in found["lora"].items()}
    assert by_adapters == {"accuracy": -0.5, "children": 1, "total_tokens": -1}
    # Each line of a panel has its label, after the title and the axis.
    curves = (tmp_path / "losses.svg").read_text()
    assert all(f">{label}<" in curves for label in smollm2.CURVES["legs"].values())
    windows = {row["limit"] for row in found["comparisons"] if row["equal"] == "window"}
    assert windows == {160, 224, 320}  # The window they learned in and two smaller ones.
    course = found["courses"]["legs/lora/sft"]
    assert [row["examples"] for row in course] == [20, 40, 60, 80]
    assert course[1]["validation_accuracy"] == 0.5


_METHODS = ("apr", "serial", "parallel")


def _run_stage(run, name):
    (stage,) = (stage for stage in run.stages() if stage.name == name)
    stage.run()


def _write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_answers(folder, right, **measures):
    """Writes an evaluation of four problems, of which the first `right` are right; other measures
    than those that are given are 7.
    """
    traces = [
        {"id": str(index), "sample": 0, "data": {}, "correct": index < right, "reward": 0.0}
        | {"stated": None, "claimed": False, "threads": [{"status": "MALFORMED"}]}
        | dict.fromkeys(MEASURES, 7)
        | measures
        for index in range(4)
    ]
    _write_lines(folder / "traces.jsonl", traces)
    (folder / "summary.json").write_text(json.dumps(summarize(traces) | {"step": 4}))


@pytest.fixture
def out(tmp_path, legs):
    """A folder of a run that has its model already: a tiny one of random weights."""
    questions = [legs.draw(seed).data["question"] for seed in range(50)]
    tokenizer = foreign.byte_level(vocab_size=500, sentences=questions)
    folder = foreign.write_folder(tmp_path / "hf", MODEL, tokenizer)
    (tmp_path / "run").mkdir()
    save_pretrained(import_folder(folder), tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "parity.json").write_text("{}")  # It was compared, too.
    return tmp_path / "run"


@pytest.mark.slow
def test_a_killed_run_goes_on_to_its_report(out):
    command = [sys.executable, str(FOLDER / "smollm2.py"), "--quick", "--out", str(out)]
    # On one device: most of the time is compiling.
    one = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_DEVICE}"}
    first = subprocess.Popen(command, env=os.environ | one)
    while not (out / "legs/serial/sft/checkpoints").is_dir():
        assert first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    seconds = json.loads((out / "stages.json").read_text())["countdown/apr/sft"]["seconds"]
    assert not (out / "results.json").exists()

    subprocess.run(command, check=True, env=os.environ | one)
    found = json.loads((out / "results.json").read_text())
    assert found["seconds"]["countdown/apr/sft"] == seconds  # It did not run again.
    assert len(found["main"]) == len(smollm2.Run(out, quick=True).evaluations())
    assert found["rl"]["task"] in smollm2.TREES
    assert len(found["rl_steps"]) == 2
    assert {row["equal"] for row in found["comparisons"]} >= {"window"}
    assert all(course[-1]["examples"] > 0 for course in found["courses"].values())
