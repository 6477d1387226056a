"""Parameters that are kept in bfloat16: their types on the way through a training, and their
updates, which are computed in float32 and rounded at random.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import recorded
from helpers.recorded import LIMITS, TREES, VOCAB

from apr_jax.data.packing import pack_forest
from apr_jax.model.transformer import cast_weights, init_params
from apr_jax.threads import Schedule, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.train.config import LoraConfig, OptimizerConfig
from apr_jax.train.lora import make_adapters, place_frozen
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.rl.rescoring import token_logprobs
from apr_jax.train.rounding import rounded_as
from apr_jax.train.state import apply_gradients, init_state
from apr_jax.train.step import make_sft_step, place_rows, place_whole

LORA = LoraConfig(rank=2, alpha=3.0)


def model(param_dtype, dtype="bfloat16"):
    return dataclasses.replace(recorded.MODEL, dtype=dtype, param_dtype=param_dtype)


def params(param_dtype):
    """The same numbers in either type."""
    kept = cast_weights(recorded.params(), "bfloat16")
    return cast_weights(kept, param_dtype)


def rows(mesh):
    rows = pack_forest(recorded.record(), 4, LIMITS.max_thread_tokens)
    return place_rows(rows, len(rows.tokens), mesh)


def assert_kept_in_bfloat16(params):
    """All but the scales of norms."""
    for path, leaf in jax.tree.leaves_with_path(params):
        is_norm = path[-1].key.endswith("_norm")
        assert leaf.dtype == (jnp.float32 if is_norm else jnp.bfloat16), path


def test_random_parameters_are_those_of_float32_rounded():
    config = model("bfloat16")
    drawn = jax.jit(lambda key: init_params(config, VOCAB, key))(jax.random.key(4))
    assert_kept_in_bfloat16(drawn)
    jax.tree.map(np.testing.assert_array_equal, drawn, params("bfloat16"))


def test_rounding_is_right_in_the_mean_and_goes_to_a_neighbour():
    """Of numbers a quarter, half and nine tenths of the way; those of bfloat16 stay."""
    low = np.float32(1.0)
    high = np.float32(1.0 + 2**-7)
    for share in (0.0, 0.25, 0.5, 0.9):
        for sign in (1, -1):
            value = sign * (low + share * (high - low))
            values = jnp.full(40_000, value, jnp.float32)
            like = jnp.zeros(1, jnp.bfloat16)
            got = np.asarray(rounded_as([values], [like], jnp.int32(3))[0], np.float32)
            assert {*np.abs(got).tolist()} <= {float(low), float(high)}
            deviation = 5 * np.sqrt(share * (1 - share) / len(got))
            assert np.mean(np.abs(got) == high) == pytest.approx(share, abs=deviation)


def test_rounding_differs_from_step_to_step_and_from_leaf_to_leaf():
    values = [jnp.full(64, 1.003, jnp.float32)] * 2
    like = [jnp.zeros(64, jnp.bfloat16)] * 2
    first, second = rounded_as(values, like, jnp.int32(3))
    (later, _) = rounded_as(values, like, jnp.int32(4))
    assert (first != second).any()
    assert (first != later).any()
    again = rounded_as(values, like, jnp.int32(3))
    np.testing.assert_array_equal(first, again[0])


def test_updates_far_below_the_distance_of_neighbours_add_up(mesh):
    """Rounded to the nearest number, not one weight of this size would move."""
    start = {"embed": jnp.full((32, 32), 0.02, jnp.bfloat16)}
    optimizer = optax.sgd(1e-6)
    state = init_state(start, optimizer, mesh)

    @jax.jit
    def many(state):
        def one(_, state):
            ones = jax.tree.map(jnp.ones_like, state.params)
            state, _ = apply_gradients(state, jnp.float32(1), ones, optimizer)
            return dataclasses.replace(state, step=state.step + 1)

        return jax.lax.fori_loop(0, 1000, one, state)

    before = float(start["embed"][0, 0])
    after = np.asarray(many(state).params["embed"], np.float32)
    assert after.dtype == np.float32 and state.params["embed"].dtype == jnp.bfloat16
    assert before - after.mean() == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.thorough)])
def test_a_step_keeps_the_types_and_moments_are_float32(mesh, name):
    optimizer = make_optimizer(OptimizerConfig(name=name, lr=1e-3, warmup=0), 10)
    step = make_sft_step(model("bfloat16"), optimizer, mesh)
    state, metrics = step(init_state(params("bfloat16"), optimizer, mesh), rows(mesh))
    assert_kept_in_bfloat16(state.params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)

    other = make_sft_step(model("float32"), optimizer, mesh)
    expected, same = other(init_state(params("float32"), optimizer, mesh), rows(mesh))
    assert metrics["loss"] == same["loss"], "the computation is the same"
    assert metrics["grad_norm"] == pytest.approx(float(same["grad_norm"]), rel=1e-2)
    # A weight ends at a neighbour of what it would be in float32.
    close = [
        np.abs(np.asarray(got, np.float32) - want) <= 2**-7 * np.abs(want) + 2e-4
        for got, want in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
        )
    ]
    assert np.mean(np.concatenate([part.reshape(-1) for part in close])) > 0.98


@pytest.mark.thorough
def test_adapters_learn_what_they_learn_on_float32_parameters(mesh):
    """Computed in bfloat16, from weights that bfloat16 holds.

    A compiler may keep what lies between two products in either type, so bits can differ.
    """
    optimizer = make_optimizer(OptimizerConfig(lr=1e-2, warmup=0), 10)

    def learned(kept):
        start = params(kept)
        step = make_sft_step(model(kept), optimizer, mesh, LORA)
        base = place_frozen(start, LORA, mesh)
        state = init_state(start, optimizer, mesh, make_adapters(start, LORA, seed=0))
        losses = []
        for _ in range(3):
            state, metrics = step(state, rows(mesh), base)
            losses.append(float(metrics["loss"]))
        return state, losses

    state, losses = learned("bfloat16")
    expected, same = learned("float32")
    np.testing.assert_allclose(losses, same, rtol=1e-3)
    assert losses[2] < losses[0]
    assert_kept_in_bfloat16(state.params)
    assert {leaf.dtype for leaf in state.adapters.values()} == {jnp.dtype(jnp.float32)}
    for got, want in zip(
        jax.tree.leaves(state.adapters), jax.tree.leaves(expected.adapters), strict=True
    ):
        # Three steps of Adam at a rate of 1e-2: a sign that flips would move a value by 2e-2.
        assert np.mean(np.abs(got - want) < 1e-3) > 0.98
    rounded = cast_weights(expected.params, "bfloat16")
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(rounded), strict=True):
        got, want = (np.asarray(leaf, np.float32) for leaf in (got, want))
        assert np.mean(np.abs(got - want) <= 2**-7 * np.abs(want) + 1e-3) > 0.98


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_recorded_log_probs_are_those_of_rescoring(mesh, dtype, bound):
    config = model("bfloat16", dtype)
    prompts = make_prompts([[p.BOS, 10, 11]] * TREES, 3, temperature=1.0)
    rollout = make_policy_rollout(config, LIMITS, Schedule(slots=3, prefill_batch=2), mesh)
    placed = place_whole(params("bfloat16"), mesh)
    forest, _ = jax.device_get(rollout(placed, prompts, jax.random.key(5)))
    packed = pack_forest(forest, 4, LIMITS.max_thread_tokens)
    assert packed.sampled.sum() > 50
    rescore = jax.jit(token_logprobs, static_argnames=("config",))
    logprobs, _ = rescore(placed, config, packed)
    assert np.abs(np.asarray(logprobs) - packed.logprob)[packed.sampled].max() < bound
