"""The thread protocol: control pieces, and what one sampled token does to a thread.

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
thread, limits are checked in this order: window and stream (OUT_OF_WINDOW; not after `</spawn>`,
the block is about to be hidden), then tokens and sequential tokens (OUT_OF_BUDGET)."""

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

# Classes of tokens that a rollout can forbid; a set of them is a sum of these.
ALLOW_TEXT, ALLOW_SPAWN, ALLOW_MSG, ALLOW_END_SPAWN, ALLOW_JOIN, ALLOW_EOS = (
    1 << bit for bit in range(6)
)
ALLOW_OTHER = 64  # <pad> <bos> <unk> <joined> </joined>
ALLOW_ALL = 127

THINK, OPENED, MESSAGE, ANSWER = range(4)
_PHASES = 4
_CLOSES = 100  # Marks the transition to "suspended" in the table below.
_ENDS = 200  # + the status with which the thread ends.


def _table() -> list[list[int]]:
    text = len(CONTROL_PIECES)  # Every id from here on is text.
    rows = [[_ENDS + Status.MALFORMED] * (text + 1) for _ in range(_PHASES)]
    rows[THINK][text] = THINK
    rows[THINK][SPAWN] = OPENED
    rows[THINK][JOIN] = ANSWER
    rows[THINK][EOS] = _ENDS + Status.NO_ANSWER
    rows[OPENED][MSG] = rows[MESSAGE][MSG] = rows[MESSAGE][text] = MESSAGE
    rows[OPENED][END_SPAWN] = rows[MESSAGE][END_SPAWN] = _CLOSES
    rows[ANSWER][text] = ANSWER
    rows[ANSWER][EOS] = _ENDS + Status.DONE
    return rows


def advance(
    phase: Int[Array, " W"], token: Int[Array, " W"]
) -> tuple[Int[Array, " W"], Bool[Array, " W"], Int[Array, " W"]]:
    """What a sampled token does to its thread.

    Returns:
      the next phase; whether the token closes a spawn block; the status with which the thread ends,
      or RUNNING.
    """
    outcome = jnp.asarray(_table(), jnp.int32)[phase, jnp.minimum(token, len(CONTROL_PIECES))]
    closes = outcome == _CLOSES
    status = jnp.where(outcome >= _ENDS, outcome - _ENDS, Status.RUNNING)
    return jnp.where(outcome < _PHASES, outcome, THINK), closes, status


def allowed_classes(
    phase: Int[Array, " W"],
    messages: Int[Array, " W"],
    budget: Int[Array, " W"],
    may_spawn: Int[Array, " W"],
    made: Int[Array, " W"],
    forced: Int[Array, " W"],
    limits: Limits,
) -> UInt8[Array, " W"]:
    """The classes that the next token may be of: all, less what `limits.constrain` and a forced
    number of children forbid.

    Args:
      messages: in the open spawn block.
      budget: tokens that the thread may still sample, the next one included.
      may_spawn: children for which the thread has threads; 0 if it is too deep.
      made: children of its earlier spawns; `forced`: how many it must make, negative if it is free.
    """

    def by_phase(think: Array | int, opened: int, message: Array | int, answer: int) -> Array:
        return jnp.select(
            [phase == THINK, phase == OPENED, phase == MESSAGE], [think, opened, message], answer
        )

    def unless(condition: Array, classes: int) -> Array:
        return jnp.where(condition, 0, classes)

    least = ALLOW_TEXT + ALLOW_JOIN
    # Each started child needs a token and so does the parent, after this token and the `</spawn>`.
    room = budget - 3
    more = jnp.minimum(jnp.minimum(limits.children, may_spawn), room)
    grammar = by_phase(
        jnp.where((may_spawn >= 1) & (room >= 2), least + ALLOW_SPAWN, least),
        ALLOW_MSG,
        ALLOW_END_SPAWN
        + unless(messages > room, ALLOW_TEXT)
        + unless(messages + 1 > more, ALLOW_MSG),
        ALLOW_TEXT + ALLOW_EOS,
    )
    wanted = forced - made
    kept = by_phase(
        jnp.where(wanted > 0, ALLOW_ALL - ALLOW_JOIN - ALLOW_EOS, ALLOW_ALL - ALLOW_SPAWN),
        ALLOW_ALL - ALLOW_END_SPAWN,
        jnp.where(
            messages >= jnp.minimum(limits.children, wanted), ALLOW_ALL - ALLOW_MSG, ALLOW_ALL
        ),
        ALLOW_ALL,
    )
    everything = jnp.full_like(phase, ALLOW_ALL)
    classes = jnp.where(forced >= 0, kept, everything) & (
        grammar if limits.constrain else everything
    )
    return classes.astype(jnp.uint8)
