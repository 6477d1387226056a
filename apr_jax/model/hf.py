"""Import and export of weights in the file layout of a Hugging Face Llama.

    FOLDER/config.json        the shape of the network
    FOLDER/model.safetensors  float32; every matrix is [out, in], and the names of a layer's tensors
                              begin with "model.layers.<index>."

`train/checkpoint/hf_folder.py` puts the tokenizer beside these files.

The network there is the same one (RMSNorm with 1e-6, rotary positions over the two halves of a
head, SwiGLU), so nothing is computed: matrices are cut apart and transposed, and come back bit for
bit.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from apr_jax.errors import UserError
from apr_jax.io.json_files import write_json
from apr_jax.io.storage import save_tensors
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import Params, init_params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Settings of a Llama for which this network has no other choice.
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
}
# Field of ModelConfig -> its name in config.json.
_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "mlp": "intermediate_size",
    "tied": "tie_word_embeddings",
    "dtype": "dtype",
}


class _Source(NamedTuple):
    """Where a tensor of a layer comes from.

    Attributes:
      name: of the parameter.
      inputs: number of the parameter's axes that are inputs; 0 for a vector, which is the same in
        the file.
      half: which half of the second axis, if the parameter is two matrices as [in, 2, out].
    """

    name: str
    inputs: int
    half: int | None = None


# Name of a layer's tensor in the file -> where it comes from.
_LAYER = {
    "input_layernorm": _Source("attn_norm", 0),
    "self_attn.q_proj": _Source("q", 1),
    "self_attn.k_proj": _Source("kv", 1, half=0),
    "self_attn.v_proj": _Source("kv", 1, half=1),
    "self_attn.o_proj": _Source("out", 2),
    "post_attention_layernorm": _Source("mlp_norm", 0),
    "mlp.gate_proj": _Source("gate_up", 1, half=0),
    "mlp.up_proj": _Source("gate_up", 1, half=1),
    "mlp.down_proj": _Source("down", 1),
}
_POSITIONS = 4096  # Other programs size their tables by it; the network has no longest position.


def to_llama(
    params: Params, config: ModelConfig, vocab: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Converts parameters to tensors by their Hugging Face names, and the content of config.json.

    Args:
      params: see `init_params`.
      config: the model's shape.
      vocab: V.
    """
    tensors = {
        name: np.ascontiguousarray(_to_file(part, inputs))
        for name, part, inputs in _parts(jax.device_get(params))
    }
    described = {
        "architectures": ["LlamaForCausalLM"],
        **_FIXED,
        **{theirs: getattr(config, field) for field, theirs in _FIELDS.items()},
        "rope_theta": config.rope_base,
        "vocab_size": vocab,
        "max_position_embeddings": _POSITIONS,
        # Without these fields other programs would stop at token 2.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return tensors, described


def save_llama(params: Params, config: ModelConfig, folder: Path) -> None:
    """Writes config.json and the weights to a folder, which is made if it is missing.

    Raises:
      UserError: a file cannot be written.
    """
    tensors, described = to_llama(params, config, params["embed"].shape[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, described)
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the weights to {folder}: {error}") from error


def load_llama(folder: Path) -> tuple[Params, ModelConfig]:
    """Reads what `save_llama` wrote, or another float32 Llama of the same kind.

    Returns:
      parameters, with numpy leaves, and the model's shape.

    Raises:
      UserError: a file cannot be read, or the network is of another kind.
    """
    config, vocab = _read_config(folder / CONFIG)
    shapes = jax.eval_shape(lambda: init_params(config, vocab, jax.random.key(0)))
    params: Params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)

    # The parts are views of the parameters, which are filled through them.
    parts = list(_parts(params))
    in_file = {name: _to_file(part, inputs).shape for name, part, inputs in parts}
    tensors = _read_tensors(folder / WEIGHTS, in_file)
    for name, part, inputs in parts:
        part[...] = tensors[name].T.reshape(part.shape) if inputs else tensors[name]
    return params, config


def _parts(params: Params) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields each tensor of the file.

    Yields:
      its name; the part of `params` that it is, as a view; and the number of that part's axes that
      are inputs.
    """
    yield "model.embed_tokens.weight", params["embed"], 0
    yield "model.norm.weight", params["final_norm"], 0
    if "unembed" in params:
        yield "lm_head.weight", params["unembed"], 1
    for index in range(len(params["layers"]["q"])):
        for name, source in _LAYER.items():
            part = params["layers"][source.name][index]
            if source.half is not None:
                part = part[:, source.half]
            yield f"model.layers.{index}.{name}.weight", part, source.inputs


def _to_file(part: np.ndarray, inputs: int) -> np.ndarray:
    """Turns [in..., out...] into [out, in]; a vector stays as it is."""
    if inputs == 0:
        return part
    return part.reshape(math.prod(part.shape[:inputs]), -1).T


def _read_config(path: Path) -> tuple[ModelConfig, int]:
    """Reads the model's shape and V from config.json."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        rope = described.get("rope_parameters", described)  # transformers 5 writes it apart.
        required = {**_FIXED, "rope_type": "default", "rope_scaling": None}
        for field, value in required.items():
            actual = (described | rope).get(field, value)
            if actual != value:
                raise UserError(
                    f"{path}: {field}={json.dumps(actual)}, must be {json.dumps(value)}"
                )
        shape = {field: described[theirs] for field, theirs in _FIELDS.items()}
        return ModelConfig(**shape, rope_base=rope["rope_theta"]), described["vocab_size"]
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a Llama's folder has {CONFIG} and {WEIGHTS}"
        ) from error
    except KeyError as error:
        raise UserError(
            f"{path} has no field {error}, which a Llama's {CONFIG} must have"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe a Llama: {error}") from error


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads the tensors of the file, which must be float32 of these names and shapes."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a type unknown to numpy.
        raise UserError(f"{path} is no whole safetensors file of float32: {error}") from error
    for name, shape in shapes.items():
        expected = f"must be float32 {list(shape)}"
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing, {expected}")
        value = tensors[name]
        if value.shape != shape or value.dtype != np.float32:
            raise UserError(
                f"{path}: tensor {name} is {value.dtype} {list(value.shape)}, {expected}"
            )

    unknown = sorted(set(tensors) - set(shapes))
    if unknown:
        raise UserError(
            f"{path}: tensor {unknown[0]} is not part of the network that {CONFIG} describes"
        )
    return tensors
