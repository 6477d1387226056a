"""Weights as a Hugging Face Llama: nothing is lost, others compute the same from the file, and a
bad file is named.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apr_jax.errors import UserError
from apr_jax.model.config import ModelConfig
from apr_jax.model.hf import load_llama, save_llama, to_llama
from apr_jax.model.transformer import forward, init_params

VOCAB = 17
FULL = ModelConfig(layers=2, width=24, heads=3, kv_heads=3, head_size=8, mlp=40, tied=False)
GROUPED = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, head_size=6, mlp=48, rope_base=500.0)
CONFIGS = [
    FULL,
    dataclasses.replace(FULL, tied=True),
    GROUPED,
    dataclasses.replace(GROUPED, tied=False),
]


def make(config):
    """Random weights without a single 1 or repeated row: norms too differ from each other."""
    params = init_params(config, VOCAB, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def ours(params, config, tokens):
    position = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    return forward(
        params,
        config,
        jnp.asarray(tokens),
        position,
        jnp.ones_like(position),
        jnp.zeros_like(position),
    )


def tokens():
    return np.random.default_rng(3).integers(0, VOCAB, (2, 11))


def plain_llama(tensors, c, tokens):
    """A Llama in numpy, written from Hugging Face's names and conventions alone: logits [L, V] of
    tokens [L].
    """
    size = c["head_dim"]
    heads = c["num_attention_heads"]
    groups = c["num_key_value_heads"]
    angle = np.outer(np.arange(len(tokens)), c["rope_theta"] ** (-np.arange(0, size, 2) / size))
    cos, sin = (np.concatenate([f(angle)] * 2, axis=-1)[:, None] for f in (np.cos, np.sin))

    def norm(x, name):
        return tensors[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"])

    def turn(x):
        return x * cos + np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], axis=-1) * sin

    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64)
    for index in range(c["num_hidden_layers"]):
        layer = f"model.layers.{index}."

        def linear(y, name, layer=layer):
            return y @ tensors[f"{layer}{name}.weight"].T

        y = norm(x, layer + "input_layernorm.weight")
        q, k, v = (linear(y, f"self_attn.{n}_proj").reshape(len(tokens), -1, size) for n in "qkv")
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, groups, groups)
        k, v = (np.repeat(part, heads // groups, axis=1) for part in (turn(k), v))
        scores = np.einsum("qhk,mhk->hqm", turn(q), k) / np.sqrt(size)
        weights = np.exp(np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf))
        found = np.einsum("hqm,mhk->qhk", weights / weights.sum(-1, keepdims=True), v).reshape(
            len(tokens), -1
        )
        x = x + linear(found, "self_attn.o_proj")
        y = norm(x, layer + "post_attention_layernorm.weight")
        gate = linear(y, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    return (
        norm(x, "model.norm.weight")
        @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    "config",
    [CONFIGS[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS[1:3]), CONFIGS[3]],
)
def test_the_layout_is_that_of_a_llama(config):
    params = make(config)
    tensors, described = to_llama(params, config, VOCAB)
    assert (
        ("lm_head.weight" in tensors) == (not described["tie_word_embeddings"]) == (not config.tied)
    )
    for row, logits in zip(tokens(), ours(params, config, tokens()), strict=True):
        np.testing.assert_allclose(plain_llama(tensors, described, row), logits, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_reads_the_same_network(config, tmp_path, monkeypatch):
    """`pip install 'apr_jax[bench]'` brings transformers and torch."""
    # Text needs neither, and their builds on PyPI load with CUDA only.
    for broken in (
        "torchvision",
        "torchaudio",
    ):
        monkeypatch.setitem(sys.modules, broken, None)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params = make(config)
    save_llama(params, config, tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens())).logits.numpy()
    np.testing.assert_allclose(theirs, ours(params, config, tokens()), atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again, shape = load_llama(tmp_path / "again")
    assert shape == config
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_is_bit_equal(config, tmp_path):
    params = make(config)
    save_llama(params, config, tmp_path / "new" / "folder")
    again, shape = load_llama(tmp_path / "new" / "folder")
    assert shape == config
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}


@pytest.fixture
def saved(tmp_path):
    save_llama(make(GROUPED), GROUPED, tmp_path)
    return tmp_path


def test_no_such_folder(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere/config\.json: No such file.* config\.json and model\.safetensors"
    ):
        load_llama(tmp_path / "nowhere")


def test_weights_that_are_not_there_or_cut(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(
        UserError, match=r"model\.safetensors is no whole safetensors file of float32"
    ):
        load_llama(saved)
    weights.unlink()
    with pytest.raises(
        UserError, match=r"model\.safetensors is no whole safetensors file of float32: No such file"
    ):
        load_llama(saved)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the weights to .*file/below: "):
        save_llama(make(FULL), FULL, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, r'config\.json: hidden_act="gelu", must be "silu"'),
        ({"rms_norm_eps": 1e-5}, r"config\.json: rms_norm_eps=1e-05, must be 1e-06"),
        ({"attention_bias": True}, r"config\.json: attention_bias=true, must be false"),
        ({"rope_scaling": {"factor": 2}}, r"config\.json: rope_scaling=.*, must be null"),
        (
            {"num_key_value_heads": 3},
            r"config\.json does not describe a Llama: model\.kv_heads=3 must divide",
        ),
        ({"head_dim": None}, r"config\.json does not describe a Llama: "),
        (
            {"hidden_size": 30},
            r"tensor model\.embed_tokens\.weight is float32 \[17, 32\], must be float32 \[17, 30\]",
        ),
        (
            {"num_hidden_layers": 4},
            r"tensor model\.layers\.3\.input_layernorm\.weight is missing, must be float32 \[32\]",
        ),
        (
            {"num_hidden_layers": 2},
            r"tensor model\.layers\.2\.\S+ is not part of the network that config\.json describes",
        ),
    ],
)
def test_config_that_does_not_fit(saved, change, message):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_llama(saved)


def test_config_without_a_field(saved):
    path = saved / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "rope_theta"})
    )
    with pytest.raises(UserError, match=r"config\.json has no field 'rope_theta'"):
        load_llama(saved)


def test_config_that_is_no_json(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json does not describe a Llama"):
        load_llama(saved)


def test_half_precision_is_not_read_in_silence(saved):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.float16)}, saved / "model.safetensors")
    with pytest.raises(
        UserError, match=r"mlp\.down_proj\.weight is float16 \[32, 48\], must be float32 \[32, 48\]"
    ):
        load_llama(saved)
