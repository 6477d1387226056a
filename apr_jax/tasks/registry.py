"""Finds tasks by their names and makes them from their settings.

    TaskConfig("countdown", numbers=4)              a short name
    TaskConfig("my_package.tasks:Anagrams")         a class of a module that Python can import
    TaskConfig("path/to/anagrams.py:Anagrams")      a class of a file

Short names are those of this library (`SHORT_NAMES`) and those that other packages register in the
entry-point group `apr_jax.tasks`. The path of a file starts at the current folder, or else at the
folder of the experiment file that names it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from apr_jax.errors import UsageError
from apr_jax.tasks.base import Bounds, Task

ENTRY_POINTS = "apr_jax.tasks"
SHORT_NAMES = {
    "arithmetic": "apr_jax.tasks.arithmetic.task:Arithmetic",
    "countdown": "apr_jax.tasks.countdown.task:Countdown",
    "hidden_digit": "apr_jax.tasks.toy:HiddenDigit",
    "path_star": "apr_jax.tasks.path_star.task:PathStar",
    "reasoning_gym": "apr_jax.tasks.reasoning_gym:ReasoningGym",
    "sudoku": "apr_jax.tasks.sudoku.task:Sudoku",
}
_REQUIRED = ("draw", "prompt", "score")  # Methods that every task must have.
# A folder in which files of tasks are also looked for.
_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("folder", default=None)


@dataclasses.dataclass(frozen=True, init=False)
class TaskConfig:
    """The task of an experiment, and its settings.

    Attributes:
      kind: a short name, `module:Class`, or `file.py:Class`.
      options: the settings, an instance of the task's class `Config`.

    Raises:
      UsageError: there is no such task, or a setting is wrong; the message names the field.
    """

    kind: str
    options: Any

    def __init__(self, kind: str, **options: Any):
        kind, task_class = find_task(kind)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "options", _checked(task_class, options))

    def __hash__(self) -> int:
        # Settings may be dicts, which have no hash. Equal configs have the same kind.
        return hash(self.kind)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values: `kind`, then the settings; `from_dict` is the inverse."""
        return {"kind": self.kind, **dataclasses.asdict(self.options)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskConfig:
        """Returns the config that has these values.

        Raises:
          UsageError: `kind` is missing, or a value is wrong.
        """
        if not isinstance(values.get("kind"), str):
            raise UsageError(
                f"config task.kind={values.get('kind')!r}: must be the name of a task, like"
                f" {', '.join(map(repr, SHORT_NAMES))}"
            )
        return cls(**values)

    def replace(self, **changes: Any) -> TaskConfig:
        """Returns the same config with some settings changed."""
        return TaskConfig(self.kind, **(dataclasses.asdict(self.options) | changes))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as plain values, because a worker process may have to load the class's file first.
        return TaskConfig.from_dict, (self.to_dict(),)


def make_task(config: TaskConfig, limits: Any = None) -> Task:
    """Makes the task of an experiment.

    Args:
      config: name and settings of the task.
      limits: `threads.Limits` of the rollout that demonstrations are for; None sets no bounds,
        which is enough if nothing is demonstrated.
    """
    return remake(config, None if limits is None else Bounds.of(limits))


def remake(config: TaskConfig, bounds: Bounds | None) -> Task:
    """Makes the task of a config, with these bounds for its demonstrations."""
    kind, task_class = find_task(config.kind)
    task = task_class(config.options, bounds)
    task.kind = kind
    return task


def config_of(task: Task) -> TaskConfig:
    """Returns the config from which `make_task` makes an equal task."""
    kind = task.kind or f"{type(task).__module__}:{type(task).__qualname__}"
    return TaskConfig(kind, **dataclasses.asdict(task.config))


@contextlib.contextmanager
def files_beside(folder: Path) -> Iterator[None]:
    """Makes a context in which files of tasks are also looked for in `folder`."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def find_task(kind: str) -> tuple[str, type[Task]]:
    """Finds the class of a task.

    Returns:
      the kind, in which the path of a file starts at the current folder; and the class.

    Raises:
      UsageError: there is no such class, or it is no task; the message says what would be right.
    """
    location = SHORT_NAMES.get(kind) or _entry_points().get(kind)
    if location is None and ":" not in kind:
        names = sorted({*SHORT_NAMES, *_entry_points()})
        near = difflib.get_close_matches(kind, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise UsageError(
            f"config task.kind={kind!r}: no task has this name; {hint} A task of your own is"
            " 'module:Class' or 'file.py:Class'"
        )
    module_name, _, class_name = (location or kind).rpartition(":")
    if module_name.endswith(".py"):
        path = _find_file(kind, module_name)
        kind = f"{path}:{class_name}"
        module = _load_file(kind, path)
    else:
        module = _import(kind, module_name)
    return kind, _find_class(kind, module, class_name)


def _entry_points() -> dict[str, str]:
    """Returns the short names that installed packages register, with what they stand for."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point.value for point in points}


def _find_file(kind: str, name: str) -> str:
    """Returns the path of a task's file, from the current folder."""
    if Path(name).is_file():
        return name
    tried = [str(Path(name).absolute())]
    folder = _folder.get()
    if folder is not None:
        path = folder / name
        if path.is_file():
            return os.path.relpath(path)
        tried.append(str(path))
    raise UsageError(
        f"config task.kind={kind!r}: there is no file {' or '.join(tried)}; run the command in the"
        " folder from which that path leads to it"
    )


def _load_file(kind: str, path: str) -> Any:
    """Returns the module of a file, which is run only once in a process."""
    full = str(Path(path).resolve())
    name = f"apr_jax_task_{Path(path).stem}_{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise UsageError(f"config task.kind={kind!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(
            f"config task.kind={kind!r}: {path}{_line(error, full)} cannot be run:"
            f" {_describe(error)}"
        ) from None
    return module


def _line(error: Exception, file: str) -> str:
    """Names the line of a file in which an error was raised, if there is one."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def _import(kind: str, name: str) -> Any:
    """Imports a module by its name."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(
            f"config task.kind={kind!r}: the module {name} cannot be imported: {_describe(error)}"
        ) from None


def _describe(error: Exception) -> str:
    """Returns name and message of an error."""
    return f"{type(error).__name__}: {error}"


def _find_class(kind: str, module: Any, name: str) -> type[Task]:
    """Returns the class of a task, found by its name in a module.

    Raises:
      UsageError: there is no such class, or it is no complete task.
    """
    try:
        value = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        value = None
    if not isinstance(value, type) or not issubclass(value, Task):
        if value is None:
            what = f"the module has no class {name!r}"
        else:
            what = f"{name!r} does not inherit from apr_jax.tasks.Task"
        names = _task_names(module)
        verb = "is" if len(names) == 1 else "are"
        raise UsageError(
            f"config task.kind={kind!r}: {what}; of tasks there {verb}"
            f" {', '.join(names) or 'none'} in it"
        )

    missing = [method for method in _REQUIRED if method in value.__abstractmethods__]
    if missing:
        raise UsageError(
            f"config task.kind={kind!r}: class {name} lacks the method {', '.join(missing)}"
        )
    if not dataclasses.is_dataclass(value.Config):
        raise UsageError(
            f"config task.kind={kind!r}: {name}.Config must be a frozen dataclass, is"
            f" {value.Config!r}"
        )
    return value


def _task_names(module: Any) -> list[str]:
    """Lists the names of the tasks that a module itself defines."""
    return sorted(
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    )


@functools.lru_cache(maxsize=32)
def _adapter(config_class: type) -> pydantic.TypeAdapter[Any]:
    """Returns pydantic's checker of a class of settings."""
    return pydantic.TypeAdapter(config_class)


def _checked(task_class: type[Task], options: dict[str, Any]) -> Any:
    """Returns a task's settings, checked and as an instance of its class `Config`.

    Raises:
      UsageError: a setting is wrong or unknown; the message names the first one.
    """
    config_class: Any = task_class.Config
    values: dict[str, Any] = {}
    for name, value in options.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            values[name] = dataclasses.asdict(value)
        else:
            values[name] = value

    try:
        return _adapter(config_class).validate_python(values, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
        if first["type"] == "unexpected_keyword_argument":
            names = [field.name for field in dataclasses.fields(config_class)]
            message = f"the task has no such setting; it has {', '.join(names) or 'none'}"
        if field:
            message = f"task.{field}{shown}: {message}"
        raise UsageError(f"config {message}") from None
