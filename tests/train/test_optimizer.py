"""The optimizer: Muon on each matrix of the stack alone, schedule, decay, clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import init_params
from apr_jax.train.config import OptimizerConfig
from apr_jax.train.optimizer import clipped_updates, make_optimizer, make_schedule

CONFIG = ModelConfig(
    layers=2,
    width=12,
    heads=2,
    kv_heads=1,
    head_size=4,
    mlp=10,
    tied=False,
    qkv_bias=True,
    qk_norm=True,
)
MUON = OptimizerConfig(name="muon", lr=0.02, warmup=0, decay=1.0, weight_decay=0.1, clip=1e9)


def _gradients(params, seed):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(CONFIG, 9, key))(jax.random.key(0))


def _matrices(tree):
    """Every matrix that the forward pass multiplies by, [in, out], cut out by hand."""
    d = CONFIG.width
    layers = tree["layers"]
    for n in range(CONFIG.layers):
        yield f"q{n}", layers["q"][n].reshape(d, -1)
        yield f"k{n}", layers["kv"][n, :, 0].reshape(d, -1)
        yield f"v{n}", layers["kv"][n, :, 1].reshape(d, -1)
        yield f"out{n}", layers["out"][n].reshape(-1, d)
        yield f"gate{n}", layers["gate_up"][n, :, 0]
        yield f"up{n}", layers["gate_up"][n, :, 1]
        yield f"down{n}", layers["down"][n]


def _run(optimizer, params, gradients):
    """Two updates, compiled as one."""

    @jax.jit
    def both(params):
        state = optimizer.init(params)
        for grads in gradients:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return both(params)


@pytest.mark.thorough
def test_muon_on_the_stack_is_muon_on_each_matrix(params):
    gradients = [_gradients(params, seed) for seed in (1, 2)]
    stacked = dict(_matrices(_run(make_optimizer(MUON, 10), params, gradients)))
    # optax's own Muon, which takes every two-dimensional array for a matrix.
    plain = optax.contrib.muon(MUON.lr, weight_decay=0.1, consistent_rms=0.2)
    apart = _run(plain, dict(_matrices(params)), [dict(_matrices(grads)) for grads in gradients])
    assert stacked.keys() == apart.keys()
    for name in apart:
        np.testing.assert_allclose(stacked[name], apart[name], atol=2e-5, err_msg=name)


def test_muon_leaves_embeddings_and_norms_to_adam(params):
    adam = optax.adamw(MUON.lr, b2=MUON.b2, weight_decay=0.0, nesterov=True)
    names = ("embed", "unembed", "final_norm")
    gradients = [_gradients(params, seed) for seed in (1, 2)]
    few = [{name: tree[name] for name in names} for tree in (params, *gradients)]
    expected = _run(adam, few[0], few[1:])
    got = _run(make_optimizer(MUON, 10), params, gradients)
    for name in names:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norms_and_biases_are_never_decayed(params, name):
    config = dataclasses.replace(MUON, name=name)
    optimizer = make_optimizer(config, 10)
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)  # Fresh biases are 0.
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda params: optimizer.update(zeros, optimizer.init(params), params)[0])(
        params
    )
    assert not np.asarray(updates["final_norm"]).any()
    for kept in ("attn_norm", "mlp_norm", "q_norm", "k_norm", "q_bias", "kv_bias"):
        assert not np.asarray(updates["layers"][kept]).any(), kept
    np.testing.assert_allclose(
        updates["layers"]["down"], -0.02 * 0.1 * params["layers"]["down"], rtol=1e-4
    )


@pytest.mark.thorough
def test_gradients_are_clipped_by_their_global_norm(params):
    optimizer = make_optimizer(
        dataclasses.replace(MUON, name="adamw", clip=1e-6, weight_decay=0.0), 10
    )
    _, state = optimizer.update(_gradients(params, 1), optimizer.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]  # mu is 0.1 x the clipped gradient.
    assert float(optax.global_norm(moments)) < 1.01e-7


def test_update_with_gradient_beyond_clip_counts_as_clipped():
    norms = list(jnp.asarray([0.1, 0.25, 0.2501, 7.0]))
    assert float(clipped_updates(norms, clip=0.25)) == 0.5
    assert float(clipped_updates(norms[:1], clip=0.25)) == 0.0
    assert float(clipped_updates([jnp.nan], clip=0.25)) == 0.0, "such an update is skipped"


def test_schedule_warms_up_and_ends_at_its_share():
    """Its first step is above zero."""
    schedule = make_schedule(OptimizerConfig(lr=1.0, warmup=4, decay=0.1), steps=20)
    values = [float(schedule(step)) for step in range(20)]
    np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert values[4:] == sorted(values[4:], reverse=True)
    np.testing.assert_allclose(schedule(20), 0.1, rtol=1e-6)
    assert float(make_schedule(OptimizerConfig(lr=1.0, warmup=50), steps=1)(0)) == 1.0
