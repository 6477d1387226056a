"""`tree_rollout`: whole thread trees, decoded on the device in one compiled loop.

The life of a tree:
1. Its root is READY, with the prompt as context. READY threads wait for a decode slot.
2. `prefill.fill_slots` gives idle decode slots to READY threads and reads all but the last token of
   their contexts into the caches, several threads and several tokens at a time. It does the same
   for a resumed parent, whose cache is rebuilt from what the parent sees.
3. A decode step feeds every decode slot its last token, draws the next one and follows the protocol
   (`decode_step.take_step`).
4. When enough decode slots have stopped, this stretch of decode steps ends.
   `spawn_join.spawn_children` makes READY children of closed spawn blocks,
   `spawn_join.join_children` makes parents READY whose last child has ended, and step 2 fills the
   decode slots again.
5. When no thread is left, the table of threads becomes a `ThreadForest`. `carry_over` stops earlier
   and keeps the table of unfinished trees for its next call.

The decode loop is compiled once for each cache length, so that a step reads only as much of the
cache as the longest running thread needs. Decode slots, prefill batches, chunks and cache lengths
change only the order of the work: each thread's tokens depend on its own context, key and limits
alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from apr_jax.threads import spawn_join
from apr_jax.threads.decode_step import runs, take_step
from apr_jax.threads.forest import ThreadForest, Work
from apr_jax.threads.keys import KEYS
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.prefill import Decode, InitCache, RolloutState, fill_slots, when
from apr_jax.threads.prompts import Prompts
from apr_jax.threads.scheduler import (
    DecodeSlots,
    Threads,
    finished_trees,
    idle_slots,
    initial_threads,
    release,
    to_forest,
)

# What the loops of the rollout carry.
_Carry = tuple[RolloutState, Work]


def tree_rollout(
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    prompts: Prompts,
    key: jax.Array,
    limits: Limits,
    schedule: Schedule,
) -> tuple[ThreadForest, Work]:
    """Decodes B thread trees to their ends.

    The function is pure. Jit it with `decode`, `init_cache`, `limits` and `schedule` fixed.

    Args:
      decode: the model, `decode(params, tokens [W, S], cache, positions [W, S], cache_length) ->
        (logits [W, S, V], cache)`. Padding has positions at or beyond the window, and nothing may
        be stored for it. All other positions are below `cache_length`, a Python int: the model may
        leave the rest of its cache unread.
      init_cache: `init_cache(slots, cache_length)` makes an empty cache for positions below
        `cache_length`. The first axis of every leaf is the decode slot. On every other axis, a leaf
        of a shorter cache holds the first entries of the same leaf for the whole window.
      params: the model's parameters, passed on to `decode`.
      prompts: the prompts of B roots, of at most window - 1 tokens each.
      key: a typed PRNG key, threefry. A tree's tokens follow from (key, prompts.tree) and from
        nothing else of the batch.
      limits: what a tree may do.
      schedule: how the device works through the trees; no part of the result.

    Returns:
      the forest of B trees, and what it cost.

    Raises:
      ValueError: a prompt and one sampled token cannot fit the window, or the key is of another
        kind.
    """
    check_start(prompts, key, limits)
    prompts = jax.tree.map(jnp.asarray, prompts)
    threads = initial_threads(prompts, key, limits)

    def all_finished(threads: Threads) -> Bool[Array, ""]:
        return jnp.all(finished_trees(threads, limits))

    state, work = grow(decode, init_cache, params, threads, prompts, limits, schedule, all_finished)
    return to_forest(state.threads, limits), work


def grow(
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    threads: Threads,
    prompts: Prompts,
    limits: Limits,
    schedule: Schedule,
    is_enough: Callable[[Threads], Bool[Array, ""]],
) -> tuple[RolloutState, Work]:
    """Decodes the trees of a table of threads until `is_enough(threads)`.

    `is_enough` is called whenever some threads have left their decode slots. Of a thread that still
    runs, its row of the table is as it was when the thread took its decode slot, except for the
    recorded tokens.

    Args:
      decode: the model, see `tree_rollout`.
      init_cache: makes the model's empty cache, see `tree_rollout`.
      params: the model's parameters.
      threads: the table, in which no thread is RUNNING.
      prompts: the prompts of its trees, of which the settings of sampling are read.
      limits: what a tree may do.
      schedule: how the device works through the trees.
      is_enough: whether to stop; it must hold once all trees are finished.

    Returns:
      the table and the decode slots, of which some may run; and what it cost.
    """
    slots = idle_slots(schedule.slots, threads.rows)
    cache = init_cache(schedule.slots, limits.window)
    zero = jnp.zeros((), jnp.int32)

    def stretch(carry: _Carry) -> _Carry:
        """Fills decode slots, decodes until enough of them have stopped, spawns and joins."""
        state, work = carry
        state = fill_slots(state, decode, init_cache, params, prompts, limits, schedule)
        state, work = _decode_stretch((state, work), decode, params, limits, schedule)
        threads, slots = release(state.threads, state.slots)
        threads = _spawn_and_join(threads, limits, schedule)
        return RolloutState(threads, slots, state.cache), work

    def goes_on(carry: _Carry) -> Bool[Array, ""]:
        return ~is_enough(carry[0].threads)

    start = (RolloutState(threads, slots, cache), Work(zero, zero))
    state, work = jax.lax.while_loop(goes_on, stretch, start)
    return state, work


def check_start(prompts: Prompts, key: jax.Array, limits: Limits) -> None:
    """Raises ValueError unless trees can begin with these prompts and this key."""
    width = prompts.tokens.shape[1]
    if width > limits.window - 1:
        raise ValueError(
            f"prompts of up to {width} tokens must be at most limits.window - 1 ="
            f" {limits.window - 1} tokens"
        )
    check_key(key)


def check_key(key: jax.Array) -> None:
    """Raises ValueError unless the key is of the kind that trees are drawn with."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        kind = str(jax.random.key_impl(key))
    else:
        kind = f"of type {key.dtype}"
    if kind != KEYS:
        raise ValueError(f"key: is {kind}; make it with jax.random.key(seed, impl={KEYS!r})")


