"""Spawn and join: the two moments at which threads read each other's tokens.

Both treat up to E threads at a time, with "no row" where fewer are due, as gathers over the token
sequences of the threads.

Shapes: E threads treated, C children a spawn, L tokens a thread.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from apr_jax.threads import keys, protocol
from apr_jax.threads.forest import NO_PARENT, Status
from apr_jax.threads.limits import Limits
from apr_jax.threads.scheduler import (
    NOT_SPAWNED,
    Threads,
    count_ended_children,
    first_rows,
    read,
    write,
)


def needs_spawn(threads: Threads) -> Bool[Array, " rows"]:
    """Returns where a closed spawn block waits for its children to be made."""
    return (threads.status == Status.WAITING) & (threads.pending == NOT_SPAWNED)


def needs_join(threads: Threads) -> Bool[Array, " rows"]:
    """Returns where all children of a suspended thread have ended."""
    return (threads.status == Status.WAITING) & (threads.pending == 0)


def spawn_children(threads: Threads, limits: Limits, count: int) -> Threads:
    """Makes the children of up to `count` closed spawn blocks.

    The first messages of a block start children, in order. There are at most C of them, as many as
    the thread has free rows in its own share, and one fewer than it has tokens in its budget, so
    that one is left for the parent; a thread that is too deep starts none. All other messages are
    refused and counted by cause, and so is a spawn without a message. Refused messages get no
    answer. A message always fits its child's window, because it stood in its parent's.
    """
    row = first_rows(needs_spawn(threads), count)  # [E]
    parents = _read_parents(threads, row)
    block = _find_messages(threads, row, limits)

    started, refused = _count_started(block.messages, parents, limits)
    shares = _divide(parents, started, limits)

    threads = _update_parents(threads, parents, started, refused, shares)
    return _place_children(threads, parents, block, started, shares, limits)


class _Parents(NamedTuple):
    """E threads as they are before their children are made; see `Threads`."""

    row: Int[Array, " E"]
    index_low: Int[Array, " E"]
    index_high: Int[Array, " E"]
    depth: Int[Array, " E"]
    budget: Int[Array, " E"]
    clock: Int[Array, " E"]
    made: Int[Array, " E"]
    forced: Int[Array, " E"]
    spawn_round: Int[Array, " E"]
    refusals: Int[Array, "E 5"]
    key: UInt32[Array, "E 2"]


def _read_parents(threads: Threads, row: Int[Array, " E"]) -> _Parents:
    return _Parents(
        row=row,
        index_low=read(threads.index_low, row),
        index_high=read(threads.index_high, row),
        depth=read(threads.depth, row),
        budget=read(threads.budget, row),
        clock=read(threads.clock, row),
        made=read(threads.made, row),
        forced=read(threads.forced, row),
        spawn_round=read(threads.spawns, row) - 1,
        refusals=read(threads.refusals, row),
        key=read(threads.key, row),
    )


class _Messages(NamedTuple):
    """The messages of E spawn blocks.

    Attributes:
      messages: number of messages in each block.
      begin: place of the `<msg>` of each of the first C messages in the token sequence.
      size: number of tokens after that `<msg>`; -1 where the block has fewer messages.
    """

    messages: Int[Array, " E"]
    begin: Int[Array, "E C"]
    size: Int[Array, "E C"]


def _find_messages(threads: Threads, row: Int[Array, " E"], limits: Limits) -> _Messages:
    tokens = read(threads.tokens, row)  # [E, L]
    length = read(threads.length, row)  # [E]
    place = jnp.arange(limits.max_thread_tokens, dtype=jnp.int32)[None, :]  # [1, L]

    # The block ends with the newest token, a `</spawn>`, which closes the last message too.
    block_begin = read(threads.spawn_at, row)[:, None]  # [E, 1]
    block_end = length[:, None] - 1  # [E, 1]
    is_message = (tokens == protocol.MSG) & (place > block_begin) & (place < block_end)
    messages_up_to = jnp.cumsum(is_message, axis=1, dtype=jnp.int32)  # [E, L]

    # The n-th `<msg>` stands at the index that equals the number of places before it. We look for
    # one more than C, because a message ends where the next one begins.
    nth = jnp.arange(1, limits.children + 2, dtype=jnp.int32)  # [C + 1]
    is_before_nth = messages_up_to[:, None, :] < nth[None, :, None]  # [E, C + 1, L]
    begin = jnp.sum(is_before_nth, axis=2, dtype=jnp.int32)  # [E, C + 1]
    begin = jnp.minimum(begin, block_end)
    size = begin[:, 1:] - begin[:, :-1] - 1  # [E, C]
    return _Messages(messages_up_to[:, -1], begin[:, :-1], size)


def _count_started(
    messages: Int[Array, " E"], parents: _Parents, limits: Limits
) -> tuple[Int[Array, " E"], Int[Array, "E 5"]]:
    """Returns how many messages of each block start a child, and how many are refused by cause.

    The causes are in the order of `Refusal`.
    """
    too_deep = parents.depth >= limits.max_depth
    free_rows = parents.index_high - parents.index_low
    within_limit = jnp.minimum(messages, limits.children)
    with_row = jnp.minimum(within_limit, free_rows)
    started = jnp.where(too_deep, 0, jnp.minimum(with_row, parents.budget - 1))

    refused = [
        messages == 0,  # NO_MESSAGE
        jnp.where(too_deep, 0, messages - within_limit),  # TOO_MANY
        jnp.where(too_deep, messages, 0),  # TOO_DEEP
        jnp.where(too_deep, 0, within_limit - with_row),  # NO_THREAD_INDEX
        jnp.where(too_deep, 0, with_row - started),  # NO_BUDGET
    ]
    return started, jnp.stack(refused, axis=1)


class _Shares(NamedTuple):
    """What each child of a spawn gets of its parent's free rows and tokens."""

    rows: Int[Array, " E"]
    tokens: Int[Array, " E"]


