"""Which task an experiment is about: found by name, made of its settings, in one place.

    TaskConfig("countdown", numbers=4)              a short name, of here or of an entry point
    TaskConfig("my_package.tasks:Anagrams")         a class of a module that Python can import
    TaskConfig("path/to/anagrams.py:Anagrams")      a class of a file

Other packages register short names by the entry-point group `apr_jax.tasks`. A file is looked for
from the current folder, then beside the experiment file that names it.
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
    "countdown": "apr_jax.tasks.countdown.task:Countdown",
    "hidden_digit": "apr_jax.tasks.toy:HiddenDigit",
}
_REQUIRED = ("draw", "prompt", "score")
_beside: contextvars.ContextVar[Path | None] = contextvars.ContextVar("beside", default=None)


@dataclasses.dataclass(frozen=True, init=False)
class TaskConfig:
    """The task of an experiment, and its settings.

    Attributes:
      kind: short name, `module:Class` or `file.py:Class`.
      options: the settings, a record of the task's class `Config`.

    Raises:
      UsageError: there is no such task, or a setting is wrong; names the field.
    """

    kind: str
    options: Any

    def __init__(self, kind: str, **options: Any):
        kind, task_class = find_task(kind)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "options", _checked(task_class, options))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: `kind`, then the settings; `from_dict` is its inverse."""
        return {"kind": self.kind, **dataclasses.asdict(self.options)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskConfig:
        """The config that has these values."""
        if not isinstance(values.get("kind"), str):
            raise UsageError(
                f"config task.kind={values.get('kind')!r}: must be the name of a task, like"
                f" {', '.join(map(repr, SHORT_NAMES))}"
            )
        return cls(**values)

    def replace(self, **changes: Any) -> TaskConfig:
        """The same with some settings changed."""
        return TaskConfig(self.kind, **(dataclasses.asdict(self.options) | changes))

    def __reduce__(self) -> tuple[Any, ...]:
        # As plain values: a worker process may have to load the file of the class first.
        return TaskConfig.from_dict, (self.to_dict(),)


def make_task(config: TaskConfig, limits: Any = None) -> Task:
    """The task of an experiment.

    Args:
      limits: `threads.Limits` of the rollout that its demonstrations are for; None for tasks that
        demonstrate nothing.
    """
    return remake(config, None if limits is None else Bounds.of(limits))


def remake(config: TaskConfig, bounds: Bounds | None) -> Task:
    """The task of a config, with the bounds of another one."""
    kind, task_class = find_task(config.kind)
    task = task_class(config.options, bounds)
    task.kind = kind
    return task


def config_of(task: Task) -> TaskConfig:
    """The config of which `make_task` makes an equal task."""
    kind = task.kind or f"{type(task).__module__}:{type(task).__qualname__}"
    return TaskConfig(kind, **dataclasses.asdict(task.config))


@contextlib.contextmanager
def files_beside(folder: Path) -> Iterator[None]:
    """While it lasts, files of tasks are also looked for in `folder`."""
    token = _beside.set(folder)
    try:
        yield
    finally:
        _beside.reset(token)


def find_task(kind: str) -> tuple[str, type[Task]]:
    """The name of a task, its file as seen from the current folder, and its class.

    Raises:
      UsageError: says what is missing, and what would be right.
    """
    place = SHORT_NAMES.get(kind) or _entry_points().get(kind)
    if place is None and ":" not in kind:
        names = sorted({*SHORT_NAMES, *_entry_points()})
        near = difflib.get_close_matches(kind, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise UsageError(
            f"config task.kind={kind!r}: no task has this name; {hint} A task of your own is"
            " 'module:Class' or 'file.py:Class'"
        )
    module_name, _, class_name = (place or kind).rpartition(":")
    if module_name.endswith(".py"):
        path = _find_file(kind, module_name)
        kind = f"{path}:{class_name}"
        module = _load_file(kind, path)
    else:
        module = _import(kind, module_name)
    return kind, _find_class(kind, module, class_name)


def _entry_points() -> dict[str, str]:
    """Short names that installed packages register."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point.value for point in found}


def _find_file(kind: str, name: str) -> str:
    beside = _beside.get()
    if Path(name).is_file():
        return name
    if beside is not None and (beside / name).is_file():
        return os.path.relpath(beside / name)
    looked = [str(Path(name).absolute()), *([str(beside / name)] if beside is not None else [])]
    raise UsageError(
        f"config task.kind={kind!r}: there is no file {' or '.join(looked)}; run the command in the"
        " folder from which that path leads to it"
    )


def _load_file(kind: str, path: str) -> Any:
    """The module of a file, which runs once in a process."""
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
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == full
        ]
        if isinstance(error, SyntaxError) and error.filename == full:
            lines = [error.lineno]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(
            f"config task.kind={kind!r}: {path}{where} cannot be run: {_said(error)}"
        ) from None
    return module


def _import(kind: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(
            f"config task.kind={kind!r}: the module {name} cannot be imported: {_said(error)}"
        ) from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _find_class(kind: str, module: Any, name: str) -> type[Task]:
    try:
        found = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        found = None
    if not isinstance(found, type) or not issubclass(found, Task):
        tasks = sorted(
            name
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, Task)
            and value.__module__ == module.__name__
        )
        has = f"there {'is' if len(tasks) == 1 else 'are'} {', '.join(tasks) or 'none'}"
        if found is None:
            what = f"the module has no class {name!r}"
        else:
            what = f"{name!r} does not inherit from apr_jax.tasks.Task"
        raise UsageError(f"config task.kind={kind!r}: {what}; of tasks {has} in it")
    missing = [method for method in _REQUIRED if method in found.__abstractmethods__]
    if missing:
        raise UsageError(
            f"config task.kind={kind!r}: class {name} lacks the method {', '.join(missing)}"
        )
    if not dataclasses.is_dataclass(found.Config):
        raise UsageError(
            f"config task.kind={kind!r}: {name}.Config must be a frozen dataclass, is"
            f" {found.Config!r}"
        )
    return found


@functools.lru_cache(maxsize=32)
def _adapter(config_class: type) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(config_class)


def _checked(task_class: type[Task], options: dict[str, Any]) -> Any:
    """A record of the task's settings; raises UsageError that names the first wrong one."""
    config_class: Any = task_class.Config
    values = {
        name: dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for name, value in options.items()
    }
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
        raise UsageError(
            f"config task.{field}{shown}: {message}" if field else f"config {message}"
        ) from None
