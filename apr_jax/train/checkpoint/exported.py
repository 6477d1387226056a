"""A model in one small file: bfloat16 weights with all that evaluation needs.

    model.safetensors   tensors by their path in the parameters, for example `layers/q`
                        metadata: one entry, JSON of config, method, stage, step and tokenizer, and
                        of sums of these and of the tensors

The sums are compared whenever the file is loaded, because safetensors itself does not notice a
flipped bit.

Half the bits of each weight are left out, so a run cannot go on from such a file bit for bit. What
the model answers hardly changes.
"""

import base64
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, deserialize

from apr_jax.config import ConfigError, from_dict, to_dict
from apr_jax.errors import UserError
from apr_jax.io.library_errors import shows_damage, what_went_wrong
from apr_jax.io.storage import as_path, save_tensors
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.train.checkpoint.checksum import digest, json_sum
from apr_jax.train.checkpoint.restored import Restored

SUFFIX = ".safetensors"
_ENTRY = "apr_jax"  # The key of our entry in the metadata.
_SUMS = "sums"  # The key of the sums in that entry.


def export_file(restored: Restored, path: Path) -> None:
    """Writes the model to a file, and makes the file's folder if it is not there.

    Raises:
      UserError: the file cannot be written.
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
    entry = json.dumps(about | {_SUMS: _sums(about, tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, {_ENTRY: entry})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load_exported(path: Path) -> Restored:
    """Loads an exported model; its weights become float32 again.

    Args:
      path: a file on this machine or in a bucket.

    Raises:
      UserError: there is no such file, or it is damaged, of another kind or another version.
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
            tokenizer=tokenizer_from_bytes(base64.b64decode(about["tokenizer"])),
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
    """Returns our entry in the file's metadata.

    A safetensors file begins with a length in eight bytes, and a JSON header of that length.
    """
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + length])
    about: dict[str, Any] = json.loads(header["__metadata__"][_ENTRY])
    return about


def _tensors(contents: bytes) -> dict[str, np.ndarray]:
    """Returns name -> tensor; raises ValueError if one is not of the type that we write."""
    tensors = {}
    for name, tensor in deserialize(contents):
        if tensor["dtype"] != "BF16":
            raise ValueError(f"{name} is {tensor['dtype']}, must be BF16")
        tensors[name] = np.frombuffer(tensor["data"], jnp.bfloat16).reshape(tensor["shape"])
    return tensors


def _sums(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns sums by which a load can tell whether the file still holds what was saved."""
    return {"about": json_sum(about), "tensors": digest(tensors)}


def _named(params: Any) -> dict[str, Any]:
    """Returns path -> weight, for example `layers/q`."""
    return dict(flatten_dict(params, sep="/"))
