"""Compares small random networks of each family of Hugging Face with `transformers`.

    pip install -e '.[hf]'
    python experiments/hf_parity.py

The command writes experiments/pretrained/parity.json, from which `make figures` fills a table of
docs/your_model.md. The tests hold the same figures to their bounds (tests/model/test_hf_parity.py).

Each network has weights that hide nothing: no bias is 0, and the scales of norms differ. Both
programs read a row of random ids, and a row of a token that repeats between stretches of another
one; every position counts. Then they read a long row, whose last tokens are turned far.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from apr_jax.model.attention.packed import attend_packed
from apr_jax.model.config import ModelConfig
from apr_jax.model.hf import load_hf, save_hf
from apr_jax.model.transformer import (
    Params,
    decoder_layer,
    forward,
    make_decode,
    prepare_decode,
    rms_norm,
    to_matrices,
)

RESULTS = Path(__file__).parent / "pretrained" / "parity.json"
VOCAB = 60
LENGTH = 200
FAR = 4_096  # Positions of the long row.
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
FAMILIES = {
    "Llama": lambda: transformers.LlamaConfig(
        **_SHAPE, rms_norm_eps=1e-5, tie_word_embeddings=True
    ),
    "Llama 3, scaled RoPE": lambda: transformers.LlamaConfig(**_SHAPE, rope_parameters=_LLAMA_3),
    "Qwen2": lambda: transformers.Qwen2Config(
        **_SHAPE, rms_norm_eps=1e-4, rope_parameters=_QWEN_ROPE
    ),
    "Qwen3": lambda: transformers.Qwen3Config(
        **_SHAPE, head_dim=12, tie_word_embeddings=True, rope_parameters=_QWEN_ROPE
    ),
}


def compare(family: str, folder: Path) -> dict[str, Any]:
    """Compares a random network of a family at each level.

    Args:
      family: a key of FAMILIES.
      folder: an empty folder for files of the network.

    Returns:
      `same_first_weight` (whether every bit is); the largest differences of the output of any layer
      (`layers`), of the logits in one pass (`logits`), of those of the long row (`far`), and of the
      logits in decoding token by token (`decoding`); `same_exported` (whether transformers computes
      the same bits from the folder that we write); and the mean and the largest error of log-probs
      in bfloat16 against float32, as multiples of those of transformers (`bfloat16_mean`,
      `bfloat16_largest`).
    """
    network = make_network(family, folder / "theirs")
    params, config = load_hf(folder / "theirs")
    tokens = make_tokens()
    with torch.inference_mode():
        theirs = network(torch.from_numpy(tokens), output_hidden_states=True)
    logits = theirs.logits.numpy()  # [2, LENGTH, VOCAB]
    long_row = np.random.default_rng(2).integers(0, VOCAB, (1, FAR))
    with torch.inference_mode():
        far_logits = network(torch.from_numpy(long_row)).logits.numpy()  # [1, FAR, VOCAB]

    first_weight = network.get_input_embeddings().weight.detach().numpy()
    outputs = zip(layer_outputs(params, config, tokens), theirs.hidden_states, strict=True)
    return {
        "same_first_weight": bool(np.array_equal(params["embed"], first_weight)),
        "layers": max(_largest_difference(ours, output.numpy()) for ours, output in outputs),
        "logits": _largest_difference(one_pass(params, config, tokens), logits),
        "far": _largest_difference(one_pass(params, config, long_row), far_logits),
        "decoding": _largest_difference(step_by_step(params, config, tokens), logits),
        "same_exported": _is_read_again(params, config, folder / "ours", tokens, logits),
        **_bfloat16_errors(family, folder / "bfloat16", tokens, logits),
    }


def make_network(family: str, folder: Path) -> Any:
    """Makes a random network of transformers, and saves it."""
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.2)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    network.eval().save_pretrained(folder)
    return network


def make_tokens() -> np.ndarray:
    """Makes a row of random ids, and one of a token that repeats: int [2, LENGTH]."""
    random = np.random.default_rng(1).integers(0, VOCAB, LENGTH)
    repeated = np.where(np.arange(LENGTH) % 50 < 40, 7, 9)
    return np.stack([random, repeated])


def one_pass(params: Params, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Computes our logits [R, L, V] of tokens [R, L] at once."""
    position = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    ones = jnp.ones_like(position)
    logits = jax.jit(forward, static_argnums=1)(
        params, config, jnp.asarray(tokens), position, ones, 0 * ones
    )
    return np.asarray(logits)


