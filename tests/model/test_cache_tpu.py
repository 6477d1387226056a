"""The TPU's cache and kernel (interpreted on CPU; tests/end_to_end/test_tpu.py compiles them) equal
those of other devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache import cache, cache_tpu
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import init_params, make_decode, prepare_decode
from apr_jax.threads import Limits, Schedule, make_prompts, make_rollout
from apr_jax.threads import protocol as p
from apr_jax.threads.keys import KEYS

VOCAB = 24
LAYER = jnp.asarray(1)  # Of the two of `config`.
interpreted = functools.partial(cache_tpu.over, interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache_tpu, "BLOCKS", ((200, 64), (400, 128)))
    monkeypatch.setattr(cache_tpu, "over", interpreted)


def config(heads=4, kv_heads=2):
    return ModelConfig(layers=2, width=32, heads=heads, kv_heads=kv_heads, head_size=16, mlp=48)


def by_heads(side, groups):
    """The layer's [W, M, G x K] as the other devices have it."""
    own = side[:, LAYER]
    return np.asarray(own.reshape(*own.shape[:2], groups, -1).transpose(0, 2, 1, 3))


@pytest.mark.thorough
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("bound", [1, 128, 300])
def test_a_step_finds_and_stores_what_other_devices_do(heads, groups, bound):
    """At places in all parts of a block and at both ends of the window; a decode slot without a
    token stores nothing. The cache of the other layer stays as it was.
    """
    random = np.random.default_rng(bound)
    places = [
        0,
        bound // 2,
        bound - 1,
        bound,
        min(15, bound - 1),
        min(16, bound - 1),
        min(127, bound - 1),
        min(128, bound - 1),
    ]
    slots = len(places)
    model = config(heads, groups)
    positions = jnp.asarray(places)[:, None]

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    q, k, v = (
        normal(slots, 1, heads, 16),
        normal(slots, groups, 1, 16),
        normal(slots, groups, 1, 16),
    )
    old = [normal(slots, groups, bound, 16) for _ in range(2)]
    empty = cache_tpu.empty(model, slots, bound)
    filled = tuple(
        e.at[:, LAYER, :bound].set(x.transpose(0, 2, 1, 3).reshape(slots, bound, -1))
        for e, x in zip(empty, old, strict=True)
    )
    found, after = jax.jit(lambda *x: interpreted(filled, LAYER, positions, bound)(*x))(q, k, v)
    expected, ((keys, values),) = cache.over((tuple(old),), positions, bound, (bound,))(q, k, v)
    real = np.asarray(places) < bound
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=2e-6)
    for side, other in zip(after, (keys, values), strict=True):
        np.testing.assert_array_equal(by_heads(side, groups)[:, :, :bound], other)
        assert not np.asarray(side[:, :, bound:]).any()
        assert not np.asarray(side[:, 0]).any()


def test_what_lies_beyond_a_slot_is_not_read():
    """NaN in the blocks after a decode slot's last one does not come through, as it would through a
    mask.
    """
    model = config()
    bound = 384
    sides = tuple(x.at[:, LAYER, 128:].set(jnp.nan) for x in cache_tpu.empty(model, 2, bound))
    q, k = jnp.ones((2, 1, 4, 16)), jnp.ones((2, 2, 1, 16))
    found, _ = interpreted(sides, LAYER, jnp.asarray([[100], [200]]), bound)(q, k, k)
    assert np.isfinite(np.asarray(found[0])).all()
    assert np.isnan(np.asarray(found[1])).all()


def _kernels(jaxpr):
    inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    return found or [kernel for sub in inner for kernel in _kernels(sub)]


