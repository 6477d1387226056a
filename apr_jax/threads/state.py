"""What the rollout's device loop carries: the threads of all trees as rows of a table, and the lanes that decode them.

Trees and slots are one axis here: row b * T + t is slot t of tree b. The index `rows` (one past the last) means "no row":
reads from it are ignored and writes to it dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from apr_jax.threads import protocol
from apr_jax.threads.forest import NO_PARENT, ROOT, Status, ThreadForest
from apr_jax.threads.limits import Limits

NOT_SPAWNED = -1  # `pending` of a thread whose spawn block is closed but whose children are not made yet.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """What the roots are given.

    Attributes:
      tokens: [B, P] the root's prompt from `<bos>` on, padded.
      length: [B] tokens of the prompt, at least 1.
      tree: [B] identity of the tree; all its randomness is folded from it.
      temperature: [B] of the sampling; 0 is greedy.
    """

    tokens: jax.Array
    length: jax.Array
    tree: jax.Array
    temperature: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threads:
    """One row a thread; the first fields are those of ThreadForest.

    Attributes (beyond ThreadForest):
      context: [rows, M] the token at each position that the thread sees now; a rewind overwrites it.
      used: [rows] positions of `context` in use.
      clock: [rows] sampled tokens on the longest chain up to now.
      phase: [rows] of the protocol.
      spawns: [rows] spawn blocks opened so far; also the current island.
      spawn_at, spawn_position: [rows] where the current `<spawn>` stands in the stream and in the window.
      answer_at: [rows] place in the stream after `<join>`.
      pending: [rows] children still at work, or NOT_SPAWNED.
      first_child, joining: [rows] the current spawn's children are rows first_child .. first_child + joining - 1.
      slot_low, slot_high: [rows] the thread's own share of free slots. Slots are divided at each spawn, not raced for, so
        that no schedule can change who gets one.
      budget: [rows] tokens the thread may still sample; divided at each spawn, what is left comes back at the join.
      refusals: [rows] of its spawns.
      key: [rows, 2] key data folded from the thread's path.
      temperature: [rows].
    """

    tokens: jax.Array
    position: jax.Array
    island: jax.Array
    sampled: jax.Array
    logprob: jax.Array
    length: jax.Array
    status: jax.Array
    parent: jax.Array
    round: jax.Array
    depth: jax.Array
    child: jax.Array
    start: jax.Array
    peak: jax.Array
    context: jax.Array
    used: jax.Array
    clock: jax.Array
    phase: jax.Array
    spawns: jax.Array
    spawn_at: jax.Array
    spawn_position: jax.Array
    answer_at: jax.Array
    pending: jax.Array
    first_child: jax.Array
    joining: jax.Array
    slot_low: jax.Array
    slot_high: jax.Array
    budget: jax.Array
    refusals: jax.Array
    key: jax.Array
    temperature: jax.Array

    @property
    def rows(self) -> int:
        return self.status.shape[0]


def read(field: Array, row: Int[Array, "*n"]) -> Array:
    """Rows of a field; "no row" reads zeros."""
    return field.at[row].get(mode="fill", fill_value=0)


def write(threads: Threads, row: Int[Array, " n"], **fields: Array) -> Threads:
    """Sets whole rows of the named fields; "no row" is dropped."""
    return dataclasses.replace(
        threads,
        **{name: getattr(threads, name).at[row].set(value, mode="drop") for name, value in fields.items()},
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
    rows = trees * limits.slots
    root = jnp.arange(trees) * limits.slots
    zeros = jnp.zeros(rows, jnp.int32)
    stream = jnp.zeros((rows, limits.stream), jnp.int32)
    given = jnp.arange(width)[None, :] < prompts.length[:, None]
    prompt = jnp.where(given, prompts.tokens, protocol.PAD)
    position = jnp.where(given, jnp.arange(width)[None, :], 0)
    return Threads(
        tokens=stream.at[root, :width].set(prompt),
        position=stream.at[root, :width].set(position),
        island=stream,
        sampled=jnp.zeros((rows, limits.stream), bool),
        logprob=jnp.zeros((rows, limits.stream), jnp.float32),
        length=zeros.at[root].set(prompts.length),
        status=(zeros + Status.FREE).at[root].set(Status.READY),
        parent=zeros + NO_PARENT,
        round=zeros,
        depth=zeros,
        child=zeros,
        start=zeros,
        peak=zeros.at[root].set(prompts.length),
        context=jnp.zeros((rows, limits.window), jnp.int32).at[root, :width].set(prompt),
        used=zeros.at[root].set(prompts.length),
        clock=zeros,
        phase=zeros + protocol.THINK,
        spawns=zeros,
        spawn_at=zeros,
        spawn_position=zeros,
        answer_at=zeros,
        pending=zeros,
        first_child=zeros,
        joining=zeros,
        slot_low=zeros.at[root].set(root + 1),
        slot_high=zeros.at[root].set(root + limits.slots),
        budget=zeros.at[root].set(limits.max_tokens),
        refusals=zeros,
        key=jnp.zeros((rows, 2), jnp.uint32).at[root].set(protocol.root_key(key, prompts.tree)),
        temperature=jnp.repeat(prompts.temperature.astype(jnp.float32), limits.slots),
    )


def to_forest(threads: Threads, limits: Limits) -> ThreadForest:
    """Rows become [B, T], parents become slots, and each tree gets its statistics."""

    def trees(field: Array) -> Array:
        return field.reshape((-1, limits.slots) + field.shape[1:])

    status, clock = trees(threads.status), trees(threads.clock)
    parent = jnp.where(threads.parent == NO_PARENT, NO_PARENT, threads.parent % limits.slots)
    truncated = (status == Status.OUT_OF_WINDOW) | (status == Status.OUT_OF_BUDGET)
    return ThreadForest(
        tokens=trees(threads.tokens),
        position=trees(threads.position),
        island=trees(threads.island),
        sampled=trees(threads.sampled),
        logprob=trees(threads.logprob),
        length=trees(threads.length),
        status=status,
        parent=trees(parent),
        round=trees(threads.round),
        depth=trees(threads.depth),
        child=trees(threads.child),
        start=trees(threads.start),
        end=clock,
        peak=trees(threads.peak),
        total_tokens=jnp.sum(trees(threads.sampled), axis=(1, 2), dtype=jnp.int32),
        sequential_tokens=clock[:, ROOT],
        children=jnp.sum(status != Status.FREE, axis=1, dtype=jnp.int32) - 1,
        refusals=jnp.sum(trees(threads.refusals), axis=1, dtype=jnp.int32),
        truncations=jnp.sum(truncated, axis=1, dtype=jnp.int32),
    )