def step_by_step(params: Params, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Computes our logits [R, L, V] of tokens [R, L] one token after the other, with a cache."""
    rows, length = tokens.shape
    decode, init_cache = make_decode(config, (length,))
    prepared = prepare_decode(jax.tree.map(jnp.asarray, params), config)
    step = jax.jit(decode, static_argnums=4)

    cache = init_cache(rows, length)
    steps = []
    for index in range(length):
        column = jnp.asarray(tokens[:, index : index + 1])  # [R, 1]
        position = jnp.full((rows, 1), index)
        logits, cache = step(prepared, column, cache, position, length)  # [R, 1, V]
        steps.append(np.asarray(logits))
    return np.concatenate(steps, axis=1)


def layer_outputs(params: Params, config: ModelConfig, tokens: np.ndarray) -> list[np.ndarray]:
    """Computes the embeddings, and our residual stream after each layer, [R, L, D] each.

    After the last layer it is normalized, as transformers gives it.
    """
    position = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    ones = jnp.ones_like(position)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attend_packed(q, k, v, ones, 0 * ones, None), None

    @jax.jit
    def apply(layer: Any, h: jax.Array) -> jax.Array:
        output: jax.Array = decoder_layer(
            to_matrices(layer, config), config, h, position, attention
        )[0]
        return output

    outputs = [jnp.asarray(params["embed"])[tokens]]
    for index in range(config.layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        outputs.append(apply(layer, outputs[-1]))
    outputs[-1] = rms_norm(outputs[-1], jnp.asarray(params["final_norm"]), config.norm_epsilon)
    return [np.asarray(output) for output in outputs]


def _is_read_again(
    params: Params, config: ModelConfig, folder: Path, tokens: np.ndarray, logits: np.ndarray
) -> bool:
    """Returns whether transformers computes the same bits from the folder that we write."""
    save_hf(params, config, folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return bool(np.array_equal(again(torch.from_numpy(tokens)).logits.numpy(), logits))


def _bfloat16_errors(
    family: str, folder: Path, tokens: np.ndarray, logits: np.ndarray
) -> dict[str, float]:
    """Returns the errors of our log-probs in bfloat16, as multiples of those of transformers.

    Args:
      family: a key of FAMILIES.
      folder: an empty folder.
      tokens: [R, L].
      logits: those of float32, [R, L, V].
    """
    half = make_network(family, folder).to(torch.bfloat16)
    half.save_pretrained(folder)
    params, config = load_hf(folder)
    assert config.dtype == "bfloat16"
    with torch.inference_mode():
        their_logits = half(torch.from_numpy(tokens)).logits.float().numpy()

    def error(of: np.ndarray) -> np.ndarray:
        return np.abs(_log_probs(of) - _log_probs(logits))

    ours = error(one_pass(params, config, tokens))
    theirs = error(their_logits)
    return {
        "bfloat16_mean": float(ours.mean() / theirs.mean()),
        "bfloat16_largest": float(ours.max() / theirs.max()),
    }


def _log_probs(logits: np.ndarray) -> np.ndarray:
    """Returns log-probs in float32."""
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


def _largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest absolute difference of two arrays of one shape."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def main() -> None:
    """Compares all families, and writes the results."""
    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found[family] = compare(family, Path(folder))
        print(family, found[family])
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    values = {"versions": versions, "positions": LENGTH, "far": FAR, "families": found}
    RESULTS.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
