"""Checkpoints: what a run saves so that it can go on bit for bit, and what evaluation needs of it.

    WORKDIR/checkpoints/<step>/params   the weights, alone
                               state    optimizer, counters
                               meta     JSON: config, method, stage, tokenizer, metrics, sums of all
                               data     JSON: where the data iterator stands

Orbax writes in the background and renames a step's folder when it is whole, so a killed run leaves
no half step. The two last steps are kept, and the best by validation accuracy. What is read is
compared with its sums (`checksum`): neither Orbax nor TensorStore notices a flipped bit inside an
array. docs/checkpoints.md says what each fault does."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from apr_jax.compare import FREE, LENGTHS, differences
from apr_jax.config import ConfigError, Experiment, from_dict, to_dict
from apr_jax.errors import DiskError, LostProcess, UserError, shows_damage, what_went_wrong
from apr_jax.io.disk_errors import Muffled, check_writable, disk_errors, quiet
from apr_jax.io.lease import Lease
from apr_jax.io.storage import absolute, as_path, is_remote, move, require_reachable, write_text
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint.checksum import array_sums, changed, json_sum
from apr_jax.train.checkpoint.exported import SUFFIX, load_exported
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.distributed import all_of
from apr_jax.train.state import TrainState

FOLDER = "checkpoints"
BEST = "validation_accuracy"  # The metric that makes a step the best.
_NOT_VALIDATED = -1.0
_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through a run and goes into each checkpoint.

    Attributes:
      stage: "sft" or "rl".
      origin: what the run started from: "" for random parameters, else a digest of the initial
        ones.
    """

    config: Experiment
    method: str
    stage: str
    tokenizer: Tokenizer
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a run goes on from.

    Attributes:
      data: JSON state of the data iterator.
      unvalidated: the run was stopped before the validation of this step that was due.
    """

    state: TrainState
    data: dict[str, Any]
    unvalidated: bool


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for the last save.

    Args:
      workdir: of the run.
      run: written into each checkpoint, and compared when one is restored.
      lease: of the workdir, which is checked before each save.
    """

    def __init__(self, workdir: Path, run: Run, lease: Lease | None = None):
        self._run = run
        self._lease = lease
        self._folder = absolute(workdir) / FOLDER
        with disk_errors(self._folder), quiet():
            self._folder.mkdir(parents=True, exist_ok=True)
            if not is_remote(self._folder):
                check_writable(self._folder)
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LastAndBest(self._folder),
                    # Of killed runs: who holds the lease has no other beside it.
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                ),
            )
        self._muffled = Muffled()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        try:
            # Closing would wait for what never comes.
            if kind is None or not issubclass(kind, LostProcess | DiskError):
                with disk_errors(self._folder):
                    self._manager.close()
        finally:
            self._muffled.end()

    def save(
        self,
        state: TrainState,
        metrics: dict[str, float],
        data: dict[str, Any],
        unvalidated: bool = False,
    ) -> None:
        """Starts saving the state under its own step, which is not there yet; when it returns, the
        state may be donated.

        Args:
          metrics: JSON values; those with BEST compete for being the best.
          data: JSON state of the data iterator.
          unvalidated: the metrics are still to come (`complete`).

        Raises:
          UserError: this save, or the one before that ran in the background, found the disk full;
            or the step is there.
        """
        step = int(state.step)
        self._check_lease()
        if (self._folder / str(step)).exists():
            raise UserError(
                f"checkpoint {self._folder / str(step)}: is there already, and is not written over"
            )
        meta = {
            "config": to_dict(self._run.config),
            "method": self._run.method,
            "stage": self._run.stage,
            "origin": self._run.origin,
            "tokenizer": _encode(self._run.tokenizer),
            "metrics": metrics,
            "unvalidated": unvalidated,
            "step": step,
            "sums": {
                "params": array_sums(state.params),
                "state": array_sums(_without_params(state)),
            },
            "data_sum": json_sum(data),
        }
        meta["meta_sum"] = json_sum(meta)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            state=ocp.args.StandardSave(_without_params(state)),
            meta=ocp.args.JsonSave(meta),
            data=ocp.args.JsonSave(data),
        )
        with disk_errors(self._folder):
            saved = self._manager.save(step, args=items)
        if not saved:
            steps = list(self._manager.all_steps())
            raise UserError(
                f"checkpoint {self._folder}: step {step} cannot follow the steps that are there"
                f" ({steps})"
            )

    def complete(self, step: int, metrics: dict[str, float]) -> None:
        """Gives a step on disk the metrics that it was saved without.

        One small file of it is replaced, whole or not at all: whatever ends the process in between,
        the step is there.

        Raises:
          UserError: the disk is full.
        """
        self._check_lease()
        if jax.process_index() == 0:
            folder = self._folder / str(step)
            with disk_errors(self._folder):
                meta = _read_meta(folder) | {"metrics": metrics, "unvalidated": False}
                write_text(
                    _json_file(folder, "meta"), json.dumps(meta | {"meta_sum": json_sum(meta)})
                )
        all_of(True)  # Until the first process is done.

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def wait(self) -> None:
        """Until all saves are on disk."""
        with disk_errors(self._folder):
            self._manager.wait_until_finished()

    def restore_latest(self, blank: TrainState) -> Saved | None:
        """The newest step that can be read; None if there is no step at all.

        A damaged step is reported in one line. Once an older one was read, it is moved to
        WORKDIR/damaged and can be saved anew; nothing is ever deleted for not being readable.
        Whatever else keeps a step from being read (memory, a permission, a device, a network) ends
        the run instead: with an older step it would only do its work again.

        Args:
          blank: a state of the wanted shapes and layout.

        Raises:
          UserError: the checkpoint is of another run, a step is whole but cannot be read here and
            now, or all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[int] = []
        for step in steps:
            folder = self._folder / str(step)
            found, error = self._read(folder, blank)
            if not all_of(error is None or shows_damage(error)):
                raise _unreadable(folder, error or OSError("by another process"))
            problem = "" if error is None else what_went_wrong(error)
            if not all_of(not problem):  # What follows is done together, and needs all.
                problem = problem or "another process cannot read it"
            if not problem and found is not None:
                state, data, meta = found
                problem = _difference(state, meta)
                if not problem:
                    self._set_aside(damaged)
                    return Saved(state, data, meta["unvalidated"])
            print(
                f"checkpoint {folder}: damaged ({problem}); going on from the step before",
                flush=True,
            )
            damaged.append(step)
        if steps:
            raise UserError(
                f"checkpoint {self._folder}: all {len(steps)} steps are damaged; move it away to"
                " start anew, or use another --workdir"
            )
        return None

    def _read(
        self, folder: Path, blank: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any], dict[str, Any]] | None, Exception | None]:
        """State, data and meta of a step, or what keeps it from being read; without a word between
        processes.
        """
        try:
            meta, data = _read_meta(folder), _read_json(folder, "data")
            if meta["data_sum"] != json_sum(data):
                raise ValueError("data is not what was saved")
            self._check_same_run(meta, folder)
            if "unvalidated" not in meta:
                raise version_error(folder)
            params = _read_arrays(folder / "params", blank.params)
            state = TrainState(
                params=params, **_read_arrays(folder / "state", _without_params(blank))
            )
            return (state, data, meta), None
        except UserError:
            raise
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise all sorts of types for damaged files.
            return None, error

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        aside = self._folder.parent / "damaged"
        if jax.process_index() == 0:
            with disk_errors(aside):
                aside.mkdir(exist_ok=True)
                for step in steps:
                    taken = len(list(aside.glob(f"{step}.*")))
                    move(self._folder / str(step), aside / f"{step}.{taken}")
        all_of(True)  # Until the first process is done.
        self._manager.reload()

    def _check_same_run(self, meta: dict[str, Any], folder: Path) -> None:
        """Raises UserError that names what differs between this run and the one that saved the
        step.
        """
        run = self._run
        for name, wanted, found in (
            ("stage", run.stage, meta["stage"]),
            ("method", run.method, meta["method"]),
            ("tokenizer", _fingerprint(_encode(run.tokenizer)), _fingerprint(meta["tokenizer"])),
            ("init", run.origin, meta["origin"]),
        ):
            if wanted != found:
                raise UserError(
                    f"checkpoint {folder}: was saved with {name}={found!r}, not {wanted!r};"
                    f" {_ANOTHER}"
                )
        free = (*FREE, *LENGTHS, "train.rl." if run.stage == "sft" else "train.sft.")
        differing = [
            f"{name}={old!r} (now {new!r})"
            for name, old, new in differences(meta["config"], run.config, free)
        ]
        if differing:
            raise UserError(
                f"checkpoint {folder}: was saved with {', '.join(differing)}; {_ANOTHER}"
            )


_ANOTHER = "use the same settings, or another --workdir"


def load_checkpoint(path: str | Path) -> Restored:
    """Loads the weights of a run's best (or, without validation, last) step, or of one step; reads
    no optimizer state.

    Args:
      path: a workdir, one `checkpoints/<step>` in it, or a file that `apr export` wrote.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    path = as_path(path)
    if path.suffix == SUFFIX:
        return load_exported(path)
    folder = _step_folder(absolute(path))
    try:
        meta = _read_meta(folder)
        params = _read_params(folder / "params")
        if wrong := changed(params, meta["sums"]["params"]):
            raise ValueError(f"params{wrong[0]} is not what was saved")
        tokenizer = Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))
        config = from_dict(meta["config"])
        return Restored(
            params, config, meta["method"], meta["stage"], tokenizer, meta["step"], str(folder)
        )
    except ConfigError as error:
        raise UserError(
            f"checkpoint {folder}: is of another version of apr_jax ({error}); train again"
        ) from None
    except Exception as error:  # Orbax and TensorStore raise all sorts of types for damaged files.
        if not shows_damage(error):
            raise _unreadable(folder, error) from error
        others = [str(step) for step in _steps(folder.parent) if str(step) != folder.name]
        hint = f"; other steps there: {', '.join(others)}" if others else "; train again"
        raise UserError(f"checkpoint {folder}: damaged ({what_went_wrong(error)}){hint}") from None


