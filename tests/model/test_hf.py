"""Weights as a Hugging Face folder: nothing is lost, others compute the same from the file, and a
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

from apr_jax.errors import UsageError, UserError
from apr_jax.io.storage import save_tensors
from apr_jax.model.config import ModelConfig, RopeScaling
from apr_jax.model.hf import load_hf, save_hf, to_hf
from apr_jax.model.transformer import forward, init_params

VOCAB = 17
FULL = ModelConfig(layers=2, width=24, heads=3, kv_heads=3, head_size=8, mlp=40, tied=False)
GROUPED = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, head_size=6, mlp=48, rope_base=500.0)
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
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
    tensors, described = to_hf(params, config, VOCAB)
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
    save_hf(params, config, tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens())).logits.numpy()
    np.testing.assert_allclose(theirs, ours(params, config, tokens()), atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again, shape = load_hf(tmp_path / "again")
    assert shape == config
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS[0],
        *(pytest.param(c, marks=pytest.mark.thorough) for c in CONFIGS[1:]),
    ],
)
def test_round_trip_is_bit_equal(config, tmp_path):
    params = make(config)
    save_hf(params, config, tmp_path / "new" / "folder")
    again, shape = load_hf(tmp_path / "new" / "folder")
    assert shape == config
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}


@pytest.fixture
def saved(tmp_path):
    save_hf(make(GROUPED), GROUPED, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("factor", "before", "window", "positions"),
    [
        (1.0, 4096, 0, 4096),
        (1.0, 4096, 6000, 6000),
        (1.0, 131_072, 6000, 131_072),
        (32.0, 4096, 6000, 32 * 8192),  # Transformers wants more than before the stretching.
        (32.0, 131_072, 6000, 131_072),  # As Llama 3.2 says it.
    ],
)
def test_other_programs_may_give_texts_as_long_as_before_and_in_training(
    factor, before, window, positions
):
    scaling = RopeScaling(factor=factor)
    config = dataclasses.replace(GROUPED, max_positions=before, rope_scaling=scaling)
    _, described = to_hf(make(config), config, VOCAB, window)
    assert described["max_position_embeddings"] == positions


@pytest.mark.parametrize(("said", "read"), [(8192, 8192), (None, 4096)])
def test_longest_text_is_that_of_the_folder(saved, said, read):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": said}))
    assert load_hf(saved)[1] == dataclasses.replace(GROUPED, max_positions=read)


def test_no_such_folder(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere/config\.json: No such file.* config\.json and model\.safetensors"
    ):
        load_hf(tmp_path / "nowhere")


def test_weights_that_are_not_there_or_cut(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
        load_hf(saved)
    weights.unlink()
    with pytest.raises(
        UserError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load_hf(saved)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the weights to .*file/below: "):
        save_hf(make(FULL), FULL, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, r'config\.json: hidden_act="gelu", must be "silu"'),
        ({"surprise": 3}, r"config\.json: setting 'surprise'=3 is unknown"),
        ({"architectures": ["GPT2"]}, r'architectures=\["GPT2"\]; apr_jax reads LlamaForCausalLM'),
        ({"architectures": None}, r"architectures=\[\]; apr_jax reads LlamaForCausalLM, Qwen2"),
        ({"model_type": "mistral"}, r'model_type="mistral", must be "llama" for LlamaForCausalLM'),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is set; take the model's"),
        ({"use_sliding_window": True}, r"use_sliding_window=true, must be false"),
        ({"use_mrope": True}, r"use_mrope=true, must be false"),
        ({"layer_types": ["sliding_attention"]}, r'layer_types holds "sliding_attention", must be'),
        ({"rope_scaling": {"rope_type": "yarn"}}, r'rope_type=\["yarn"\], must be "default" or'),
        (
            {"rope_scaling": {"type": "llama3"}},
            r"rope_scaling has no 'factor', which rope_type=",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            r"config\.json: rope_parameters has no 'factor', which rope_type=\"llama3\" needs",
        ),
        (
            {"rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 8192.9}},
            r"rope_scaling\.original_max_position_embeddings=8192\.9, must be a whole number of",
        ),
        ({"rope_theta": 10**400}, r"config\.json: rope_theta=inf, must be above 1 and finite"),
        (
            {"rope_scaling": LLAMA_3 | {"low_freq_factor": 9.0}},
            r"rope_scaling: low_freq_factor=9\.0 must be above 0 and below high_freq_factor=4\.0",
        ),
        (
            {"rope_scaling": LLAMA_3 | {"factor": "8"}},
            r'config\.json: rope_scaling\.factor="8", must be a number',
        ),
        ({"rope_scaling": "yarn"}, r'config\.json: rope_scaling="yarn", must be a JSON object'),
        ({"rope_theta": "1e6"}, r'config\.json: rope_theta="1e6", must be a number'),
        ({"rope_theta": 1}, r"config\.json: rope_theta=1\.0, must be above 1 and finite"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
            r"rope_theta=500000\.0, but rope_parameters\.rope_theta=10000\.0; must be the same",
        ),
        ({"rms_norm_eps": "1e-5"}, r'config\.json: rms_norm_eps="1e-5", must be a number'),
        ({"rms_norm_eps": 1}, r"config\.json: rms_norm_eps=1\.0, must be between 0 and 1"),
        ({"tie_word_embeddings": "false"}, r'tie_word_embeddings="false", must be true or false'),
        ({"layer_types": 3}, r"config\.json: layer_types=3, must be a list"),
        ({"head_dim": 5}, r"config\.json: head_dim=5, must be even"),
        (
            {"max_position_embeddings": 0},
            r"max_position_embeddings=0, must be a whole number",
        ),
        ({"num_attention_heads": 0}, r"num_attention_heads=0, must be a whole number of at least"),
        ({"vocab_size": "many"}, r'vocab_size="many", must be a whole number of at least 1'),
        ({"attention_bias": True}, r"config\.json: attention_bias=true, must be false"),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 5.0}},
            r"rope_scaling=.* and rope_parameters=.* must be the same where both are set",
        ),
        (
            {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 16},
            r"original_max_position_embeddings=16, but rope_scaling\.original_max\S+=8192; must be",
        ),
        ({"rope_scaling": {"factor": 2}}, r"rope_scaling: setting 'factor' is unknown"),
        (
            {"num_key_value_heads": 3},
            r"config\.json: num_key_value_heads=3 must divide num_attention_heads=4",
        ),
        ({"head_dim": None}, r"self_attn\.k_proj\.weight is \[12, 32\], must be \[16, 32\]"),
        (
            {"hidden_size": 30},
            r"tensor model\.embed_tokens\.weight is \[17, 32\], must be \[17, 30\]",
        ),
        (
            {"num_hidden_layers": 4},
            r"tensor model\.layers\.3\.input_layernorm\.weight is missing, must be \[32\]",
        ),
        (
            {"num_hidden_layers": 2},
            r"tensor 'model\.layers\.2\.\S+ is not part of the network that config\.json describes",
        ),
    ],
)
def test_config_that_does_not_fit(saved, change, message):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_hf(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unk_token_id", 3),
        ("sep_token_id", 3),
        ("_name_or_path", "a/b"),
        ("use_cache", True),
        ("use_mrope", False),  # Qwen2.5 says so.
    ],
)
def test_settings_that_change_no_network_are_passed_over(saved, name, value):
    path = saved / "config.json"
    before, _ = load_hf(saved)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    after, _ = load_hf(saved)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_config_without_a_field(saved):
    path = saved / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "hidden_size"})
    )
    with pytest.raises(UserError, match=r"config\.json has no field 'hidden_size'"):
        load_hf(saved)


def test_config_that_is_no_json(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json does not describe a network"):
        load_hf(saved)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_widened_exactly(saved, dtype):
    before, _ = load_hf(saved)
    tensors = load_file(saved / "model.safetensors")
    halves = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_tensors(halves, saved / "model.safetensors", {})
    after, _ = load_hf(saved)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.dtype == np.float32
        np.testing.assert_array_equal(new, old.astype(dtype).astype(np.float32))


def test_quantised_tensor_is_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.int8)}, saved / "model.safetensors")
    with pytest.raises(UsageError, match=r"mlp\.down_proj\.weight' is I8, must be one of F32, F16"):
        load_hf(saved)


def _shard(folder):
    """Splits the weights of a folder over two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_several_files_are_read_by_their_index(saved):
    whole, _ = load_hf(saved)
    _shard(saved)
    jax.tree.map(np.testing.assert_array_equal, load_hf(saved)[0], whole)


