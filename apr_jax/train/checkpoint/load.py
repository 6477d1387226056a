"""Loads the weights of a run, with all that evaluation and RL need of them."""

from pathlib import Path
from typing import Any

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
from apr_jax.train.checkpoint.restored import Pretrained, Restored, read_file_method
from apr_jax.train.checkpoint.retention import best_step
from apr_jax.train.checkpoint.run import read_tokenizer
from apr_jax.train.checkpoint.step_files import read_meta, steps_in, unreadable


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


def _load(path: str | Path) -> Restored | Pretrained:
    """Loads the model of any checkpoint or file."""
    path = as_path(path)
    found = load_exported(path) if path.suffix == SUFFIX else _load_best_step(absolute(path))
    _check_finite(found)
    return found


def _load_best_step(run: Path) -> Restored:
    """Loads the weights of a run's best step, or of the step that `run` is.

    Raises:
      UserError: there is no checkpoint, or it is damaged or cannot be read.
    """
    folder = best_step(run)
    try:
        return _read(folder)
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
    params = _read_params(folder / "params")
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


def _read_params(folder: Path) -> Any:
    """Reads the weights of a step as numpy arrays, whatever their shapes."""
    reader = ocp.PyTreeCheckpointHandler()
    with quiet():
        tree = reader.metadata(folder).tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))
