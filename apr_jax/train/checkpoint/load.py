"""Loads the weights of a run, with all that evaluation and RL need of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from apr_jax.config import ConfigError, from_dict
from apr_jax.errors import UsageError, UserError
from apr_jax.io.disk_errors import quiet
from apr_jax.io.library_errors import shows_damage, what_went_wrong
from apr_jax.io.storage import absolute, as_path
from apr_jax.train.checkpoint.checksum import changed
from apr_jax.train.checkpoint.exported import SUFFIX, load_exported
from apr_jax.train.checkpoint.restored import Adapted, Pretrained, Restored, read_file_method
from apr_jax.train.checkpoint.retention import best_step
from apr_jax.train.checkpoint.run import read_tokenizer
from apr_jax.train.checkpoint.step_files import read_meta, steps_in, unreadable

_Read = TypeVar("_Read")  # What is read of a step.


def load_checkpoint(path: str | Path) -> Restored:
    """Loads the weights of a run's best step, or of one given step; reads no optimizer state.

    Without a validation, the last step of a run counts as its best.

    Args:
      path: a workdir, one `checkpoints/<step>` in it, or a file that `apr export` wrote.

    Raises:
      UsageError: it is an imported model.
      UserError: there is no checkpoint, it is damaged or cannot be read, or a weight is no number.
    """
    found = _load(path)
    if isinstance(found, Pretrained):
        raise UsageError(
            f"{found.path}: is an imported model, which was trained on no task yet; train it first,"
            f" by `apr train sft --init {found.path}`"
        )
    return found


def load_pretrained(path: str | Path) -> Pretrained:
    """Loads shape, weights and tokenizer of a model, for a training that starts from it.

    Args:
      path: a file that `apr import` wrote, or whatever `load_checkpoint` takes.

    Raises:
      UserError: as `load_checkpoint`, which alone refuses imported models.
    """
    found = _load(path)
    return found if isinstance(found, Pretrained) else found.pretrained


def load_adapters(path: str | Path) -> Adapted:
    """Loads the adapters of a run's best step, or of one given step.

    Args:
      path: a workdir, or one `checkpoints/<step>` in it.

    Raises:
      UsageError: it is a file, or a training of all weights.
      UserError: there is no checkpoint, or it is damaged or cannot be read.
    """
    path = as_path(path)
    if path.suffix == SUFFIX:
        raise UsageError(
            f"{path}: is a file, which holds weights with the adapters merged; give the folder of"
            " the run that trained them"
        )
    adapted = _read_best_step(absolute(path), _read_adapters)
    if adapted is None:
        raise UsageError(
            f"{path}: has no adapters, because all weights were trained (lora.rank=0); export the"
            " model itself"
        )
    return adapted


def _load(path: str | Path) -> Restored | Pretrained:
    """Loads the model of any checkpoint or file."""
    path = as_path(path)
    is_file = path.suffix == SUFFIX
    found = load_exported(path) if is_file else _read_best_step(absolute(path), _read)
    _check_finite(found)
    return found


def _read_best_step(run: Path, read: Callable[[Path], _Read]) -> _Read:
    """Reads something of a run's best step, or of the step that `run` is.

    Args:
      run: the run or the step.
      read: reads it from the folder of a step.

    Raises:
      UserError: there is no checkpoint, or it is damaged or cannot be read.
    """
    folder = best_step(run)
    try:
        return read(folder)
    except ConfigError as error:
        raise UserError(
            f"checkpoint {folder}: is of another version of apr_jax ({error}); train again"
        ) from None
    # Orbax and TensorStore raise errors of many types for damaged files.
    except Exception as error:
        if not shows_damage(error):
            raise unreadable(folder, error) from error
        others = [str(step) for step in steps_in(folder.parent) if str(step) != folder.name]
        hint = f"; other steps there: {', '.join(others)}" if others else "; train again"
        raise UserError(f"checkpoint {folder}: damaged ({what_went_wrong(error)}){hint}") from None


def _check_finite(found: Restored | Pretrained) -> None:
    """Refuses weights that a training left behind when it diverged.

    Raises:
      UserError: a weight is NaN or infinite.
    """
    for path, leaf in jax.tree.leaves_with_path(found.params):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{found.path}: the weights {name} hold NaN or infinity, so the training had"
                " diverged; take an earlier step, or train again with a smaller learning rate"
            )


def _read(folder: Path) -> Restored:
    """Reads the weights of a step and what describes them, and compares them with their sums."""
    meta = read_meta(folder)
    params = _read_arrays(folder / "params")
    wrong = changed(params, meta["sums"]["params"])
    if wrong:
        raise ValueError(f"params{wrong[0]} is not what was saved")
    return Restored(
        params=params,
        tokenizer=read_tokenizer(meta),
        config=from_dict(meta["config"]),
        method=meta["method"],
        stage=meta["stage"],
        step=meta["step"],
        path=str(folder),
        file_method=read_file_method(meta, str(folder)),
    )


def _read_adapters(folder: Path) -> Adapted | None:
    """Reads the adapters of a step, and compares them with their sums; None if it has none."""
    meta = read_meta(folder)
    config = from_dict(meta["config"])
    lora = config.train.rl.lora if meta["stage"] == "rl" else config.train.sft.lora
    if not lora.rank:
        return None
    adapters = _read_arrays(folder / "state")["adapters"]
    sums = {
        path: value
        for path, value in meta["sums"]["state"].items()
        if path.startswith("['adapters']")
    }
    wrong = changed({"adapters": adapters}, sums)
    if wrong:
        raise ValueError(f"state{wrong[0]} is not what was saved")
    return Adapted(adapters, lora, read_tokenizer(meta), str(folder))


def _read_arrays(folder: Path) -> Any:
    """Reads the arrays of an item of a step into numpy, whatever their shapes."""
    reader = ocp.PyTreeCheckpointHandler()
    with quiet():
        tree = reader.metadata(folder).tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))
