"""A task in a file outside the library, from nothing to an evaluated model, by the command line
alone.
"""

import json
import shutil
from pathlib import Path

import pytest

from apr_jax.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "anagrams.py"
EXPERIMENT = """
from apr_jax.config import EvalConfig, Experiment, MeshConfig
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment():
    optimizer = OptimizerConfig(lr=1e-3, warmup=1)
    return Experiment(
        name="anagrams",
        seed=0,
        task=TaskConfig("anagrams.py:Anagrams", letters=2),
        data=DataConfig(demonstrations=12, heldout=2),
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_size=8, mlp=16),
        limits=Limits(
            window=32, max_thread_tokens=40, max_threads=5, children=4, max_depth=1, max_tokens=60
        ),
        schedule=Schedule(slots=4, prefill_batch=2, prefill_chunk=8),
        train=TrainConfig(
            sft=SftConfig(steps=2, batch_rows=4, optimizer=optimizer, validate_every=2, validation=2),
            rl=RlConfig(
                steps=1,
                problems=2,
                group=2,
                micro_batch_rows=4,
                objective=ObjectiveConfig(),
                optimizer=optimizer,
                validation=2,
            ),
        ),
        evaluate=EvalConfig(batch=4, problems=2),
        mesh=MeshConfig(data=1),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(EXAMPLE, folder / "anagrams.py")
    (folder / "experiment.py").write_text(EXPERIMENT)
    return folder


def apr(*words):
    assert main.run([str(word) for word in words]) == 0


@pytest.mark.thorough
def test_task_file_is_trained_evaluated_and_shown(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    config = ("--config", "experiment.py")
    apr("data", "build", *config, "--out", "data")
    built = json.loads((folder / "data" / "data.json").read_text())["methods"]
    assert built.keys() == {"serial", "parallel"}
    apr("train", "sft", *config, "--data", "data", "--workdir", "sft")
    apr("train", "rl", *config, "--data", "data", "--workdir", "rl", "--init", "sft")
    apr("eval", "--checkpoint", "rl", "--problems", "data/test.jsonl", "--out", "eval")
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    assert (summary["n"], summary["unknown"], summary["method"]) == (2, 0, "parallel")
    trace = json.loads((folder / "eval" / "traces.jsonl").read_text().splitlines()[0])
    assert trace["problem"] == f"{trace['data']['letters']}:"
    capsys.readouterr()
    apr("solve", '{"letters": "da"}', "--checkpoint", "rl", "--html", "tree.html")
    assert "root" in capsys.readouterr().out and "da:" in (folder / "tree.html").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("data", "build", "--out", "x", "--method", "apr"), "it has serial, parallel"),
        (
            ("data", "build", "--out", "x", "--set", "task.letters=9"),
            "task.letters=9 must be from 2",
        ),
        (("data", "build", "--out", "x", "--set", "data.heldout=99"), "found only"),
    ],
)
def test_what_does_not_fit_the_task_is_one_line(folder, monkeypatch, capsys, words, line):
    monkeypatch.chdir(folder)
    assert main.run([*words, "--config", "experiment.py"]) == 2
    told = capsys.readouterr().err
    assert line in told and "\n" not in told.strip()
