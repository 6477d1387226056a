"""tree_rollout: whole thread trees on the device, in one compiled loop.

The life of a tree:
1. Its root is READY with the prompt as context. READY threads wait for a decode slot.
2. `prefill.admit` gives idle decode slots to READY threads and reads all but the last context token
   into their caches, several threads and several tokens at a time. A resumed parent is admitted the
   same way: its cache is rebuilt from what it sees.
3. A decode step feeds every decode slot its last token, draws the next one and follows the protocol
   (`step.take_step`).
4. When enough decode slots have stopped, the stretch of steps ends: `family.spawn_children` turns
   closed spawn blocks into READY children, `family.join_children` makes parents READY whose last
   child has ended, and 2. fills the decode slots again.
5. When no thread is left, the table of threads becomes a ThreadForest.

The decode loop exists once for each bucket of context length, so that a step reads only as much of
the cache as the longest running thread needs. Decode slots, admission, chunks and buckets change
only the order of the work: each thread's tokens depend on its own context, key and limits alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from apr_jax.threads import spawn_join
from apr_jax.threads.decode_step import runs, take_step
from apr_jax.threads.forest import Status, ThreadForest
from apr_jax.threads.keys import KEYS
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.prefill import Decode, InitCache, Seats, admit, when
from apr_jax.threads.prompts import Prompts
from apr_jax.threads.scheduler import (
    DecodeSlots,
    Threads,
    idle_slots,
    initial_threads,
    to_forest,
    unseat,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What a rollout cost. Depends on the schedule, unlike the forest.

    Attributes:
      steps: decode steps.
      live: decode slots that decoded a token, summed over the steps; live / (steps x W) is the
        decode slot occupancy.
    """

    steps: jax.Array
    live: jax.Array


def tree_rollout(
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    prompts: Prompts,
    key: jax.Array,
    limits: Limits,
    schedule: Schedule,
) -> tuple[ThreadForest, Work]:
    """Decodes B thread trees to their ends. Pure; jit it with decode, init_cache, limits and
    schedule fixed.

    Args:
      decode: the model, `decode(params, tokens [W, S], cache, positions [W, S], bound) -> (logits
        [W, S, V], cache)`. Padding has positions at or beyond the window: it must store nothing for
        them. All other positions are below `bound`, a Python int: a model may leave the rest of its
        cache unread.
      init_cache: `init_cache(decode slots, bound)` makes an empty cache for positions below
        `bound`. The first axis of every leaf is the decode slot; leaves for a smaller bound are
        corners of those for the window.
      prompts: of B roots, at most window - 1 tokens each.
      key: a typed PRNG key, threefry; a tree's tokens follow from (key, prompts.tree) and from
        nothing else of the batch.

    Raises:
      ValueError: a prompt cannot fit the window with one sampled token, or the key is of another
        kind.
    """
    width = prompts.tokens.shape[1]
    if width > limits.window - 1:
        raise ValueError(
            f"prompts of up to {width} tokens must be at most limits.window - 1 ="
            f" {limits.window - 1} tokens"
        )
    check_key(key)
    prompts = jax.tree.map(jnp.asarray, prompts)
    threads = initial_threads(prompts, key, limits)
    seats = Seats(
        threads, idle_slots(schedule.slots, threads.rows), init_cache(schedule.slots, limits.window)
    )
    zero = jnp.zeros((), jnp.int32)

    def stretch(carry: tuple[Seats, Work]) -> tuple[Seats, Work]:
        seats, work = carry
        seats = admit(seats, decode, init_cache, params, prompts, limits, schedule)
        enough, live = _enough(seats, schedule), _running(seats.slots)
        advance = functools.partial(
            _advance, decode=decode, params=params, limits=limits, schedule=schedule, enough=enough
        )
        most = 0
        for count in schedule.small_batch_sizes:
            fits = (live > most) & (live <= count)
            seats, work = when(fits, functools.partial(_on_few, count, advance), (seats, work))
            most = count
        # After a loop for few no decode slot is left to take a turn here.
        seats, work = advance((seats, work))
        threads, slots = unseat(seats.threads, seats.slots)
        return (
            dataclasses.replace(seats, threads=_settle(threads, limits, schedule), slots=slots),
            work,
        )

    def unfinished(carry: tuple[Seats, Work]) -> Array:
        status = carry[0].threads.status
        return jnp.any((status != Status.FREE) & (status < Status.DONE))

    seats, work = jax.lax.while_loop(unfinished, stretch, (seats, Work(zero, zero)))
    return to_forest(seats.threads, limits), work