def version_error(folder: Path) -> UserError:
    """Returns the error for a run that another version of this library saved."""
    return UserError(
        f"checkpoint {folder}: is of another version of apr_jax; use another --workdir"
    )


def _unreadable(folder: Path, error: Exception) -> UserError:
    """The error for a step that is not known to be damaged, but cannot be read here and now."""
    return UserError(
        f"checkpoint {folder}: cannot be read here and now ({what_went_wrong(error)}); this is no"
        " damage, and nothing was changed; mend the cause and start the same command again"
    )


def _step_folder(path: Path) -> Path:
    """Folder of the step that is meant by `path`: the step itself, or of a run the best one, among
    equals the last.

    Raises:
      UserError: there is none, or a step does not say how good it is. Another one is not taken in
        its place: it would be another model without a word.
    """
    is_step = path.parent.name == FOLDER and path.name.isdigit() and path.is_dir()
    if is_step or (path / "meta").is_dir():
        return path
    folders = _step_folders(path)
    scores = {folder: _known_score(folder, folders) for folder in folders}
    return max(folders, key=lambda folder: (scores[folder], int(folder.name)))


def _known_score(folder: Path, folders: Sequence[Path]) -> float:
    try:
        return _score(_read_meta(folder))
    except Exception as error:
        # A training that goes on has just deleted it, for others are better.
        if not folder.is_dir():
            return _NOT_VALIDATED
        if not shows_damage(error):
            raise _unreadable(folder, error) from error
        others = ", ".join(str(other) for other in folders if other != folder)
        remedy = f"to take another step, name it ({others})" if others else "train again"
        raise UserError(
            f"checkpoint {folder}: damaged ({what_went_wrong(error)}), so which step of the run is"
            f" the best is not known; {remedy}"
        ) from None


