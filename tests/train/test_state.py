"""Updates that are not finite are skipped whole and counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import init_params
from apr_jax.train.config import OptimizerConfig
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import apply_gradients, init_state

CONFIG = ModelConfig(layers=2, width=8, heads=2, kv_heads=1, head_size=4, mlp=8)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def setting(request, mesh):
    """A state after one good update, the compiled update, and gradients."""
    params = jax.jit(lambda key: init_params(CONFIG, 9, key))(jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(name=request.param), 10)
    update = jax.jit(lambda state, loss, grads: apply_gradients(state, loss, grads, optimizer))
    ones = jax.tree.map(jnp.ones_like, params)
    state, _ = update(init_state(params, optimizer, mesh), jnp.float32(1), ones)
    return state, update, ones


@pytest.mark.parametrize("where", ["loss", "one gradient"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_step_changes_nothing_but_the_counters(setting, where, value):
    state, update, ones = setting
    bad = ones
    loss = jnp.float32(1)
    if where == "loss":
        loss = jnp.float32(value)
    else:
        bad = {**ones, "embed": ones["embed"].at[0, 0].set(value)}
    after, _ = update(state, loss, bad)
    after, metrics = update(after, loss, bad)
    assert int(after.skipped) == int(after.bad_in_a_row) == int(metrics["bad_in_a_row"]) == 2
    back = dataclasses.replace(after, skipped=state.skipped, bad_in_a_row=state.bad_in_a_row)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    good, _ = update(after, jnp.float32(1), ones)
    assert int(good.skipped) == 2
    assert int(good.bad_in_a_row) == 0
    assert float(jnp.abs(good.params["embed"] - state.params["embed"]).max()) > 0
