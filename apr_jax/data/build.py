"""Builds the data of an experiment: problems, tokenizer and demonstrations, in one folder.

    OUT/data.json                         settings, counts and checksums of all the rest
    OUT/train.jsonl, validation.jsonl, test.jsonl
    OUT/tokenizer.model
    OUT/demonstrations/<method>/1.0.0/

The life of a build:
1. The task splits its problems. None is of the same group as an excluded one, and no training
   problem is of the same group as one that is held out.
2. The tokenizer is trained on the first demonstrations of every method of the task. So it does not
   depend on which methods are built. If a pretrained model is going to learn, its own is taken.
3. For each wanted method, worker processes demonstrate the training problems (`demonstrate`), and
   TFDS stores the trees (`dataset`).
4. `data.json` says what was built, from which settings, and how good the solvers were.

If `data.demonstrations` is a file of thread trees, its trees are the demonstrations, and its
problems the training problems. The task then gives only the problems that are held out.

Every file appears whole or not at all. An interrupted build goes on with the first method that is
missing.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from apr_jax.config import flatten_fields
from apr_jax.data import dataset, tree_files
from apr_jax.data.demonstrate import (
    Counts,
    Example,
    Recipe,
    Workers,
    demonstrations,
    given_demonstrations,
    stored_types,
    texts,
    texts_of,
)
from apr_jax.data.statistics import statistics
from apr_jax.data.tree_files import Demonstration
from apr_jax.errors import UsageError, UserError
from apr_jax.io.json_files import write_json
from apr_jax.io.lease import Lease
from apr_jax.io.stage_line import Bars
from apr_jax.io.storage import copies_folder, is_remote, require_reachable, upload, write_bytes
from apr_jax.tasks import (
    Bounds,
    Condition,
    Method,
    Problem,
    Split,
    Task,
    load_problems,
    make_task,
)
from apr_jax.tasks.problem_files import problem_lines
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from apr_jax.config import Experiment

RECORD = "data.json"
_TOKENIZER = "tokenizer.model"
_OFTEN = 20  # Demonstrations of one problem, from which on a model learns problems by heart.
_TOKENIZER_SAMPLE = 1_024  # Problems whose demonstrations train the tokenizer.
# The setting that the user cannot set: the checksum of the file of thread trees.
_FILE_SUM = "data.demonstrations_sha256"
# So is this one: the checksum of a tokenizer that was given.
_GIVEN_TOKENIZER = "tokenizer_sha256"


@dataclasses.dataclass(frozen=True)
class _Order:
    """What a build is to make.

    Attributes:
      config: the experiment.
      methods: methods whose demonstrations are wanted.
      excluded: groups of which no problem may be (`Task.group`).
      progress: whether bars are shown.
      workers: number of processes; None for all cores.
      file_sum: SHA-256 of the file of thread trees; None if the task demonstrates.
      tokenizer: the tokenizer of the model that will learn; None trains one.
    """

    config: "Experiment"
    methods: Sequence[str]
    excluded: frozenset[Any]
    progress: bool
    workers: int | None
    file_sum: str | None
    tokenizer: Tokenizer | None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the data, by name of the setting."""
        settings = _settings(self.config, self.excluded)
        if self.file_sum is not None:
            settings[_FILE_SUM] = self.file_sum
        if self.tokenizer is not None:
            settings[_GIVEN_TOKENIZER] = hashlib.sha256(self.tokenizer.to_bytes()).hexdigest()
        return settings


@dataclasses.dataclass(frozen=True)
class _Given:
    """The content of a file of thread trees, and the problems that go with it.

    Attributes:
      demonstrations: the demonstrations that train, in the order of the file.
      split: their problems, and held-out problems of the task.
      left_out: number of demonstrations that do not train because of their problem, by the reason.
      facts: what data.json says about the file.
    """

    demonstrations: list[Demonstration]
    split: Split
    left_out: dict[str, int]
    facts: dict[str, Any]


