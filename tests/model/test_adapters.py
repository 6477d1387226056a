"""Adapters: what they add to which matrix, and that a mesh changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.config import ModelConfig
from apr_jax.model.lora import CONTROL, TARGETS, frozen, init_adapters, merge
from apr_jax.model.sharding import LOGICAL_AXES, make_mesh, shardings
from apr_jax.model.transformer import init_params

CONFIG = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, head_size=4, mlp=12, tied=False)
VOCAB = 24
ROWS = 10
RANK = 3
SCALE = 0.7
ALL = (*TARGETS, CONTROL)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(CONFIG, VOCAB, key))(jax.random.key(0))


def new(params, targets=ALL):
    return init_adapters(params, targets, RANK, ROWS, jax.random.key(1))


def moved(adapters):
    """Adapters somewhere on their way, where every entry counts."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return tree.unflatten(noise)


def merged(params, adapters, targets=ALL):
    return merge(adapters, params, frozen(params, targets), SCALE)


def matrices(layers, index):
    """The matrices [in, out] of one layer, cut out by hand."""
    return {
        "q": layers["q"][index].reshape(16, 16),
        "k": layers["kv"][index, :, 0].reshape(16, 8),
        "v": layers["kv"][index, :, 1].reshape(16, 8),
        "o": layers["out"][index].reshape(16, 16),
        "gate": layers["gate_up"][index, :, 0],
        "up": layers["gate_up"][index, :, 1],
        "down": layers["down"][index],
    }


def test_new_adapters_change_nothing(params):
    jax.tree.map(np.testing.assert_array_equal, merged(params, new(params)), params)


@pytest.mark.parametrize("targets", [ALL, ("q",), ("k",), ("v", "down"), ("o", "up"), ("gate",)])
def test_each_target_gets_its_product_and_nothing_else_changes(params, targets):
    adapters = moved(new(params, targets))
    got = merged(params, adapters, targets)
    for index in range(CONFIG.layers):
        before = matrices(params["layers"], index)
        for name, matrix in matrices(got["layers"], index).items():
            if name not in targets:
                np.testing.assert_array_equal(matrix, before[name], name)
                continue
            down = np.asarray(adapters[f"{name}_a"][index]).reshape(-1, RANK)
            up = np.asarray(adapters[f"{name}_b"][index]).reshape(RANK, -1)
            np.testing.assert_allclose(
                matrix, before[name] + SCALE * down @ up, atol=1e-5, err_msg=name
            )
    for name in ("embed", "unembed"):
        rows = got[name] if name == "embed" else got[name].T
        before = params[name] if name == "embed" else params[name].T
        np.testing.assert_array_equal(rows[ROWS:], before[ROWS:])
        assert bool((rows[:ROWS] != before[:ROWS]).all()) == (CONTROL in targets)
    for name in ("attn_norm", "mlp_norm"):
        np.testing.assert_array_equal(got["layers"][name], params["layers"][name])


def test_size_of_a_is_that_of_fresh_weights(params):
    """And a target's A is the same whatever other targets there are."""
    wide = dataclasses.replace(CONFIG, width=256, heads=8, head_size=32)
    shapes = jax.eval_shape(lambda: init_params(wide, VOCAB, jax.random.key(0)))
    adapters = init_adapters(shapes, tuple(TARGETS), 64, ROWS, jax.random.key(1))
    for name in ("q", "o", "gate"):
        assert float(adapters[f"{name}_a"].std()) == pytest.approx(1 / 16, rel=0.05), name
    np.testing.assert_array_equal(new(params, ("down",))["down_a"], new(params)["down_a"])
    assert not np.array_equal(new(params)["k_a"], new(params)["v_a"])


def test_gradient_of_adapters_is_the_chain_rule(params):
    """By hand: dA = scale x dW B^T, dB = scale x A^T dW."""
    adapters = moved(new(params))
    gradient = moved(params)
    _, pull_back = jax.vjp(lambda adapters: merged(params, adapters), adapters)
    (got,) = pull_back(gradient)
    for index in range(CONFIG.layers):
        for name, of_matrix in matrices(gradient["layers"], index).items():
            down = np.asarray(adapters[f"{name}_a"][index]).reshape(-1, RANK)
            up = np.asarray(adapters[f"{name}_b"][index]).reshape(RANK, -1)
            np.testing.assert_allclose(
                got[f"{name}_a"][index].reshape(-1, RANK), SCALE * of_matrix @ up.T, atol=1e-4
            )
            np.testing.assert_allclose(
                got[f"{name}_b"][index].reshape(RANK, -1), SCALE * down.T @ of_matrix, atol=1e-4
            )
    np.testing.assert_array_equal(got["control_embed"], gradient["embed"][:ROWS])
    np.testing.assert_array_equal(got["control_unembed"], gradient["unembed"][:, :ROWS])


def test_every_adapter_has_as_many_axes_as_its_layout(params):
    for name, leaf in new(params).items():
        assert leaf.ndim == len(LOGICAL_AXES[name]), name


def test_a_mesh_merges_the_same_and_splits_the_result(params):
    adapters = moved(new(params))
    expected = merged(params, adapters)
    mesh = make_mesh(2, 2, 2, jax.devices()[:8])
    placed = jax.device_put((params, adapters), shardings((params, adapters), mesh))
    assert not placed[1]["q_b"].is_fully_replicated
    got = jax.jit(merged)(*placed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)


def test_tied_models_have_rows_of_the_embedding_alone(params):
    tied = {name: leaf for name, leaf in params.items() if name != "unembed"}
    adapters = new(tied)
    assert "control_embed" in adapters and "control_unembed" not in adapters
    assert jnp.array_equal(merged(tied, adapters)["embed"], params["embed"])
