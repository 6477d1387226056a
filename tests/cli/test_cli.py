"""The command line: every command has help with an example, and every error is one line."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from helpers.whole_runs import write_config

from apr_jax.cli.main import app, run

MODEL = Path(__file__).parents[2] / "experiments" / "mini" / "apr-rl.safetensors"
COMMANDS = [
    ("data", "build"),
    ("train", "sft"),
    ("train", "rl"),
    ("task", "check"),
    ("eval",),
    ("solve",),
    ("import",),
    ("export",),
    ("reproduce",),
    ("report",),
    ("ablation",),
    ("plan",),
    ("check",),
    ("new",),
    ("completion",),
    ("bench", "carry-over"),
    ("bench", "rollout"),
    ("bench", "decode"),
    ("bench", "schedule"),
    ("bench", "cache"),
    ("bench", "train"),
    ("bench", "solver"),
]


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory):
    """The tiny config as an experiment file."""
    return write_config(config, tmp_path_factory.mktemp("config") / "tiny.py")


@pytest.fixture
def failing(capfd):
    """Returns a function that runs a command that must fail.

    It returns the exit status and the one line on standard error.
    """

    def call(*arguments):
        status = run([str(argument) for argument in arguments])
        said = capfd.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert said[0].startswith("apr: ")
        return status, said[0]

    return call


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_parses(command, capsys):
    assert run([*command, "--help"]) == 0
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert f"Example: apr {' '.join(command)}" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_asks_apr(shell, capsys):
    assert run(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "_APR_COMPLETE" in said and f"complete_{shell}" in said


def test_bash_completes_commands_and_flags(monkeypatch, capsys):
    monkeypatch.setenv("_APR_COMPLETE", "complete_bash")
    for words, wanted in (("apr tr", "train"), ("apr plan --topo", "--topology")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert run([]) == 0
        assert capsys.readouterr().out.split() == [wanted]


def test_no_other_commands():
    found = []
    for name, command in typer.main.get_command(app).commands.items():
        if hasattr(command, "commands"):
            found += [(name, below) for below in command.commands]
        else:
            found.append((name,))
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (f"solve '22 26 2 = 46' --checkpoint {MODEL}", 2, "22 26 2 -> 46"),
        (f"solve '1 1 1 -> 99' --checkpoint {MODEL}", 2, "no solution"),
        ("solve '3 4 -> 7' --checkpoint /nowhere", 1, "/nowhere"),
        (f"eval --checkpoint {MODEL} --problems /nowhere.jsonl --out o", 2, "/nowhere.jsonl"),
        ("eval --problems p.jsonl --out o", 2, "--checkpoint"),
        ("reproduce --out o", 2, "--scale or --config"),
        ("reproduce --out o --scale huge", 2, "huge"),
        ("train sft --config /nowhere.py --workdir w", 2, "/nowhere.py"),
        ("report /nowhere", 1, "/nowhere"),
        ("plan --config experiments/nano.py --topology v9:4x4", 2, "v9"),
        ("bench rollout --repeats 1", 2, "repeats"),
        ("bench rollout --checkpoint x", 2, "both --checkpoint and --problems"),
        ("export --checkpoint /nowhere --out o", 1, "/nowhere"),
        ("fly", 2, "fly"),
    ],
)
def test_wrong_use_is_one_line(failing, tmp_path, monkeypatch, arguments, status, message):
    found, line = failing(*shlex.split(arguments))
    assert found == status
    assert message in line


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.context_buckets=32,x", "'32,x' is not of type tuple"),
        (
            "schedule.context_buckets=32,16",
            "schedule.context_buckets=(32, 16) must be positive and increasing",
        ),
        ("train.sft.stepz=3", "did you mean 'train.sft.steps'"),
        ("train.sft.steps=many", "'many' is not of type int"),
        ("train.sft=3", "is a group of fields"),
        ("train.sft.steps", "write it as field=value"),
        ("limits.window=6", "limits.window=6"),
        ("limits.children=9", "limits.children=9"),
        ("model.kv_heads=3", "kv_heads=3"),
        ("mesh.data=64", "mesh data=64"),
        ("train.sft.batch_rows=3", "train.sft.batch_rows=3: must be a multiple of the 2 shards"),
        ("train.rl.objective.clip=-1", "train.rl.objective.clip=-1.0 must be positive"),
        ("mesh.data=-1", "mesh.data=-1 must be at least 0"),
        ("mesh.fsdp=0", "mesh.fsdp=0 must be at least 1"),
        ("mesh.tensor=-1", "mesh.tensor=-1 must be at least 0"),
        ("seed=-1", "config seed=-1 must be from 0 to 4294967295"),
        ("seed=4294967296", "config seed=4294967296 must be from 0 to 4294967295"),
        (
            "seed=100000000000000000000",
            "config seed=100000000000000000000 must be from 0 to 4294967295",
        ),
        ("data.seed=-1", "data.seed=-1 must be from 0 to 4294967295"),
        ("data.seed=4294967296", "data.seed=4294967296 must be from 0 to 4294967295"),
        (
            "train.rl.steps=2147483648",
            "config train.rl.steps=2147483648 must be from -2147483647 to 2147483647",
        ),
        (
            "evaluate.children=1,2147483648",
            "config evaluate.children=(1, 2147483648) must be from -2147483647 to 2147483647",
        ),
        ("model.rope_base=1", "model.rope_base=1.0 must be above 1"),
        ("model.rope_base=nan", "model.rope_base=nan must be above 1"),
        ("model.norm_epsilon=0", "model.norm_epsilon=0.0 must be between 0 and 1"),
        ("model.rope_scaling.factor=0.5", "model.rope_scaling.factor=0.5 must be at least 1"),
        (
            "model.rope_scaling.low_frequency_turns=5",
            "model.rope_scaling.low_frequency_turns=5.0 must be above 0 and below"
            " model.rope_scaling.high_frequency_turns=4.0",
        ),
        (
            "model.rope_scaling.original_length=0",
            "model.rope_scaling.original_length=0 must be at least 1",
        ),
    ],
)
def test_a_config_out_of_range_names_the_field(
    failing, config_file, data_dir, tmp_path, setting, message
):
    status, line = failing(
        "train",
        "sft",
        "--config",
        config_file,
        "--data",
        data_dir,
        "--workdir",
        tmp_path / "w",
        "--set",
        setting,
    )
    assert status == 2
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import nothing_of_this_name\n",
            "own.py, line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("\nhalf = 1 / 0\n", "own.py, line 2: ZeroDivisionError: division by zero"),
        ("def experiment():\n    return {}['mini']\n", "own.py, line 2: KeyError: 'mini'"),
        ("def experiment(:\n", "own.py: SyntaxError: "),
        (
            "from apr_jax.config import MeshConfig\nMeshConfig(fsdp=0)\n",
            "own.py, line 2: mesh.fsdp=0 must be at least 1",
        ),
        ("experiment = 3\n", "own.py: has no function experiment()"),
        ("", "own.py: has no function experiment()"),
        (
            "def experiment():\n    return 3\n",
            "own.py: experiment() returned int, not an Experiment",
        ),
    ],
)
def test_an_experiment_file_that_fails_is_named(failing, tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    status, line = failing(
        "data", "build", "--config", tmp_path / "own.py", "--out", tmp_path / "data"
    )
    assert status == 2
    assert message in line and "APR_DEBUG" not in line


def test_a_folder_is_no_experiment_file(failing, tmp_path):
    status, line = failing("data", "build", "--config", tmp_path, "--out", tmp_path / "data")
    assert status == 2
    assert f"config {tmp_path}: is a folder" in line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", "numbers": [1, 2], "target": 3', "line 2"),
        ('{"id": "x", "numbers": [1, "2"], "target": 3}', "numbers"),
        ('{"id": "x", "numbers": [1, 2]}', "target"),
        ('{"id": "x", "numbers": [], "target": 3}', "numbers"),
        ('{"id": "x", "numbers": [1, 2], "target": true}', "target"),
    ],
)
def test_a_malformed_problems_file_names_the_line(failing, checkpoint, tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "a", "numbers": [3, 4, 5], "target": 12}\n' + line + "\n")
    status, said = failing(
        "eval", "--checkpoint", checkpoint, "--problems", path, "--out", tmp_path / "out"
    )
    assert status == 2
    assert f"{path}, line 2" in said and message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_damaged_checkpoint_is_named_and_others_still_serve(failing, checkpoint, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(checkpoint, copy)
    steps = sorted((copy / "checkpoints").iterdir(), key=lambda step: int(step.name))
    for file in steps[-1].rglob("*"):
        if file.is_file() and "params" in file.parts:
            file.write_bytes(b"\x00" * 10)
    status, line = failing("solve", "3 4 5 -> 12", "--checkpoint", steps[-1])
    assert status == 1
    assert str(steps[-1]) in line
    assert run(["solve", "3 4 5 -> 12", "--checkpoint", str(steps[-2])]) == 0


@pytest.mark.parametrize("command", ["eval", "export", "train rl"])
def test_a_run_whose_best_step_is_unknown_is_refused(
    failing, checkpoint, config_file, data_dir, tmp_path, command
):
    """The metadata of one step are cut off; an older step would silently be another model."""
    copy = tmp_path / "run"
    shutil.copytree(checkpoint, copy)
    newest = max((copy / "checkpoints").iterdir(), key=lambda step: int(step.name))
    os.truncate(newest / "meta" / "metadata", 100)
    arguments = {
        "eval": [
            "--checkpoint",
            copy,
            "--problems",
            data_dir / "test.jsonl",
            "--out",
            tmp_path / "out",
        ],
        "export": ["--checkpoint", copy, "--out", tmp_path / "out"],
        "train rl": [
            "--config",
            config_file,
            "--data",
            data_dir,
            "--workdir",
            tmp_path / "out",
            "--init",
            copy,
        ],
    }[command]
    status, line = failing(*command.split(), *arguments)
    assert status == 1
    assert str(newest) in line and "damaged" in line and "to take another step, name it" in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("command", ["train sft", "eval", "data build", "reproduce"])
def test_a_second_writer_is_refused_and_changes_nothing(
    failing, checkpoint, config_file, data_dir, tmp_path, command
):
    """Another process, which still runs, holds the folder."""
    folder = tmp_path / "out"
    holder = "import sys, pathlib\nfrom apr_jax.io.lease import Lease\n"
    holder += (
        "with Lease(pathlib.Path(sys.argv[1]), 'training'):\n    print(flush=True)\n   "
        " sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    arguments = {
        "train sft": ["--config", config_file, "--data", data_dir, "--workdir", folder],
        "eval": [
            "--checkpoint",
            checkpoint,
            "--problems",
            data_dir / "test.jsonl",
            "--out",
            folder,
        ],
        "data build": ["--config", config_file, "--out", folder],
        "reproduce": ["--config", config_file, "--out", folder],
    }[command]
    with subprocess.Popen([sys.executable, "-c", holder, str(folder)], **pipes) as process:
        process.stdout.readline()
        status, line = failing(*command.split(), *arguments)
        assert [entry.name for entry in folder.iterdir()] == ["lease.json"]
    assert status == 1
    told = (
        rf"apr: error: {folder}: is being written by process {process.pid} on host .* \(training,"
        r" since .*\), which lives"
    )
    assert re.match(told, line)


def test_an_error_without_a_word_says_where_it_was(failing, monkeypatch):
    def failed(*arguments):
        raise AssertionError

    monkeypatch.setattr("apr_jax.report.solve.solve", failed)
    status, line = failing("solve", "3 4 5 -> 12", "--checkpoint", MODEL)
    assert status == 1 and re.search(
        r"AssertionError in test_cli.py, line \d+; APR_DEBUG=1 shows where", line
    )


def test_solve_prints_the_tree_and_writes_its_viewer(checkpoint, tmp_path, capsys):
    page = tmp_path / "tree.html"
    file = tmp_path / "tree.json"
    command = ["solve", "3 4 5 -> 12", "--checkpoint", str(checkpoint), "--html", str(page)]
    assert run([*command, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["data"]["target"] == 12
    said = capsys.readouterr().out
    assert "root" in said and "tokens" in said and str(page) in said.replace("\n", "")
    assert "3 4 5 -&gt; 12" in page.read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_solve_where_the_output_is_not_utf8(checkpoint, tmp_path, monkeypatch, encoding):
    """The decode slots of the tree are drawn with what there is, and the page is written."""
    page = tmp_path / "tree-ß日.html"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert run(["solve", "3 4 5 -> 12", "--checkpoint", str(checkpoint), "--html", str(page)]) == 0
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue().decode(encoding)
    assert "root" in said and "-+-" in said and "tokens" in said
    assert f"tree-{'?' if encoding == 'ascii' else 'ß'}?.html" in said
    assert "3 4 5 -&gt; 12" in page.read_text(encoding="utf-8")


def test_full_disk_names_page_and_keeps_older_one(failing, checkpoint, tmp_path, monkeypatch):
    page = tmp_path / "tree.html"
    page.write_text("older")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status, line = failing("solve", "3 4 5 -> 12", "--checkpoint", checkpoint, "--html", page)
    assert status == 1
    assert f"no space left on the disk while writing {page}" in line
    assert page.read_text() == "older"
    assert list(tmp_path.iterdir()) == [page], "no half file is left"


def test_no_control_character_of_a_file_reaches_the_terminal(failing, tmp_path):
    """A message quotes the file, which could clear the screen or fake another message."""
    path = tmp_path / "p.jsonl"
    path.write_text("\x1b[2J \x9b1A \x1b]0;owned\x07 \u202e\n")
    status, line = failing(
        "eval", "--checkpoint", MODEL, "--problems", path, "--out", tmp_path / "out"
    )
    assert status == 2
    assert "is not JSON: ␛[2J \\x9b1A ␛]0;owned␇ \\u202e; expected" in line


def test_eval_from_the_command_line(checkpoint, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"id": "a", "numbers": [3, 4, 5], "target": 12}\n')
    arguments = [
        "eval",
        "--checkpoint",
        str(checkpoint),
        "--problems",
        str(problems),
        "--out",
        str(tmp_path / "out"),
    ]
    file = tmp_path / "figures.json"
    settings = ["--samples", "3", "--temperature", "0.5", "--window", "40", "--json", str(file)]
    assert run([*arguments, *settings]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n"] == 1 and json.loads(file.read_text()) == summary
    assert len((tmp_path / "out" / "traces.jsonl").read_text().splitlines()) == 3


@pytest.mark.thorough
def test_ctrl_c_saves_and_says_so(config_file, data_dir, tmp_path):
    """A real process, a real signal, and the same command again to the end."""
    command = [
        sys.executable,
        "-m",
        "apr_jax",
        "train",
        "sft",
        "--config",
        str(config_file),
        "--data",
        str(data_dir),
    ]
    command += [
        "--workdir",
        str(tmp_path),
        "--set",
        "train.sft.steps=100000",
        "--set",
        "train.sft.save_every=100000",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "100"}
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and not (metrics.exists() and metrics.read_text())
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 130, said
    assert re.search(
        r"apr: interrupted; step \d+ is saved in .*; the same command goes on from there", said
    )
    assert "Traceback" not in said