def build(
    config: "Experiment",
    out: Path,
    exclude: Sequence[Path] = (),
    methods: Sequence[str] | None = None,
    progress: bool = True,
    workers: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, dict[str, Any]]:
    """Builds what the folder lacks, and returns at once if it lacks nothing.

    Args:
      config: the experiment. Its task, data and limits decide the data; the rest may change.
      out: folder of the data, of this machine or in a bucket.
      exclude: problems files, and folders of built data. No problem is of the same group, by the
        task's `group`, as one of theirs.
      methods: methods whose demonstrations are wanted; None for all that the limits have room for.
      progress: whether to show bars on standard error.
      workers: number of processes; None for all cores. The data do not depend on it.
      tokenizer: the tokenizer of the model that will learn, for example an imported one; None
        trains one on the demonstrations.

    Returns:
      method -> `statistics` of its training demonstrations.

    Raises:
      UsageError: `out` holds data of other settings, the task has too few problems, no
        demonstration fits the limits, or a line of the file of thread trees is wrong.
      UserError: another build writes in `out`, or the disk is full or not writable.
      KeyboardInterrupt, Stopped: by Ctrl-C, SIGTERM or SIGHUP. What was finished is kept.
    """
    if methods is None:
        methods = methods_to_build(config)
    try:
        _check_buildable(config, methods)
        file_sum = config.data.file and tree_files.checksum(config.data.file)
        excluded = _excluded(config, exclude)
        order = _Order(config, methods, excluded, progress, workers, file_sum, tokenizer)
        record = _complete_record(out, order)
        if record is None:
            with Lease(out, "data build") as lease:
                # Another build may have ended before this one got the lease.
                record = _complete_record(out, order) or _build(out, order, lease)
    except OSError as error:
        raise UserError(
            f"data {out}: cannot write ({error.strerror or error}); nothing built before is lost"
        ) from None
    return {method: record["methods"][method]["train"] for method in methods}


def check_built(config: "Experiment", out: Path, demonstrations: bool = True) -> None:
    """Makes sure that the data in `out` are those of a config.

    Args:
      config: the experiment.
      out: folder of the data.
      demonstrations: whether the caller reads demonstrations too. If not, settings on which only
        they depend may differ.

    Raises:
      UserError: `out` holds no data.
      UsageError: they were built with other settings; names the first that differs.
    """
    if not (out / RECORD).is_file():
        require_reachable(out)
        raise UserError(f"data {out}: holds no data; run `apr data build --out {out}`")

    # Who reads the data does not know which problems were excluded from them, and needs the
    # file of thread trees no more. The tokenizer is compared by those who bring one.
    ignored = ["exclude", _FILE_SUM, _GIVEN_TOKENIZER]
    if not demonstrations:
        options = make_task(config.task).demonstration_options
        ignored += [f"task.{name}" for name in options]
        ignored += ["limits.", "data.correct_only"]

    def relevant(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value for name, value in settings.items() if not name.startswith(tuple(ignored))
        }

    built = _read_record(out)["settings"]
    wanted = _settings(config, excluded=frozenset())
    _compare(out, relevant(built), relevant(wanted))


def training_sum(out: Path, method: str | None = None) -> str:
    """Returns the SHA-256 of what a training reads.

    Args:
      out: folder of built data.
      method: the method whose training demonstrations are read; None for the training problems.
    """
    record = _read_record(out)
    if method is None:
        return str(record["sha256"][problem_file("train")])
    return str(record["methods"][method]["train"]["sha256"])


def check_files(out: Path, *names: str) -> None:
    """Makes sure that tokenizer and problems in `out` are the files that its build wrote.

    Files of another build are as well-formed, so nothing but their checksums in data.json would
    tell them apart. A file that is missing is left to its reader.

    Args:
      out: folder of the data.
      *names: files that the caller reads; none for all of which data.json has a checksum.

    Raises:
      UserError: a file is not the one that was written; names the first.
    """
    if not (out / RECORD).is_file():
        return
    for name, recorded in _read_record(out).get("sha256", {}).items():
        path = out / name
        is_wanted = not names or name in names
        if not is_wanted or not path.is_file():
            continue
        actual = _sha256(path)
        if actual != recorded:
            raise UserError(
                f"data {path}: is not the file that this folder was built with (its SHA-256 is"
                f" {actual[:12]}..., data.json says {recorded[:12]}...); put that file back, or"
                f" delete {out} and run `apr data build --out {out}`"
            )


def problem_file(split: str) -> str:
    """Returns the name of the file with the problems of "train", "validation" or "test"."""
    return f"{split}.jsonl"