def _divide(parents: _Parents, started: Int[Array, " E"], limits: Limits) -> _Shares:
    """Divides free rows and tokens evenly among the parent and its new children.

    Shares are rounded down and the parent keeps the rest.
    """
    sharers = started + 1
    # A parent that must make more children keeps a row back for each of them.
    still_to_make = jnp.maximum(parents.forced - (parents.made + started), 0)
    free_rows = parents.index_high - parents.index_low
    spare_rows = jnp.maximum(free_rows - started - still_to_make, 0)
    children_may_spawn = parents.depth + 1 < limits.max_depth
    return _Shares(
        rows=jnp.where(children_may_spawn, spare_rows // sharers, 0),
        tokens=parents.budget // sharers,
    )


def _update_parents(
    threads: Threads,
    parents: _Parents,
    started: Int[Array, " E"],
    refused: Int[Array, "E 5"],
    shares: _Shares,
) -> Threads:
    """Records a spawn in its parents, which then wait for `started` children.

    A parent's free rows go to its children first, then to their shares, and then remain its own.
    """
    return write(
        threads,
        parents.row,
        pending=started,
        first_child=parents.index_low,
        joining=started,
        made=parents.made + started,
        index_low=parents.index_low + started + started * shares.rows,
        budget=parents.budget - started * shares.tokens,
        refusals=parents.refusals + refused,
    )


def _place_children(
    threads: Threads,
    parents: _Parents,
    block: _Messages,
    started: Int[Array, " E"],
    shares: _Shares,
    limits: Limits,
) -> Threads:
    """Puts the new children, READY with `<bos> message`, into the first free rows of their parents.

    All fields are written for E * C children at once; children that are not started go to "no row".
    """
    number = jnp.arange(limits.children, dtype=jnp.int32)[None, :]  # [1, C]
    starts = number < started[:, None]  # [E, C]
    child_row = jnp.where(starts, parents.index_low[:, None] + number, threads.rows)

    index_low = (parents.index_low + started)[:, None] + number * shares.rows[:, None]  # [E, C]
    of_children = jax.vmap(keys.child_key, (None, None, 0))
    of_parents = jax.vmap(of_children, (0, 0, None))
    child_key = of_parents(parents.key, parents.spawn_round, number[0])  # [E, C, 2]

    def each(value: Int[Array, "..."]) -> Int[Array, " n"]:
        """Spreads a value of all, of each parent or of each child to every child, [E * C]."""
        return jnp.broadcast_to(value, starts.shape).reshape(-1)

    prompt_length = each(block.size + 1)  # With `<bos>`.
    return write(
        threads,
        child_row.reshape(-1),
        tokens=_child_prompts(threads, parents.row, block, limits),
        prompt_length=prompt_length,
        length=prompt_length,
        used=prompt_length,
        peak=prompt_length,
        status=each(jnp.asarray(Status.READY, jnp.int32)),
        parent=each(parents.row[:, None]),
        round=each(parents.spawn_round[:, None]),
        depth=each(parents.depth[:, None] + 1),
        child=each(number),
        start=each(parents.clock[:, None]),
        clock=each(parents.clock[:, None]),
        index_low=each(index_low),
        index_high=each(index_low + shares.rows[:, None]),
        budget=each(shares.tokens[:, None]),
        key=child_key.reshape(-1, 2),
    )


def _child_prompts(
    threads: Threads, row: Int[Array, " E"], block: _Messages, limits: Limits
) -> Int[Array, "n L"]:
    """Makes the prompt `<bos> message`, padded, for the C children of each of the E rows."""
    place = jnp.arange(limits.max_thread_tokens, dtype=jnp.int32)[None, None, :]  # [1, 1, L]
    # Place 0 of the source is the `<msg>`, where the child has its `<bos>`.
    source = block.begin[:, :, None] + place  # [E, C, L]
    text = threads.tokens.at[row[:, None, None], source].get(mode="fill", fill_value=0)

    in_message = place <= block.size[:, :, None]
    prompt = jnp.where(place == 0, protocol.BOS, jnp.where(in_message, text, protocol.PAD))
    return prompt.reshape(-1, limits.max_thread_tokens)


def join_children(threads: Threads, limits: Limits, count: int) -> Threads:
    """Resumes up to `count` threads whose children have all ended.

    `<joined> (<msg> answer)* </joined>` goes into the token sequence as prompt tokens, at positions
    that begin where `<spawn>` stood. The clock goes on from the longest child's, and what the
    children left of their budgets comes back. A thread without room for the block and one more
    token ends OUT_OF_WINDOW, and one whose sequential tokens are spent ends OUT_OF_BUDGET; then the
    block is not written.
    """
    row = first_rows(needs_join(threads), count)  # [E]
    answers = _find_answers(threads, row, limits)
    length = read(threads.length, row)
    spawn_position = read(threads.spawn_position, row)

    # Time and tokens.
    child_clocks = jnp.where(answers.joined, read(threads.clock, answers.child), 0)  # [E, C]
    clock = jnp.maximum(read(threads.clock, row), jnp.max(child_clocks, axis=1))
    child_budgets = jnp.where(answers.joined, read(threads.budget, answers.child), 0)  # [E, C]
    budget = read(threads.budget, row) + jnp.sum(child_budgets, axis=1)

    # Whether the thread can go on: the block and one more token must fit.
    window_full = spawn_position + answers.block_length > limits.window - 1
    sequence_full = length + answers.block_length > limits.max_thread_tokens - 1
    no_room = window_full | sequence_full
    spent = clock >= limits.max_sequential
    ends = no_room | spent
    status = jnp.where(spent, Status.OUT_OF_BUDGET, Status.READY)
    status = jnp.where(no_room, Status.OUT_OF_WINDOW, status).astype(jnp.int32)

    # The block goes behind the thread's tokens.
    place = jnp.arange(limits.max_thread_tokens)[None, :] - length[:, None]  # [E, L]
    in_block = (place >= 0) & (place < answers.block_length[:, None]) & ~ends[:, None]
    block = _joined_block(threads, answers, place, limits)  # [E, L]
    used = jnp.where(ends, read(threads.used, row), spawn_position + answers.block_length)

    ended_parent = jnp.where((row < threads.rows) & ends, read(threads.parent, row), NO_PARENT)
    threads = write(
        threads,
        row,
        tokens=jnp.where(in_block, block, read(threads.tokens, row)),
        length=jnp.where(ends, length, length + answers.block_length),
        used=used,
        peak=jnp.maximum(read(threads.peak, row), used),
        status=status,
        clock=clock,
        budget=budget,
    )
    return count_ended_children(threads, ended_parent)


class _Answers(NamedTuple):
    """The answers that E threads join, and where they stand in the joined block.

    Attributes:
      joined: True for the children of the spawn; the other entries mean nothing.
      child: row of each child, or "no row".
      begin: place of its answer in its own token sequence.
      message_at: place of its `<msg>` in the joined block.
      block_length: tokens of the joined block.
    """

    joined: Bool[Array, "E C"]
    child: Int[Array, "E C"]
    begin: Int[Array, "E C"]
    message_at: Int[Array, "E C"]
    block_length: Int[Array, " E"]


def _find_answers(threads: Threads, row: Int[Array, " E"], limits: Limits) -> _Answers:
    number = jnp.arange(limits.children)[None, :]  # [1, C]
    joined = number < read(threads.joining, row)[:, None]  # [E, C]
    child = jnp.where(joined, read(threads.first_child, row)[:, None] + number, threads.rows)

    # An answer stands between `<join>` and `<eos>`; only a thread that is DONE has one. [E, C]
    is_done = read(threads.status, child) == Status.DONE
    begin = read(threads.answer_at, child)
    size = jnp.where(is_done, read(threads.length, child) - 1 - begin, 0)

    # Place 0 of the block is `<joined>`, and each answer has a `<msg>` before it. [E, C]
    sizes_up_to = jnp.cumsum(jnp.where(joined, size + 1, 0), axis=1)
    message_at = 1 + sizes_up_to - (size + 1)
    return _Answers(joined, child, begin, message_at, block_length=2 + sizes_up_to[:, -1])


def _joined_block(
    threads: Threads, answers: _Answers, place: Int[Array, "E L"], limits: Limits
) -> Int[Array, "E L"]:
    """Returns the tokens at these places of the joined block.

    Places outside of it give any token.
    """
    # A place belongs to the last answer whose `<msg>` is not after it.
    has_begun = answers.message_at[:, None, :] <= place[:, :, None]  # [E, L, C]
    number = jnp.sum(answers.joined[:, None, :] & has_begun, axis=2) - 1
    number = jnp.maximum(number, 0)  # [E, L]

    def of_answer(field: Int[Array, "E C"]) -> Int[Array, "E L"]:
        return jnp.take_along_axis(field, number, axis=1)

    place_in_answer = place - of_answer(answers.message_at) - 1  # -1 is the `<msg>` itself.
    source = of_answer(answers.begin) + place_in_answer
    source = jnp.clip(source, 0, limits.max_thread_tokens - 1)
    text = threads.tokens.at[of_answer(answers.child), source].get(mode="fill", fill_value=0)

    token = jnp.where(place_in_answer < 0, protocol.MSG, text)
    token = jnp.where(place == answers.block_length[:, None] - 1, protocol.END_JOINED, token)
    return jnp.where(place == 0, protocol.JOINED, token)
