"""One forward function: packed rows, prefill and decoding agree; nothing leaks between threads or
out of hidden blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.config import ModelConfig, RopeScaling
from apr_jax.model.kv_cache.cache import store
from apr_jax.model.lora import CONTROL, TARGETS, init_adapters
from apr_jax.model.sharding import LOGICAL_AXES, make_mesh, shardings
from apr_jax.model.transformer import (
    count_params,
    forward,
    init_params,
    make_decode,
    prepare_decode,
    rotate,
)

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_size=8, mlp=48)
# All that the families Llama 3, Qwen2 and Qwen3 have beyond Llama 2.
FULL = dataclasses.replace(
    CONFIG,
    head_size=10,
    norm_epsilon=1e-4,
    qkv_bias=True,
    qk_norm=True,
    rope_base=50.0,
    rope_scaling=RopeScaling(4.0, original_length=16),
)
VOCAB = 17
BOUNDS = (5, 8, 16)  # Where the cache is cut.


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, VOCAB, jax.random.key(0))


@pytest.fixture(scope="module")
def full_params():
    """No bias is 0 here and no scale 1, as they are in fresh parameters."""
    leaves, tree = jax.tree.flatten(init_params(FULL, VOCAB, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return tree.unflatten(noisy)


def rows(key: int, length: int = 12):
    tokens = jax.random.randint(jax.random.key(key), (2, length), 0, VOCAB)
    position = jnp.tile(jnp.arange(length), (2, 1))
    return tokens, position, jnp.ones((2, length), jnp.int32), jnp.zeros((2, length), jnp.int32)


def test_parameter_count_by_hand(params):
    layer = 32 * 32 + 32 * 2 * 2 * 8 + 32 * 32 + 32 * 2 * 48 + 48 * 32 + 2 * 32
    assert count_params(params) == (2 * layer + 32 + VOCAB * 32, 2 * layer + 32)


@pytest.mark.thorough
def test_no_gradient_from_invisible_tokens(params):
    """Those are of the future, of other threads and of closed hidden blocks."""
    tokens, position, _, _ = rows(1)
    segment = jnp.asarray([[1] * 8 + [2] * 4] * 2)
    hidden_block = jnp.asarray([[0, 0, 1, 1, 0, 0, 0, 0] + [0] * 4] * 2)

    def logit(inputs, at):
        one_hot = jax.nn.one_hot(tokens, VOCAB) + inputs
        swapped = params | {"embed": jnp.eye(VOCAB) @ params["embed"]}
        h = jnp.einsum("rlv,vd->rld", one_hot, swapped["embed"])
        return _forward_from(h, params, position, segment, hidden_block)[0, at].sum()

    blank = jnp.zeros((2, 12, VOCAB))
    after = np.abs(jax.grad(logit)(blank, 6)).sum(-1)
    assert (after[1] == 0).all()
    np.testing.assert_array_equal(after[0] != 0, [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    child = np.abs(jax.grad(logit)(blank, 10)).sum(-1)
    np.testing.assert_array_equal(child[0] != 0, [0] * 8 + [1, 1, 1, 0])


def _forward_from(h, params, position, segment, hidden_block):
    """`forward` with the embeddings given, so that a gradient reaches each token's own."""
    width = h.shape[-1]
    rows_, length = position.shape
    table = jnp.concatenate([params["embed"], h.reshape(-1, width)])
    index = VOCAB + jnp.arange(rows_ * length).reshape(rows_, length)
    return forward(params | {"embed": table}, CONFIG, index, position, segment, hidden_block)[
        ..., :VOCAB
    ]


@pytest.mark.parametrize("bound", [12, 16])
@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_decoding_in_chunks_gives_the_training_logits(params, chunk, bound):
    _check_decoding(params, CONFIG, chunk, bound)


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [1, 5])
def test_decoding_with_biases_norms_and_scaling_gives_the_training_logits(full_params, chunk):
    _check_decoding(full_params, FULL, chunk, 16)