def test_file_that_the_index_names_is_missing(saved):
    _shard(saved)
    (saved / "b.safetensors").unlink()
    with pytest.raises(UsageError, match=r"b\.safetensors: no such file, but model\.safetensors\."):
        load_hf(saved)


def test_one_file_is_read_before_an_index_as_transformers_does(saved):
    whole, _ = load_hf(saved)
    tensors = load_file(saved / "model.safetensors")
    _shard(saved)
    for file in ("a.safetensors", "b.safetensors"):
        (saved / file).unlink()
    save_file(tensors, saved / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_hf(saved)[0], whole)


def test_computed_tensors_of_older_folders_are_skipped(saved):
    whole, _ = load_hf(saved)
    tensors = load_file(saved / "model.safetensors")
    wavelengths = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | wavelengths, saved / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_hf(saved)[0], whole)


def test_index_that_is_none(saved):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UsageError, match=r"index\.json: is no index of safetensors files"):
        load_hf(saved)


def test_head_beside_a_tied_embedding_must_be_equal(saved):
    tensors = load_file(saved / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, saved / "model.safetensors")
    load_hf(saved)
    save_file(tensors | {"lm_head.weight": embedding + 1}, saved / "model.safetensors")
    with pytest.raises(UsageError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_hf(saved)


def test_no_family_has_biases_and_norms_of_heads():
    both = dataclasses.replace(FULL, qkv_bias=True, qk_norm=True)
    with pytest.raises(UserError, match=r"model\.qkv_bias=True with model\.qk_norm=True: no arch"):
        to_hf({}, both, VOCAB)
