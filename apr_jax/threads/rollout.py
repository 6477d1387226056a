"""tree_rollout: whole thread trees on the device, in one compiled loop.

The life of a tree:
1. Its root is READY with the prompt as context. READY threads wait for a lane.
2. `_admit` gives idle lanes to READY threads and reads all but the last context token into their caches, several threads and
   several tokens at a time. A resumed parent is admitted the same way: its cache is rebuilt from what it still sees.
3. `_decode` feeds every lane its last token, draws the next one, appends it to the thread's stream and follows the protocol.
   A thread that ends or suspends leaves its lane at once.
4. `family.spawn_children` turns a closed spawn block into READY children; `family.join_children` makes the parent READY again
   when the last child has ended.
5. When no thread is left, the table of threads becomes a ThreadForest.

Steps 2 and 4 run between stretches of decoding, when enough lanes are idle for them to pay. Lanes, admission and chunks change
only the order of the work: each thread's tokens depend on its own context, key and limits alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from apr_jax.threads import family, protocol
from apr_jax.threads.forest import NO_PARENT, Status, ThreadForest
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.sampling import draw
from apr_jax.threads.state import (
    NOT_SPAWNED,
    Prompts,
    Threads,
    children_ended,
    first_rows,
    initial_threads,
    read,
    to_forest,
    write,
)

# (params, tokens [W, S], cache, positions [W, S]) -> (logits [W, S, V], cache)
Decode = Callable[[Any, Array, Any, Array], tuple[Array, Any]]
# (lanes, window) -> cache; in every leaf the first axis is the lane.
InitCache = Callable[[int, int], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """Carry of the loops: `lane` [W] is the row that each lane decodes, or "no row"; `steps` and `live` count the work."""

    threads: Threads
    lane: jax.Array
    cache: Any
    steps: jax.Array
    live: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What a rollout cost. Depends on the schedule, unlike the forest.

    Attributes:
      steps: decode steps.
      live: lanes that decoded a token, summed over the steps; live / (steps x W) is the lane occupancy.
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
    """Decodes B thread trees to their ends. Pure; jit it with decode, init_cache, limits and schedule fixed.

    Args:
      decode: the model. Padding has positions at or beyond the window: it must store nothing for them.
      init_cache: makes an empty cache.
      prompts: of B roots, at most window - 1 tokens each.
      key: a typed PRNG key; a tree's tokens follow from (key, prompts.tree) and from nothing else of the batch.

    Raises:
      ValueError: a prompt cannot fit the window with one sampled token.
    """
    width = prompts.tokens.shape[1]
    if width > limits.window - 1:
        raise ValueError(
            f"prompts of up to {width} tokens must be at most limits.window - 1 = {limits.window - 1} tokens"
        )
    threads = initial_threads(prompts, key, limits)
    idle = jnp.full(schedule.lanes, threads.rows, jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    loop = _Loop(threads, idle, init_cache(schedule.lanes, limits.window), zero, zero)

    def stretch(loop: _Loop) -> _Loop:
        loop = _settle(loop, limits, schedule)
        loop = _admit(loop, decode, init_cache, params, limits, schedule)
        return jax.lax.while_loop(
            lambda loop: _keep_decoding(loop, schedule), lambda loop: _decode(loop, decode, params, limits), loop
        )

    loop = jax.lax.while_loop(lambda loop: jnp.any(_alive(loop.threads)), stretch, loop)
    return to_forest(loop.threads, limits), Work(loop.steps, loop.live)


def _alive(threads: Threads) -> Array:
    return (threads.status != Status.FREE) & (threads.status < Status.DONE)


def _keep_decoding(loop: _Loop, schedule: Schedule) -> Array:
    """Until enough lanes are idle and something waits for them, or no lane is left."""
    idle = jnp.sum(loop.lane == loop.threads.rows)
    status = loop.threads.status
    waits = jnp.any((status == Status.READY) | family.needs_spawn(loop.threads) | family.needs_join(loop.threads))
    return (idle < schedule.lanes) & ~((idle >= schedule.admit) & waits)


def _settle(loop: _Loop, limits: Limits, schedule: Schedule) -> _Loop:
    """Makes all children and resumes all parents that are due."""

    def due(threads: Threads) -> Array:
        return jnp.any(family.needs_spawn(threads) | family.needs_join(threads))

    def body(threads: Threads) -> Threads:
        threads = family.spawn_children(threads, limits, schedule.admit)
        return family.join_children(threads, limits, schedule.admit)

    return dataclasses.replace(loop, threads=jax.lax.while_loop(due, body, loop.threads))


def _admit(
    loop: _Loop, decode: Decode, init_cache: InitCache, params: Any, limits: Limits, schedule: Schedule
) -> _Loop:
    """Fills idle lanes with READY threads, `admit` at a time.

    Their contexts go into a small fresh cache first, chunk by chunk, and from there into the lanes' rows of the large one.
    The last context token is left for the next decode step, which needs its logits.
    """
    rows = loop.threads.rows

    def possible(loop: _Loop) -> Array:
        return jnp.any(loop.threads.status == Status.READY) & jnp.any(loop.lane == rows)

    def body(loop: _Loop) -> _Loop:
        lane = first_rows(loop.lane == rows, schedule.admit)
        row = first_rows(loop.threads.status == Status.READY, schedule.admit)
        row = jnp.where(lane < schedule.lanes, row, rows)
        lane = jnp.where(row < rows, lane, schedule.lanes)
        context, last = read(loop.threads.context, row), read(loop.threads.used, row) - 1

        def read_chunk(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            begin, cache = carry
            at = begin + jnp.arange(schedule.chunk)[None, :]
            tokens = context.at[jnp.arange(schedule.admit)[:, None], at].get(mode="fill", fill_value=protocol.PAD)
            _, cache = decode(params, tokens, cache, jnp.where(at < last[:, None], at, limits.window))
            return begin + schedule.chunk, cache

        _, fresh = jax.lax.while_loop(
            lambda carry: jnp.any(carry[0] < last),
            read_chunk,
            (jnp.zeros((), jnp.int32), init_cache(schedule.admit, limits.window)),
        )
        return dataclasses.replace(
            loop,
            threads=write(loop.threads, row, status=jnp.full_like(row, Status.RUNNING)),
            lane=loop.lane.at[lane].set(row, mode="drop"),
            cache=jax.tree.map(lambda lanes, new: lanes.at[lane].set(new, mode="drop"), loop.cache, fresh),
        )

    return jax.lax.while_loop(possible, body, loop)


def _decode(loop: _Loop, decode: Decode, params: Any, limits: Limits) -> _Loop:
    """One token on every busy lane."""
    threads, row = loop.threads, loop.lane
    busy = row < threads.rows
    used, length = read(threads.used, row), read(threads.length, row)
    last = jnp.where(busy, used - 1, limits.window)
    fed = threads.context.at[row, last].get(mode="fill", fill_value=protocol.PAD)
    logits, cache = decode(params, fed[:, None], loop.cache, last[:, None])
    token, logprob = draw(
        logits[:, 0].astype(jnp.float32), read(threads.key, row), length, read(threads.temperature, row)
    )

    before = read(threads.phase, row)
    phase, closes, status = protocol.advance(before, token)
    opens, answers = phase == protocol.OPENED, (phase == protocol.ANSWER) & (token == protocol.JOIN)
    spawns = read(threads.spawns, row) + opens
    in_block = opens | (before == protocol.OPENED) | (before == protocol.MESSAGE)
    clock, budget = read(threads.clock, row) + 1, read(threads.budget, row) - 1

    running = status == Status.RUNNING
    full = running & ~closes & ((used + 1 >= limits.window) | (length + 1 >= limits.stream))
    spent = running & ~full & ((clock >= limits.max_sequential) | (budget <= 0))
    status = jnp.where(full, Status.OUT_OF_WINDOW, jnp.where(spent, Status.OUT_OF_BUDGET, status))
    suspended = closes & ~spent
    status = jnp.where(suspended, Status.WAITING, status)

    at = (row, length)
    threads = dataclasses.replace(
        threads,
        tokens=threads.tokens.at[at].set(token, mode="drop"),
        position=threads.position.at[at].set(used, mode="drop"),
        island=threads.island.at[at].set(jnp.where(in_block, spawns, 0), mode="drop"),
        sampled=threads.sampled.at[at].set(True, mode="drop"),
        logprob=threads.logprob.at[at].set(logprob, mode="drop"),
        context=threads.context.at[row, used].set(token, mode="drop"),
    )
    threads = write(
        threads,
        row,
        length=length + 1,
        used=used + 1,
        peak=jnp.maximum(read(threads.peak, row), used + 1),
        clock=clock,
        budget=budget,
        phase=phase,
        spawns=spawns,
        spawn_at=jnp.where(opens, length, read(threads.spawn_at, row)),
        spawn_position=jnp.where(opens, used, read(threads.spawn_position, row)),
        answer_at=jnp.where(answers, length + 1, read(threads.answer_at, row)),
        pending=jnp.where(suspended, NOT_SPAWNED, read(threads.pending, row)),
        status=status,
    )
    ended = busy & (status >= Status.DONE)
    threads = children_ended(threads, jnp.where(ended, read(threads.parent, row), NO_PARENT))
    return _Loop(
        threads=threads,
        lane=jnp.where(busy & (status == Status.RUNNING), row, threads.rows),
        cache=cache,
        steps=loop.steps + 1,
        live=loop.live + jnp.sum(busy, dtype=jnp.int32),
    )
