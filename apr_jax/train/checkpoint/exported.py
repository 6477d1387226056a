"""A model in one file: weights with all that evaluation, or a training, needs.

    model.safetensors   tensors by their path in the parameters, for example `layers/q`
                        metadata: one entry, JSON of what describes the model, and of sums of it and
                        of the tensors

There are two kinds. `apr export` writes a trained model with its config, method, stage, step and
tokenizer, and its weights in bfloat16. Half the bits of each weight are left out, so a run cannot
go on from such a file bit for bit; what the model answers hardly changes. `apr import` writes a
pretrained model with its shape and tokenizer, and loses no bit: a tensor is stored in bfloat16 only
if all its values are of that type.

The sums are compared whenever the file is loaded, because safetensors itself does not notice a
flipped bit.
"""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pydantic
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, deserialize

from apr_jax.config import ConfigError, from_dict, to_dict
from apr_jax.errors import UserError
from apr_jax.io.library_errors import shows_damage, what_went_wrong
from apr_jax.io.storage import as_path, save_tensors
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import cast_weights
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint.checksum import digest, json_sum
from apr_jax.train.checkpoint.restored import Pretrained, Restored, read_file_method

SUFFIX = ".safetensors"
_ENTRY = "apr_jax"  # The key of our entry in the metadata.
_SUMS = "sums"  # The key of the sums in that entry.
_DTYPES = {"BF16": jnp.bfloat16, "F32": np.float32}
_MODEL = pydantic.TypeAdapter(ModelConfig)


def export_file(restored: Restored, path: Path) -> None:
    """Writes a trained model to a file, and makes the file's folder if it is not there.

    Raises:
      UserError: the file cannot be written.
    """
    about = {
        "config": to_dict(restored.config),
        "method": restored.method,
        "file_method": restored.file_method and dataclasses.asdict(restored.file_method),
        "stage": restored.stage,
        "step": restored.step,
        "tokenizer": _encode(restored.tokenizer),
    }
    tensors = {
        name: np.asarray(leaf).astype(jnp.bfloat16)
        for name, leaf in _named(restored.params).items()
    }
    _write(about, tensors, path)


def save_pretrained(pretrained: Pretrained, path: Path) -> None:
    """Writes a pretrained model to a file without the loss of a bit.

    Raises:
      UserError: the file cannot be written.
    """
    about = {
        "model": dataclasses.asdict(pretrained.model),
        "tokenizer": _encode(pretrained.tokenizer),
    }
    tensors = {name: _narrowed(leaf) for name, leaf in _named(pretrained.params).items()}
    _write(about, tensors, path)


def load_exported(path: Path) -> Restored | Pretrained:
    """Loads an exported or an imported model; its weights get their `param_dtype` again.

    Args:
      path: a file on this machine or in a bucket.

    Raises:
      UserError: there is no such file, or it is damaged, of another kind or another version.
    """
    try:
        contents = as_path(path).read_bytes()
        tensors = _tensors(contents)
        about = _about(contents)
        del contents  # The tensors are copies.
        if about.pop(_SUMS) != _sums(about, tensors):
            raise UserError(
                f"{path}: is damaged (its sums are not those that were saved); copy or export it"
                " again"
            )
        params = unflatten_dict(tensors, sep="/")
        tokenizer = tokenizer_from_bytes(base64.b64decode(about["tokenizer"]))
        if "model" in about:
            model = _MODEL.validate_python(about["model"], extra="forbid")
            params = cast_weights(params, model.param_dtype)
            return Pretrained(params, model, tokenizer, str(path))
        config = from_dict(about["config"])
        return Restored(
            params=cast_weights(params, config.model.param_dtype),
            config=config,
            method=about["method"],
            stage=about["stage"],
            tokenizer=tokenizer,
            step=about["step"],
            path=str(path),
            file_method=read_file_method(about, str(path)),
        )
    except ConfigError as error:
        raise UserError(f"{path}: is of another version of apr_jax ({error})") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: is of another version of apr_jax (model.{field}: {first['msg']})"
        ) from None
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; `apr export` writes one, and so does `apr import`"
        ) from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and not shows_damage(error):
            raise UserError(
                f"{path}: cannot be read here and now ({what_went_wrong(error)})"
            ) from None
        raise UserError(
            f"{path}: is not a whole model that `apr export` wrote ({error!r:.100})"
        ) from None


def _write(about: dict[str, Any], tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file with its sums, and makes the file's folder if it is not there."""
    entry = json.dumps(about | {_SUMS: _sums(about, tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, {_ENTRY: entry})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _narrowed(leaf: np.ndarray) -> np.ndarray:
    """Returns a float32 tensor in bfloat16 if no value of it changes, else as it is."""
    narrow = leaf.astype(jnp.bfloat16)
    return narrow if np.array_equal(narrow.astype(np.float32), leaf) else leaf


def _encode(tokenizer: Tokenizer) -> str:
    """Returns a tokenizer as text for JSON."""
    return base64.b64encode(tokenizer.to_bytes()).decode()


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
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is {tensor['dtype']}, must be one of {', '.join(_DTYPES)}")
        values = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
        tensors[name] = values.reshape(tensor["shape"])
    return tensors


def _sums(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns sums by which a load can tell whether the file still holds what was saved."""
    return {"about": json_sum(about), "tensors": digest(tensors)}


def _named(params: Any) -> dict[str, Any]:
    """Returns path -> weight, for example `layers/q`."""
    return dict(flatten_dict(params, sep="/"))
