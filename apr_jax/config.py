"""All settings of an experiment as one tree of frozen dataclasses: files, `--set` overrides, JSON.

An experiment file is Python with one function `experiment()` that returns an `Experiment`. pydantic
checks the types, so that neither an override nor a stored config can put a string where a number
belongs.
"""

import dataclasses
import difflib
import json
import runpy
import traceback
import typing
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

_LARGEST_INTEGER = 2**31 - 1  # Devices count in 32 bits. Seeds have bounds of their own.


class ConfigError(UsageError):
    """A config file or an override cannot be used; the message names the field."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Numbers of devices along the axes of the mesh.

    Attributes:
      data: number of copies of the weights, each of which works on rows of its own. 0 takes all
        devices that are left; in a single process, as many of them as the rows of a step divide
        over.
      fsdp: number of devices over which one copy of weights and optimizer state is spread. Each of
        them works on rows of its own.
      tensor: number of devices that work on the same rows, each on some of the heads. 0 takes one
        device, or as many as there are devices for a row of `train.sft.batch_rows`.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for field, least in (("data", 0), ("fsdp", 1), ("tensor", 0)):
            value = getattr(self, field)
            if value < least:
                raise ValueError(f"mesh.{field}={value} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What `apr reproduce` evaluates.

    For the paper's task that is `paper/suite.py`; figures and tables are the paper's. For any other
    task it is `paper/methods.py`: of these fields it takes `batch`, `problems`, `samples`, the
    highest of `temperatures`, `windows` and `methods`.

    A finished run may be given other values. Then only the evaluations that are new are done.

    Attributes:
      compared: whether the run is set beside the paper, with its figures, tables and comparisons.
        Models that are trained for minutes have nothing to compare; of them the report shows the
        main ones alone.
      headline: temperature of the answers that come first: every model answers all test problems at
        it, and the report opens with them. 0 is greedy.
      batch: number of trees of one rollout call.
      problems: number of test problems, the first of the file, of all other evaluations.
      validation: number of validation problems, the last of the file, that choose where a
        comparison takes the best of several evaluations. The first ones of the file choose the step
        of each training.
      samples: number of trees for each problem of serial search at each temperature, for pass@n and
        cons@n.
      temperatures: temperatures of evaluations besides the greedy ones and those of the headline
        (Fig. 4a and 8, Table 3).
      children: conditions of the sweep of APR: numbers of children that its prompts request
        (Fig. 4a, 6 and 8).
      bins: conditions of the sweep of SoS+: numbers of window bins (Fig. 6).
      forced: numbers of forced children, before and after RL (Fig. 7), in increasing order. The
        last one is evaluated at all temperatures. Only the first one is for APR with a random
        parent beam, which breaks if many children are forced.
      sweep: the stage whose models are swept. The paper sweeps the supervised ones.
      timed: number of problems that are answered one at a time and timed (Fig. 6), and of which
        samples of serial search are timed side by side. A third of them is timed on several numbers
        of decode slots. 0 times none.
      repeats: number of times that each of these problems is answered; the median counts.
      ablations: whether to train the ablations of the suite too (Tables 1 and 2, Fig. 5), on data
        in folders of their own. An ablation is not trained if it is the experiment itself or if its
        model exists. Models that exist are evaluated in any case.
      windows: windows, besides `limits.window`, in which the methods of another task are compared.
      methods: methods of another task that are trained and compared; none means all that fit the
        limits.
    """

    compared: bool = True
    headline: float = 0.0
    batch: int = 256
    problems: int = 200
    validation: int = 200
    samples: int = 8
    temperatures: tuple[float, ...] = (1.0,)
    children: tuple[int, ...] = ()
    bins: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    sweep: Literal["sft", "rl"] = "sft"
    timed: int = 0
    repeats: int = 5
    ablations: bool = False
    windows: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("batch", "problems", "validation", "samples", "repeats"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"evaluate.{field}={value} must be at least 1")
        if self.headline < 0:
            raise ValueError(f"evaluate.headline={self.headline} must be at least 0")
        if self.timed < 0:
            raise ValueError(f"evaluate.timed={self.timed} must be at least 0")
        if any(temperature <= 0 for temperature in self.temperatures):
            raise ValueError(
                f"evaluate.temperatures={self.temperatures} must be above 0; greedy answers are"
                " always there"
            )


