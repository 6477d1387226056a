"""Import and export of weights as a Hugging Face folder: Llama, Qwen2 and Qwen3.

    FOLDER/config.json                    the shape of the network
    FOLDER/model.safetensors              weights in float32, bfloat16 or float16; every matrix is
                                          [out, in], and the names of a layer's tensors begin with
                                          "model.layers.<index>."
    FOLDER/model.safetensors.index.json   if there is no such file: which of several files holds
                                          each tensor

`train/checkpoint/hf_folder.py` puts the tokenizer beside these files.

The network is chosen by the architecture that config.json names, never by the name of a model. The
network there is the same one, so nothing is computed: matrices are cut apart and transposed, and
float32 comes back bit for bit. Whatever would make the network another one is refused by name:
a setting of another value, a setting that nobody here knows, a tensor too many, too few or of
another shape.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize

from apr_jax.errors import UsageError, UserError
from apr_jax.io.json_files import write_json
from apr_jax.io.storage import save_tensors
from apr_jax.model.config import ModelConfig, RopeScaling
from apr_jax.model.transformer import Params, init_params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class _Family(NamedTuple):
    """What an architecture fixes.

    Attributes:
      model_type: its name in config.json.
      qkv_bias: see `ModelConfig`.
      qk_norm: see `ModelConfig`.
      head_size: `head_dim` if config.json has none; None for width / heads.
    """

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_size: int | None = None


FAMILIES = {
    "LlamaForCausalLM": _Family("llama"),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", qk_norm=True, head_size=128),
}

# Settings that must have exactly these values. transformers assumes the same values where a setting
# is missing or null.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
# Field of ModelConfig -> its name in config.json, for fields that every config.json must have.
_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
}
# Settings that are read apart from these tables.
_READ = {
    "architectures",
    "model_type",
    "vocab_size",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "dtype",
    "torch_dtype",
    "layer_types",
    "original_max_position_embeddings",
    "quantization_config",
}
# Settings that do not change what the network computes from tokens. Sliding windows are off here
# (`use_sliding_window`), so that their sizes mean nothing.
_NEUTRAL = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_model_name_or_path",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "do_sample",
    "finetuning_task",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_window_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "sliding_window",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
# Settings with this ending do not change the network either: they name the tokens that begin, end
# or fill a text.
_SPECIAL_TOKEN = "_token_id"
# Field of RopeScaling -> its name in config.json.
_SCALING = {
    "factor": "factor",
    "low_frequency_turns": "low_freq_factor",
    "high_frequency_turns": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


class _Source(NamedTuple):
    """Where a tensor of a layer comes from.

    Attributes:
      name: of the parameter.
      inputs: number of the parameter's axes that are inputs; 0 for a vector, which is the same in
        the file but for its shape.
      half: which half of the parameter, if it is two: as [in, 2, out], or a bias [2, out].
    """

    name: str
    inputs: int
    half: int | None = None


# Name of a layer's tensor in the file -> where it comes from.
_LAYER = {
    "input_layernorm.weight": _Source("attn_norm", 0),
    "self_attn.q_proj.weight": _Source("q", 1),
    "self_attn.k_proj.weight": _Source("kv", 1, half=0),
    "self_attn.v_proj.weight": _Source("kv", 1, half=1),
    "self_attn.o_proj.weight": _Source("out", 2),
    "self_attn.q_proj.bias": _Source("q_bias", 0),
    "self_attn.k_proj.bias": _Source("kv_bias", 0, half=0),
    "self_attn.v_proj.bias": _Source("kv_bias", 0, half=1),
    "self_attn.q_norm.weight": _Source("q_norm", 0),
    "self_attn.k_norm.weight": _Source("k_norm", 0),
    "post_attention_layernorm.weight": _Source("mlp_norm", 0),
    "mlp.gate_proj.weight": _Source("gate_up", 1, half=0),
    "mlp.up_proj.weight": _Source("gate_up", 1, half=1),
    "mlp.down_proj.weight": _Source("down", 1),
}
# Tensors with this ending follow from config.json. Folders of older versions of transformers hold
# them, and newer versions leave them unread.
_COMPUTED = "rotary_emb.inv_freq"


def to_hf(
    params: Params, config: ModelConfig, vocab: int, window: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Converts parameters to tensors by their Hugging Face names, and the content of config.json.

    Args:
      params: see `init_params`.
      config: the model's shape.
      vocab: V.
      window: positions of the window in which the model was trained; 0 if that is unknown.

    Raises:
      UserError: no family has both biases and norms of queries and keys.
    """
    architecture = _architecture(config)
    tensors = {
        name: np.ascontiguousarray(_to_file(part, inputs))
        for name, part, inputs in _parts(jax.device_get(params))
    }
    family = FAMILIES[architecture]
    described = {
        "architectures": [architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        **{theirs: getattr(config, field) for field, theirs in _FIELDS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "tie_word_embeddings": config.tied,
        "dtype": config.dtype,
        **({} if family.qkv_bias else {"attention_bias": False}),
        **({"mlp_bias": False} if family.model_type == "llama" else {}),
        "rope_theta": config.rope_base,
        **_described_scaling(config.rope_scaling),
        "vocab_size": vocab,
        # Other programs take no longer texts than this.
        "max_position_embeddings": _positions(config, window),
        # Without these fields other programs would stop at token 2.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return tensors, described


def save_hf(params: Params, config: ModelConfig, folder: Path, window: int = 0) -> None:
    """Writes config.json and the weights to a folder, which is made if it is missing.

    Args:
      params: see `init_params`.
      config: the model's shape.
      folder: the folder.
      window: see `to_hf`.

    Raises:
      UserError: a file cannot be written.
    """
    tensors, described = to_hf(params, config, params["embed"].shape[0], window)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, described)
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the weights to {folder}: {error}") from error


def load_hf(folder: Path) -> tuple[Params, ModelConfig]:
    """Reads what `save_hf` wrote, or another folder of one of `FAMILIES`.

    Returns:
      float32 parameters, with numpy leaves, and the model's shape. Widening bfloat16 and float16
      loses nothing.

    Raises:
      UsageError: the network is of another kind, or a setting or a tensor does not fit.
      UserError: a file cannot be read.
    """
    config, vocab = read_config(folder / CONFIG)
    shapes = jax.eval_shape(lambda: init_params(config, vocab, jax.random.key(0)))
    params: Params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)

    # The parts are views of the parameters, which are filled through them.
    parts = {name: (part, inputs) for name, part, inputs in _parts(params)}
    missing = dict.fromkeys(parts)
    tied_heads = []  # Copies of the embedding, with their files.
    for path, name, tensor in _read_tensors(folder):
        if name.endswith(_COMPUTED):
            continue
        if name == "lm_head.weight" and config.tied:
            tied_heads.append((path, tensor))
            continue
        if name not in parts:
            raise UsageError(
                f"{path}: tensor {name!r} is not part of the network that {CONFIG} describes; take"
                " weights and settings from one folder, or delete the tensor if it changes nothing"
            )
        part, inputs = parts[name]
        shape = _to_file(part, inputs).shape
        if tensor.shape != shape:
            raise UsageError(
                f"{path}: tensor {name} is {list(tensor.shape)}, must be {list(shape)}"
            )
        part[...] = tensor.T.reshape(part.shape) if inputs else tensor.reshape(part.shape)
        missing.pop(name, None)
    for name in missing:
        shape = _to_file(*parts[name]).shape
        raise UsageError(f"{folder}: tensor {name} is missing, must be {list(shape)}")
    for path, head in tied_heads:
        if not np.array_equal(params["embed"], head.astype(np.float32)):
            raise UsageError(
                f"{path}: tensor lm_head.weight differs from model.embed_tokens.weight, though"
                f" {CONFIG} says tie_word_embeddings=true"
            )
    return params, config


def read_config(path: Path) -> tuple[ModelConfig, int]:
    """Reads the model's shape and V from config.json.

    Raises:
      UsageError: there is no such file, or the network is of another kind.
    """
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(described, dict):
            raise ValueError("it is no JSON object")
        # A setting that is null is one that is not there.
        described = {name: value for name, value in described.items() if value is not None}
        family = _family(described, path)
        _check_settings(described, path)
        return _model_config(described, family, path), described["vocab_size"]
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; the folder of a model has {CONFIG} and {WEIGHTS}"
        ) from error
    except KeyError as error:
        raise UsageError(f"{path} has no field {error}, which {CONFIG} must have") from error
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path} does not describe a network: {error}") from error