def _decode_stretch(
    carry: _Carry, decode: Decode, params: Any, limits: Limits, schedule: Schedule
) -> _Carry:
    """Decodes until the share `prefill_batch / slots` of the running decode slots has stopped.

    Where few decode slots run, they are decoded as a small batch.
    """
    running = _count_running(carry[0].slots)
    stop_at = running - jnp.maximum(1, running * schedule.prefill_batch // schedule.slots)

    def decode_all(carry: _Carry) -> _Carry:
        return _decode_until(carry, decode, params, limits, schedule, stop_at)

    smaller = 0
    for size in schedule.small_batch_sizes:
        fits = (running > smaller) & (running <= size)
        carry = when(fits, functools.partial(_decode_small_batch, size, decode_all), carry)
        smaller = size
    # After a small batch enough decode slots have stopped, and this does nothing.
    return decode_all(carry)


def _count_running(slots: DecodeSlots) -> Int[Array, ""]:
    return jnp.sum(runs(slots), dtype=jnp.int32)


def _decode_small_batch(size: int, decode_all: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """Decodes a stretch on `size` decode slots, all running ones among them.

    They are moved to a small cache of their own and moved back afterwards.
    """
    state, work = carry
    chosen = jnp.argsort(~runs(state.slots), stable=True)[:size]  # Running decode slots first.
    whole = state.slots, state.cache
    slots, cache = jax.tree.map(lambda leaf: leaf[chosen], whole)

    small, work = decode_all((RolloutState(state.threads, slots, cache), work))

    slots, cache = jax.tree.map(
        lambda leaf, new: leaf.at[chosen].set(new), whole, (small.slots, small.cache)
    )
    return RolloutState(small.threads, slots, cache), work


def _decode_until(
    carry: _Carry,
    decode: Decode,
    params: Any,
    limits: Limits,
    schedule: Schedule,
    stop_at: Int[Array, ""],
) -> _Carry:
    """Decodes until only `stop_at` decode slots run.

    The loops for longer and longer caches follow each other, as the longest thread grows.
    """
    for cache_length in schedule.cache_lengths(limits.window):

        def goes_on(carry: _Carry, cache_length: int = cache_length) -> Bool[Array, ""]:
            slots = carry[0].slots
            longest = jnp.max(jnp.where(runs(slots), slots.used, 0))
            return (_count_running(slots) > stop_at) & (longest <= cache_length)

        def step(carry: _Carry, cache_length: int = cache_length) -> _Carry:
            return _decode_one_token(carry, decode, params, limits, cache_length)

        # The name of the loop in profiles and in `apr plan`.
        with jax.named_scope(f"decode_{cache_length}"):
            carry = jax.lax.while_loop(goes_on, step, carry)
    return carry


def _decode_one_token(
    carry: _Carry, decode: Decode, params: Any, limits: Limits, cache_length: int
) -> _Carry:
    """Decodes one token on every running decode slot."""
    state, work = carry
    slots = state.slots
    running = runs(slots)  # [W]
    # Decode slots that do not run are padding, which positions beyond the window mark.
    position = jnp.where(running, slots.used - 1, limits.window)

    logits, cache = decode(
        params, slots.last[:, None], state.cache, position[:, None], cache_length
    )  # [W, 1, V]
    threads, slots = take_step(state.threads, slots, logits[:, 0].astype(jnp.float32), limits)

    work = Work(work.steps + 1, work.live + _count_running(state.slots))
    return RolloutState(threads, slots, cache), work


def _spawn_and_join(threads: Threads, limits: Limits, schedule: Schedule) -> Threads:
    """Makes all children and resumes all parents that are due, some at a time."""

    def is_due(threads: Threads) -> Bool[Array, ""]:
        return jnp.any(spawn_join.needs_spawn(threads) | spawn_join.needs_join(threads))

    def spawn_and_join(threads: Threads) -> Threads:
        threads = spawn_join.spawn_children(threads, limits, schedule.prefill_batch)
        return spawn_join.join_children(threads, limits, schedule.prefill_batch)

    return jax.lax.while_loop(is_due, spawn_and_join, threads)
