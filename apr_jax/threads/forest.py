"""What a rollout returns: a `ThreadForest`, and the `Work` that it took.

A forest has every thread of every tree of a batch, as arrays of fixed shapes.

Rescoring and the loss consume a forest, evaluation measures it and the viewer draws it. A
demonstration can be a forest too: one in which no token was drawn by a policy.

Shapes: B trees, T threads a tree, L tokens a thread.
"""

import dataclasses
import enum

import jax

ROOT = 0  # The thread index of the root thread.
NO_PARENT = -1  # Parent of the root and of unused threads.


class Status(enum.IntEnum):
    """State of the thread at a thread index. Every status from DONE on means that it has ended."""

    FREE = 0  # There is no thread at this index.
    READY = 1  # It has tokens to read or to sample and waits for a decode slot.
    RUNNING = 2  # It holds a decode slot.
    WAITING = 3  # It is suspended at `</spawn>` until its children end.
    DONE = 4  # It ended with `<join> answer <eos>`.
    NO_ANSWER = 5  # It ended with `<eos>` before `<join>`: the answer is empty.
    MALFORMED = 6  # A control token was out of place: the answer is empty.
    OUT_OF_WINDOW = 7  # Its window or its token sequence is full: the answer is empty.
    OUT_OF_BUDGET = 8  # Its tokens or the sequential tokens are spent: the answer is empty.


class Refusal(enum.IntEnum):
    """Why a message started no child: the columns of `ThreadForest.refusals`."""

    NO_MESSAGE = 0  # The spawn block held no message at all.
    TOO_MANY = 1  # It is beyond the most children of one spawn.
    TOO_DEEP = 2  # The thread is too deep in the tree to have children.
    NO_THREAD_INDEX = 3  # No free thread index is left for it.
    NO_BUDGET = 4  # No token is left for it.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThreadForest:
    """A batch of thread trees. Integers are int32, masks bool, log-probs float32.

    Attributes:
      tokens: [B, T, L] each thread's token sequence in time order, never overwritten; `<pad>` from
        `length` on.
      position: [B, T, L] place in the thread's window; after a join it goes on from where `<spawn>`
        stood.
      hidden_block: [B, T, L] 0 for a token that all later tokens of the thread see; n for a token
        of the thread's n-th spawn block, which is visible to that block alone.
      sampled: [B, T, L] True where the policy chose the token.
      logprob: [B, T, L] log-prob of a sampled token under the distribution it was drawn from; 0
        elsewhere.
      allowed: [B, T, L] uint8, the classes of tokens (`protocol.ALLOW_*`) among which a sampled
        token was drawn; 0 elsewhere. Rescoring builds the masked distribution from it again. It
        does not record a cut by top-k or top-p, so train without those.
      length: [B, T] number of tokens of the thread.
      status: [B, T] a `Status`.
      parent: [B, T] thread index of the parent, NO_PARENT for the root and free indices.
      round: [B, T] which of the parent's spawns made this thread, from 0; 0 for the root.
      depth: [B, T] number of ancestors; 0 for the root.
      child: [B, T] place among the children of that spawn, from 0; 0 for the root.
      start: [B, T] sequential clock (sampled tokens on the longest chain) at which the thread
        began.
      end: [B, T] sequential clock at which it ended.
      peak: [B, T] the most positions of the window that the thread occupied at once, prompt tokens
        included.
      total_tokens: [B] sampled tokens of all threads.
      sequential_tokens: [B] sampled tokens on the longest chain, which is the root's `end`.
      children: [B] threads that spawns made.
      refusals: [B, 5] messages that started no child, counted by `Refusal`; NO_MESSAGE counts
        spawns without a message.
      truncations: [B] threads that ended OUT_OF_WINDOW or OUT_OF_BUDGET.
    """

    tokens: jax.Array
    position: jax.Array
    hidden_block: jax.Array
    sampled: jax.Array
    logprob: jax.Array
    allowed: jax.Array
    length: jax.Array
    status: jax.Array
    parent: jax.Array
    round: jax.Array
    depth: jax.Array
    child: jax.Array
    start: jax.Array
    end: jax.Array
    peak: jax.Array
    total_tokens: jax.Array
    sequential_tokens: jax.Array
    children: jax.Array
    refusals: jax.Array
    truncations: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What a rollout cost. Unlike the forest it depends on the schedule.

    Attributes:
      steps: [] decode steps; of a rollout on a mesh [shards].
      live: [] decode slots that decoded a token, summed over the steps; of a rollout on a mesh
        [shards]. `live / (steps * W)` is the decode slot occupancy.
    """

    steps: jax.Array
    live: jax.Array
