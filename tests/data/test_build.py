"""Building: what is on disk, the same for any number of workers, complete or refused, and without
TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from helpers.puzzles import read_problems, with_solver
from helpers.small_data import NANO, problem_of, small
from tensorflow_datasets.proto import tf_example_pb2

from apr_jax.config import override
from apr_jax.data import dataset
from apr_jax.data.build import build, few_problems, problem_counts
from apr_jax.data.demonstrate import Counts, Workers, unflatten
from apr_jax.data.encode import read_thread
from apr_jax.data.statistics import statistics, wilson
from apr_jax.errors import UsageError, UserError
from apr_jax.tasks import Problem, TaskConfig, flatten, make_task, save_problems
from apr_jax.tasks.countdown.problems import numbers_of
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem, problem_key
from apr_jax.text.stored import tokenizer_from_bytes

PARTS = ("train", "validation", "test")


def record_of(out: Path) -> dict:
    return json.loads((out / "data.json").read_text())


def examples_of(out: Path, method: str, split: str) -> list[dict]:
    source = dataset.read(out, method, split)
    return [source[k] for k in range(len(source))]


def problems_of(out: Path, method: str, split: str) -> list[Problem]:
    tokenizer = tokenizer_from_bytes((out / "tokenizer.model").read_bytes())
    return [problem_of(example, tokenizer) for example in examples_of(out, method, split)]


def keys_of(out: Path, method: str, split: str) -> list:
    return list(map(problem_key, problems_of(out, method, split)))


def shown(problems: list[Problem]) -> list:
    """Without their names."""
    return [(Puzzle.of(problem).numbers, Puzzle.of(problem).target) for problem in problems]


def test_what_is_stored_are_the_demonstrations(config, data_dir):
    tokenizer = tokenizer_from_bytes((data_dir / "tokenizer.model").read_bytes())
    task = make_task(config.task)
    for method in ("sos", "sos+", "apr"):
        facts = record_of(data_dir)["methods"][method]["train"]
        examples = examples_of(data_dir, method, "train")
        assert facts["demonstrations"] == len(examples)
        assert len(examples) + sum(facts["dropped"].values()) == config.data.demonstrations
        contents = (
            np.asarray(values).tobytes() for example in examples for values in example.values()
        )
        # Also: in the order they were made.
        assert facts["sha256"] == hashlib.sha256(b"".join(contents)).hexdigest()
        solved = sampled = threads = window = 0
        for example in examples:
            thread = read_thread(unflatten(example), tokenizer)
            problem = problem_of(example, tokenizer)
            assert thread.prompt.partition("#")[0] == task.prompt(problem)
            solved += task.score(problem, thread.answer).correct
            sampled += int(example["sampled"].sum())
            threads += len(example["length"])
            window += int(example["position"].max()) + 1
            assert example["length"].max() <= config.limits.max_thread_tokens
            assert example["position"].max() < config.limits.window
        assert facts["kept_success"] == pytest.approx(solved / len(examples))
        assert facts["mean_total_tokens"] == pytest.approx(sampled / len(examples))
        assert facts["mean_thread_tokens"] == pytest.approx(sampled / threads)
        assert facts["mean_children"] == pytest.approx(threads / len(examples) - 1)
        assert facts["mean_longest_thread"] == pytest.approx(window / len(examples))
        assert facts["ci95"] == list(wilson(round(facts["solver_success"] * 150), 150))
        assert facts["longest_stream"] == max(int(example["length"].max()) for example in examples)


def test_splits_and_their_demonstrations_share_no_numbers(config, data_dir):
    parts = {name: read_problems(data_dir / f"{name}.jsonl") for name in PARTS}
    assert {name: len(part) for name, part in parts.items()} == record_of(data_dir)["problems"]
    assert len(parts["train"]) == config.data.demonstrations
    assert len(parts["validation"]) == len(parts["test"]) == config.data.heldout
    train, validation, test = (
        {tuple(sorted(Puzzle.of(problem).numbers)) for problem in part} for part in parts.values()
    )
    assert not train & validation and not train & test and not validation & test
    for method in ("sos", "sos+", "apr"):
        for name in ("train", "validation"):
            assert set(shown(problems_of(data_dir, method, name))) <= set(shown(parts[name]))
    sums = {
        name: hashlib.sha256((data_dir / name).read_bytes()).hexdigest()
        for name in record_of(data_dir)["sha256"]
    }
    assert sums == record_of(data_dir)["sha256"]
    assert sums.keys() == {"train.jsonl", "validation.jsonl", "test.jsonl", "tokenizer.model"}


def test_a_problem_trains_on_though_its_demonstration_was_dropped(config, data_dir, tmp_path):
    narrow = small(limits=dataclasses.replace(config.limits, window=120))
    facts = build(narrow, tmp_path, methods=("apr", "sos"), progress=False, workers=1)
    assert facts["apr"]["dropped"]["window"] != facts["sos"]["dropped"]["window"] > 0
    assert (tmp_path / "train.jsonl").read_bytes() == (data_dir / "train.jsonl").read_bytes()
    problems = read_problems(tmp_path / "train.jsonl")
    kept = shown(problems_of(tmp_path, "apr", "train"))
    assert len(set(shown(problems)) - set(kept)) == facts["apr"]["dropped"]["window"] > 0

    # What data.json tells of the dropped, against the demonstrations themselves.
    task = make_task(config.task, config.limits)
    lost = {True: [], False: []}
    for k, problem in enumerate(problems):
        thread = task.demonstrate(problem, "apr", (config.data.seed << 32) + k)
        right = task.score(problem, thread.answer).correct
        lost[shown([problem])[0] not in kept].append((len(flatten(thread)) - 1, right))
    for was_lost, names in (
        (True, ("dropped_children", "dropped_success")),
        (False, ("mean_children", "kept_success")),
    ):
        assert np.mean(lost[was_lost], axis=0) == pytest.approx(
            [facts["apr"][name] for name in names]
        )
    assert (
        statistics(Counts(made=3, threads=3), types.SimpleNamespace())["dropped_children"] is None
    )


def test_tfds_reads_the_same(data_dir):
    theirs = tfds.builder_from_directory(dataset.directory(data_dir, "sos+")).as_data_source(
        "train"
    )
    ours = dataset.read(data_dir, "sos+", "train")
    assert len(ours) == len(theirs) > 100
    for k in (0, 57, len(ours) - 1):
        one = ours[k]
        other = theirs[k]
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


def test_any_number_of_workers_builds_the_same(config, data_dir, tmp_path):
    build(config, tmp_path, methods=("apr",), progress=False, workers=2)
    alone, together = record_of(data_dir), record_of(tmp_path)
    assert together["methods"]["apr"] == alone["methods"]["apr"]
    assert together["sha256"] == alone["sha256"]
    folders = [dataset.directory(out, "apr") for out in (data_dir, tmp_path)]
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders
    )
    assert first == second


def test_records_are_deterministic_and_no_files_are_hidden(data_dir):
    # protobuf orders the features of a record anew in each process, if it is not told otherwise.
    (file,) = dataset.directory(data_dir, "apr").glob("*train*")
    records = ArrayRecordDataSource([str(file)])
    assert len(records) > 100
    for record in (records[k] for k in range(20)):
        example = tf_example_pb2.Example.FromString(record)
        assert record == example.SerializeToString(deterministic=True)
    assert not list((data_dir / "demonstrations").rglob(".*"))


def test_results_come_in_order_and_not_all_at_once():
    drawn = []

    def numbers():
        for k in range(60):
            drawn.append(k)
            yield -k

    with Workers(2) as pool:
        results = pool.map(abs, numbers())
        assert next(results) == 0
        assert len(drawn) < 10  # The rest waits until somebody wants it.
        assert list(results) == list(range(1, 60))
        assert list(pool.map_chunks(abs, range(-500, 0))) == list(range(500, 0, -1))


def test_the_seed_and_the_number_of_the_demonstration_matter(config, data_dir, tmp_path):
    other = small(data=dataclasses.replace(config.data, seed=4))
    build(other, tmp_path, methods=("apr",), progress=False, workers=1)
    assert record_of(tmp_path)["methods"]["apr"]["train"]["sha256"] != sha(data_dir)
    tiny = small(
        task=config.task.replace(high=3),
        data=dataclasses.replace(config.data, heldout=2),
    )
    build(tiny, tmp_path / "tiny", methods=("apr",), progress=False, workers=1)
    examples = examples_of(tmp_path / "tiny", "apr", "train")
    problems = record_of(tmp_path / "tiny")["problems"]["train"]
    # Fewer problems than demonstrations: they come again, searched in another way.
    assert problems < len(examples) == 150
    assert len({example["tokens"].tobytes() for example in examples}) > problems


def sha(out: Path) -> str:
    return record_of(out)["methods"]["apr"]["train"]["sha256"]


def test_an_excluded_problem_occurs_nowhere(config, data_dir, tmp_path):
    first = problems_of(data_dir, "apr", "train")[0]
    heldout = read_problems(data_dir / "validation.jsonl")[0]
    trained = make_problem(
        "mine", sorted(Puzzle.of(first).numbers, reverse=True), Puzzle.of(first).target
    )
    save_problems([trained, dataclasses.replace(heldout, id="x")], tmp_path / "exclude.jsonl")
    out = tmp_path / "out"
    build(config, out, [tmp_path / "exclude.jsonl"], methods=("apr",), progress=False, workers=1)
    seen = {*keys_of(out, "apr", "train"), *keys_of(out, "apr", "validation")}
    seen |= {problem_key(p) for name in PARTS for p in read_problems(out / f"{name}.jsonl")}
    numbers = {numbers_of(trained), numbers_of(heldout)}
    assert not {sorted_numbers for sorted_numbers, _ in seen} & numbers
    # Without the file the same folder means something else.
    with pytest.raises(UsageError, match="exclude='2 groups"):
        build(config, out, methods=("apr",), progress=False, workers=1)


def test_few_training_problems_are_told(config, data_dir, tmp_path):
    """Where what is held out takes nearly the whole space, a model learns the rest by heart."""
    assert problem_counts(data_dir)["train"] == config.data.demonstrations
    assert few_problems(config, data_dir) is None
    # Its space has 56 problems.
    narrow = override(config, ["task.high=4", "data.demonstrations=400", "data.heldout=20"])
    build(narrow, tmp_path / "narrow", methods=("apr",), progress=False, workers=1)
    train = problem_counts(tmp_path / "narrow")["train"]
    few = few_problems(narrow, tmp_path / "narrow")
    assert f"only {train} problems" in few and "data.heldout (now 20)" in few


def test_nested_demonstrations_are_built_where_children_may_spawn(config, tmp_path):
    with pytest.raises(
        UsageError, match="limits.max_depth=1 must be at least 2 for method 'apr-nested'"
    ):
        build(config, tmp_path, methods=("apr-nested",), progress=False)
    deep = small(
        task=with_solver(
            config, parent_beam=5, parent_beam_low=3, child_beam=5, max_children=35
        ).task.replace(numbers=4),
        limits=dataclasses.replace(
            config.limits, window=1_000, max_thread_tokens=1_000, max_threads=36, max_depth=2
        ),
    )
    facts = build(deep, tmp_path, methods=("apr-nested",), progress=False, workers=1)["apr-nested"]
    # The solver divides its threads as a rollout its threads, so none of its trees lacks one.
    assert facts["dropped"] == {"window": 0, "max_thread_tokens": 0, "threads": 0, "wrong": 0}
    examples = examples_of(tmp_path, "apr-nested", "train")
    assert len(examples) == 150
    assert sum(int(example["depth"].max()) == 2 for example in examples) > 50


def test_a_task_without_methods_has_problems_and_a_tokenizer(config, tmp_path):
    (tmp_path / "sums.py").write_text(
        "from apr_jax.tasks import Problem, Score, Task\n"
        "class Sums(Task):\n"
        "    def draw(self, seed):\n"
        "        return Problem(str(seed), {'a': seed % 1000, 'b': seed // 1000 % 1000})\n"
        "    def prompt(self, problem, condition=None):\n"
        "        return f\"{problem.data['a']}+{problem.data['b']}=\"\n"
        "    def score(self, problem, answer):\n"
        "        return Score(0.0, correct=False)\n"
    )
    sums = small(task=TaskConfig(f"{tmp_path / 'sums.py'}:Sums"))
    out = tmp_path / "data"
    assert build(sums, out, progress=False, workers=1) == {}
    assert record_of(out)["problems"] == {"train": 150, "validation": 40, "test": 40}
    assert (out / "tokenizer.model").is_file()
    before = times(out)
    assert build(sums, out, progress=False, workers=1) == {}
    assert times(out) == before


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_rejection_sampling_keeps_only_the_right_demonstrations(config, data_dir, tmp_path):
    """They are the right ones of those that a build without it makes, in the same order."""
    strict = small(data=dataclasses.replace(config.data, correct_only=True))
    facts = build(strict, tmp_path, methods=("sos+",), progress=False)["sos+"]
    tokenizer = tokenizer_from_bytes((data_dir / "tokenizer.model").read_bytes())
    task = make_task(config.task)

    def is_right(example: dict) -> bool:
        answer = read_thread(unflatten(example), tokenizer).answer
        return task.score(problem_of(example, tokenizer), answer).correct

    every, right = (examples_of(folder, "sos+", "train") for folder in (data_dir, tmp_path))
    assert [e["tokens"].tolist() for e in right] == [
        e["tokens"].tolist() for e in every if is_right(e)
    ]
    assert facts["dropped"] == {
        "window": 0,
        "max_thread_tokens": 0,
        "threads": 0,
        "wrong": len(every) - len(right),
    }
    assert facts["kept_success"] == 1 > facts["solver_success"] > 0.3
    # RL is to have the others all the same.
    assert all(
        (tmp_path / f"{name}.jsonl").read_bytes() == (data_dir / f"{name}.jsonl").read_bytes()
        for name in PARTS
    )
    none = Counts(made=7, dropped_wrong=7)
    with pytest.raises(
        UsageError, match=r"wrong, under data.correct_only: 7\); set data.correct_only=false"
    ):
        statistics(
            none,
            types.SimpleNamespace(
                method="sos+", bounds=types.SimpleNamespace(window=1, max_thread_tokens=1)
            ),
        )


def test_a_split_is_written_shard_by_shard(config, data_dir, tmp_path, monkeypatch):
    """It need not fit into memory, and what is read does not depend on where shards end."""
    monkeypatch.setattr(dataset, "_SHARD_BYTES", 4_000)
    on_disk = []
    encode = dataset._sorted

    def watched(record):
        on_disk.append(len(list(tmp_path.glob("demonstrations/apr/*/train.*"))))
        return encode(record)

    monkeypatch.setattr(dataset, "_sorted", watched)
    build(config, tmp_path, methods=("apr",), progress=False, workers=1)
    files = sorted(path.name for path in dataset.directory(tmp_path, "apr").glob("*-train.*"))
    count = len(files)
    assert count > 5
    assert files == [
        f"demonstrations-train.array_record-{k:05}-of-{count:05}" for k in range(count)
    ]
    assert max(on_disk) >= count - 2, "shards are written while others are not made yet"
    for split in ("train", "validation"):
        for one, other in zip(
            examples_of(tmp_path, "apr", split), examples_of(data_dir, "apr", split), strict=True
        ):
            assert all(np.array_equal(one[name], other[name]) for name in dataset.MEANINGS)


@pytest.mark.parametrize("how", ["map", "map_chunks"])
def test_a_worker_that_is_killed_is_told_in_one_line(how):
    with Workers(2) as pool, pytest.raises(UserError, match="one of 2 worker processes was killed"):
        list(getattr(pool, how)(os._exit, [9, 9, 9]))


def test_second_build_does_nothing_or_adds_a_method(config, data_dir, tmp_path):
    build(config, tmp_path, methods=("sos",), progress=False, workers=1)
    before = times(tmp_path)
    facts = build(config, tmp_path, methods=("sos",), progress=False, workers=1)
    assert facts == {"sos": record_of(tmp_path)["methods"]["sos"]["train"]}
    assert times(tmp_path) == before
    build(config, tmp_path, methods=("sos", "apr"), progress=False, workers=1)
    records = [path for path in before if "array_record" in path.name]
    assert records
    assert all(times(tmp_path)[path] == before[path] for path in records)
    assert record_of(tmp_path)["methods"]["apr"] == record_of(data_dir)["methods"]["apr"]


def test_an_interrupted_build_goes_on(config, data_dir, tmp_path, monkeypatch):
    write = dataset.write

    def interrupted(out, method, *rest):
        if method == "sos+":
            leftover = dataset.directory(out, method).parent / "incomplete.X_1.0.0"
            leftover.mkdir(parents=True)
            raise KeyboardInterrupt
        write(out, method, *rest)

    monkeypatch.setattr(dataset, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(config, tmp_path, progress=False, workers=1)
    assert list(record_of(tmp_path)["methods"]) == ["sos"]
    with pytest.raises(UserError, match=r"no readable train demonstrations of method 'sos\+'"):
        dataset.read(tmp_path, "sos+", "train")
    monkeypatch.undo()
    build(config, tmp_path, progress=False, workers=1)
    assert record_of(tmp_path) == record_of(data_dir)
    assert not list(tmp_path.rglob("incomplete*"))
    assert not list(tmp_path.rglob("*.partial"))


def test_other_settings_are_refused_by_name(config, data_dir):
    other = with_solver(config, child_beam=7)
    with pytest.raises(
        UsageError, match=r"built with task.solver.child_beam=15, now task.solver.child_beam=7"
    ):
        build(other, data_dir, progress=False)
    other = small(limits=dataclasses.replace(config.limits, window=159))
    with pytest.raises(UsageError, match=r"built with limits.window=176, now limits.window=159"):
        build(other, data_dir, progress=False)
    # Decides nothing here.
    build(dataclasses.replace(config, seed=99, name="else"), data_dir, progress=False)


def test_users_mistakes(config, tmp_path):
    known = r"task 'countdown' has no such .* it has sos, sos\+, apr, apr-nested"
    with pytest.raises(UsageError, match=f"method='bfs': {known}"):
        build(config, tmp_path, methods=("bfs",), progress=False)
    narrow = small(limits=dataclasses.replace(config.limits, window=12))
    with pytest.raises(
        UsageError, match=r"none of the 150 demonstrations of 'apr' fits .* limits.window=12: 150"
    ):
        build(narrow, tmp_path / "a", methods=("apr",), progress=False, workers=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        build(config, tmp_path / "file" / "below", progress=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "data.json").write_text('{"methods"')
    with pytest.raises(UsageError, match="is damaged"):
        build(config, tmp_path / "c", progress=False)


def test_a_damaged_file_is_named(config, tmp_path):
    build(config, tmp_path, methods=("sos",), progress=False, workers=1)
    (file,) = dataset.directory(tmp_path, "sos").glob("*train*")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(
        UserError, match=r"no readable train demonstrations of method 'sos' .*delete the folder"
    ):
        dataset.read(tmp_path, "sos", "train")


def test_no_tensorflow(tmp_path):
    program = f"""