def _read_task(task: Any) -> TaskConfig:
    """Returns the task of a config, which may be stored as plain values."""
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
    """All settings of a run. Every checkpoint contains them.

    Attributes:
      name: name of the experiment in reports and metrics.
      seed: seed of the weights, of the order of the data, and of all sampling.
      task: the task and its settings.
      data: how problems and demonstrations are made.
      model: size and form of the transformer.
      limits: what the threads of a tree may do.
      schedule: how the rollout shares out its decode slots. It changes no token, only the speed.
      train: supervised training and reinforcement learning.
      evaluate: what `apr reproduce` evaluates.
      mesh: how the devices are used.
    """

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
    """Refuses integers that do not fit into 32 bits, other than seeds.

    Args:
      values: the fields of a config, in nested groups.
      prefix: the names of the groups around them, with dots.

    Raises:
      ValueError: an integer is too large; the message names its field.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            _check_integers(value, f"{prefix}{name}.")
            continue
        if name == "seed":
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, int) and abs(number) > _LARGEST_INTEGER:
                raise ValueError(
                    f"{prefix}{name}={value} must be from -{_LARGEST_INTEGER} to {_LARGEST_INTEGER}"
                )


_ADAPTER = pydantic.TypeAdapter(Experiment)


def to_dict(config: Experiment) -> dict[str, Any]:
    """Returns a config as nested plain values; `from_dict` is the inverse."""
    return dataclasses.asdict(config) | {"task": config.task.to_dict()}


def from_dict(values: dict[str, Any]) -> Experiment:
    """Returns the config that has these values.

    Args:
      values: plain values in nested groups, as `to_dict` returns them. A field that is missing has
        its default.

    Raises:
      ConfigError: a field is wrong or unknown; the message names the first one, its value and the
        rule that it breaks.
    """
    try:
        return _ADAPTER.validate_python(values, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        value = first["input"]
        shown = "" if isinstance(value, dict) else f"={value!r}"
        if field:
            message = f"{field}{shown}: {message}"
        raise ConfigError(f"config {message}") from None


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
    """Applies settings of the form `path.to.field=value`, from left to right.

    Raises:
      ConfigError: a setting has no `=`, names no field (the nearest one is suggested), or its value
        has the wrong type.
    """
    values = to_dict(config)
    _apply(settings, values, _open_groups(config.task))
    return from_dict(values)


def task_from_settings(kind: str, settings: list[str]) -> TaskConfig:
    """Returns the task of this kind, with settings of the form `task.name=value`.

    Raises:
      UsageError: as `override` and `TaskConfig` do.
    """
    task = TaskConfig(kind)
    values = {"task": task.to_dict()}
    _apply(settings, values, _open_groups(task))
    return TaskConfig.from_dict(values["task"])


def _open_groups(task: TaskConfig) -> frozenset[str]:
    """Returns the settings of a task that are dicts: they may have keys that nobody declared."""
    return frozenset(
        f"task.{field.name}"
        for field in dataclasses.fields(task.options)
        if isinstance(getattr(task.options, field.name), dict)
    )


def _apply(settings: list[str], values: dict[str, Any], open_groups: frozenset[str]) -> None:
    """Changes `values`, nested groups of fields, as each setting says.

    Args:
      settings: texts of the form `path.to.field=value`.
      values: the groups of fields.
      open_groups: paths of groups that take new fields, too.

    Raises:
      ConfigError: a setting has no `=`, names no field, or its value has the wrong type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {setting!r}: write it as field=value, for example train.sft.steps=200"
            )

        parent, _, key = path.strip().rpartition(".")
        if parent in open_groups and key:
            _set_open(values["task"][parent.removeprefix("task.")], key, text.strip(), setting)
            continue

        # Go down to the group that holds the field.
        group: dict[str, Any] = {}
        value: Any = values
        names = path.strip().split(".")
        for name in names:
            if not isinstance(value, dict) or name not in value:
                raise ConfigError(f"--set {setting!r}: no field {path!r}; {_nearest(path, values)}")
            group = value
            value = group[name]
        if isinstance(value, dict):
            if path.strip() in open_groups:
                raise ConfigError(
                    f"--set {setting!r}: {path!r} is a group of fields; set one of them, as in"
                    f" {path.strip()}.key=value"
                )
            raise ConfigError(
                f"--set {setting!r}: {path!r} is a group of fields: {', '.join(value)}"
            )
        declared = _declared_type(names)
        if declared == int | str:
            group[names[-1]] = _parse_count_or_file(text.strip())
        elif typing.get_origin(declared) is tuple and typing.get_args(declared)[0] is str:
            group[names[-1]] = _split(text)
        else:
            group[names[-1]] = _parse(text.strip(), value, setting)