def _check_decoding(params, config, chunk, bound):
    tokens, position, segment, hidden_block = rows(2)
    expected = forward(params, config, tokens, position, segment, hidden_block)
    decode, init_cache = make_decode(config, BOUNDS)
    ready = prepare_decode(params, config)
    cache = init_cache(2, bound)
    step = jax.jit(decode, static_argnums=4)
    for begin in range(0, 12, chunk):
        part = slice(begin, begin + chunk)
        logits, cache = step(ready, tokens[:, part], cache, position[:, part], bound)
        np.testing.assert_allclose(logits, expected[:, begin : begin + chunk], atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("field", ["norm_epsilon", "qkv_bias", "qk_norm", "rope_scaling"])
def test_every_setting_of_a_family_matters(full_params, field):
    without = dataclasses.replace(FULL, **{field: getattr(CONFIG, field)})
    batch = rows(2)
    difference = forward(full_params, FULL, *batch) - forward(full_params, without, *batch)
    assert float(jnp.abs(difference).max()) > 1e-4


def test_wavelengths_are_stretched_as_by_llama_3():
    """The angles of Llama 3.2's own numbers, worked out pair by pair in plain Python."""
    scaling = RopeScaling(32.0, low_frequency_turns=1.0, high_frequency_turns=4.0)
    config = dataclasses.replace(CONFIG, head_size=64, rope_base=500_000.0, rope_scaling=scaling)
    expected = []
    for pair in range(32):
        frequency = 500_000.0 ** (-pair / 32)
        turns = 8192 * frequency / (2 * np.pi)
        if turns < 1:
            frequency /= 32
        elif turns < 4:
            share = (turns - 1) / (4 - 1)
            frequency = (1 - share) * frequency / 32 + share * frequency
        expected.append(frequency)

    position = 3
    ones = jnp.concatenate([jnp.ones(32), jnp.zeros(32)])[None, None, None]  # [1, 1, 1, K]
    turned = rotate(ones, jnp.full((1, 1), position), config)[0, 0, 0]
    angle = np.arctan2(turned[32:], turned[:32])
    wrapped = np.angle(np.exp(1j * position * np.asarray(expected)))
    np.testing.assert_allclose(angle, wrapped, rtol=1e-5, atol=1e-9)


def test_padding_leaves_the_cache_untouched(params):
    decode, init_cache = make_decode(CONFIG, BOUNDS)
    tokens, position, _, _ = rows(3)
    ready = prepare_decode(params, CONFIG)
    _, cache = decode(ready, tokens, init_cache(2, 16), position, 16)
    _, after = decode(ready, tokens[:, :2], cache, jnp.full((2, 2), 16), 16)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rewound_cache_forgets(params):
    decode, init_cache = make_decode(CONFIG, BOUNDS)
    tokens, position, segment, hidden_block = rows(4)
    ready = prepare_decode(params, CONFIG)
    _, cache = decode(ready, tokens, init_cache(2, 16), position, 16)
    other = (tokens + 1) % VOCAB
    logits, _ = decode(ready, other[:, 5:7], cache, position[:, 5:7], 16)
    joined = jnp.concatenate([tokens[:, :5], other[:, 5:7]], axis=1)
    expected = forward(params, CONFIG, joined, position[:, :7], segment[:, :7], hidden_block[:, :7])
    np.testing.assert_allclose(logits, expected[:, 5:7], atol=2e-5)


def test_gradient_of_a_layer_is_no_array_as_large_as_all_layers():
    """The stacked gradient is put together once. A sum of one such array a layer took 7 GiB more
    for the adapters of SmolLM2, and three times as long.
    """
    config = dataclasses.replace(CONFIG, layers=5)
    params = init_params(config, VOCAB, jax.random.key(0))
    stacks = {leaf.shape for leaf in params["layers"].values()}
    gradient = jax.make_jaxpr(jax.grad(lambda params: forward(params, config, *rows(5)).sum()))
    made = [
        equation.primitive.name
        for equation in gradient(params).eqns
        if equation.outvars[0].aval.shape in stacks
    ]
    assert made == ["concatenate"] * len(params["layers"])


@pytest.mark.thorough
def test_remat_changes_memory_not_gradients(params):
    batch = rows(5, length=64)

    def loss(config):
        return jax.jit(jax.grad(lambda p: jnp.square(forward(p, config, *batch)).mean()))

    def of(compiled):
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    configs = [dataclasses.replace(CONFIG, remat=policy) for policy in ("none", "dots", "layer")]
    plain, dots, layer = (of(loss(config).lower(params).compile()) for config in configs)
    assert layer[0] < 0.8 * plain[0] and layer[0] < dots[0] < plain[0]
    assert dots[1] < layer[1]  # Both scan, and a scan's body counts once.
    expected = jax.tree.leaves(loss(CONFIG)(params))
    for config in configs[1:]:
        for a, b in zip(jax.tree.leaves(loss(config)(params)), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [
        pytest.param(8, 1, 1, marks=pytest.mark.thorough),
        (2, 2, 2),
        pytest.param(1, 4, 2, marks=pytest.mark.thorough),
    ],
)
def test_every_mesh_gives_the_same_logits(params, data, fsdp, tensor):
    _check_mesh(params, CONFIG, data, fsdp, tensor)


def test_a_mesh_splits_biases_and_norms_of_heads(full_params):
    _check_mesh(full_params, FULL, 2, 2, 2)


def _check_mesh(params, config, data, fsdp, tensor):
    tokens, position, segment, hidden_block = (jnp.tile(x, (4, 1)) for x in rows(6))
    expected = forward(params, config, tokens, position, segment, hidden_block)
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[:8])
    placed = jax.device_put(params, shardings(params, mesh))
    assert (fsdp * tensor == 1) == placed["layers"]["q"].is_fully_replicated
    logits = jax.jit(forward, static_argnums=(1, 6))(
        placed, config, tokens, position, segment, hidden_block, mesh
    )
    np.testing.assert_allclose(logits, expected, atol=5e-5)


