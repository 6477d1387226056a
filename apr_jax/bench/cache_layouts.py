"""Ways to keep the key/value cache of decoding, at the attention of one decode step: a write a
decode slot, then the products.

All hold the same M positions of W decode slots, in every layer of the shape; what differs is where
they stand in memory."""

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

SLOTS, POSITIONS, WINDOW, PAGE, STEPS = 16, 256, 1024, 16, 64

# (cache of one side, new [W, G, 1, K], place [W, 1]) -> cache; (keys, values, q [W, 1, H, K], mask)
# -> found [W, 1, H, K].
Write = Callable[[Array, Array, Array], Array]
Read = Callable[[Array, Array, Array, Array], Array]


def contest(shape: str) -> list[Contestant]:
    """Ours first."""
    config = SHAPES[shape]
    groups, size = config.kv_heads, config.head_size
    ours = (SLOTS, groups, POSITIONS, size)
    # The page of each part of each decode slot.
    table = jnp.arange(SLOTS * POSITIONS // PAGE).reshape(SLOTS, -1)
    slot = jnp.arange(SLOTS)

    def plain(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        return attend_cached(q, [(keys, values)], mask)

    def sliced(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        return plain(keys[:, :, :POSITIONS], values[:, :, :POSITIONS], q, mask)

    def in_half(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        return plain(keys, values, q.astype(jnp.bfloat16), mask).astype(q.dtype)

    def write_flat(cache: Array, new: Array, place: Array) -> Array:
        return cache.at[slot, place[:, 0]].set(new.reshape(SLOTS, -1))

    def read_flat(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        by_head = [x.reshape(SLOTS, -1, groups, size).swapaxes(1, 2) for x in (keys, values)]
        return attend_cached(q, [(by_head[0], by_head[1])], mask)

    def write_page(cache: Array, new: Array, place: Array) -> Array:
        return cache.at[table[slot, place[:, 0] // PAGE], :, place[:, 0] % PAGE].set(new[:, :, 0])

    def read_pages(keys: Array, values: Array, q: Array, mask: Array) -> Array:
        gathered = [x[table].swapaxes(1, 2).reshape(ours) for x in (keys, values)]
        return attend_cached(q, [(gathered[0], gathered[1])], mask)

    flat, paged = (SLOTS, POSITIONS, groups * size), (table.size, groups, PAGE, size)
    ways: list[tuple[str, tuple[int, ...], Any, Write, Read]] = [
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
    contestants, first = [], None
    for name, kept, dtype, write, read in ways:
        run = _steps(kept, dtype, write, read, config)
        found = run(q)
        first = found if first is None else first
        if not jnp.allclose(found, first, rtol=0.1 if dtype == jnp.bfloat16 else 1e-4, atol=1e-2):
            raise RuntimeError(f"bench cache: {name} finds something else")
        contestants.append(Contestant(name, functools.partial(_wait, run, q), "steps"))
    return contestants


def _steps(
    kept: tuple[int, ...], dtype: Any, write: Write, read: Read, config: ModelConfig
) -> Callable[[Array], Array]:
    """STEPS decode steps of attention alone: the last positions are written, what a query finds
    goes into the next.
    """
    mask = jnp.ones((SLOTS, 1, POSITIONS), bool)

    @jax.jit
    def run(q: Array) -> Array:
        def step(
            index: Array, carry: tuple[Array, list[tuple[Array, Array]]]
        ) -> tuple[Array, list[tuple[Array, Array]]]:
            q, cache = carry
            place = jnp.full((SLOTS, 1), POSITIONS - STEPS + index)
            new = q.swapaxes(1, 2)[:, : config.kv_heads].astype(dtype)
            following = []
            for keys, values in cache:
                side = write(keys, new, place), write(values, new, place)
                q = jnp.tanh(q + read(*side, q, mask))
                following.append(side)
            return q, following

        cache = [(jnp.zeros(kept, dtype), jnp.zeros(kept, dtype)) for _ in range(config.layers)]
        return jax.lax.fori_loop(0, STEPS, step, (q, cache))[0]

    return run


def _wait(run: Callable[[Array], Array], q: Array) -> float:
    jax.block_until_ready(run(q))
    return STEPS