def problem_counts(out: Path) -> dict[str, int]:
    """Returns split -> its number of problems, for "train", "validation" and "test".

    Raises:
      UserError: `out` holds no data.
    """
    return _read_record(out)["problems"]


def few_problems(config: "Experiment", out: Path) -> str | None:
    """Says what is wrong if the data have far fewer training problems than demonstrations.

    A model then learns its problems by heart: it imitates perfectly and solves no other problem.
    """
    demonstrations = config.data.demonstrations
    problems = problem_counts(out)["train"]
    if isinstance(demonstrations, str) or demonstrations < _OFTEN * problems:
        return None
    return (
        f"data.demonstrations={demonstrations}: the task has only {problems} problems to train on,"
        f" each demonstrated some {demonstrations // problems} times, which a model learns by"
        f" heart; widen the task, or lower data.heldout (now {config.data.heldout})"
    )


def stated_conditions(out: Path, method: str) -> dict[int, int]:
    """Counts the conditions that the training demonstrations of a method state.

    Returns:
      condition (number of children, or of window bins) -> number of demonstrations that state it.

    Raises:
      UserError: `out` holds no data of the method.
    """
    try:
        conditions: dict[str, int] = _read_record(out)["methods"][method]["train"]["conditions"]
    except (OSError, KeyError):
        raise UserError(
            f"data {out / RECORD}: does not say which conditions the demonstrations of"
            f" {method!r} state; delete {out} and run `apr data build --out {out}`"
        ) from None
    return {int(condition): count for condition, count in conditions.items()}


def file_method(config: "Experiment", out: Path) -> Method | None:
    """Returns what the method of built data is if they come from a file of thread trees.

    Args:
      config: the experiment.
      out: folder of its data.

    Returns:
      how deep the threads of the file spawn, and from which to which condition its prompts state;
      None if the task itself has demonstrated.

    Raises:
      UserError: `out` does not say so.
    """
    if not config.data.file:
        return None
    stated = stated_conditions(out, tree_files.METHOD)
    condition = None
    if stated:
        of_task = (method.condition for method in make_task(config.task).methods.values())
        counts = next((known.counts for known in of_task if known), "of the file")
        condition = Condition(counts, min(stated), max(stated))
    try:
        facts = _read_record(out)["file"]
        return Method(bool(facts["parallel"]), int(facts["depth"]), condition)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"data {out / RECORD}: does not say how deep the threads of the file spawn; delete"
            f" {out} and run `apr data build --out {out}`"
        ) from None


def fitting_methods(task: Task) -> list[str]:
    """Returns the methods of a task for which its bounds have room."""
    return [name for name, method in task.methods.items() if method.depth <= task.bounds.max_depth]


def methods_to_build(config: "Experiment") -> list[str]:
    """Returns the methods of the data of an experiment: of a file one, else those that fit."""
    if config.data.file:
        return [tree_files.METHOD]
    return fitting_methods(make_task(config.task, config.limits))


def _check_buildable(config: "Experiment", methods: Sequence[str]) -> None:
    """Makes sure that the methods are those of the file, or else methods of the task that fit."""
    if not config.data.file:
        check_methods(config, methods)
        return
    for name in methods:
        if name != tree_files.METHOD:
            raise UsageError(
                f"method={name!r}: data.demonstrations={config.data.file!r} is a file, whose one"
                f" method is {tree_files.METHOD!r}"
            )


def check_methods(config: "Experiment", methods: Sequence[str]) -> None:
    """Makes sure that the task has the methods and the limits have room for them.

    Raises:
      UsageError: names the first method for which this does not hold.
    """
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


def _excluded(config: "Experiment", exclude: Sequence[Path]) -> frozenset[Any]:
    """Returns the groups of the problems in some files and folders of built data."""
    task = make_task(config.task)
    files: list[Path] = []
    for path in exclude:
        if path.is_dir():
            files += [path / problem_file(split) for split in ("train", "validation", "test")]
        else:
            files.append(path)
    return frozenset(task.group(problem) for file in files for problem in load_problems(file, task))


