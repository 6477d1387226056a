"""Builds the data of an experiment: problems, tokenizer and demonstrations, in one folder.

The life of a sample:
  1. `split_problems` sets validation and test problems aside, with all that have their numbers, and
     leaves out what an exclude file names.
  2. The tokenizer is trained on the first demonstrations of every method, whichever methods are
     wanted, so that it does not depend on them.
  3. For each method, workers demonstrate the training problems (`demonstrate`) and TFDS stores them
     (`builder`).
  4. `data.json` says what was built, from which settings, and how good the solvers were.

    OUT/data.json  OUT/tokenizer.model  OUT/train.jsonl  OUT/validation.jsonl  OUT/test.jsonl
    OUT/demonstrations/<method>/1.0.0/

Every file appears whole or not at all; an interrupted build goes on with the first part that is
missing."""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from apr_jax.config import flatten_fields
from apr_jax.data import dataset
from apr_jax.data.demonstrate import (
    Counts,
    Example,
    Recipe,
    Workers,
    demonstrations,
    stored_types,
    texts,
)
from apr_jax.data.statistics import statistics
from apr_jax.errors import UsageError, UserError
from apr_jax.io.json_files import write_json
from apr_jax.io.lease import Lease
from apr_jax.io.storage import copies_folder, is_remote, require_reachable, upload, write_bytes
from apr_jax.io.terminal import Terminal
from apr_jax.tasks import Bounds, Problem, Split, Task, load_problems, make_task
from apr_jax.tasks.problem_files import problem_lines
from apr_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from apr_jax.config import Experiment

_TOKENIZER_SAMPLE = 1_024  # Problems whose demonstrations train the tokenizer.


