"""Data from a file of thread trees: the same examples as from the task itself, and a whole run."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.anagrams import experiment, own_demonstrations, some_demonstrations

from apr_jax.cli import main
from apr_jax.cli.train import _default_method
from apr_jax.config import ConfigError, override
from apr_jax.data import build as building
from apr_jax.data import dataset
from apr_jax.data.build import build, check_built, file_method
from apr_jax.data.tree_files import Demonstration, load_trees, save_trees
from apr_jax.errors import UsageError, UserError
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.runner import evaluate
from apr_jax.tasks import (
    Condition,
    Method,
    Spawn,
    TaskConfig,
    Thread,
    load_problems,
    make_task,
)
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.checkpoint.exported import export_file
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft


def record_of(out: Path) -> dict:
    return json.loads((out / "data.json").read_text())


def examples_of(out: Path, method: str) -> list[dict[str, np.ndarray]]:
    """Examples whose tokens are pieces: two tokenizers may number them differently."""
    pieces = np.array(SentencePieceTokenizer((out / "tokenizer.model").read_bytes()).pieces)
    source = dataset.read(out, method, "train")
    stored = [source[k] for k in range(len(source))]
    return [example | {"tokens": pieces[example["tokens"]]} for example in stored]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Data that the task itself has demonstrated."""
    out = tmp_path_factory.mktemp("own")
    build(experiment(25), out, progress=False, workers=1)
    return out


@pytest.fixture(scope="module")
def file(own, tmp_path_factory):
    """The parallel demonstrations of these data as a file."""
    path = tmp_path_factory.mktemp("file") / "trees.jsonl"
    save_trees(own_demonstrations(experiment(25), own, "parallel"), path)
    return path