import dataclasses, pathlib, sys
from apr_jax.config import load
from apr_jax.data.build import build, few_problems, problem_counts
from apr_jax.data.pipeline import sft_batches
config = load({str(NANO)!r}, ["data.demonstrations=20", "data.heldout=5"])
out = pathlib.Path({str(tmp_path)!r})
build(config, out, methods=("apr",), progress=False, workers=1)
next(sft_batches(out, "apr", 4, config.limits.max_thread_tokens, seed=0))
print([name for name in sys.modules if name.split(".")[0] == "tensorflow"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=NANO.parents[1]
    )
    assert done.stdout == "[]\n", done.stderr
    # Nothing is said, not even by threads that are still reading when Python exits.
    assert done.stderr == ""


@pytest.fixture
def building(tmp_path):
    """A build on two cores whose workers are at work, in a folder whose files bear names of the
    standard library.
    """
    (tmp_path / "here").mkdir()
    for name in ("random", "signal", "socket"):
        (tmp_path / "here" / f"{name}.py").write_text(
            "raise KeyboardInterrupt('this is no standard library')"
        )
    words = [
        "data",
        "build",
        "--config",
        str(NANO),
        "--out",
        str(tmp_path / "out"),
        "--method",
        "sos",
    ]
    words += ["--set", "data.demonstrations=40000", "--set", "data.heldout=10"]
    with subprocess.Popen(
        [sys.executable, "-m", "apr_jax", *words],
        cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": str(NANO.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while not (tmp_path / "out" / "tokenizer.model").is_file() and process.poll() is None:
                time.sleep(0.05)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _session(leader):
    """Commands of the running processes of a session."""
    commands = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                commands[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
    return commands


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_build_leaves_no_process(building, number, tmp_path):
    """Stopped by SIGTERM, it says where the finished parts are.

    Files in the current folder that bear names of the standard library are in nobody's way.
    """
    assert building.poll() is None, building.stderr.read()
    assert sum("forkserver" in command for command in _session(building.pid).values()) >= 2, (
        "the server and a worker"
    )
    building.send_signal(number)
    if number == signal.SIGTERM:
        assert building.wait(timeout=60) == 143
        told = (
            f"apr: stopped by SIGTERM; parts that were finished are in {tmp_path / 'out'}; the same"
            " command goes on"
        )
        assert told in " ".join(building.stderr.read().split())
    else:
        building.wait(timeout=60)
    deadline = time.monotonic() + 20
    while _session(building.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _session(building.pid)
