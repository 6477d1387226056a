"""Prefill: gives idle decode slots to threads that are ready, and fills the slots' caches.

The caches are filled with the tokens that the threads see.

Shapes: W decode slots, E threads of one prefill batch, S tokens a step, M positions of the window,
V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from apr_jax.threads import protocol
from apr_jax.threads.forest import Status
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.positions import lay_out
from apr_jax.threads.prompts import Prompts
from apr_jax.threads.scheduler import DecodeSlots, Threads, first_rows, occupy, read, write

# (params, tokens [W, S], cache, positions [W, S], cache length) -> (logits [W, S, V], cache)
Decode = Callable[[Any, Array, Any, Array, int], tuple[Array, Any]]
# (decode slots, cache length) -> cache; in every leaf the first axis is the decode slot.
InitCache = Callable[[int, int], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """The state of a rollout: the table of threads, the decode slots and the slots' cache."""

    threads: Threads
    slots: DecodeSlots
    cache: Any


def contexts(threads: Threads, row: Int[Array, " E"], limits: Limits) -> Int[Array, "E M"]:
    """Returns the token at each position that these threads see.

    A thread that was suspended within a spawn block sees that block, which is not hidden yet.
    """
    tokens = read(threads.tokens, row)  # [E, L]
    length = read(threads.length, row)
    layout = lay_out(tokens, read(threads.prompt_length, row), length)
    inside = jnp.arange(limits.max_thread_tokens)[None, :] < length[:, None]
    newest = jnp.maximum(length - 1, 0)[:, None]
    open_block = jnp.take_along_axis(layout.hidden_block, newest, axis=1)  # [E, 1], 0 if none.
    is_seen = (layout.hidden_block == 0) | (layout.hidden_block == open_block)
    visible = inside & is_seen  # [E, L]

    # Tokens that are not visible go past the window, where they are dropped.
    blank = jnp.full((row.shape[0], limits.window), protocol.PAD, jnp.int32)
    number = jnp.arange(row.shape[0])[:, None]
    position = jnp.where(visible, layout.position, limits.window)
    return blank.at[number, position].set(tokens, mode="drop")


def fill_slots(
    state: RolloutState,
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    schedule: Schedule,
) -> RolloutState:
    """Fills idle decode slots with READY threads, up to `schedule.prefill_batch` at a time.

    The contexts of a batch go into a small fresh cache first, chunk by chunk, and from there into
    the decode slots' rows of the large one. The last context token of a thread is left for the next
    decode step, because its logits are needed there.
    """
    rows = state.threads.rows
    cache_lengths = schedule.cache_lengths(limits.window)

    def can_fill(state: RolloutState) -> Bool[Array, ""]:
        return jnp.any(state.threads.status == Status.READY) & jnp.any(state.slots.row == rows)

    def fill(state: RolloutState) -> RolloutState:
        # Pair idle decode slots with ready threads, as many as there are of both. [E]
        slot = first_rows(state.slots.row == rows, schedule.prefill_batch)
        row = first_rows(_ready_alike(state.threads, cache_lengths), schedule.prefill_batch)
        row = jnp.where(slot < schedule.slots, row, rows)
        slot = jnp.where(row < rows, slot, schedule.slots)

        context = contexts(state.threads, row, limits)
        last = read(state.threads.used, row) - 1  # The position that is left for the decode step.

        def read_into(cache_length: int, cache: Any) -> Any:
            fresh = _read_contexts(
                decode, init_cache, params, context, last, limits, schedule, cache_length
            )
            return _insert(cache, slot, fresh)

        # Exactly one of the cache lengths is the shortest that holds all contexts.
        cache = state.cache
        shorter = -1
        for cache_length in cache_lengths:
            fits = (jnp.max(last) > shorter) & (jnp.max(last) <= cache_length)
            shorter = cache_length
            # The name of the loop in profiles and in `apr plan`.
            with jax.named_scope(f"prefill_{cache_length}"):
                cache = when(fits, functools.partial(read_into, cache_length), cache)

        return RolloutState(
            threads=write(state.threads, row, status=jnp.full_like(row, Status.RUNNING)),
            slots=occupy(state.slots, slot, state.threads, row, prompts, limits),
            cache=cache,
        )

    with jax.named_scope("prefill_batch"):
        return jax.lax.while_loop(can_fill, fill, state)


def _ready_alike(threads: Threads, cache_lengths: tuple[int, ...]) -> Bool[Array, " rows"]:
    """Returns which READY threads have contexts of the same cache length as the first one's.

    Prefill reads all contexts of a batch to the end of the longest, so a short context beside a
    long one is mostly padding.
    """
    ready = threads.status == Status.READY
    needed = jnp.searchsorted(jnp.asarray(cache_lengths), threads.used - 1)
    return ready & (needed == needed[jnp.argmax(ready)])


def _read_contexts(
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    context: Int[Array, "E M"],
    last: Int[Array, " E"],
    limits: Limits,
    schedule: Schedule,
    cache_length: int,
) -> Any:
    """Makes a fresh cache that has read the first `last` tokens of each context.

    All of these are at positions below `cache_length`.
    """
    count = context.shape[0]

    def read_chunk(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        begin, cache = carry
        place = begin + jnp.arange(schedule.prefill_chunk)[None, :]  # [1, S]
        tokens = context.at[jnp.arange(count)[:, None], place].get(
            mode="fill", fill_value=protocol.PAD
        )
        # Positions at or beyond the window mark padding.
        positions = jnp.where(place < last[:, None], place, limits.window)  # [E, S]
        _, cache = decode(params, tokens, cache, positions, cache_length)
        return begin + schedule.prefill_chunk, cache

    def is_unread(carry: tuple[Array, Any]) -> Bool[Array, ""]:
        begin, _ = carry
        return jnp.any(begin < last)

    start = (jnp.zeros((), jnp.int32), init_cache(count, cache_length))
    _, cache = jax.lax.while_loop(is_unread, read_chunk, start)
    return cache


def _insert(cache: Any, slot: Int[Array, " E"], fresh: Any) -> Any:
    """Replaces the decode slots' rows of the cache by those of a fresh cache.

    A leaf of a fresh cache may be shorter; it then holds the first entries of each axis.
    """

    def insert_leaf(leaf: Array, fresh_leaf: Array) -> Array:
        if fresh_leaf.size == 0:
            return leaf
        corner = tuple(slice(0, size) for size in fresh_leaf.shape[1:])
        return leaf.at[(slot, *corner)].set(fresh_leaf, mode="drop")

    return jax.tree.map(insert_leaf, cache, fresh)


def when(condition: Bool[Array, ""], change: Callable[[Any], Any], value: Any) -> Any:
    """Returns `change(value)` if the condition holds, else `value`.

    It is a loop of at most one turn, because XLA works in place in loops and copies around a cond.
    """
    _, value = jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), change(carry[1])),
        (condition, value),
    )
    return value