def build(
    config: "Experiment",
    out: Path,
    exclude: Path | None = None,
    methods: Sequence[str] | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Builds what is not there yet; returns at once when all is.

    Args:
      config: task, solver, data and limits decide; the rest may differ.
      out: the folder.
      exclude: problems file; none of its problems, by the task's `key`, occurs in any split.
      methods: whose demonstrations are wanted; None for all that the limits have room for.
      progress: show bars on standard error.
      workers: processes; None for all cores. The data do not depend on it.

    Returns:
      method -> `statistics` of its training demonstrations.

    Raises:
      UsageError: `out` holds data of other settings, the space of problems is too small, or nothing
        fits the limits.
      UserError: the disk is full or not writable.
      KeyboardInterrupt, Stopped: by Ctrl-C, SIGTERM or SIGHUP; what was finished is kept.
    """
    if methods is None:
        methods = fitting_methods(make_task(config.task, config.limits))
    try:
        make = _build_in_bucket if is_remote(out) else _build
        record = make(config, out, exclude, methods, progress, workers)
        return {method: record["methods"][method]["train"] for method in methods}
    except OSError as error:
        raise UserError(
            f"data {out}: cannot write ({error.strerror or error}); nothing built before is lost"
        ) from None


def check_built(config: "Experiment", out: Path, demonstrations: bool = True) -> None:
    """Makes sure that the data in `out` are those of `config`.

    Args:
      demonstrations: whether they matter to the caller too; the problems do in any case.

    Raises:
      UserError: `out` holds no data.
      UsageError: they were built with other settings; names the first that differs.
    """
    if not (out / "data.json").is_file():
        require_reachable(out)
        raise UserError(f"data {out}: holds no data; run `apr data build --out {out}`")
    options = make_task(config.task).demonstration_options
    left_out = tuple(f"task.{name}" for name in options) + ("limits.", "data.correct_only")
    built, wanted = (
        {
            name: value
            for name, value in settings.items()
            if name != "exclude" and (demonstrations or not name.startswith(left_out))
        }
        for settings in (_read_record(out)["settings"], _settings(config, frozenset()))
    )
    _compare(out, built, wanted)


def check_files(out: Path, *names: str) -> None:
    """Makes sure that tokenizer and problems in `out` are those that its build wrote, by the sums
    in data.json.

    Another build's are as well-formed, so nothing else would notice them. A file that is missing is
    left to its reader.

    Args:
      names: of the files that the caller reads; by default all of which there is a sum.

    Raises:
      UserError: names the first file that is another.
    """
    if not (out / "data.json").is_file():
        return
    for name, recorded in _read_record(out).get("sha256", {}).items():
        path = out / name
        if names and name not in names:
            continue
        if path.is_file() and (found := _sha256(path)) != recorded:
            raise UserError(
                f"data {path}: is not the file that this folder was built with (its SHA-256 is"
                f" {found[:12]}..., data.json says {recorded[:12]}...); put that file back, or"
                f" delete {out} and run `apr data build --out {out}`"
            )


def problem_file(split: str) -> str:
    """Where a folder of data has the problems of "train", "validation" or "test"."""
    return f"{split}.jsonl"


def stated_conditions(out: Path, method: str) -> dict[int, int]:
    """How many training demonstrations of a method in `out` state each condition (children, or
    window bins).

    Raises:
      UserError: `out` holds no data of the method.
    """
    try:
        conditions: dict[str, int] = _read_record(out)["methods"][method]["train"]["conditions"]
    except (OSError, KeyError):
        raise UserError(
            f"data {out / 'data.json'}: does not say which conditions the demonstrations of"
            f" {method!r} state; delete {out} and run `apr data build --out {out}`"
        ) from None
    return {int(condition): count for condition, count in conditions.items()}


def _build_in_bucket(
    config: "Experiment",
    out: Path,
    exclude: Path | None,
    methods: Sequence[str],
    progress: bool,
    workers: int | None,
) -> dict[str, Any]:
    """Builds on this machine's disk, for array_record writes nowhere else, and uploads what is
    whole.
    """

    def whole() -> dict[str, Any] | None:
        if not (out / "data.json").is_file():
            return None
        record = _read_record(out)
        _compare(out, record["settings"], _settings(config, _excluded(config, exclude)))
        return record if set(methods) <= set(record["methods"]) else None

    if record := whole():
        return record
    with Lease(out, "data build") as lease:
        return whole() or _build_and_upload(config, out, exclude, methods, progress, workers, lease)


def _build_and_upload(
    config: "Experiment",
    out: Path,
    exclude: Path | None,
    methods: Sequence[str],
    progress: bool,
    workers: int | None,
    lease: Lease,
) -> dict[str, Any]:
    here = copies_folder() / f"building-{hashlib.sha256(str(out).encode()).hexdigest()[:16]}"
    record = _build(config, here, exclude, methods, progress, workers)
    lease.check()
    upload(here, out, last="data.json")
    return record


def _excluded(config: "Experiment", exclude: Path | None) -> frozenset[Any]:
    """The keys of the problems in the exclude file."""
    if exclude is None:
        return frozenset()
    task = make_task(config.task)
    return frozenset(map(task.key, load_problems(exclude, task)))


def fitting_methods(task: Task) -> list[str]:
    """The methods of a task for which its bounds have room."""
    return [name for name, method in task.methods.items() if method.depth <= task.bounds.max_depth]


def check_methods(config: "Experiment", methods: Sequence[str]) -> None:
    """Raises UsageError for a method that the task does not have or the limits have no room for."""
    task = make_task(config.task, config.limits)
    for name in methods:
        method = task.methods.get(name)
        if method is None:
            known = ", ".join(task.methods) or "none"
            raise UsageError(
                f"method={name!r}: task {config.task.kind!r} has no such method to demonstrate; it"
                f" has {known}"
            )
        if method.depth > config.limits.max_depth:
            raise UsageError(
                f"limits.max_depth={config.limits.max_depth} must be at least {method.depth} for"
                f" method {name!r}: its children spawn"
            )


def _build(
    config: "Experiment",
    out: Path,
    exclude: Path | None,
    methods: Sequence[str],
    progress: bool,
    workers: int | None,
) -> dict[str, Any]:
    """`build`; returns what data.json holds."""
    check_methods(config, methods)
    excluded = _excluded(config, exclude)
    settings = _settings(config, excluded)
    record, missing = _built_so_far(out, settings, methods)
    if not missing:
        return record
    with Lease(out, "data build") as lease:
        return _build_missing(config, out, excluded, settings, methods, progress, workers, lease)


def _built_so_far(
    out: Path, settings: dict[str, Any], methods: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """What data.json holds, and of which methods there are no demonstrations yet."""
    record: dict[str, Any] = {"settings": settings, "methods": {}}
    if (out / "data.json").is_file():
        record = _read_record(out)
        _compare(out, record["settings"], settings)
        check_files(out)
    return record, [
        m for m in methods if m not in record["methods"] or not dataset.directory(out, m).is_dir()
    ]


def _build_missing(
    config: "Experiment",
    out: Path,
    excluded: frozenset[Any],
    settings: dict[str, Any],
    methods: Sequence[str],
    progress: bool,
    workers: int | None,
    lease: Lease,
) -> dict[str, Any]:
    # Again: another build may have ended before the lease was ours.
    record, missing = _built_so_far(out, settings, methods)
    if not missing:
        return record
    write_json(out / "data.json", record)
    with Workers(workers) as pool, _bars(progress) as bars:
        split = make_task(config.task).split(
            config.data.demonstrations,
            config.data.heldout,
            config.data.seed,
            excluded,
            pool.map_chunks,
        )
        record["problems"] = {name: len(problems) for name, problems in vars(split).items()}
        # Methods that are there already were built with these files; another version of this
        # program may write others.
        known = record.get("sha256", {}) if record["methods"] else {}
        sums = {}
        for name, problems in vars(split).items():
            file = problem_file(name)
            sums[file] = _write_known(out / file, problem_lines(problems).encode(), known)
        tokenizer = _tokenizer(config, split, pool)
        model = out / "tokenizer.model"
        sums[model.name] = _write_known(model, tokenizer.to_bytes(), known)
        record["vocab_size"] = tokenizer.vocab_size
        record["sha256"] = sums
        for method in missing:
            lease.check()
            recipe = _recipe(config, method, tokenizer.to_bytes())
            record["methods"][method] = _build_method(
                out, recipe, split, config.data.demonstrations, pool, bars
            )
            write_json(out / "data.json", record)
    return record


def _recipe(config: "Experiment", method: str, tokenizer: bytes) -> Recipe:
    bounds = Bounds.of(config.limits)
    return Recipe(
        config.task, method, config.data.seed, tokenizer, bounds, config.data.correct_only
    )


def _tokenizer(config: "Experiment", split: Split, pool: Workers) -> Tokenizer:
    """The tokenizer of the first demonstrations, with every character that the task can write: the
    sample may lack one.
    """
    task = make_task(config.task, config.limits)
    found: list[str] = []
    if not task.methods:
        found = [task.prompt(problem) for problem in split.train[:_TOKENIZER_SAMPLE]]
    for method in task.methods:
        collect = functools.partial(texts, _recipe(config, method, b""))
        for several in pool.map_chunks(collect, split.train[:_TOKENIZER_SAMPLE]):
            found += several
    return Tokenizer.train(found, task.phrases, task.alphabet)


def _build_method(
    out: Path, recipe: Recipe, split: Split, wanted: int, pool: Workers, bars: Progress
) -> dict[str, Any]:
    """Writes one method's data set and returns its part of data.json."""
    # Of an interrupted build.
    for leftover in dataset.directory(out, recipe.method).parent.glob("*"):
        shutil.rmtree(leftover)
    facts: dict[str, Any] = {}
    task = bars.add_task(f"{recipe.method} demonstrations", total=wanted + len(split.validation))

    def source(name: str, problems: list[Problem], count: int) -> Callable[[], Iterator[Example]]:
        def examples() -> Iterator[Example]:
            counts, digest = Counts(), hashlib.sha256()
            for chunk, part in demonstrations(recipe, problems, count, pool):
                counts += part
                bars.advance(task, part.made)
                for example in chunk:
                    # Of the contents: a protobuf may order its fields as it likes, so files of
                    # equal data can differ.
                    digest.update(
                        b"".join(np.asarray(values).tobytes() for values in example.values())
                    )
                    yield example
            facts[name] = {**statistics(counts, recipe), "sha256": digest.hexdigest()}

        return examples

    sources = {
        "train": source("train", split.train, wanted),
        "validation": source("validation", split.validation, len(split.validation)),
    }
    types = stored_types(Tokenizer(recipe.tokenizer).vocab_size, recipe.bounds)
    dataset.write(out, recipe.method, sources, types)
    return facts


def _settings(config: "Experiment", excluded: frozenset[Any]) -> dict[str, Any]:
    """Everything that decides the data, one level deep: `task.solver.parent_beam` -> value."""
    groups = {"task": config.task.to_dict(), "data": dataclasses.asdict(config.data)}
    settings = flatten_fields(groups)
    # Not by problem, as it once was: such data are of another split.
    settings["data.split"] = "by group"
    settings |= {
        f"limits.{field.name}": getattr(config.limits, field.name)
        for field in dataclasses.fields(Bounds)
    }
    digest = hashlib.sha256(repr(sorted(excluded, key=repr)).encode()).hexdigest()[:16]
    return settings | {"exclude": f"{len(excluded)} problems, {digest}"}


def _read_record(out: Path) -> dict[str, Any]:
    """data.json, finished or not; raises UsageError if it is damaged."""
    path = out / "data.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record["settings"] = dict(record["settings"])
        return record
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"data {path}: is damaged; delete {out} and build again") from None


def _compare(out: Path, built: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UsageError that names the first setting in which they differ, be it missing on one
    side.
    """
    for name in {**wanted, **built}:
        if built.get(name) != wanted.get(name):
            raise UsageError(
                f"data {out}: was built with {name}={built.get(name)!r}, now"
                f" {name}={wanted.get(name)!r}; choose another folder or delete this one"
            )


def _write_known(path: Path, contents: bytes, known: dict[str, str]) -> str:
    """Writes a file, and returns its SHA-256.

    Args:
      path: of the file.
      contents: what is written.
      known: file name -> SHA-256 of the file with which earlier methods were built.

    Raises:
      UsageError: the file is known by another sum.
    """
    digest = hashlib.sha256(contents).hexdigest()
    if known.get(path.name, digest) != digest:
        raise UsageError(
            f"data {path}: this version of apr_jax would write another one, and the methods that"
            f" are there were built with this one; delete {path.parent} and build all methods again"
        )
    write_bytes(path, contents)
    return digest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()  # In a bucket, too.


def _bars(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TextColumn("in"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *times, console=Terminal(stderr=True), disable=not shown)
