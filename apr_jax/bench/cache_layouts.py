"""Measures layouts of the key/value cache at the attention of a decode step.

In such a step each decode slot writes one position and then attends to all of its positions. Every
layout holds the same M positions of W decode slots, with G groups of K numbers, in every layer. The
layouts differ in where a position is in memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from apr_jax.bench.paired import Contestant
from apr_jax.bench.plain_decoding import SHAPES
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache.cache import attend_cached, store

SLOTS = 16
POSITIONS = 256
WINDOW = 1024
PAGE = 16  # Positions of a page.
STEPS = 64

# (keys or values, new [W, G, 1, K], position [W, 1]) -> keys or values.
Write = Callable[[Array, Array, Array], Array]
# (keys, values, q [W, 1, H, K], mask [W, 1, M]) -> attention [W, 1, H, K].
Read = Callable[[Array, Array, Array, Array], Array]


def contest(shape: str) -> list[Contestant]:
    """Makes the contestants: the layouts of the cache of one model, ours first.

    Args:
      shape: name of the model in `plain_decoding.SHAPES`.

    Raises:
      RuntimeError: a layout computes another result than ours.
    """
    config = SHAPES[shape]
    groups = config.kv_heads
    size = config.head_size
    ours = (SLOTS, groups, POSITIONS, size)
    table = jnp.arange(SLOTS * POSITIONS // PAGE).reshape(SLOTS, -1)  # [W, pages of a slot]
    slot = jnp.arange(SLOTS)  # [W]

    def plain(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        return attend_cached(q, [(keys, values)], mask)

    def sliced(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        return plain(keys[:, :, :POSITIONS], values[:, :, :POSITIONS], q, mask)

    def in_half(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        return plain(keys, values, q.astype(jnp.bfloat16), mask).astype(q.dtype)

    def write_flat(cache: Array, new: Array, position: Array) -> Array:
        return cache.at[slot, position[:, 0]].set(new.reshape(SLOTS, -1))

    def read_flat(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        # [W, M, G x K] -> [W, G, M, K]
        by_head = [x.reshape(SLOTS, -1, groups, size).swapaxes(1, 2) for x in (keys, values)]
        return attend_cached(q, [(by_head[0], by_head[1])], mask)

    def write_page(cache: Array, new: Array, position: Array) -> Array:
        page = table[slot, position[:, 0] // PAGE]  # [W]
        return cache.at[page, :, position[:, 0] % PAGE].set(new[:, :, 0])

    def read_pages(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        # [pages, G, PAGE, K] -> [W, G, M, K]
        gathered = [x[table].swapaxes(1, 2).reshape(ours) for x in (keys, values)]
        return attend_cached(q, [(gathered[0], gathered[1])], mask)

    flat = (SLOTS, POSITIONS, groups * size)
    paged = (table.size, groups, PAGE, size)
    layouts: list[tuple[str, tuple[int, ...], Any, Write, Read]] = [
        ("[W, G, M, K], of just these positions", ours, jnp.float32, store, plain),
        (
            f"the same, cut out of a window of {WINDOW}",
            (SLOTS, groups, WINDOW, size),
            jnp.float32,
            store,
            sliced,
        ),
        ("[W, M, G x K]", flat, jnp.float32, write_flat, read_flat),
        (f"paged, {PAGE} positions a page", paged, jnp.float32, write_page, read_pages),
        ("[W, G, M, K] in bfloat16", ours, jnp.bfloat16, store, in_half),
    ]
    q = jax.random.normal(jax.random.key(0), (SLOTS, 1, config.heads, size))
    contestants = []
    expected = None
    for name, cache_shape, dtype, write, read in layouts:
        run = _steps(cache_shape, dtype, write, read, config)
        result = run(q)
        if expected is None:
            expected = result
        rtol = 0.1 if dtype == jnp.bfloat16 else 1e-4
        if not jnp.allclose(result, expected, rtol=rtol, atol=1e-2):
            raise RuntimeError(f"bench cache: {name} computes another result than ours")
        contestants.append(Contestant(name, functools.partial(_wait, run, q), "steps"))
    return contestants


def _steps(
    cache_shape: tuple[int, ...], dtype: Any, write: Write, read: Read, config: ModelConfig
) -> Callable[[Array], Array]:
    """Compiles STEPS decode steps of attention alone.

    The steps write the last positions of the cache. The result of a layer's attention becomes the
    query of the next layer.
    """
    mask = jnp.ones((SLOTS, 1, POSITIONS), bool)

    @jax.jit
    def run(q: Array) -> Array:
        def step(
            index: Array, carry: tuple[Array, list[tuple[Array, Array]]]
        ) -> tuple[Array, list[tuple[Array, Array]]]:
            q, cache = carry
            position = jnp.full((SLOTS, 1), POSITIONS - STEPS + index)
            new = q.swapaxes(1, 2)[:, : config.kv_heads].astype(dtype)  # [W, G, 1, K]
            written = []
            for keys, values in cache:
                layer = write(keys, new, position), write(values, new, position)
                q = jnp.tanh(q + read(*layer, q, mask))
                written.append(layer)
            return q, written

        empty = jnp.zeros(cache_shape, dtype)
        cache = [(empty, empty) for _ in range(config.layers)]
        return jax.lax.fori_loop(0, STEPS, step, (q, cache))[0]

    return run


def _wait(run: Callable[[Array], Array], q: Array) -> float:
    """Runs the steps to their end, and returns how many they are."""
    jax.block_until_ready(run(q))
    return STEPS
