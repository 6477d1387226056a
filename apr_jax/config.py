"""The whole experiment as one tree of frozen dataclasses: loading, `--set` overrides, JSON.

An experiment file is Python with one function `experiment()` that returns an `Experiment`. pydantic
checks types, so an override or a stored config can't smuggle in a string for a number."""

import dataclasses
import difflib
import json
import runpy
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from apr_jax.data.config import DataConfig
from apr_jax.errors import UsageError, UserError
from apr_jax.model.config import ModelConfig
from apr_jax.scales import SCALES, scale_file
from apr_jax.tasks.registry import TaskConfig, files_beside
from apr_jax.threads.keys import LARGEST_SEED
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import TrainConfig

_MOST = 2**31 - 1  # Of the config's integers, seeds aside.


class ConfigError(UsageError):
    """A config file or an override that cannot be used; the message names the field."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis.

    Attributes:
      data: copies of the weights, each with rows of its own; 0 takes all devices that are left; in
        a single process, as many of them as the rows of a step divide over.
      fsdp: devices over which one copy of weights and optimizer is spread, each with rows of its
        own.
      tensor: devices that share the same rows, each with some of the heads; 0 takes one, or as many
        as there are devices for a row of `train.sft.batch_rows`.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for field, least in (("data", 0), ("fsdp", 1), ("tensor", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"mesh.{field}={getattr(self, field)} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What `apr reproduce` evaluates (`paper/suite.py`). A finished run may be given other values:
    only what is new is done.

    Attributes:
      batch: trees of one rollout call.
      problems: the first so many test problems serve the evaluations that sample or sweep; the
        plain greedy ones take all.
      samples: trees a problem of SoS+, for pass@n and cons@n (of which stage at which temperature:
        `paper/suite.py`).
      temperatures: evaluated besides greedy answers (Fig. 4a and 8, Table 3).
      children: conditions of APR's sweep: child counts that its prompts ask for (Fig. 4a, 6 and 8).
      bins: conditions of SoS+'s sweep: window bins (Fig. 6).
      forced: child counts that roots are held to, before and after RL (Fig. 7); the last one at all
        temperatures. Increasing: APR on drawn beams, which breaks where it is held to many, is held
        to the first alone.
      sweep: the stage whose models are swept; the paper's are supervised.
      timed: problems that are answered one at a time, for their seconds (Fig. 6), a third of them
        on several numbers of decode slots; 0 measures none.
      repeats: of each of them; the median counts.
      ablations: whether those of the suite are trained too (Tables 1 and 2, Fig. 5), on data in
        folders of their own. Not one that is the experiment itself, or whose model is there: what
        is there is evaluated in any case.
    """

    batch: int = 256
    problems: int = 200
    samples: int = 8
    temperatures: tuple[float, ...] = (1.0,)
    children: tuple[int, ...] = ()
    bins: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    sweep: Literal["sft", "rl"] = "sft"
    timed: int = 0
    repeats: int = 5
    ablations: bool = False

    def __post_init__(self):
        for field in ("batch", "problems", "samples", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"evaluate.{field}={getattr(self, field)} must be at least 1")
        if self.timed < 0:
            raise ValueError(f"evaluate.timed={self.timed} must be at least 0")
        if any(temperature <= 0 for temperature in self.temperatures):
            raise ValueError(
                f"evaluate.temperatures={self.temperatures} must be above 0; greedy answers are"
                " always there"
            )


def _read_task(task: Any) -> TaskConfig:
    """The task of a config, be it stored as plain values."""
    if isinstance(task, TaskConfig):
        return task
    if not isinstance(task, dict):
        raise ConfigError(f"config task={task!r}: must be a TaskConfig")
    try:
        return TaskConfig.from_dict(task)
    except ConfigError:
        raise
    except UsageError as error:
        raise ConfigError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run. A checkpoint carries it whole."""

    name: str
    seed: int
    task: Annotated[TaskConfig, pydantic.PlainValidator(_read_task)]
    data: DataConfig
    model: ModelConfig
    limits: Limits
    schedule: Schedule
    train: TrainConfig
    evaluate: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed={self.seed} must be from 0 to {LARGEST_SEED}")
        _check_integers(to_dict(self), "")


def _check_integers(values: dict[str, Any], prefix: str) -> None:
    """Refuses integers that do not fit into 32 bits, which is what devices count in."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_integers(value, f"{prefix}{name}.")
        elif name != "seed":  # Seeds have bounds of their own.
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) > _MOST:
                    raise ValueError(f"{prefix}{name}={value} must be from -{_MOST} to {_MOST}")