def test_small_blocks_find_and_store_the_same():
    """A bound of small blocks over a cache made for large ones; the longest decode slot ends in its
    last block.
    """
    model = config()
    random = np.random.default_rng(0)
    sides = tuple(
        jnp.asarray(random.normal(size=e.shape), e.dtype) for e in cache_tpu.empty(model, 3, 300)
    )
    q, k, v = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((3, 1, 4, 16), (3, 2, 1, 16), (3, 2, 1, 16))
    )
    positions = jnp.asarray([[5], [64], [199]])
    small, large = (interpreted(sides, LAYER, positions, bound)(q, k, v) for bound in (200, 300))
    (kernel,) = _kernels(jax.make_jaxpr(interpreted(sides, LAYER, positions, 200))(q, k, v).jaxpr)
    assert kernel.params["grid_mapping"].num_dynamic_grid_bounds == 1, (
        "as many turns as the longest decode slot has blocks"
    )
    np.testing.assert_allclose(small[0], large[0], atol=2e-6)
    for a, b in zip(small[1], large[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_in_bfloat16_within_its_rounding():
    bound = 256
    random = np.random.default_rng(0)
    old = jnp.asarray(random.normal(size=(2, 3, 2, bound, 16)), jnp.bfloat16)
    sides = tuple(x.transpose(0, 2, 1, 3).reshape(3, 1, bound, -1) for x in old)
    q = jnp.asarray(random.normal(size=(3, 1, 4, 16)), jnp.bfloat16)
    k = jnp.asarray(random.normal(size=(3, 2, 1, 16)), jnp.bfloat16)
    positions = jnp.asarray([[7], [130], [255]])
    found, _ = interpreted(sides, jnp.asarray(0), positions, bound)(q, k, k)
    exact, _ = cache.over(
        ((old[0].astype(jnp.float32), old[1].astype(jnp.float32)),), positions, bound, (bound,)
    )(*(x.astype(jnp.float32) for x in (q, k, k)))
    assert found.dtype == jnp.bfloat16
    assert (
        np.abs(np.asarray(found, np.float32) - np.asarray(exact)).max()
        < 0.02 * np.abs(np.asarray(exact)).max()
    )


def test_blocks_fit_beside_each_other():
    """Small ones up to a bound, large ones beyond; fewer positions where one is wider, and whole
    tiles always.
    """
    assert [cache_tpu.block_size(1_024, 2, bound) for bound in (1, 200, 201, 400)] == [
        64,
        64,
        128,
        128,
    ]
    assert cache_tpu.block_size(4_096, 4, 400) == 64
    assert cache_tpu.block_size(8_200, 4, 400) == 16
    assert cache_tpu.block_size(100_000, 4, 400) == cache_tpu.TILE


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [1, 3])
def test_contexts_and_steps_share_a_cache(chunk):
    """Read in chunks, then decoded token by token, with a smaller cache's leaves as corners of the
    larger one's.
    """
    model = config()
    params = init_params(model, VOCAB, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCAB)
    logits = {}
    for tpu in (False, True):
        decode, init_cache = make_decode(model, (16, 40), tpu)
        ready = prepare_decode(params, model, tpu)
        small, large = init_cache(2, 16), init_cache(2, 40)
        for begin in range(0, 6, chunk):
            at = (
                jnp.tile(jnp.arange(begin, begin + chunk), (2, 1))
                .at[1]
                .add(jnp.where(begin >= 3, 40, 0))
            )
            _, small = decode(ready, tokens[:, begin : begin + chunk], small, at, 16)

        def corner(leaf, new):
            return leaf.at[tuple(slice(0, size) for size in new.shape)].set(new)

        kept = jax.tree.map(corner, large, small)
        steps = []
        for step in range(6, 12):
            at = jnp.asarray([[step], [step - 3]])
            out, kept = decode(ready, tokens[:, step : step + 1], kept, at, 40)
            steps.append(out)
        logits[tpu] = np.concatenate(steps, axis=1)
    np.testing.assert_allclose(logits[True], logits[False], atol=2e-5)


def test_more_layers_are_no_larger_program():
    """The layers are a loop, so what is compiled for each cache length is one of them."""

    def size(layers):
        model = dataclasses.replace(config(), layers=layers)
        decode, init_cache = make_decode(model, (16,), tpu=True)

        def step():
            params = init_params(model, VOCAB, jax.random.key(0))
            ready = prepare_decode(params, model, tpu=True)
            tokens = jnp.zeros((2, 1), jnp.int32)
            return decode(ready, tokens, init_cache(2, 16), tokens, 16)

        return len(jax.jit(step).lower().as_text())

    assert size(12) < 1.02 * size(2)


def spawning(decode):
    """The model, inclined to spawn and not to end."""

    def inclined(params, tokens, cache, positions, bound):
        logits, after = decode(params, tokens, cache, positions, bound)
        return logits.at[..., p.EOS].add(-2.0).at[..., (p.SPAWN, p.END_SPAWN)].add(1.5), after

    return inclined


@pytest.mark.slow
def test_a_rollout_grows_the_same_trees():
    """Of a random policy that spawns and joins: every token and status, with decode slots that
    change hands.
    """
    model = config()
    limits = Limits(
        window=48, max_thread_tokens=72, max_threads=5, children=3, max_depth=1, constrain=True
    )
    params = init_params(model, VOCAB, jax.random.key(2))
    prompts = make_prompts([[p.BOS, 20, 21], [p.BOS, 22]] * 4, 4, temperature=1.0)
    schedule = Schedule(slots=6, prefill_batch=2, prefill_chunk=4, context_buckets=(16,))
    forests = []
    for tpu in (False, True):
        decode, init_cache = make_decode(model, schedule.cache_lengths(limits.window), tpu)
        mesh = make_mesh(devices=jax.devices()[:1])
        rollout = make_rollout(
            spawning(decode),
            init_cache,
            limits,
            schedule,
            mesh,
            prepare=lambda x, tpu=tpu: prepare_decode(x, model, tpu),
        )
        forests.append(rollout(params, prompts, jax.random.key(0, impl=KEYS))[0])
    plain, kernel = forests
    assert int(plain.total_tokens.sum()) > 300 and (np.asarray(plain.parent) >= 0).sum() > 8
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(kernel), strict=True):
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, atol=1e-4)
        else:
            np.testing.assert_array_equal(a, b)
