"""Every family of Hugging Face computes here what `transformers` computes: the first weight, the
output of each layer, the logits; in one pass and step by step.

`pip install 'apr_jax[hf]'` brings transformers and torch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.attention.packed import attend_packed
from apr_jax.model.hf import load_hf, save_hf
from apr_jax.model.transformer import (
    decoder_layer,
    forward,
    make_decode,
    prepare_decode,
    rms_norm,
    to_matrices,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.thorough

VOCAB = 60
LENGTH = 200
SHAPE = {
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
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, tie_word_embeddings=True),
    "llama3": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=_LLAMA_3),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, rms_norm_eps=1e-4),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True),
}


def _make(name, folder):
    """Saves a random model of a family: no bias is 0, and the scales of norms differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.2)
            if parameter_name.endswith("norm.weight"):
                parameter.add_(1.0)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """The model of transformers, our parameters and shape."""
    folder = tmp_path_factory.mktemp(request.param)
    model = _make(request.param, folder)
    return model, *load_hf(folder)


def _tokens():
    """One row of random ids, and one of a token that repeats between stretches of another."""
    random = np.random.default_rng(1).integers(0, VOCAB, LENGTH)
    repeated = np.where(np.arange(LENGTH) % 50 < 40, 7, 9)
    return np.stack([random, repeated])


def _theirs(model, tokens):
    with torch.inference_mode():
        return model(torch.from_numpy(tokens), output_hidden_states=True)


def _ours(params, config, tokens):
    position = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    ones = jnp.ones_like(position)
    return jax.jit(forward, static_argnums=1)(
        params, config, jnp.asarray(tokens), position, ones, 0 * ones
    )


def _layer_outputs(params, config, tokens):
    """The embedding, and the residual stream after each layer; after the last one, normalized."""
    position = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    ones = jnp.ones_like(position)

    def attention(q, k, v):
        return attend_packed(q, k, v, ones, 0 * ones, None), None

    @jax.jit
    def apply(layer, h):
        return decoder_layer(to_matrices(layer, config), config, h, position, attention)[0]

    outputs = [jnp.asarray(params["embed"])[tokens]]
    for index in range(config.layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        outputs.append(apply(layer, outputs[-1]))
    outputs[-1] = rms_norm(outputs[-1], jnp.asarray(params["final_norm"]), config.norm_epsilon)
    return outputs


def test_first_weight_is_theirs(pair):
    model, params, _ = pair
    np.testing.assert_array_equal(params["embed"], model.get_input_embeddings().weight.detach())


def test_output_of_each_layer_is_theirs(pair):
    model, params, config = pair
    theirs = _theirs(model, _tokens()).hidden_states
    ours = _layer_outputs(params, config, _tokens())
    assert len(theirs) == len(ours) == config.layers + 1
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4, err_msg=f"after layer {index}")


def test_logits_are_theirs_at_every_position(pair):
    model, params, config = pair
    theirs = _theirs(model, _tokens()).logits.numpy()
    np.testing.assert_allclose(_ours(params, config, _tokens()), theirs, atol=2e-4)


def test_decoding_step_by_step_gives_their_logits(pair):
    model, params, config = pair
    tokens = _tokens()
    theirs = _theirs(model, tokens).logits.numpy()
    decode, init_cache = make_decode(config, (LENGTH,))
    ready = prepare_decode(jax.tree.map(jnp.asarray, params), config)
    step = jax.jit(decode, static_argnums=4)
    cache = init_cache(2, LENGTH)
    for place in range(LENGTH):
        column = jnp.asarray(tokens[:, place : place + 1])
        logits, cache = step(ready, column, cache, jnp.full((2, 1), place), LENGTH)
        np.testing.assert_allclose(logits[:, 0], theirs[:, place], atol=2e-4)


def test_exported_folder_is_loaded_by_transformers(pair, tmp_path):
    model, params, config = pair
    save_hf(params, config, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    theirs = _theirs(model, _tokens()).logits
    np.testing.assert_array_equal(_theirs(again, _tokens()).logits, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_theirs(name, tmp_path):
    """Log-probs of both differ from those of float32 by rounding alone; the bound is theirs."""
    exact = _make(name, tmp_path / "float32")
    half = _make(name, tmp_path / "bfloat16").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    params, config = load_hf(tmp_path / "bfloat16")
    assert config.dtype == "bfloat16"

    def log_probs(logits):
        return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))

    expected = log_probs(_theirs(exact, _tokens()).logits.numpy())
    theirs = np.abs(log_probs(_theirs(half, _tokens()).logits.float().numpy()) - expected)
    ours = np.abs(log_probs(_ours(params, config, _tokens())) - expected)
    assert 0 < ours.mean() < 1.25 * theirs.mean()
    assert ours.max() < 1.5 * theirs.max()