def _complete_record(out: Path, order: _Order) -> dict[str, Any] | None:
    """Returns what data.json holds if the folder lacks nothing of the order, else None.

    Raises:
      UsageError: the folder holds data of other settings.
      UserError: the folder holds a file of another build.
    """
    record = _record_so_far(out, order)
    # A task without methods has problems and a tokenizer all the same.
    has_files = bool(record["methods"]) or "sha256" in record
    is_complete = has_files and not _missing_methods(out, record, order)
    return record if is_complete else None


def _record_so_far(out: Path, order: _Order) -> dict[str, Any]:
    """Returns what data.json holds, and a record without methods if there is no such file."""
    if not (out / RECORD).is_file():
        return {"settings": order.settings, "methods": {}}
    record = _read_record(out)
    _compare(out, record["settings"], order.settings)
    if not is_remote(out):  # Whoever reads from a bucket checks the local copy.
        check_files(out)
    return record


def _missing_methods(out: Path, record: dict[str, Any], order: _Order) -> list[str]:
    """Returns the wanted methods of which there are no demonstrations yet."""

    def is_there(method: str) -> bool:
        # data.json is uploaded last, so that a bucket holds all that it lists.
        return method in record["methods"] and (
            is_remote(out) or dataset.directory(out, method).is_dir()
        )

    return [method for method in order.methods if not is_there(method)]


def _build(out: Path, order: _Order, lease: Lease) -> dict[str, Any]:
    """Builds what is missing, by way of a folder of this machine if `out` is in a bucket.

    ArrayRecord files can be written nowhere else.
    """
    if not is_remote(out):
        return _build_missing(out, order, lease)

    digest = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    local = copies_folder() / f".building-{digest}"
    local.mkdir(parents=True, exist_ok=True)
    # An earlier build may have ended during the upload.
    record = _complete_record(local, order) or _build_missing(local, order, lease)
    lease.check()
    upload(local, out, last=RECORD)
    return record


def _build_missing(out: Path, order: _Order, lease: Lease) -> dict[str, Any]:
    """Builds the shared files and the missing methods; returns what data.json holds."""
    config = order.config
    record = _record_so_far(out, order)
    missing = _missing_methods(out, record, order)
    write_json(out / RECORD, record)
    with Workers(order.workers) as pool, _bars(order.progress) as bars:
        given = None
        count = config.data.demonstrations
        if isinstance(count, str):
            given = _load_given(order, count, pool)
            count = len(given.demonstrations)
            split = given.split
            record["file"] = given.facts
        else:
            split = make_task(config.task).split(
                count,
                config.data.heldout,
                config.data.seed,
                map_draws=pool.map_chunks,
                apart_from=order.excluded,
            )
        tokenizer = _write_shared_files(out, order, split, given, record, pool)
        if not missing:  # The task has no methods.
            write_json(out / RECORD, record)
        for method in missing:
            lease.check()
            recipe = _recipe(config, method, tokenizer.to_bytes())
            if given is None:
                record["methods"][method] = _build_method(out, recipe, count, split, pool, bars)
            else:
                record["methods"][method] = _build_given(out, recipe, given, pool, bars)
            write_json(out / RECORD, record)
    return record


def _load_given(order: _Order, file: str, pool: Workers) -> _Given:
    """Reads the file of thread trees, and has the task hold out other problems.

    Demonstrations are left out if their problem is of an excluded group, or of the same group as
    one that is held out.

    Raises:
      UsageError: a line is wrong, or no demonstration is left.
    """
    data = order.config.data
    task = make_task(order.config.task)
    found = tree_files.load_trees(file, task)
    keys = {task.key(demonstration.problem) for demonstration in found}
    # The one training problem is not used; a task may refuse to make a split without any.
    heldout = task.split(
        1, data.heldout, data.seed, keys, pool.map_chunks, apart_from=order.excluded
    )
    heldout_groups = set(map(task.group, [*heldout.validation, *heldout.test]))

    kept: list[Demonstration] = []
    left_out = {"excluded": 0, "heldout": 0}
    for demonstration in found:
        problem = demonstration.problem
        if task.group(problem) in order.excluded:
            left_out["excluded"] += 1
        elif task.group(problem) in heldout_groups:
            left_out["heldout"] += 1
        else:
            kept.append(demonstration)
    if not kept:
        raise UsageError(
            f"thread trees {file}: none of the {len(found)} demonstrations can train: the problems"
            f" of {left_out['excluded']} are excluded, and those of"
            f" {left_out['heldout']} are in the group of a validation or test problem; lower"
            " data.heldout or add problems"
        )

    problem_of_id = {demonstration.problem.id: demonstration.problem for demonstration in kept}
    method = tree_files.method_of(kept)
    facts = {
        "name": Path(file).name,
        "sha256": order.file_sum,
        "demonstrations": len(found),
        "parallel": method.parallel,
        "depth": method.depth,
    }
    split = Split(list(problem_of_id.values()), heldout.validation, heldout.test)
    return _Given(kept, split, left_out, facts)