def last_step(workdir: Path) -> Path:
    """Folder of a run's last step, for `load_checkpoint`: a run that is to save tokens does not
    want its most accurate one.

    Raises:
      UserError: the run has no step.
    """
    return _step_folders(absolute(workdir))[-1]


def _step_folders(path: Path) -> list[Path]:
    """All steps of a run, in their order."""
    steps = _steps(path / FOLDER)
    if not steps:
        require_reachable(path)
        raise UserError(
            f"checkpoint {path}: no such checkpoint; give a run's folder or one of its"
            f" {FOLDER}/<step>"
        )
    return [path / FOLDER / str(step) for step in steps]


def _score(meta: dict[str, Any]) -> float:
    return float(meta["metrics"].get(BEST, _NOT_VALIDATED))


def _steps(folder: Path) -> list[int]:
    return (
        sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())
        if folder.is_dir()
        else []
    )


def _json_file(folder: Path, item: str) -> Path:
    """Where Orbax's JSON handler writes it."""
    return folder / item / "metadata"


def _read_json(folder: Path, item: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_json_file(folder, item).read_text())
    return value


def _read_meta(folder: Path) -> dict[str, Any]:
    """Raises ValueError if it is not what was saved."""
    meta = _read_json(folder, "meta")
    if meta.pop("meta_sum", None) != json_sum(meta):
        raise ValueError("meta is not what was saved")
    return meta


def _difference(state: TrainState, meta: dict[str, Any]) -> str:
    """What of the state is not what was saved, or ""; all processes call it, and all get the
    same.
    """
    arrays = {"params": state.params, "state": _without_params(state)}
    wrong = [
        item + path for item, sums in meta["sums"].items() for path in changed(arrays[item], sums)
    ]
    if wrong:
        return f"{wrong[0]} is not what was saved"
    return "" if int(state.step) == meta["step"] else f"holds step {int(state.step)}"


def _read_arrays(folder: Path, blank: Any) -> Any:
    """Arrays of the shapes and the layout of `blank`."""
    with quiet():  # Not by way of the manager: its processes would wait for one that has failed.
        return ocp.StandardCheckpointHandler().restore(
            folder, args=ocp.args.StandardRestore(_abstract(blank))
        )


def _read_params(folder: Path) -> Any:
    reader = ocp.PyTreeCheckpointHandler()
    with quiet():
        tree = reader.metadata(folder).tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))


class _LastAndBest(preservation_policy.PreservationPolicy):
    """Keeps the last steps and the best one, among equals the later; and those whose score cannot
    be read, which may be the best.

    The scores are read from `meta`: with metrics of its own, Orbax could not open a folder in which
    one is damaged. The step that is being saved has no score yet, but it is among the last."""

    def __init__(self, folder: Path):
        self._folder = folder

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-_KEPT:])
        scores = {}
        for step in steps:
            try:
                scores[step] = _score(_read_meta(self._folder / str(step)))
            # Damaged, or it cannot be read just now. One of the last may still be on its way.
            except Exception:
                kept.add(step)
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], step)))
        return [step in kept for step in steps]


def _without_params(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _encode(tokenizer: Tokenizer) -> str:
    return base64.b64encode(tokenizer.to_bytes()).decode()


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
