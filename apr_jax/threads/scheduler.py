"""What the rollout's device loop carries: the threads of all trees as rows of a table, and the
decode slots that decode them.

Trees and threads are one axis here: row b * T + t is thread index t of tree b. The index `rows`
(one past the last) means "no row": reads from it are ignored and writes to it dropped. A thread on
a decode slot keeps what a decode step changes in the decode slot's registers; the table has it
again when the thread leaves the decode slot."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from apr_jax.threads import keys, protocol
from apr_jax.threads.forest import NO_PARENT, ROOT, Refusal, Status, ThreadForest
from apr_jax.threads.limits import Limits
from apr_jax.threads.positions import lay_out
from apr_jax.threads.prompts import NOT_FORCED, Prompts

# `pending` of a thread whose spawn block is closed but whose children are not made yet.
NOT_SPAWNED = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threads:
    """One row a thread; fields that ThreadForest has mean the same.

    Attributes (beyond ThreadForest):
      given: [rows] tokens of the thread's own prompt.
      used: [rows] positions of the window in use.
      clock: [rows] sampled tokens on the longest chain up to now.
      spawns: [rows] spawn blocks opened so far.
      spawn_at, spawn_position: [rows] where the current `<spawn>` stands in the stream and in the
      window. answer_at: [rows] place in the stream after `<join>`. pending: [rows] children still
      at work, or NOT_SPAWNED. first_child, joining: [rows] the current spawn's children are rows
      first_child .. first_child + joining - 1. made: [rows] children of all spawns of the thread.
      forced: [rows] children that the thread must make, or NOT_FORCED. index_low, index_high:
      [rows] the thread's own share of free threads. Threads are divided at each spawn, not raced
      for, so
        that no schedule can change who gets one.
      budget: [rows] tokens the thread may still sample; divided at each spawn, what is left comes
      back at the join. refusals: [rows, 5] of its spawns. key: [rows, 2] key data folded from the
      thread's path.
    """

    tokens: jax.Array
    logprob: jax.Array
    allowed: jax.Array
    given: jax.Array
    length: jax.Array
    status: jax.Array
    parent: jax.Array
    round: jax.Array
    depth: jax.Array
    child: jax.Array
    start: jax.Array
    peak: jax.Array
    used: jax.Array
    clock: jax.Array
    spawns: jax.Array
    spawn_at: jax.Array
    spawn_position: jax.Array
    answer_at: jax.Array
    pending: jax.Array
    first_child: jax.Array
    joining: jax.Array
    made: jax.Array
    forced: jax.Array
    index_low: jax.Array
    index_high: jax.Array
    budget: jax.Array
    refusals: jax.Array
    key: jax.Array

    @property
    def rows(self) -> int:
        return self.status.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeSlots:
    """Registers of the W decode slots; those that Threads has mean the same.

    Attributes (beyond Threads):
      row: [W] the thread on the decode slot, or "no row".
      last: [W] the newest token of the thread, which the next step feeds to the model.
      phase: [W] of the protocol.
      messages: [W] in the open spawn block.
      may_spawn: [W] children that a spawn could be given now: 0 if the thread is too deep.
      temperature, top_k, top_p: [W] of the thread's tree.
    """

    row: jax.Array
    status: jax.Array
    last: jax.Array
    used: jax.Array
    length: jax.Array
    clock: jax.Array
    budget: jax.Array
    phase: jax.Array
    messages: jax.Array
    spawns: jax.Array
    spawn_at: jax.Array
    spawn_position: jax.Array
    answer_at: jax.Array
    made: jax.Array
    forced: jax.Array
    may_spawn: jax.Array
    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def read(field: Array, row: Int[Array, "*n"]) -> Array:
    """Rows of a field; "no row" reads zeros."""
    return field.at[row].get(mode="fill", fill_value=0)


def write(threads: Threads, row: Int[Array, " n"], **fields: Array) -> Threads:
    """Sets whole rows of the named fields; "no row" is dropped."""
    return dataclasses.replace(
        threads,
        **{
            name: getattr(threads, name).at[row].set(value, mode="drop")
            for name, value in fields.items()
        },
    )


def children_ended(threads: Threads, parent: Int[Array, " n"]) -> Threads:
    """One child of each of these rows has ended; NO_PARENT is dropped."""
    row = jnp.where(parent == NO_PARENT, threads.rows, parent)
    return dataclasses.replace(threads, pending=threads.pending.at[row].add(-1, mode="drop"))


def first_rows(mask: Array, count: int) -> Int[Array, " count"]:
    """The first `count` rows where the mask holds, filled up with "no row"."""
    return jnp.nonzero(mask, size=count, fill_value=mask.shape[0])[0].astype(jnp.int32)


def initial_threads(prompts: Prompts, key: jax.Array, limits: Limits) -> Threads:
    """Roots READY with their prompts; all other rows FREE."""
    trees, width = prompts.tokens.shape
    rows = trees * limits.max_threads
    root = jnp.arange(trees) * limits.max_threads
    zeros = jnp.zeros(rows, jnp.int32)
    given = jnp.arange(width)[None, :] < prompts.length[:, None]
    lengths = zeros.at[root].set(prompts.length)
    return Threads(
        tokens=jnp.zeros((rows, limits.max_thread_tokens), jnp.int32)
        .at[root, :width]
        .set(jnp.where(given, prompts.tokens, protocol.PAD)),
        logprob=jnp.zeros((rows, limits.max_thread_tokens), jnp.float32),
        allowed=jnp.zeros((rows, limits.max_thread_tokens), jnp.uint8),
        given=lengths,
        length=lengths,
        status=(zeros + Status.FREE).at[root].set(Status.READY),
        parent=zeros + NO_PARENT,
        round=zeros,
        depth=zeros,
        child=zeros,
        start=zeros,
        peak=lengths,
        used=lengths,
        clock=zeros,
        spawns=zeros,
        spawn_at=zeros,
        spawn_position=zeros,
        answer_at=zeros,
        pending=zeros,
        first_child=zeros,
        joining=zeros,
        made=zeros,
        forced=(zeros + NOT_FORCED).at[root].set(prompts.children),
        index_low=zeros.at[root].set(root + 1),
        index_high=zeros.at[root].set(root + limits.max_threads),
        budget=zeros.at[root].set(limits.max_tokens),
        refusals=jnp.zeros((rows, len(Refusal)), jnp.int32),
        key=jnp.zeros((rows, 2), jnp.uint32).at[root].set(keys.root_key(key, prompts.tree)),
    )


def idle_slots(count: int, rows: int) -> DecodeSlots:
    """Decode slots without threads."""
    zeros = jnp.zeros(count, jnp.int32)
    names = {field.name: zeros for field in dataclasses.fields(DecodeSlots)}
    return DecodeSlots(
        **names
        | {
            "row": zeros + rows,
            "key": jnp.zeros((count, 2), jnp.uint32),
            "temperature": jnp.zeros(count),
            "top_p": jnp.ones(count),
        }
    )


def seat(
    slots: DecodeSlots,
    slot: Int[Array, " n"],
    threads: Threads,
    row: Int[Array, " n"],
    prompts: Prompts,
    limits: Limits,
) -> DecodeSlots:
    """Puts threads that are READY on decode slots; "no row" and decode slots past the last are
    dropped.
    """
    tree = row // limits.max_threads
    registers = {
        field.name: read(getattr(threads, field.name), row)
        for field in dataclasses.fields(DecodeSlots)
        if hasattr(threads, field.name)
    }
    length = registers["length"]
    registers |= {
        "row": row,
        "status": jnp.full_like(row, Status.RUNNING),
        "last": threads.tokens.at[row, length - 1].get(mode="fill", fill_value=protocol.PAD),
        "phase": jnp.full_like(row, protocol.THINK),
        "messages": jnp.zeros_like(row),
        "may_spawn": jnp.where(
            read(threads.depth, row) < limits.max_depth,
            read(threads.index_high, row) - read(threads.index_low, row),
            0,
        ),
        "temperature": read(prompts.temperature, tree),
        "top_k": read(prompts.top_k, tree),
        "top_p": read(prompts.top_p, tree),
    }
    return DecodeSlots(
        **{
            name: getattr(slots, name).at[slot].set(value, mode="drop")
            for name, value in registers.items()
        }
    )


def unseat(threads: Threads, slots: DecodeSlots) -> tuple[Threads, DecodeSlots]:
    """Brings the table up to date; decode slots whose threads have ended or wait become idle."""
    row = slots.row
    left = (row < threads.rows) & (slots.status != Status.RUNNING)
    waits = slots.status == Status.WAITING
    threads = write(
        threads,
        jnp.where(left, row, threads.rows),
        status=slots.status,
        length=slots.length,
        used=slots.used,
        peak=jnp.maximum(read(threads.peak, row), slots.used),
        clock=slots.clock,
        budget=slots.budget,
        spawns=slots.spawns,
        spawn_at=slots.spawn_at,
        spawn_position=slots.spawn_position,
        answer_at=slots.answer_at,
        pending=jnp.where(waits, NOT_SPAWNED, 0),
    )
    threads = children_ended(
        threads, jnp.where(left & ~waits, read(threads.parent, row), NO_PARENT)
    )
    return threads, dataclasses.replace(slots, row=jnp.where(left, threads.rows, row))


def to_forest(threads: Threads, limits: Limits) -> ThreadForest:
    """Rows become [B, T], parents become threads, and each tree gets its statistics."""

    def trees(field: Array) -> Array:
        return field.reshape((-1, limits.max_threads) + field.shape[1:])

    status, clock = trees(threads.status), trees(threads.clock)
    parent = jnp.where(threads.parent == NO_PARENT, NO_PARENT, threads.parent % limits.max_threads)
    truncated = (status == Status.OUT_OF_WINDOW) | (status == Status.OUT_OF_BUDGET)
    layout = lay_out(threads.tokens, threads.given, threads.length)
    return ThreadForest(
        tokens=trees(threads.tokens),
        position=trees(layout.position),
        hidden_block=trees(layout.hidden_block),
        sampled=trees(layout.sampled),
        logprob=trees(threads.logprob),
        allowed=trees(threads.allowed),
        length=trees(threads.length),
        status=status,
        parent=trees(parent),
        round=trees(threads.round),
        depth=trees(threads.depth),
        child=trees(threads.child),
        start=trees(threads.start),
        end=clock,
        peak=trees(threads.peak),
        total_tokens=jnp.sum(trees(layout.sampled), axis=(1, 2), dtype=jnp.int32),
        sequential_tokens=clock[:, ROOT],
        children=jnp.sum(status != Status.FREE, axis=1, dtype=jnp.int32) - 1,
        refusals=jnp.sum(trees(threads.refusals), axis=1, dtype=jnp.int32),
        truncations=jnp.sum(truncated, axis=1, dtype=jnp.int32),
    )
