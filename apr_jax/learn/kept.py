"""A model in one small file: bfloat16 weights with all that evaluation needs, for a repository or a friend.

    model.safetensors   tensors by their path in the parameters, `layers/q` for one
                        metadata: one entry, JSON of config, method, stage, step and tokenizer

Half the bits of a weight are left out, so a run can't go on from it bit for bit; what it answers hardly changes.
"""

import base64
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from apr_jax.config import ConfigError, from_dict, to_dict
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.errors import UserError
from apr_jax.learn.restored import Restored

SUFFIX = ".safetensors"
_ENTRY = "apr_jax"


def keep(restored: Restored, path: Path) -> None:
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
    tensors = {name: np.asarray(leaf).astype(jnp.bfloat16) for name, leaf in _named(restored.params).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={_ENTRY: json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load_kept(path: Path) -> Restored:
    """The model, its weights as float32 again.

    Raises:
      UserError: there is no such file, or it is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[_ENTRY])
        leaves = {name: value.astype(np.float32) for name, value in load_file(path).items()}
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
        raise UserError(f"{path}: no such file; `apr keep` writes one") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: is not a whole model that `apr keep` wrote ({error!r:.100})") from None


def _named(params: Any) -> dict[str, Any]:
    return dict(flatten_dict(params, sep="/"))
