"""Gives idle decode slots to threads that are ready, and reads what those see into the decode
slots' caches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from apr_jax.threads import protocol
from apr_jax.threads.forest import Status
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.positions import lay_out
from apr_jax.threads.prompts import Prompts
from apr_jax.threads.scheduler import DecodeSlots, Threads, first_rows, read, seat, write

# (params, tokens [W, S], cache, positions [W, S], bound) -> (logits [W, S, V], cache)
Decode = Callable[[Any, Array, Any, Array, int], tuple[Array, Any]]
# (decode slots, bound) -> cache; in every leaf the first axis is the decode slot.
InitCache = Callable[[int, int], Any]


def contexts(threads: Threads, row: Int[Array, " E"], limits: Limits) -> Int[Array, "E M"]:
    """The token at each position that these threads see; none of them is within a spawn block."""
    tokens, length = read(threads.tokens, row), read(threads.length, row)
    layout = lay_out(tokens, read(threads.given, row), length)
    seen = (jnp.arange(limits.max_thread_tokens)[None, :] < length[:, None]) & (
        layout.hidden_block == 0
    )
    blank = jnp.full((row.shape[0], limits.window), protocol.PAD, jnp.int32)
    number = jnp.arange(row.shape[0])[:, None]
    return blank.at[number, jnp.where(seen, layout.position, limits.window)].set(
        tokens, mode="drop"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seats:
    """What admission changes: the table, the decode slots and their cache."""

    threads: Threads
    slots: DecodeSlots
    cache: Any


def admit(
    seats: Seats,
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    schedule: Schedule,
) -> Seats:
    """Fills idle decode slots with READY threads, `schedule.prefill_batch` at a time.

    Their contexts go into a small fresh cache first, chunk by chunk, and from there into the decode
    slots' rows of the large one. The last context token is left for the next decode step, which
    needs its logits."""
    rows = seats.threads.rows
    bounds = schedule.bounds(limits.window)

    def possible(seats: Seats) -> Array:
        return jnp.any(seats.threads.status == Status.READY) & jnp.any(seats.slots.row == rows)

    def body(seats: Seats) -> Seats:
        slot = first_rows(seats.slots.row == rows, schedule.prefill_batch)
        row = first_rows(_alike(seats.threads, bounds), schedule.prefill_batch)
        row = jnp.where(slot < schedule.slots, row, rows)
        slot = jnp.where(row < rows, slot, schedule.slots)
        context, last = contexts(seats.threads, row, limits), read(seats.threads.used, row) - 1

        def fill(bound: int, cache: Any) -> Any:
            fresh = _read_contexts(
                decode, init_cache, params, context, last, limits, schedule, bound
            )
            return _insert(cache, slot, fresh)

        cache, below = seats.cache, -1
        for bound in bounds:
            fits = (jnp.max(last) > below) & (jnp.max(last) <= bound)
            below = bound
            with jax.named_scope(f"prefill_{bound}"):
                cache = when(fits, functools.partial(fill, bound), cache)
        return Seats(
            threads=write(seats.threads, row, status=jnp.full_like(row, Status.RUNNING)),
            slots=seat(seats.slots, slot, seats.threads, row, prompts, limits),
            cache=cache,
        )

    with jax.named_scope("prefill_batch"):
        return jax.lax.while_loop(possible, body, seats)


def _alike(threads: Threads, bounds: tuple[int, ...]) -> Array:
    """[rows] True for the READY threads whose contexts fall under the same bound as the first
    one's.

    Prefill reads all contexts of a batch to the end of the longest, so a short one with a long one
    is mostly padding."""
    ready = threads.status == Status.READY
    under = jnp.searchsorted(jnp.asarray(bounds), threads.used - 1)
    return ready & (under == under[jnp.argmax(ready)])


def _read_contexts(
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    context: Int[Array, "E M"],
    last: Int[Array, " E"],
    limits: Limits,
    schedule: Schedule,
    bound: int,
) -> Any:
    """A fresh cache that has read the first `last` tokens of each context; all of them are below
    `bound`.
    """
    count = context.shape[0]

    def read_chunk(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        begin, cache = carry
        at = begin + jnp.arange(schedule.prefill_chunk)[None, :]
        tokens = context.at[jnp.arange(count)[:, None], at].get(
            mode="fill", fill_value=protocol.PAD
        )
        _, cache = decode(
            params, tokens, cache, jnp.where(at < last[:, None], at, limits.window), bound
        )
        return begin + schedule.prefill_chunk, cache

    start = (jnp.zeros((), jnp.int32), init_cache(count, bound))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0] < last), read_chunk, start)[1]


def _insert(cache: Any, slot: Int[Array, " E"], fresh: Any) -> Any:
    """The decode slots' rows become those of the fresh cache, whose leaves are corners of the
    cache's.
    """

    def put(leaf: Array, new: Array) -> Array:
        corner = tuple(slice(0, size) for size in new.shape[1:])
        return leaf.at[(slot, *corner)].set(new, mode="drop") if new.size else leaf

    return jax.tree.map(put, cache, fresh)


def when(condition: Array, change: Callable[[Any], Any], value: Any) -> Any:
    """change(value) if the condition holds. A loop of at most one turn: XLA runs loops in place,
    and copies around a cond.
    """
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), change(carry[1])),
        (condition, value),
    )[1]