def _write_shared_files(
    out: Path,
    order: _Order,
    split: Split,
    given: _Given | None,
    record: dict[str, Any],
    pool: Workers,
) -> Tokenizer:
    """Writes problems and tokenizer, which all methods share.

    Args:
      out: folder of the data.
      order: what is to be built.
      split: the problems.
      given: the content of a file of thread trees; None if the task demonstrates.
      record: what data.json holds; the numbers and checksums of the files are put there.
      pool: processes that demonstrate for the tokenizer.

    Returns:
      the tokenizer.

    Raises:
      UsageError: methods that are there already were built with other files.
    """
    known = record.get("sha256", {}) if record["methods"] else {}
    sums = {}
    for name, problems in vars(split).items():
        path = out / problem_file(name)
        sums[path.name] = _write_known(path, problem_lines(problems).encode(), known)

    if order.tokenizer is not None:
        tokenizer = order.tokenizer
    elif given is None:
        tokenizer = _train_tokenizer(order.config, split, pool)
    else:
        tokenizer = _train_given_tokenizer(order.config, given)
    sums[_TOKENIZER] = _write_known(out / _TOKENIZER, tokenizer.to_bytes(), known)

    record["problems"] = {name: len(problems) for name, problems in vars(split).items()}
    record["vocab_size"] = tokenizer.vocab_size
    record["sha256"] = sums
    return tokenizer


def _recipe(config: "Experiment", method: str, tokenizer: bytes) -> Recipe:
    """Returns the recipe by which the experiment has a method demonstrated."""
    bounds = Bounds.of(config.limits)
    return Recipe(
        config.task, method, config.data.seed, tokenizer, bounds, config.data.correct_only
    )


def _train_tokenizer(config: "Experiment", split: Split, pool: Workers) -> Tokenizer:
    """Trains the tokenizer on the first demonstrations of every method.

    It also knows all other characters that the task can write. Of a task without methods it reads
    the prompts.
    """
    task = make_task(config.task, config.limits)
    sample = split.train[:_TOKENIZER_SAMPLE]
    written: list[str] = []
    if not task.methods:
        written = [task.prompt(problem) for problem in sample]
    for method in task.methods:
        demonstrate = functools.partial(texts, _recipe(config, method, tokenizer=b""))
        for demonstration in pool.map_chunks(demonstrate, sample):
            written += demonstration
    return SentencePieceTokenizer.train(written, task.phrases, task.alphabet)


def _train_given_tokenizer(config: "Experiment", given: _Given) -> Tokenizer:
    """Trains the tokenizer on the first thread trees of a file.

    It also knows all other characters that the file may hold.
    """
    task = make_task(config.task)
    written: list[str] = []
    for demonstration in given.demonstrations[:_TOKENIZER_SAMPLE]:
        written += texts_of(demonstration.thread)
    return SentencePieceTokenizer.train(written, task.phrases, tree_files.characters(task))


def _build_method(
    out: Path,
    recipe: Recipe,
    count: int,
    split: Split,
    pool: Workers,
    bars: Bars,
) -> dict[str, Any]:
    """Writes the data set of one method of the task, and returns its part of data.json.

    Args:
      out: folder of the data.
      recipe: how the method demonstrates.
      count: number of training demonstrations.
      split: the problems.
      pool: processes that demonstrate.
      bars: where the progress is shown.
    """

    def source(problems: list[Problem], number: int) -> _Source:
        make_chunks = functools.partial(demonstrations, recipe, problems, number, pool)
        return _Source(recipe, make_chunks, functools.partial(bars.advance, bar))

    total = count + len(split.validation)
    bar = bars.add_task(f"{recipe.method} demonstrations", total=total)
    sources = {
        "train": source(split.train, count),
        "validation": source(split.validation, len(split.validation)),
    }
    _write_data_set(out, recipe, sources)
    return {name: source.facts for name, source in sources.items()}


