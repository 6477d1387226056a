"""The files of a saved step, and the steps of a run.

    WORKDIR/checkpoints/<step>/params   the weights, alone
                               state    optimizer, counters, adapters if these are trained, and
                                        the trees that RL carries over to the next step
                               meta     JSON: config, method, stage, tokenizer, metrics, sums of all
                               data     JSON: where the data iterator stands

On a disk the folder of a step gets its name once it is whole. In a bucket nothing can be renamed,
so a step is written under its own name, and Orbax commits it by a last file. A folder without it is
no step yet, or was left by a killed save.

Whatever is read is compared with its sums (`checksum`), because neither Orbax nor TensorStore
notices a flipped bit inside an array.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from apr_jax.errors import UserError
from apr_jax.io.library_errors import what_went_wrong
from apr_jax.io.storage import absolute, require_reachable
from apr_jax.train.checkpoint.checksum import json_sum
from apr_jax.train.state import TrainState

FOLDER = "checkpoints"


def last_step(workdir: Path) -> Path:
    """Finds the folder of a run's last step, for `load_checkpoint`.

    The best step of a run is its most accurate one. Where a run learns to save tokens, that is not
    the one that is wanted.

    Raises:
      UserError: the run has no step.
    """
    return step_folders(absolute(workdir))[-1]


def step_folders(path: Path) -> list[Path]:
    """Lists the folders of all steps of a run, in the order of the steps.

    Raises:
      UserError: the run has no step.
    """
    steps = steps_in(path / FOLDER)
    if not steps:
        require_reachable(path)
        begun = _numbered(path / FOLDER)
        if begun:
            raise unfinished(begun[-1])
        raise UserError(
            f"checkpoint {path}: no such checkpoint; give a run's folder or one of its"
            f" {FOLDER}/<step>"
        )
    return [path / FOLDER / str(step) for step in steps]


def steps_in(folder: Path) -> list[int]:
    """Lists the whole steps in a folder of checkpoints, in order; none if there is no folder."""
    return sorted(int(entry.name) for entry in _numbered(folder) if is_whole(entry))


def is_whole(folder: Path) -> bool:
    """Returns whether Orbax has committed a step, which it does once all of it is written."""
    return bool(ocp.utils.is_checkpoint_finalized(folder))


def _numbered(folder: Path) -> list[Path]:
    """Lists what is named like a step in a folder of checkpoints."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.glob("*") if entry.name.isdigit()]


def json_file(folder: Path, item: str) -> Path:
    """Returns the file into which Orbax's JSON handler writes an item of a step."""
    return folder / item / "metadata"


def read_json(folder: Path, item: str) -> dict[str, Any]:
    """Reads a JSON item of a step."""
    value: dict[str, Any] = json.loads(json_file(folder, item).read_text())
    return value


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the `meta` of a step.

    Raises:
      ValueError: it is not what was saved.
    """
    meta = read_json(folder, "meta")
    if meta.pop("meta_sum", None) != json_sum(meta):
        raise ValueError("meta is not what was saved")
    return meta


def without_params(state: TrainState) -> dict[str, Any]:
    """Returns the item `state` of a step: the fields of a state by name, all but the weights.

    Adapters and carried trees are left out where there are none.
    """
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "params" and value is not None}


def version_error(folder: Path) -> UserError:
    """Returns the error for a run that another version of this library saved."""
    return UserError(
        f"checkpoint {folder}: is of another version of apr_jax; use another --workdir"
    )


def unfinished(folder: Path) -> UserError:
    """Returns the error for the folder of a step that was never committed, or is not yet."""
    return UserError(
        f"checkpoint {folder}: its save has not ended; if the run was killed meanwhile, start it"
        " again, and it saves the step anew"
    )


def unreadable(folder: Path, error: Exception) -> UserError:
    """Returns the error for a step that is not known to be damaged, but cannot be read now."""
    return UserError(
        f"checkpoint {folder}: cannot be read here and now ({what_went_wrong(error)}); this is no"
        " damage, and nothing was changed; mend the cause and start the same command again"
    )