def check_key(key: jax.Array) -> None:
    """Raises ValueError unless it is a key of the kind that trees are drawn with."""
    kind = (
        jax.random.key_impl(key)
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        else f"of type {key.dtype}"
    )
    if kind != KEYS:
        raise ValueError(f"key: is {kind}; make it with jax.random.key(seed, impl={KEYS!r})")


def _enough(seats: Seats, schedule: Schedule) -> Array:
    """The number of running decode slots at which a stretch ends: when an admission's share of them
    has stopped.
    """
    live = _running(seats.slots)
    return live - jnp.maximum(1, live * schedule.prefill_batch // schedule.slots)


def _running(slots: DecodeSlots) -> Array:
    return jnp.sum(runs(slots), dtype=jnp.int32)


def _on_few(
    count: int,
    advance: Callable[[tuple[Seats, Work]], tuple[Seats, Work]],
    carry: tuple[Seats, Work],
) -> tuple[Seats, Work]:
    """A stretch of `count` decode slots, among them all that run: moved to a cache of their own,
    and back after it.
    """
    seats, work = carry
    taken = jnp.argsort(~runs(seats.slots), stable=True)[:count]
    of_all = seats.slots, seats.cache
    slots, cache = jax.tree.map(lambda leaf: leaf[taken], of_all)
    few, work = advance((Seats(seats.threads, slots, cache), work))
    slots, cache = jax.tree.map(
        lambda leaf, new: leaf.at[taken].set(new), of_all, (few.slots, few.cache)
    )
    return Seats(few.threads, slots, cache), work


def _advance(
    carry: tuple[Seats, Work],
    decode: Decode,
    params: Any,
    limits: Limits,
    schedule: Schedule,
    enough: Array,
) -> tuple[Seats, Work]:
    """Decodes until enough decode slots have stopped, with the loop for the length that is
    reached.
    """
    for bound in schedule.bounds(limits.window):
        # The name of the loop in profiles and in `apr plan`.
        with jax.named_scope(f"decode_{bound}"):
            carry = jax.lax.while_loop(
                lambda carry, bound=bound: _goes_on(carry[0], enough, bound),
                lambda carry, bound=bound: _decode(carry, decode, params, limits, bound),
                carry,
            )
    return carry


def _goes_on(seats: Seats, enough: Array, bound: int) -> Array:
    running = runs(seats.slots)
    longest = jnp.max(jnp.where(running, seats.slots.used, 0))
    return (_running(seats.slots) > enough) & (longest <= bound)


def _decode(
    carry: tuple[Seats, Work], decode: Decode, params: Any, limits: Limits, bound: int
) -> tuple[Seats, Work]:
    """One token on every running decode slot."""
    seats, work = carry
    slots = seats.slots
    running = runs(slots)
    position = jnp.where(running, slots.used - 1, limits.window)
    logits, cache = decode(params, slots.last[:, None], seats.cache, position[:, None], bound)
    threads, slots = take_step(seats.threads, slots, logits[:, 0].astype(jnp.float32), limits)
    return Seats(threads, slots, cache), Work(work.steps + 1, work.live + _running(seats.slots))


def _settle(threads: Threads, limits: Limits, schedule: Schedule) -> Threads:
    """Makes all children and resumes all parents that are due."""

    def due(threads: Threads) -> Array:
        return jnp.any(spawn_join.needs_spawn(threads) | spawn_join.needs_join(threads))

    def body(threads: Threads) -> Threads:
        threads = spawn_join.spawn_children(threads, limits, schedule.prefill_batch)
        return spawn_join.join_children(threads, limits, schedule.prefill_batch)

    return jax.lax.while_loop(due, body, threads)
