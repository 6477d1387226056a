"""The thread protocol: the control tokens, and what one sampled token does to its thread.

    phase      token                 becomes
    THINK      text                  THINK
    THINK      <spawn>               OPENED      a new hidden block begins with this token
    THINK      <join>                ANSWER
    THINK      <eos>                 ends NO_ANSWER
    OPENED     <msg>                 MESSAGE
    OPENED     </spawn>              suspended: a spawn without a message
    MESSAGE    text, <msg>           MESSAGE
    MESSAGE    </spawn>              suspended until its children end
    ANSWER     text                  ANSWER
    ANSWER     <eos>                 ends DONE
    any other pair                   ends MALFORMED

A thread that ends in any way but DONE has the empty answer. After a token that does not end the
thread, limits are checked in this order: first the window and the length of the token sequence
(OUT_OF_WINDOW; not after `</spawn>`, because the block is about to be hidden), then tokens and
sequential tokens (OUT_OF_BUDGET).

Shape: W decode slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8

from apr_jax.threads.forest import Status
from apr_jax.threads.limits import Limits

CONTROL_PIECES = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<spawn>",
    "<msg>",
    "</spawn>",
    "<joined>",
    "</joined>",
    "<join>",
)
PAD, BOS, EOS, UNK, SPAWN, MSG, END_SPAWN, JOINED, END_JOINED, JOIN = range(len(CONTROL_PIECES))

# Classes of tokens that a rollout can forbid. A set of classes is the sum of its members.
ALLOW_TEXT = 1
ALLOW_SPAWN = 2
ALLOW_MSG = 4
ALLOW_END_SPAWN = 8
ALLOW_JOIN = 16
ALLOW_EOS = 32
ALLOW_OTHER = 64  # <pad> <bos> <unk> <joined> </joined>
ALLOW_ALL = 127

THINK, OPENED, MESSAGE, ANSWER = range(4)
_PHASES = 4
_CLOSES = 100  # Marks the transition to "suspended" in the table below.
_ENDS = 200  # Marks a transition that ends the thread; its status is added to it.


def _transitions() -> list[list[int]]:
    """Lists what follows each phase (row) and token (column); the last column is text."""
    text = len(CONTROL_PIECES)  # Every id from here on is text.
    table = [[_ENDS + Status.MALFORMED] * (text + 1) for _ in range(_PHASES)]

    table[THINK][text] = THINK
    table[THINK][SPAWN] = OPENED
    table[THINK][JOIN] = ANSWER
    table[THINK][EOS] = _ENDS + Status.NO_ANSWER

    table[OPENED][MSG] = MESSAGE
    table[OPENED][END_SPAWN] = _CLOSES

    table[MESSAGE][text] = MESSAGE
    table[MESSAGE][MSG] = MESSAGE
    table[MESSAGE][END_SPAWN] = _CLOSES

    table[ANSWER][text] = ANSWER
    table[ANSWER][EOS] = _ENDS + Status.DONE
    return table


def advance(
    phase: Int[Array, " W"], token: Int[Array, " W"]
) -> tuple[Int[Array, " W"], Bool[Array, " W"], Int[Array, " W"]]:
    """Looks up what a sampled token does to its thread.

    Returns:
      the next phase; whether the token closes a spawn block; the status with which the thread ends,
      or RUNNING.
    """
    column = jnp.minimum(token, len(CONTROL_PIECES))  # [W]
    outcome = jnp.asarray(_transitions(), jnp.int32)[phase, column]  # [W]

    closes = outcome == _CLOSES
    status = jnp.where(outcome >= _ENDS, outcome - _ENDS, Status.RUNNING)
    next_phase = jnp.where(outcome < _PHASES, outcome, THINK)
    return next_phase, closes, status


def allowed_classes(
    phase: Int[Array, " W"],
    messages: Int[Array, " W"],
    budget: Int[Array, " W"],
    free_threads: Int[Array, " W"],
    made: Int[Array, " W"],
    forced: Int[Array, " W"],
    limits: Limits,
) -> UInt8[Array, " W"]:
    """Returns the classes that the next token of each thread may belong to.

    All classes are allowed, except those that `limits.constrain` or a forced number of children
    forbids. `docs/protocol.md` has both rules as tables.

    Args:
      phase: where the thread is in the protocol.
      messages: number of messages in its open spawn block.
      budget: tokens that it may still sample, the next one included.
      free_threads: threads that its children could take; 0 if it is too deep to spawn.
      made: children that its earlier spawns made.
      forced: children that it must make in all; negative if it is free.
      limits: the limits of the rollout.
    """
    everything = jnp.full_like(phase, ALLOW_ALL)
    constrained = everything
    if limits.constrain:
        constrained = _constrained_classes(phase, messages, budget, free_threads, limits)

    still_to_make = forced - made
    forcing = _forcing_classes(phase, messages, still_to_make, limits)
    forcing = jnp.where(forced >= 0, forcing, everything)
    return (forcing & constrained).astype(jnp.uint8)


def _constrained_classes(
    phase: Int[Array, " W"],
    messages: Int[Array, " W"],
    budget: Int[Array, " W"],
    free_threads: Int[Array, " W"],
    limits: Limits,
) -> Int[Array, " W"]:
    """Returns the classes with which no thread is malformed and no message is refused."""
    # Every child must have a token, and so must the parent, after this token and the `</spawn>`.
    affordable = budget - 3
    most_messages = jnp.minimum(jnp.minimum(limits.children, free_threads), affordable)

    without_spawn = ALLOW_TEXT + ALLOW_JOIN
    can_spawn = (free_threads >= 1) & (affordable >= 2)
    thinking = jnp.where(can_spawn, without_spawn + ALLOW_SPAWN, without_spawn)

    text_in_message = jnp.where(messages > affordable, 0, ALLOW_TEXT)
    another_message = jnp.where(messages + 1 > most_messages, 0, ALLOW_MSG)
    in_message = ALLOW_END_SPAWN + text_in_message + another_message

    return _by_phase(phase, thinking, ALLOW_MSG, in_message, ALLOW_TEXT + ALLOW_EOS)


def _forcing_classes(
    phase: Int[Array, " W"],
    messages: Int[Array, " W"],
    still_to_make: Int[Array, " W"],
    limits: Limits,
) -> Int[Array, " W"]:
    """Returns the classes with which a thread makes just as many children as it must."""
    # It may not end before all children are made, and may not spawn after that.
    until_all_made = ALLOW_ALL - ALLOW_JOIN - ALLOW_EOS
    after_all_made = ALLOW_ALL - ALLOW_SPAWN
    thinking = jnp.where(still_to_make > 0, until_all_made, after_all_made)

    # A spawn has at least one message, and no more than are still to make.
    opened = ALLOW_ALL - ALLOW_END_SPAWN
    has_enough = messages >= jnp.minimum(limits.children, still_to_make)
    in_message = jnp.where(has_enough, ALLOW_ALL - ALLOW_MSG, ALLOW_ALL)

    return _by_phase(phase, thinking, opened, in_message, ALLOW_ALL)


def _by_phase(
    phase: Int[Array, " W"],
    think: Int[Array, " W"],
    opened: int,
    message: Int[Array, " W"],
    answer: int,
) -> Int[Array, " W"]:
    """Chooses for each thread the value of its phase."""
    conditions = [phase == THINK, phase == OPENED, phase == MESSAGE]
    return jnp.select(conditions, [think, opened, message], answer)