def _positions(config: ModelConfig, window: int) -> int:
    """Returns how many positions other programs shall let a text have.

    A longest text that ends before the stretching of the rotary embedding begins is not the
    model's own, but the default.
    """
    longest = max(config.max_positions, window)
    scaling = config.rope_scaling
    if scaling.factor > 1 and config.max_positions <= scaling.original_length:
        longest = max(longest, int(scaling.factor * scaling.original_length))
    return longest


def _architecture(config: ModelConfig) -> str:
    """Returns the architecture that has a model's biases and norms."""
    for name, family in FAMILIES.items():
        if (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm):
            return name
    raise UserError(
        "model.qkv_bias=True with model.qk_norm=True: no architecture of Hugging Face that"
        f" apr_jax writes has both ({', '.join(FAMILIES)})"
    )


def _family(described: Mapping[str, Any], path: Path) -> _Family:
    """Finds the family that config.json names."""
    supported = f"apr_jax reads {', '.join(FAMILIES)}"
    names = described.get("architectures") or []
    if len(names) != 1 or names[0] not in FAMILIES:
        raise UsageError(f"{path}: architectures={_shown(names)}; {supported}")
    family = FAMILIES[names[0]]
    model_type = described.get("model_type", family.model_type)
    if model_type != family.model_type:
        raise UsageError(
            f"{path}: model_type={_shown(model_type)}, must be {_shown(family.model_type)} for"
            f" {names[0]}"
        )
    if "quantization_config" in described:
        raise UsageError(
            f"{path}: quantization_config is set; take the model's folder that is not quantised"
        )
    return family