_ADAPTER = pydantic.TypeAdapter(Experiment)


def to_dict(config: Experiment) -> dict[str, Any]:
    """Plain values only; `from_dict` is its inverse."""
    return dataclasses.asdict(config) | {"task": config.task.to_dict()}


def from_dict(values: dict[str, Any]) -> Experiment:
    """Raises ConfigError that names the first wrong field, its value and the rule."""
    try:
        return _ADAPTER.validate_python(values, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        value = first["input"]
        shown = "" if isinstance(value, dict) else f"={value!r}"
        raise ConfigError(
            f"config {field}{shown}: {message}" if field else f"config {message}"
        ) from None


def flatten_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested groups of fields one level deep, with the values that a JSON file would hold.

    `{"train": {"sft": {"steps": 5}}}` becomes `{"train.sft.steps": 5}`, and a tuple becomes a list.
    So the fields of a config can be compared with those that were read from a file.
    """
    return _flatten(json.loads(json.dumps(values)), prefix="")


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def override(config: Experiment, settings: list[str]) -> Experiment:
    """Applies `path.to.field=value` settings, left to right.

    Raises:
      ConfigError: the setting has no `=`, names no field (the nearest one is suggested), or the
        value has the wrong type.
    """
    values = to_dict(config)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {setting!r}: write it as field=value, for example train.sft.steps=200"
            )
        node: dict[str, Any] = values
        known: Any = values
        parts = path.strip().split(".")
        for depth, part in enumerate(parts):
            if not isinstance(known, dict) or part not in known:
                raise ConfigError(
                    f"--set {setting!r}: no field {path!r}; {_nearest(path, to_dict(config))}"
                )
            node, known = known, known[part]
            if depth == len(parts) - 1 and isinstance(known, dict):
                raise ConfigError(
                    f"--set {setting!r}: {path!r} is a group of fields: {', '.join(known)}"
                )
        node[parts[-1]] = _parse(text.strip(), known, setting)
    return from_dict(values)


def _parse(text: str, old: Any, setting: str) -> Any:
    if isinstance(old, str):
        return text
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, tuple):  # Of numbers; empty text is an empty one.
            return tuple(
                float(part) if "." in part else int(part)
                for part in text.split(",")
                if part.strip()
            )
        return type(old)(text)
    except (ValueError, KeyError):
        raise ConfigError(
            f"--set {setting!r}: {text!r} is not of type {type(old).__name__} (now {old!r})"
        ) from None


def _nearest(path: str, values: dict[str, Any]) -> str:
    def leaves(node: dict[str, Any], prefix: str) -> list[str]:
        return [
            leaf
            for name, value in node.items()
            for leaf in (
                leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
            )
        ]

    near = difflib.get_close_matches(path, leaves(values, ""), n=1, cutoff=0.0)
    return f"did you mean {near[0]!r}?"


def load(path: str | Path, settings: list[str] | None = None) -> Experiment:
    """Runs the experiment file, or that of the scale of this name, and applies the overrides.

    The file is Python and may do whatever this process may, so a stranger's must never be given.

    Raises:
      ConfigError: the file is missing, raises, has no `experiment()`, or a value is out of range.
    """
    path = Path(path)
    if str(path) in SCALES and not path.exists():
        path = scale_file(str(path))
    if not path.is_file():
        wrong = "is a folder; give a file in it" if path.is_dir() else "no such file"
        raise ConfigError(
            f"config {path}: {wrong}; or give the name of a scale: {', '.join(SCALES)}"
        )
    try:
        with files_beside(path.parent):
            function = runpy.run_path(str(path)).get("experiment")
            config = function() if callable(function) else None
    except Exception as error:
        raise ConfigError(f"config {path}{_line(error, path)}: {_said(error)}") from None
    if not callable(function):
        raise ConfigError(f"config {path}: has no function experiment()")
    if not isinstance(config, Experiment):
        raise ConfigError(
            f"config {path}: experiment() returned {type(config).__name__}, not an Experiment"
        )
    return override(from_dict(to_dict(config)), settings or [])


def _line(error: Exception, path: Path) -> str:
    """Where in the experiment file it was raised, if anywhere."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    return f", line {lines[-1]}" if lines else ""


def _said(error: Exception) -> str:
    """The error's own words, after its name where they would say little without it."""
    return (
        str(error)
        if isinstance(error, ValueError | UserError)
        else f"{type(error).__name__}: {error}"
    )
