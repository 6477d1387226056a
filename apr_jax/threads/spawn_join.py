"""Spawn and join: the two moments at which threads read each other's tokens.

Both work on a few rows at a time (E of them, "no row" where there are fewer), as gathers over their
streams.

Shapes: E rows treated, C children a spawn, L stream length, M window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from apr_jax.threads import keys, protocol
from apr_jax.threads.forest import Status
from apr_jax.threads.limits import Limits
from apr_jax.threads.scheduler import NOT_SPAWNED, Threads, children_ended, first_rows, read, write


def needs_spawn(threads: Threads) -> Array:
    """[rows] True where a closed spawn block waits for its children to be made."""
    return (threads.status == Status.WAITING) & (threads.pending == NOT_SPAWNED)


def needs_join(threads: Threads) -> Array:
    """[rows] True where all children of a suspended thread have ended."""
    return (threads.status == Status.WAITING) & (threads.pending == 0)


def spawn_children(threads: Threads, limits: Limits, count: int) -> Threads:
    """Makes the children of up to `count` closed spawn blocks.

    Of the first C messages as many are started, in order, as there are free threads in the thread's
    own share and tokens in its budget (one must be left for everybody); too deep, none. All others
    are refused and counted by cause, and so is a spawn without a message. Refused messages get no
    answer. (A message always fits a child's window: it stood in its parent's.)"""
    row = first_rows(needs_spawn(threads), count)
    block = _find_messages(threads, row, limits)
    low, high, depth = (
        read(threads.index_low, row),
        read(threads.index_high, row),
        read(threads.depth, row),
    )
    budget, clock = read(threads.budget, row), read(threads.clock, row)
    started, refused = _admit(block.messages, depth >= limits.max_depth, high - low, budget, limits)
    number = jnp.arange(limits.children, dtype=jnp.int32)[None, :]
    starts = number < started[:, None]  # [E, C]

    made = read(threads.made, row) + started
    # What a thread that must make more children keeps back for them.
    kept = jnp.maximum(read(threads.forced, row) - made, 0)
    spare = jnp.maximum(high - low - started - kept, 0)
    per_slots = jnp.where(depth + 1 < limits.max_depth, spare // (started + 1), 0)
    per_budget = budget // (started + 1)
    spawn_round = read(threads.spawns, row) - 1
    threads = write(
        threads,
        row,
        pending=started,
        first_child=low,
        joining=started,
        made=made,
        index_low=low + started + started * per_slots,
        budget=budget - started * per_budget,
        refusals=read(threads.refusals, row) + refused,
    )

    child_row = jnp.where(starts, low[:, None] + number, threads.rows).reshape(-1)
    child_low = (low + started)[:, None] + number * per_slots[:, None]

    def each(value: Array) -> Array:
        return jnp.broadcast_to(value, starts.shape).reshape(-1)

    child_key = jax.vmap(jax.vmap(keys.child_key, (None, None, 0)), (0, 0, None))(
        read(threads.key, row), spawn_round, number[0]
    )
    prompt_size = each(block.size + 1)
    return write(
        threads,
        child_row,
        tokens=_child_prompts(threads, row, block, limits),
        given=prompt_size,
        length=prompt_size,
        used=prompt_size,
        peak=prompt_size,
        status=each(jnp.asarray(Status.READY, jnp.int32)),
        parent=each(row[:, None]),
        round=each(spawn_round[:, None]),
        depth=each(depth[:, None] + 1),
        child=each(number),
        start=each(clock[:, None]),
        clock=each(clock[:, None]),
        index_low=each(child_low),
        index_high=each(child_low + per_slots[:, None]),
        budget=each(per_budget[:, None]),
        key=child_key.reshape(-1, 2),
    )


def _admit(
    messages: Int[Array, " E"],
    deep: Array,
    room: Int[Array, " E"],
    budget: Int[Array, " E"],
    limits: Limits,
) -> tuple[Int[Array, " E"], Int[Array, "E R"]]:
    """How many of a block's messages start a child, and how many are refused for each cause, in the
    order of `Refusal`.

    Args:
      deep: whether the parent may have no children.
      room: free threads of the parent's share.
    """
    wanted = jnp.minimum(messages, limits.children)
    housed = jnp.minimum(wanted, room)
    started = jnp.where(deep, 0, jnp.minimum(housed, budget - 1))
    refused = [
        messages == 0,
        jnp.where(deep, 0, messages - wanted),
        jnp.where(deep, messages, 0),
        jnp.where(deep, 0, wanted - housed),
        jnp.where(deep, 0, housed - started),
    ]
    return started, jnp.stack(refused, axis=1)


class _Messages(NamedTuple):
    """Where the messages of E spawn blocks stand: how many [E]; of the first C, places in the
    stream and sizes [E, C].
    """

    messages: Int[Array, " E"]
    begin: Int[Array, "E C"]
    size: Int[Array, "E C"]


def _find_messages(threads: Threads, row: Int[Array, " E"], limits: Limits) -> _Messages:
    tokens, length = read(threads.tokens, row), read(threads.length, row)
    at = jnp.arange(limits.max_thread_tokens, dtype=jnp.int32)[None, :]
    end = length[:, None] - 1  # Of `</spawn>`, which closes the last message.
    is_message = (tokens == protocol.MSG) & (at > read(threads.spawn_at, row)[:, None]) & (at < end)
    nth = jnp.cumsum(is_message, axis=1, dtype=jnp.int32)
    # The place of the n-th message is the number of places before it.
    place = jnp.arange(1, limits.children + 2, dtype=jnp.int32)
    begin = jnp.sum(nth[:, None, :] < place[None, :, None], axis=2, dtype=jnp.int32)  # [E, C + 1]
    begin = jnp.minimum(begin, end)
    return _Messages(nth[:, -1], begin[:, :-1], begin[:, 1:] - begin[:, :-1] - 1)


def _child_prompts(
    threads: Threads, row: Int[Array, " E"], block: _Messages, limits: Limits
) -> Int[Array, "n L"]:
    """`<bos> message`, padded, for the C children of each row."""
    place = jnp.arange(limits.max_thread_tokens, dtype=jnp.int32)[None, None, :]
    text = threads.tokens.at[row[:, None, None], block.begin[:, :, None] + place].get(
        mode="fill", fill_value=0
    )
    text = jnp.where(
        place == 0, protocol.BOS, jnp.where(place <= block.size[:, :, None], text, protocol.PAD)
    )
    return text.reshape(-1, limits.max_thread_tokens)


def join_children(threads: Threads, limits: Limits, count: int) -> Threads:
    """Resumes up to `count` threads whose children have all ended.

    `<joined> (<msg> answer)* </joined>` goes into the stream as given tokens, at positions that
    begin where `<spawn>` stood. The clock goes to the longest child's, and unspent budget comes
    back. Without room for the block and one more token the thread ends OUT_OF_WINDOW, with its
    sequential budget spent OUT_OF_BUDGET; the block is not written then."""
    row = first_rows(needs_join(threads), count)
    number = jnp.arange(limits.children)[None, :]
    joined = number < read(threads.joining, row)[:, None]
    # [E, C]
    child = jnp.where(joined, read(threads.first_child, row)[:, None] + number, threads.rows)
    done = read(threads.status, child) == Status.DONE
    answer_at = read(threads.answer_at, child)
    size = jnp.where(done, read(threads.length, child) - 1 - answer_at, 0)
    ends = jnp.cumsum(jnp.where(joined, size + 1, 0), axis=1)
    # Place of each `<msg>` in the block; the block's place 0 is `<joined>`.
    message_at = 1 + ends - (size + 1)
    block = 2 + ends[:, -1]

    length, spawn_position = read(threads.length, row), read(threads.spawn_position, row)
    clock = jnp.maximum(
        read(threads.clock, row), jnp.max(jnp.where(joined, read(threads.clock, child), 0), axis=1)
    )
    budget = read(threads.budget, row) + jnp.sum(
        jnp.where(joined, read(threads.budget, child), 0), axis=1
    )
    no_room = (spawn_position + block > limits.window - 1) | (
        length + block > limits.max_thread_tokens - 1
    )
    spent = clock >= limits.max_sequential
    ended = no_room | spent
    status = jnp.where(
        no_room, Status.OUT_OF_WINDOW, jnp.where(spent, Status.OUT_OF_BUDGET, Status.READY)
    ).astype(jnp.int32)

    def block_token(place: Int[Array, "E n"]) -> Int[Array, "E n"]:
        """Tokens of the block at these places of it."""
        which = (
            jnp.sum(joined[:, None, :] & (message_at[:, None, :] <= place[:, :, None]), axis=2) - 1
        )
        chosen = jnp.maximum(which, 0)
        within = place - jnp.take_along_axis(message_at, chosen, axis=1) - 1
        source = jnp.clip(
            jnp.take_along_axis(answer_at, chosen, axis=1) + within, 0, limits.max_thread_tokens - 1
        )
        text = threads.tokens.at[jnp.take_along_axis(child, chosen, axis=1), source].get(
            mode="fill", fill_value=0
        )
        token = jnp.where(within < 0, protocol.MSG, text)
        token = jnp.where(place == block[:, None] - 1, protocol.END_JOINED, token)
        return jnp.where(place == 0, protocol.JOINED, token)

    at = jnp.arange(limits.max_thread_tokens)[None, :] - length[:, None]
    in_stream = (at >= 0) & (at < block[:, None]) & ~ended[:, None]
    used = jnp.where(ended, read(threads.used, row), spawn_position + block)
    parent = jnp.where((row < threads.rows) & ended, read(threads.parent, row), -1)
    threads = write(
        threads,
        row,
        tokens=jnp.where(in_stream, block_token(at), read(threads.tokens, row)),
        length=jnp.where(ended, length, length + block),
        used=used,
        peak=jnp.maximum(read(threads.peak, row), used),
        status=status,
        clock=clock,
        budget=budget,
    )
    return children_ended(threads, parent)
