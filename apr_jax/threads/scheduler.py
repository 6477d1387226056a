"""The state of the rollout's device loop: a table of all threads, and the decode slots.

Trees and threads are one axis here: row b * T + t of the table is thread t of tree b. The index
`rows` (one past the last) means "no row": reads from it give zeros and writes to it are dropped.
What a decode step changes of a thread is kept in the registers of its decode slot, and comes back
to the table when the thread leaves the decode slot.

Shapes: `rows` threads of all trees, B trees, T threads a tree, L tokens a thread, W decode slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

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
    """The table of threads, one row a thread. Fields that `ThreadForest` has mean the same.

    Attributes (beyond ThreadForest):
      prompt_length: tokens of the thread's own prompt.
      used: positions of the window in use.
      clock: sampled tokens on the longest chain up to now.
      phase: where the thread is in the protocol.
      messages: number of messages in its open spawn block.
      spawns: spawn blocks opened so far.
      spawn_at: place of the current `<spawn>` in the token sequence.
      spawn_position: position of the current `<spawn>` in the window.
      answer_at: place in the token sequence after `<join>`.
      pending: children of the current spawn that have not ended, or NOT_SPAWNED.
      first_child, joining: the children of the current spawn are the `joining` rows from
        `first_child` on.
      made: children that all spawns of the thread have made.
      forced: children that the thread must make, or NOT_FORCED.
      index_low, index_high: the thread's own share of free rows, index_low .. index_high - 1. Each
        spawn divides the share instead of letting threads compete for rows, so that no schedule can
        change which thread gets one.
      budget: tokens that the thread may still sample. Each spawn divides it; what a child leaves
        comes back at the join.
      refusals: refused messages of the thread's spawns, by `Refusal`.
      key: key data, folded from the thread's path in the tree.
    """

    tokens: Int[Array, "rows L"]
    logprob: Float[Array, "rows L"]
    allowed: UInt8[Array, "rows L"]
    prompt_length: Int[Array, " rows"]
    length: Int[Array, " rows"]
    status: Int[Array, " rows"]
    parent: Int[Array, " rows"]
    round: Int[Array, " rows"]
    depth: Int[Array, " rows"]
    child: Int[Array, " rows"]
    start: Int[Array, " rows"]
    peak: Int[Array, " rows"]
    used: Int[Array, " rows"]
    clock: Int[Array, " rows"]
    phase: Int[Array, " rows"]
    messages: Int[Array, " rows"]
    spawns: Int[Array, " rows"]
    spawn_at: Int[Array, " rows"]
    spawn_position: Int[Array, " rows"]
    answer_at: Int[Array, " rows"]
    pending: Int[Array, " rows"]
    first_child: Int[Array, " rows"]
    joining: Int[Array, " rows"]
    made: Int[Array, " rows"]
    forced: Int[Array, " rows"]
    index_low: Int[Array, " rows"]
    index_high: Int[Array, " rows"]
    budget: Int[Array, " rows"]
    refusals: Int[Array, "rows 5"]
    key: UInt32[Array, "rows 2"]

    @property
    def rows(self) -> int:
        """Number of rows; as an index it means "no row"."""
        return self.status.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeSlots:
    """The registers of the decode slots. Fields that `Threads` has mean the same.

    Attributes (beyond Threads):
      row: the thread on the decode slot, or "no row".
      last: the newest token of the thread, which the next step feeds to the model.
      free_threads: rows that children of the thread could take; 0 if it is too deep to spawn.
      temperature, top_k, top_p: settings of the thread's tree.
    """

    row: Int[Array, " W"]
    status: Int[Array, " W"]
    last: Int[Array, " W"]
    used: Int[Array, " W"]
    length: Int[Array, " W"]
    clock: Int[Array, " W"]
    budget: Int[Array, " W"]
    phase: Int[Array, " W"]
    messages: Int[Array, " W"]
    spawns: Int[Array, " W"]
    spawn_at: Int[Array, " W"]
    spawn_position: Int[Array, " W"]
    answer_at: Int[Array, " W"]
    made: Int[Array, " W"]
    forced: Int[Array, " W"]
    free_threads: Int[Array, " W"]
    key: UInt32[Array, "W 2"]
    temperature: Float[Array, " W"]
    top_k: Int[Array, " W"]
    top_p: Float[Array, " W"]


def read(field: Array, row: Int[Array, "*n"]) -> Array:
    """Reads rows of a field; "no row" reads zeros."""
    return field.at[row].get(mode="fill", fill_value=0)


def write(threads: Threads, row: Int[Array, " n"], **fields: Array) -> Threads:
    """Sets whole rows of the named fields; writes to "no row" are dropped."""
    updated = {
        name: getattr(threads, name).at[row].set(values, mode="drop")
        for name, values in fields.items()
    }
    return dataclasses.replace(threads, **updated)


def count_ended_children(threads: Threads, parent: Int[Array, " n"]) -> Threads:
    """Takes one ended child off `pending` of each of these parents; NO_PARENT is ignored."""
    row = jnp.where(parent == NO_PARENT, threads.rows, parent)
    return dataclasses.replace(threads, pending=threads.pending.at[row].add(-1, mode="drop"))


def first_rows(mask: Bool[Array, " n"], count: int) -> Int[Array, " count"]:
    """Finds the first `count` places where a mask holds, filled up with its length ("no row")."""
    return jnp.nonzero(mask, size=count, fill_value=mask.shape[0])[0].astype(jnp.int32)


def initial_threads(prompts: Prompts, key: jax.Array, limits: Limits) -> Threads:
    """Makes the table at the start: roots are READY with their prompts, all other rows FREE."""
    trees, width = prompts.tokens.shape
    rows = trees * limits.max_threads
    root = jnp.arange(trees) * limits.max_threads  # [B]
    zeros = jnp.zeros(rows, jnp.int32)

    in_prompt = jnp.arange(width)[None, :] < prompts.length[:, None]  # [B, P]
    prompt_lengths = zeros.at[root].set(prompts.length)
    blank = jnp.zeros((rows, limits.max_thread_tokens), jnp.int32)

    return Threads(
        tokens=blank.at[root, :width].set(jnp.where(in_prompt, prompts.tokens, protocol.PAD)),
        logprob=jnp.zeros((rows, limits.max_thread_tokens), jnp.float32),
        allowed=jnp.zeros((rows, limits.max_thread_tokens), jnp.uint8),
        prompt_length=prompt_lengths,
        length=prompt_lengths,
        status=(zeros + Status.FREE).at[root].set(Status.READY),
        parent=zeros + NO_PARENT,
        round=zeros,
        depth=zeros,
        child=zeros,
        start=zeros,
        peak=prompt_lengths,
        used=prompt_lengths,
        clock=zeros,
        phase=zeros + protocol.THINK,
        messages=zeros,
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
    """Makes `count` decode slots that hold no thread."""
    zeros = jnp.zeros(count, jnp.int32)
    registers = {field.name: zeros for field in dataclasses.fields(DecodeSlots)}
    registers["row"] = zeros + rows
    registers["key"] = jnp.zeros((count, 2), jnp.uint32)
    registers["temperature"] = jnp.zeros(count)
    registers["top_p"] = jnp.ones(count)
    return DecodeSlots(**registers)


def occupy(
    slots: DecodeSlots,
    slot: Int[Array, " n"],
    threads: Threads,
    row: Int[Array, " n"],
    prompts: Prompts,
    limits: Limits,
) -> DecodeSlots:
    """Puts the READY threads in these rows on these decode slots.

    "No row" is put on no decode slot, and an index past the last decode slot takes no thread.
    """
    tree = row // limits.max_threads
    registers = {
        field.name: read(getattr(threads, field.name), row)
        for field in dataclasses.fields(DecodeSlots)
        if hasattr(threads, field.name)
    }
    last_place = registers["length"] - 1
    may_have_children = read(threads.depth, row) < limits.max_depth
    free_rows = read(threads.index_high, row) - read(threads.index_low, row)
    registers |= {
        "row": row,
        "status": jnp.full_like(row, Status.RUNNING),
        "last": threads.tokens.at[row, last_place].get(mode="fill", fill_value=protocol.PAD),
        "free_threads": jnp.where(may_have_children, free_rows, 0),
        "temperature": read(prompts.temperature, tree),
        "top_k": read(prompts.top_k, tree),
        "top_p": read(prompts.top_p, tree),
    }
    updated = {
        name: getattr(slots, name).at[slot].set(values, mode="drop")
        for name, values in registers.items()
    }
    return DecodeSlots(**updated)


def release(threads: Threads, slots: DecodeSlots) -> tuple[Threads, DecodeSlots]:
    """Makes the decode slots idle whose threads ended or wait.

    Their registers are written back to the table of threads.
    """
    row = slots.row
    stopped = (row < threads.rows) & (slots.status != Status.RUNNING)  # [W]
    waits = slots.status == Status.WAITING
    threads = _write_back(threads, slots, stopped)
    threads = write(
        threads,
        jnp.where(stopped, row, threads.rows),
        pending=jnp.where(waits, NOT_SPAWNED, 0),
    )

    ended = stopped & ~waits
    threads = count_ended_children(threads, jnp.where(ended, read(threads.parent, row), NO_PARENT))
    return threads, dataclasses.replace(slots, row=jnp.where(stopped, threads.rows, row))


def suspend(threads: Threads, slots: DecodeSlots) -> Threads:
    """Takes the running threads off their decode slots; they become READY again.

    When they get a decode slot the next time, their contexts are read into its cache anew.

    Args:
      threads: the table of threads.
      slots: the decode slots, all of which are idle or run (`release`).
    """
    ready = dataclasses.replace(slots, status=jnp.full_like(slots.status, Status.READY))
    return _write_back(threads, ready, slots.row < threads.rows)


def _write_back(threads: Threads, slots: DecodeSlots, chosen: Bool[Array, " W"]) -> Threads:
    """Writes the registers of the chosen decode slots to the rows of their threads."""
    return write(
        threads,
        jnp.where(chosen, slots.row, threads.rows),
        status=slots.status,
        length=slots.length,
        used=slots.used,
        peak=jnp.maximum(read(threads.peak, slots.row), slots.used),
        clock=slots.clock,
        budget=slots.budget,
        phase=slots.phase,
        messages=slots.messages,
        spawns=slots.spawns,
        spawn_at=slots.spawn_at,
        spawn_position=slots.spawn_position,
        answer_at=slots.answer_at,
    )


def finished_trees(threads: Threads, limits: Limits) -> Bool[Array, " B"]:
    """Returns the trees whose root has ended; all their other threads have ended before it."""
    return threads.status[:: limits.max_threads] >= Status.DONE


def to_forest(threads: Threads, limits: Limits) -> ThreadForest:
    """Makes the forest of the table: rows become [B, T], and each tree gets its statistics."""

    def by_tree(field: Array) -> Array:
        return field.reshape((-1, limits.max_threads) + field.shape[1:])

    status = by_tree(threads.status)
    clock = by_tree(threads.clock)
    # The table counts parents by row, the forest by thread index.
    parent = jnp.where(threads.parent == NO_PARENT, NO_PARENT, threads.parent % limits.max_threads)
    truncated = (status == Status.OUT_OF_WINDOW) | (status == Status.OUT_OF_BUDGET)  # [B, T]
    layout = lay_out(threads.tokens, threads.prompt_length, threads.length)

    return ThreadForest(
        tokens=by_tree(threads.tokens),
        position=by_tree(layout.position),
        hidden_block=by_tree(layout.hidden_block),
        sampled=by_tree(layout.sampled),
        logprob=by_tree(threads.logprob),
        allowed=by_tree(threads.allowed),
        length=by_tree(threads.length),
        status=status,
        parent=by_tree(parent),
        round=by_tree(threads.round),
        depth=by_tree(threads.depth),
        child=by_tree(threads.child),
        start=by_tree(threads.start),
        end=clock,
        peak=by_tree(threads.peak),
        total_tokens=jnp.sum(by_tree(layout.sampled), axis=(1, 2), dtype=jnp.int32),
        sequential_tokens=clock[:, ROOT],
        children=jnp.sum(status != Status.FREE, axis=1, dtype=jnp.int32) - 1,
        refusals=jnp.sum(by_tree(threads.refusals), axis=1, dtype=jnp.int32),
        truncations=jnp.sum(truncated, axis=1, dtype=jnp.int32),
    )
