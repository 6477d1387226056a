"""A model in one small file: bfloat16 weights with all that evaluation needs, for a repository or a
friend.

    model.safetensors   tensors by their path in the parameters, `layers/q` for one
                        metadata: one entry, JSON of config, method, stage, step and tokenizer, and
                        of sums of these and of the tensors

The sums are compared at every load: safetensors itself takes a flipped bit for a weight.

Half the bits of a weight are left out, so a run can't go on from it bit for bit; what it answers
hardly changes."""

import base64
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, deserialize

from apr_jax.config import ConfigError, from_dict, to_dict
from apr_jax.errors import UserError, shows_damage, what_went_wrong
from apr_jax.io.storage import as_path, save_tensors
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint.checksum import digest, json_sum
from apr_jax.train.checkpoint.restored import Restored

SUFFIX = ".safetensors"
_ENTRY = "apr_jax"
_SUMS = "sums"


def export_file(restored: Restored, path: Path) -> None:
    """Writes the file; its folder is made if it is not there.

    Raises:
      UserError: it can't be written.
    """
    about = {
        "config": to_dict(restored.config),
        "method": restored.method,
        "stage": restored.stage,
        "step": restored.step,
        "tokenizer": base64.b64encode(restored.tokenizer.to_bytes()).decode(),
    }
    tensors = {
        name: np.asarray(leaf).astype(jnp.bfloat16)
        for name, leaf in _named(restored.params).items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, {_ENTRY: json.dumps(about | {_SUMS: _sums(about, tensors)})})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load_exported(path: Path) -> Restored:
    """The model, its weights as float32 again.

    Args:
      path: of a file here or in a bucket.

    Raises:
      UserError: there is no such file, or it is damaged or of another kind.
    """
    try:
        contents = as_path(path).read_bytes()
        tensors = _tensors(contents)
        about = _about(contents)
        if about.pop(_SUMS) != _sums(about, tensors):
            raise UserError(
                f"{path}: is damaged (its sums are not those that were saved); copy or export it"
                " again"
            )
        leaves = {name: value.astype(np.float32) for name, value in tensors.items()}
        return Restored(
            params=unflatten_dict(leaves, sep="/"),
            config=from_dict(about["config"]),
            method=about["method"],
            stage=about["stage"],
            tokenizer=Tokenizer.from_bytes(base64.b64decode(about["tokenizer"])),
            step=about["step"],
            path=str(path),
        )
    except ConfigError as error:
        raise UserError(f"{path}: is of another version of apr_jax ({error})") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `apr export` writes one") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and not shows_damage(error):
            raise UserError(
                f"{path}: cannot be read here and now ({what_went_wrong(error)})"
            ) from None
        raise UserError(
            f"{path}: is not a whole model that `apr export` wrote ({error!r:.100})"
        ) from None


def _about(contents: bytes) -> dict[str, Any]:
    """The JSON of the file's metadata: its header is a length of eight bytes, and JSON of that
    length.
    """
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + length])
    about: dict[str, Any] = json.loads(header["__metadata__"][_ENTRY])
    return about


def _tensors(contents: bytes) -> dict[str, np.ndarray]:
    """The tensors of the file, by name."""
    found = {}
    for name, tensor in deserialize(contents):
        if tensor["dtype"] != "BF16":
            raise ValueError(f"{name} is {tensor['dtype']}, must be BF16")
        found[name] = np.frombuffer(tensor["data"], jnp.bfloat16).reshape(tensor["shape"])
    return found


def _sums(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """What tells whether a file still holds what was saved."""
    return {"about": json_sum(about), "tensors": digest(tensors)}


def _named(params: Any) -> dict[str, Any]:
    return dict(flatten_dict(params, sep="/"))