@pytest.fixture(scope="module")
def data(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("given")
    build(experiment(str(file)), out, progress=False, workers=1)
    return out


def test_a_file_gives_the_examples_of_the_task_itself(own, data):
    expected = examples_of(own, "parallel")
    examples = examples_of(data, "file")
    assert len(examples) == len(expected) == 25
    for example, same in zip(examples, expected, strict=True):
        assert example.keys() == same.keys()
        for name, values in example.items():
            np.testing.assert_array_equal(values, same[name], err_msg=name)
    ours = record_of(data)["methods"]["file"]["train"]
    theirs = record_of(own)["methods"]["parallel"]["train"]
    assert {name: ours[name] for name in theirs if name != "sha256"} == {
        name: value for name, value in theirs.items() if name != "sha256"
    }


def test_its_problems_train_and_no_others_are_held_out(own, data, file):
    assert (data / "train.jsonl").read_bytes() == (own / "train.jsonl").read_bytes()
    task = make_task(experiment(1).task)
    parts = [load_problems(data / f"{name}.jsonl", task) for name in ("validation", "test")]
    assert list(map(len, parts)) == [3, 3]
    given = {task.key(demonstration.problem) for demonstration in load_trees(file, task)}
    validation, test = ({task.key(problem) for problem in part} for part in parts)
    assert not given & validation and not given & test and not validation & test
    record = record_of(data)
    assert list(record["methods"]) == ["file"]
    assert record["file"] == {
        "name": "trees.jsonl",
        "sha256": record["settings"]["data.demonstrations_sha256"],
        "demonstrations": 25,
        "parallel": True,
        "depth": 1,
    }


def test_a_file_is_built_alike_by_any_number_of_workers(data, file, tmp_path):
    build(experiment(str(file)), tmp_path, progress=False, workers=2)
    assert record_of(tmp_path) == record_of(data)


@pytest.mark.thorough
def test_a_run_on_a_file_is_trained_and_evaluated(data, file, tmp_path):
    config = experiment(str(file))
    file_of_run = tmp_path / "elsewhere" / "trees.jsonl"
    file_of_run.parent.mkdir()
    shutil.copy(file, file_of_run)
    moved = experiment(str(file_of_run))
    file_of_run.unlink()  # Whoever trains needs the data only.

    state = train_sft(moved, data, tmp_path / "sft", _default_method(config), progress=False)
    assert int(state.step) == 2
    train_rl(moved, data, tmp_path / "rl", tmp_path / "sft", progress=False)
    for stage in ("sft", "rl"):
        restored = load_checkpoint(tmp_path / stage)
        assert restored.method == "file"
        assert restored.file_method == Method(parallel=True, depth=1)
    problems = load_problems(data / "test.jsonl", make_task(config.task))
    # Two children are forced, which a model without threads would refuse.
    summary = evaluate(restored, problems, tmp_path / "eval", Decoding(forced=2))
    assert summary["n"] == 3 and summary["method"] == "file"


@pytest.mark.thorough
def test_a_model_of_trees_that_never_spawn_is_known_as_serial(own, tmp_path):
    """Though its limits have room for children, none can be forced: it never saw any."""
    path = tmp_path / "trees.jsonl"
    save_trees(own_demonstrations(experiment(25), own, "serial"), path)
    config = experiment(str(path))
    build(config, tmp_path / "data", progress=False, workers=1)
    train_sft(config, tmp_path / "data", tmp_path / "sft", "file", progress=False)
    export_file(load_checkpoint(tmp_path / "sft"), tmp_path / "model.safetensors")
    problems = load_problems(tmp_path / "data" / "test.jsonl", make_task(config.task))
    for model in ("sft", "model.safetensors"):
        restored = load_checkpoint(tmp_path / model)
        assert restored.file_method == Method(parallel=False)
        with pytest.raises(UsageError, match="--force-children 2: .* have no children"):
            evaluate(restored, problems, tmp_path / "eval", Decoding(forced=2))


def test_the_conditions_of_a_file_are_those_that_a_model_may_be_given(data, file, tmp_path):
    """The task's prompts state none, so the built data are told to hold some."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    config = experiment(str(file))
    record = record_of(tmp_path)
    assert file_method(config, tmp_path) == Method(parallel=True, depth=1)
    assert file_method(experiment(25), tmp_path) is None
    record["methods"]["file"]["train"]["conditions"] = {"5": 1, "2": 7, "11": 2}
    (tmp_path / "data.json").write_text(json.dumps(record))
    assert file_method(config, tmp_path) == Method(True, 1, Condition("of the file", 2, 11))
    del record["file"]["depth"]
    (tmp_path / "data.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="data.json: does not say how deep the threads"):
        file_method(config, tmp_path)


def test_an_interrupted_build_goes_on(data, file, tmp_path, monkeypatch):
    config = experiment(str(file))
    write = dataset.write

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(building.dataset, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        build(config, tmp_path, progress=False, workers=1)
    assert record_of(tmp_path)["methods"] == {}
    monkeypatch.setattr(building.dataset, "write", write)
    facts = build(config, tmp_path, progress=False, workers=1)
    assert record_of(tmp_path) == record_of(data)
    monkeypatch.setattr(building.dataset, "write", stop)
    assert build(config, tmp_path, progress=False, workers=1) == facts, "all is there"


def test_a_changed_file_is_noticed(file, tmp_path):
    mine = tmp_path / "trees.jsonl"
    shutil.copy(file, mine)
    config = experiment(str(mine))
    build(config, tmp_path / "data", progress=False, workers=1)
    mine.write_text(mine.read_text() + "\n")
    with pytest.raises(UsageError, match="data.demonstrations_sha256="):
        build(config, tmp_path / "data", progress=False, workers=1)
    check_built(config, tmp_path / "data")  # The data are whole all the same.
    with pytest.raises(UsageError, match="data.demonstrations='trees.jsonl', now .*=25"):
        check_built(experiment(25), tmp_path / "data")
    with pytest.raises(UsageError, match="No such file"):
        build(experiment(str(tmp_path / "none.jsonl")), tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_what_cannot_train_is_counted(own, tmp_path):
    task = make_task(experiment(1).task)
    made = own_demonstrations(experiment(25), own, "parallel")[:12]
    wide = Thread(made[0].thread.prompt, (Spawn((Thread("", (), ""),) * 5),), "")
    deep = Thread(
        made[1].thread.prompt, (Spawn((Thread("", (Spawn((Thread("", (), ""),)),), ""),)),), ""
    )
    long = Thread(made[2].thread.prompt, ("a" * 64,), "")
    wrong = Thread(made[3].thread.prompt, ("a",), "zzz")
    odd = [
        Demonstration(made[k].problem, thread) for k, thread in enumerate((wide, deep, long, wrong))
    ]
    save_trees(made + odd, tmp_path / "trees.jsonl")
    config = experiment(str(tmp_path / "trees.jsonl"), correct_only=True)
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text(json.dumps(made[7].problem.to_json()))
    facts = build(config, tmp_path / "data", [exclude], progress=False, workers=1)["file"]
    assert facts["dropped"] == {"window": 1, "max_thread_tokens": 0, "threads": 2, "wrong": 1}
    assert facts["left_out"] == {"excluded": 1, "heldout": 0}
    assert facts["demonstrations"] == 11
    problems = load_problems(tmp_path / "data" / "train.jsonl", task)
    assert problems == [found.problem for found in made if found is not made[7]]


def test_demonstrations_of_held_out_groups_are_left_out(tmp_path):
    # Problems of Countdown are of one group if they share their numbers.
    countdown = TaskConfig("countdown", numbers=3, high=9, target_high=30)
    config = dataclasses.replace(experiment(1), task=countdown)
    task = make_task(countdown)
    drawn = {task.key(problem): problem for problem in map(task.draw, range(120))}
    made = [
        Demonstration(problem, Thread(task.prompt(problem), (), "")) for problem in drawn.values()
    ]
    path = tmp_path / "trees.jsonl"
    save_trees(made, path)
    data = dataclasses.replace(config.data, demonstrations=str(path), heldout=6)
    config = dataclasses.replace(config, data=data)
    facts = build(config, tmp_path / "data", progress=False, workers=1)["file"]
    left_out = facts["left_out"]["heldout"]
    assert 0 < left_out < len(made) == left_out + facts["demonstrations"]

    parts = {
        name: load_problems(tmp_path / "data" / f"{name}.jsonl", task)
        for name in ("train", "validation", "test")
    }
    heldout = [*parts["validation"], *parts["test"]]
    assert not set(map(task.group, parts["train"])) & set(map(task.group, heldout))
    # Of the problems that were left out, too, none is held out.
    assert not drawn.keys() & set(map(task.key, heldout))


def test_settings_take_a_number_or_a_file():
    config = experiment(25)
    given = override(config, ["data.demonstrations=some/trees.jsonl"])
    assert given.data.file == given.data.demonstrations == "some/trees.jsonl"
    again = override(given, ["data.demonstrations=7"])
    assert again.data.demonstrations == 7 and again.data.file is None
    for wrong in ("many", "2.5", "", "trees.json", "0", "-3"):
        with pytest.raises(ConfigError, match=r"data\.demonstrations="):
            override(config, [f"data.demonstrations={wrong}"])


def test_a_file_has_one_method(file, tmp_path):
    with pytest.raises(UsageError, match="method='serial': .* whose one method is 'file'"):
        build(experiment(str(file)), tmp_path, methods=["serial"], progress=False)
    with pytest.raises(UsageError, match="method='file': task .* it has serial, parallel"):
        build(experiment(25), tmp_path, methods=["file"], progress=False)


def test_the_command_builds_from_a_file(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_trees(some_demonstrations(make_task(experiment(1).task), 20), "trees.jsonl")
    shutil.copy(Path(__file__).parents[2] / "examples" / "anagrams.py", "anagrams.py")
    Path("experiment.py").write_text(
        "from helpers.anagrams import experiment as make\n\n\ndef experiment():\n"
        "    return make(25)\n"
    )
    words = ["data", "build", "--config", "experiment.py", "--out", "data"]
    words += ["--set", "data.demonstrations=trees.jsonl"]
    assert main.run(words) == 0
    assert "file" in capsys.readouterr().out
    lines = Path("trees.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace('"answer"', '"anwser"', 1)
    Path("trees.jsonl").write_text("\n".join(lines))
    words[words.index("data", 2)] = "other"
    assert main.run(words) == 2
    message = capsys.readouterr().err
    assert "thread trees trees.jsonl, line 5: thread" in message and "\n" not in message.strip()
