"""Weights as others read them: the file layout of a Hugging Face Llama.

`train/checkpoint/hf_folder.py` puts the tokenizer beside them.

    FOLDER/config.json        the shape of the network
           model.safetensors  float32, every matrix [out, in], a layer's tensors under
           "model.layers.<index>."

The network is the same one (RMSNorm with 1e-6, rotary positions over the two halves of a head,
SwiGLU), so nothing is computed: matrices are cut apart and transposed, and come back bit for bit.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from apr_jax.errors import UserError
from apr_jax.io.storage import save_tensors
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import Params, init_params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What a Llama may have otherwise, and this network has not.
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
}
# Fields of ModelConfig by their names there.
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
# Of a layer, by their names there: the parameter, how many of its axes are inputs (0: no matrix,
# the same in the file), and which half of its second axis, if it holds two matrices as [in, 2,
# out].
_LAYER = {
    "input_layernorm": ("attn_norm", 0, None),
    "self_attn.q_proj": ("q", 1, None),
    "self_attn.k_proj": ("kv", 1, 0),
    "self_attn.v_proj": ("kv", 1, 1),
    "self_attn.o_proj": ("out", 2, None),
    "post_attention_layernorm": ("mlp_norm", 0, None),
    "mlp.gate_proj": ("gate_up", 1, 0),
    "mlp.up_proj": ("gate_up", 1, 1),
    "mlp.down_proj": ("down", 1, None),
}
_POSITIONS = 4096  # Readers size their tables by it; the network itself has no longest position.


def to_llama(
    params: Params, config: ModelConfig, vocab: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The weights by their Hugging Face names, and the content of config.json."""
    tensors = {
        name: np.ascontiguousarray(_to_file(x, inputs))
        for name, x, inputs in _parts(jax.device_get(params))
    }
    shape = {theirs: getattr(config, field) for field, theirs in _FIELDS.items()}
    sizes = {
        "rope_theta": config.rope_base,
        "vocab_size": vocab,
        "max_position_embeddings": _POSITIONS,
    }
    ends = {"bos_token_id": None, "eos_token_id": None}  # Left out, readers would stop at token 2.
    return tensors, {"architectures": ["LlamaForCausalLM"], **_FIXED, **shape, **sizes, **ends}


def save_llama(params: Params, config: ModelConfig, folder: Path) -> None:
    """Writes both files; the folder is made if it is not there."""
    tensors, described = to_llama(params, config, params["embed"].shape[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the weights to {folder}: {error}") from error


def load_llama(folder: Path) -> tuple[Params, ModelConfig]:
    """Parameters (numpy leaves) and shape of what `save_llama` wrote, or of another float32 Llama
    of the same kind.
    """
    config, vocab = _read_config(folder / CONFIG)
    shapes = jax.eval_shape(lambda: init_params(config, vocab, jax.random.key(0)))
    params: Params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    parts = list(_parts(params))
    tensors = _read_tensors(
        folder / WEIGHTS, {name: _to_file(part, inputs).shape for name, part, inputs in parts}
    )
    for name, part, inputs in parts:
        part[...] = tensors[name].T.reshape(part.shape) if inputs else tensors[name]
    return params, config


def _parts(params: Params) -> Iterator[tuple[str, np.ndarray, int]]:
    """Each tensor of the file: its name, the part of `params` that it is (a view), and how many
    axes of that are inputs.
    """
    yield "model.embed_tokens.weight", params["embed"], 0
    yield "model.norm.weight", params["final_norm"], 0
    if "unembed" in params:
        yield "lm_head.weight", params["unembed"], 1
    for index in range(len(params["layers"]["q"])):
        for name, (leaf, inputs, half) in _LAYER.items():
            part = params["layers"][leaf][index]
            yield (
                f"model.layers.{index}.{name}.weight",
                part if half is None else part[:, half],
                inputs,
            )


def _to_file(part: np.ndarray, inputs: int) -> np.ndarray:
    """[in..., out...] -> [out, in]."""
    return part.reshape(math.prod(part.shape[:inputs]), -1).T if inputs else part


def _read_config(path: Path) -> tuple[ModelConfig, int]:
    """The network that config.json describes, and its V."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rope = found.get("rope_parameters", found)  # transformers 5 writes it apart.
        for field, value in {**_FIXED, "rope_type": "default", "rope_scaling": None}.items():
            if (found | rope).get(field, value) != value:
                raise UserError(
                    f"{path}: {field}={json.dumps((found | rope)[field])}, must be"
                    f" {json.dumps(value)}"
                )
        shape = {field: found[theirs] for field, theirs in _FIELDS.items()}
        return ModelConfig(**shape, rope_base=rope["rope_theta"]), found["vocab_size"]
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
    """The tensors of the file, which must be these and in float32."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a type that numpy has not.
        raise UserError(f"{path} is no whole safetensors file of float32: {error}") from error
    for name, shape in shapes.items():
        right = f"must be float32 {list(shape)}"
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing, {right}")
        value = tensors[name]
        if value.shape != shape or value.dtype != np.float32:
            raise UserError(f"{path}: tensor {name} is {value.dtype} {list(value.shape)}, {right}")
    if beyond := sorted(set(tensors) - set(shapes)):
        raise UserError(
            f"{path}: tensor {beyond[0]} is not part of the network that {CONFIG} describes"
        )
    return tensors