def _build_given(
    out: Path, recipe: Recipe, given: _Given, pool: Workers, bars: Bars
) -> dict[str, Any]:
    """Writes the data set of a file of thread trees, and returns its part of data.json."""
    solved = [(found.problem, found.thread) for found in given.demonstrations]
    bar = bars.add_task(f"demonstrations of {given.facts['name']}", total=len(solved))
    make_chunks = functools.partial(given_demonstrations, recipe, solved, pool)
    source = _Source(recipe, make_chunks, functools.partial(bars.advance, bar))
    _write_data_set(out, recipe, {"train": source})
    return {"train": {**source.facts, "left_out": given.left_out}}


def _write_data_set(out: Path, recipe: Recipe, sources: dict[str, "_Source"]) -> None:
    """Writes the demonstrations of a method; `sources` has those of each split."""
    # An interrupted build may have left an unfinished data set.
    for leftover in dataset.directory(out, recipe.method).parent.glob("*"):
        shutil.rmtree(leftover)
    types = stored_types(tokenizer_from_bytes(recipe.tokenizer).vocab_size, recipe.bounds)
    dataset.write(out, recipe.method, sources, types)


class _Source:
    """The demonstrations of one split, counted while the data set takes them.

    Attributes:
      facts: once all were taken, what data.json says about them: `statistics`, and a checksum of
        their contents.

    Args:
      recipe: how a problem becomes a demonstration.
      make_chunks: returns examples and counts of the demonstrations, a chunk at a time.
      advance: is called with each number of further demonstrations that were made.
    """

    def __init__(
        self,
        recipe: Recipe,
        make_chunks: Callable[[], Iterator[tuple[list[Example], Counts]]],
        advance: Callable[[float], None],
    ):
        self._recipe = recipe
        self._make_chunks = make_chunks
        self._advance = advance
        self.facts: dict[str, Any] = {}

    def __call__(self) -> Iterator[Example]:
        counts = Counts()
        digest = hashlib.sha256()
        for examples, chunk_counts in self._make_chunks():
            counts += chunk_counts
            self._advance(chunk_counts.made)
            for example in examples:
                digest.update(b"".join(values.tobytes() for values in example.values()))
                yield example
        # If no demonstration fits, this raises before the data set is complete.
        self.facts = {**statistics(counts, self._recipe), "sha256": digest.hexdigest()}


def _settings(config: "Experiment", excluded: frozenset[Any]) -> dict[str, Any]:
    """Returns everything that decides the data, one level deep: `data.seed` -> value."""
    groups = {"task": config.task.to_dict(), "data": dataclasses.asdict(config.data)}
    settings = flatten_fields(groups)
    if config.data.file:
        # The folder does not matter, and its checksum tells whether the file is the same.
        settings["data.demonstrations"] = Path(config.data.file).name
    # Older data were split by single problems, and are not to be taken for data of this split.
    settings["data.split"] = "by group"
    for field in dataclasses.fields(Bounds):
        settings[f"limits.{field.name}"] = getattr(config.limits, field.name)
    digest = hashlib.sha256(repr(sorted(excluded, key=repr)).encode()).hexdigest()[:16]
    settings["exclude"] = f"{len(excluded)} groups, {digest}"
    return settings


def _read_record(out: Path) -> dict[str, Any]:
    """Reads data.json, of a finished or an unfinished build.

    Raises:
      UsageError: the file is damaged.
    """
    path = out / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record["settings"] = dict(record["settings"])
        return record
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"data {path}: is damaged; delete {out} and build again") from None


def _compare(out: Path, built: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Makes sure that two groups of settings are the same.

    Raises:
      UsageError: names the first setting that differs, or that only one of them has.
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
    """Returns the SHA-256 of a file, of this machine or in a bucket."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bars(shown: bool) -> Bars:
    """Returns progress bars on standard error, which are not shown unless `shown` holds."""
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("in"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        shown=shown,
    )