def test_every_parameter_and_adapter_has_logical_axes():
    untied = init_params(dataclasses.replace(FULL, tied=False), VOCAB, jax.random.key(0))
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(untied)}
    adapters = init_adapters(untied, (*TARGETS, CONTROL), 2, 3, jax.random.key(0))
    assert names | adapters.keys() == set(LOGICAL_AXES)


@pytest.mark.parametrize("axes", [(3, 3, 1), (0, 3, 1), (0, 16, 1)])
def test_mesh_that_does_not_fit_is_named(axes):
    data, fsdp, tensor = axes
    with pytest.raises(
        ValueError,
        match=f"mesh data={data} x fsdp={fsdp} x tensor={tensor}: does not fit the 8 devices",
    ):
        make_mesh(data, fsdp, tensor, jax.devices()[:8])


def test_mesh_takes_the_first_devices_it_needs():
    assert list(make_mesh(3, 1, 1, jax.devices()[:8]).devices.flat) == jax.devices()[:3]
    assert make_mesh(0, 2, 2, jax.devices()[:8]).devices.shape == (2, 2, 2)


def test_what_is_stored_and_what_is_dropped():
    old = jax.random.normal(jax.random.key(0), (3, 2, 7, 4))
    for steps in (1, 3):
        new = jax.random.normal(jax.random.key(1), (3, 2, steps, 4))
        place = jnp.asarray([[0, 6, 9], [7, 2, 3], [5, 4, 700]])[:, :steps]
        expected = np.array(old)
        for slot, step in np.ndindex(3, steps):
            if place[slot, step] < 7:
                expected[slot, :, place[slot, step]] = new[slot, :, step]
        np.testing.assert_array_equal(jax.jit(store)(old, new, place), expected)
    one = jax.jit(store)(old[:1], old[:1, :, 3:4], jnp.asarray([[5]]))
    np.testing.assert_array_equal(one, old[:1].at[:, :, 5].set(old[:1, :, 3]))