def _declared_type(names: list[str]) -> Any:
    """Returns the annotation of a field of `Experiment`, or None of a task's own options."""
    kind: Any = Experiment
    for name in names:
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def _split(text: str) -> tuple[str, ...]:
    """Returns what stands between the commas; of an empty text, nothing."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _set_open(group: dict[str, Any], key: str, text: str, setting: str) -> None:
    """Sets a field of an open group: of its old type if it has a plain value, else JSON or text."""
    old = group.get(key)
    if isinstance(old, (str, bool, int, float)):
        group[key] = _parse(text, old, setting)
        return
    try:
        group[key] = json.loads(text)
    except (ValueError, RecursionError):
        group[key] = text


def _parse_count_or_file(text: str) -> int | str:
    """Reads a number of demonstrations or the name of a file, whichever the field has now."""
    try:
        return int(text)
    except ValueError:
        return text


def _parse(text: str, old: Any, setting: str) -> Any:
    """Reads the value of a setting.

    Args:
      text: what stands behind the `=`.
      old: the value that the field has now, which decides the type.
      setting: the whole setting, for messages.

    Raises:
      ConfigError: the text is not of that type.
    """
    if isinstance(old, str):
        return text
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, tuple):  # An empty text is an empty tuple.
            if old and isinstance(old[0], str):
                return _split(text)
            # An empty tuple is one of numbers.
            return tuple(float(part) if "." in part else int(part) for part in _split(text))
        return type(old)(text)
    except (ValueError, KeyError):
        raise ConfigError(
            f"--set {setting!r}: {text!r} is not of type {type(old).__name__} (now {old!r})"
        ) from None


def _nearest(path: str, values: dict[str, Any]) -> str:
    """Suggests the field whose name is most like `path`."""
    near = difflib.get_close_matches(path, list(flatten_fields(values)), n=1, cutoff=0.0)
    return f"did you mean {near[0]!r}?"


def load(path: str | Path, settings: list[str] | None = None) -> Experiment:
    """Runs an experiment file and applies overrides.

    The file is Python and may do whatever this process may do, so never run a stranger's file.

    Args:
      path: an experiment file, or the name of a scale.
      settings: overrides of the form `path.to.field=value`.

    Raises:
      ConfigError: the file is missing, raises, or has no `experiment()`, or a value is out of
        range.
    """
    path = Path(path)
    if str(path) in SCALES and not path.exists():
        path = scale_file(str(path))
    if not path.is_file():
        trouble = "is a folder; give a file in it" if path.is_dir() else "no such file"
        raise ConfigError(
            f"config {path}: {trouble}; or give the name of a scale: {', '.join(SCALES)}"
        )

    try:
        with files_beside(path.parent):
            function = runpy.run_path(str(path)).get("experiment")
            config = function() if callable(function) else None
    except Exception as error:
        raise ConfigError(f"config {path}{_line(error, path)}: {_describe(error)}") from None
    if not callable(function):
        raise ConfigError(f"config {path}: has no function experiment()")
    if not isinstance(config, Experiment):
        raise ConfigError(
            f"config {path}: experiment() returned {type(config).__name__}, not an Experiment"
        )
    return override(from_dict(to_dict(config)), settings or [])


def _line(error: Exception, path: Path) -> str:
    """Names the line of the experiment file in which an error was raised, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _describe(error: Exception) -> str:
    """Returns the message of an error, after its name if the message alone says too little."""
    if isinstance(error, ValueError | UserError):
        return str(error)
    return f"{type(error).__name__}: {error}"