def _check_settings(described: Mapping[str, Any], path: Path) -> None:
    """Raises UsageError at a setting that would make it another network."""
    for name, value in _FIXED.items():
        actual = described.get(name, value)
        if actual != value:
            raise UsageError(f"{path}: {name}={_shown(actual)}, must be {_shown(value)}")
    kinds = described.get("layer_types", [])
    if not isinstance(kinds, list):
        raise UsageError(f"{path}: layer_types={_shown(kinds)}, must be a list")
    for kind in kinds:
        if kind != "full_attention":
            raise UsageError(
                f'{path}: layer_types holds {_shown(kind)}, must be "full_attention" everywhere'
            )
    tied = described.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise UsageError(f"{path}: tie_word_embeddings={_shown(tied)}, must be true or false")
    known = _READ | _NEUTRAL | set(_FIXED) | set(_FIELDS.values())
    for name in described:
        if name not in known and not name.endswith(_SPECIAL_TOKEN):
            raise UsageError(
                f"{path}: setting {name!r:.60}={_shown(described[name])} is unknown, and may make"
                " it another network; delete it from the file if it does not"
            )


def _model_config(described: Mapping[str, Any], family: _Family, path: Path) -> ModelConfig:
    """Returns the shape that config.json describes."""
    counts = ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")
    for name in (*_FIELDS.values(), *counts):
        _check_whole(described.get(name, 1), f"{path}: {name}")
    heads = described["num_attention_heads"]
    width = described["hidden_size"]
    if family.head_size is None and "head_dim" not in described and width % heads:
        raise UsageError(f"{path}: num_attention_heads={heads} must divide hidden_size={width}")
    kv_heads = described.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UsageError(
            f"{path}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}"
        )
    head_size = described.get("head_dim", family.head_size or width // heads)
    if head_size % 2:
        raise UsageError(f"{path}: head_dim={head_size}, must be even")
    epsilon = _number(described.get("rms_norm_eps", 1e-6), f"{path}: rms_norm_eps")
    if not 0 < epsilon < 1:
        raise UsageError(f"{path}: rms_norm_eps={epsilon}, must be between 0 and 1")
    rope_name, rope = _rotary_settings(described, path)
    rope_base = _number(
        rope.pop("rope_theta", described.get("rope_theta", 10_000.0)), f"{path}: rope_theta"
    )
    if not 1 < rope_base < math.inf:
        raise UsageError(f"{path}: rope_theta={rope_base}, must be above 1 and finite")
    dtype = described.get("dtype", described.get("torch_dtype", "float32"))
    return ModelConfig(
        **{field: described[theirs] for field, theirs in _FIELDS.items()},
        kv_heads=kv_heads,
        head_size=head_size,
        tied=described.get("tie_word_embeddings", False),
        norm_epsilon=epsilon,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_base=rope_base,
        rope_scaling=_read_scaling(rope, f"{path}: {rope_name}"),
        max_positions=described.get("max_position_embeddings", ModelConfig.max_positions),
        # There is no computation in float16, whose range is too small for training.
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
    )


def _check_whole(value: Any, where: str) -> None:
    """Raises UsageError if a setting is no whole number of at least 1; `where` names it."""
    if type(value) is not int or value < 1:
        raise UsageError(f"{where}={_shown(value)}, must be a whole number of at least 1")


def _number(value: Any, where: str) -> float:
    """Returns a setting that must be a number; `where` names it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{where}={_shown(value)}, must be a number")
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any length.
        return math.inf


def _rotary_settings(described: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Returns the settings of the rotary embedding, and the name under which they stand.

    transformers 5 writes them under another name, and the base of the wavelengths among them.

    Raises:
      UsageError: two places disagree. Versions of transformers differ in which of them counts.
    """
    older, newer = (described.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    for name, settings in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(settings, dict):
            raise UsageError(f"{path}: {name}={_shown(settings)}, must be a JSON object")
    if older and newer and older != newer:
        raise UsageError(
            f"{path}: rope_scaling={_shown(older)} and rope_parameters={_shown(newer)} must be the"
            " same where both are set"
        )
    found = "rope_parameters" if newer else "rope_scaling"
    rope = dict(older or newer)
    for name in ("original_max_position_embeddings", "rope_theta"):
        if name in rope and described.get(name, rope[name]) != rope[name]:
            raise UsageError(
                f"{path}: {name}={_shown(described[name])}, but {found}.{name}="
                f"{_shown(rope[name])}; must be the same"
            )
    return found, rope


def _read_scaling(rope: dict[str, Any], where: str) -> RopeScaling:
    """Reads how the rotary embedding is scaled; `where` names the settings, which hold no base."""
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope} or {"default"}
    if kinds == {"default"}:
        expected: set[str] = {"partial_rotary_factor"}
        scaling = RopeScaling()
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UsageError(
                f"{where}.partial_rotary_factor={_shown(rope['partial_rotary_factor'])}, must be 1"
            )
    elif kinds == {"llama3"}:
        expected = set(_SCALING.values())
        scaling = _llama3_scaling(rope, where)
    else:
        raise UsageError(
            f'{where}.rope_type={_shown(sorted(kinds))}, must be "default" or "llama3"'
        )
    for name in rope:
        if name not in expected:
            raise UsageError(
                f"{where}: setting {name!r:.60} is unknown, and may make it another network; delete"
                " it from the file if it does not"
            )
    return scaling


def _llama3_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling:
    """Reads how Llama 3 scales its rotary embedding; `where` names the settings."""
    for theirs in _SCALING.values():
        if theirs not in rope:
            raise UsageError(f'{where} has no {theirs!r}, which rope_type="llama3" needs')
        _number(rope[theirs], f"{where}.{theirs}")
    _check_whole(rope[_SCALING["original_length"]], f"{where}.{_SCALING['original_length']}")
    try:
        return RopeScaling(**{field: rope[theirs] for field, theirs in _SCALING.items()})
    except ValueError as error:
        message = str(error)
        for field, theirs in _SCALING.items():
            message = message.replace(f"model.rope_scaling.{field}", theirs)
        raise UsageError(f"{where}: {message}") from None


def _described_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Returns what config.json says about the scaling of the rotary embedding."""
    if scaling.factor == 1:
        return {}
    values = {theirs: getattr(scaling, field) for field, theirs in _SCALING.items()}
    return {"rope_scaling": {"rope_type": "llama3", **values}}


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
            if source.name not in params["layers"]:
                continue
            part = params["layers"][source.name][index]
            if source.half is not None:
                part = part[:, source.half] if source.inputs else part[source.half]
            if source.inputs == 0:
                part = part.reshape(-1)  # A bias has an axis of heads here.
            yield f"model.layers.{index}.{name}", part, source.inputs


def _to_file(part: np.ndarray, inputs: int) -> np.ndarray:
    """Turns [in..., out...] into [out, in]; a part without inputs stays as it is."""
    if inputs == 0:
        return part
    return part.reshape(math.prod(part.shape[:inputs]), -1).T


def _read_tensors(folder: Path) -> Iterator[tuple[Path, str, np.ndarray]]:
    """Yields file, name and values of every tensor of a folder, a file at a time."""
    for path in _weight_files(folder):
        try:
            tensors = deserialize(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is no whole safetensors file: {error}") from error
        # The file's own order is not fixed, and an error should always name the same tensor.
        for name, tensor in sorted(tensors, key=lambda named: named[0]):
            if tensor["dtype"] not in _DTYPES:
                raise UsageError(
                    f"{path}: tensor {name!r} is {tensor['dtype']}, must be one of"
                    f" {', '.join(_DTYPES)}; take or save the model in one of these, not quantised"
                )
            values = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
            yield path, name, values.reshape(tensor["shape"])


def _weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold the weights: one, or else those that the index names.

    Where a folder has both, transformers reads the one file too.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise UsageError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; save the model by `save_pretrained` of"
            " transformers, which writes them"
        )

    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index}: is no index of safetensors files ({error!r:.100})") from error
    for path in files:
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file, but {index.name} names it; fetch the whole folder again"
            )
    return files


def _shown(value: Any) -> str:
    """Returns a value of a JSON file as it stands there, cut to a length that a line can hold."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
