"""ThreadForest: every thread of every tree of a batch, as fixed arrays.

It is what the rollout returns, what rescoring and the loss consume, what evaluation measures and
what the viewer draws. A demonstration is a forest too: one that nobody sampled.

Shapes: B trees, T threads a tree, L stream length.
"""

import dataclasses
import enum

import jax

ROOT = 0  # The thread index of the root thread.
NO_PARENT = -1  # Parent of the root and of unused threads.


class Status(enum.IntEnum):
    """What a thread index holds. Everything from DONE on has ended."""

    FREE = 0  # No thread was ever placed here.
    READY = 1  # Has tokens to read or to sample and waits for a decode slot.
    RUNNING = 2  # Sits on a decode slot.
    WAITING = 3  # Suspended at `</spawn>` until its children end.
    DONE = 4  # `<join> answer <eos>`.
    NO_ANSWER = 5  # `<eos>` before `<join>`: the answer is empty.
    MALFORMED = 6  # A control token out of place: the answer is empty.
    OUT_OF_WINDOW = 7  # No position or no room in the stream is left: the answer is empty.
    OUT_OF_BUDGET = 8  # The tree's token or sequential-token budget is spent: the answer is empty.


class Refusal(enum.IntEnum):
    """Why a message got no thread: columns of `ThreadForest.refusals`."""

    NO_MESSAGE = 0
    TOO_MANY = 1
    TOO_DEEP = 2
    NO_SLOT = 3
    NO_BUDGET = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThreadForest:
    """A batch of thread trees. Integers are int32, masks bool, log-probs float32.

    Attributes:
      tokens: [B, T, L] each thread's stream in time order, never overwritten; `<pad>` from `length`
        on.
      position: [B, T, L] place in the thread's window; after a join it goes on from where `<spawn>`
        stood.
      hidden block: [B, T, L] 0 = visible to all later tokens of the thread; n = the thread's n-th
        spawn block, visible to itself.
      sampled: [B, T, L] True where the policy chose the token.
      logprob: [B, T, L] log-prob of the sampled token under the distribution it was drawn from; 0
        elsewhere.
      allowed: [B, T, L] uint8, the classes of tokens (`protocol.ALLOW_*`) of which the sampled
        token was drawn; 0 elsewhere. With it rescoring builds the masked distribution again (but
        knows of no cut by top-k or top-p: train without those).
      length: [B, T] tokens in the stream.
      status: [B, T] a `Status`.
      parent: [B, T] thread index of the parent, NO_PARENT for the root and free threads.
      round: [B, T] which of the parent's spawns made this thread, from 0; 0 for the root.
      depth: [B, T] 0 for the root.
      child: [B, T] place among the children of that spawn, from 0; 0 for the root.
      start: [B, T] sequential clock (sampled tokens on the longest chain) at which the thread
        began.
      end: [B, T] sequential clock at which it ended.
      peak: [B, T] most positions of the window that the thread occupied at once, given tokens
        included.
      total_tokens: [B] sampled tokens of all threads.
      sequential_tokens: [B] sampled tokens on the longest chain: the root's `end`.
      children: [B] threads made by spawns.
      refusals: [B, 5] messages of spawns that were given no thread, by `Refusal`; NO_MESSAGE counts
        spawns without one.
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
