"""Position, hidden block and `sampled` of every token, computed from the token sequences alone.

They follow from the protocol, so the device loop does not write them step by step. Two facts make
that possible. Only the last token of a sequence can be out of place, because such a token ends its
thread. And no thread ends inside a joined block. So every `<joined>` except a last token was
written by the engine, and a `<spawn>` opens a block unless a block is open already or the answer
has begun.

Shapes: `rows` threads, L tokens a thread.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from apr_jax.threads import protocol


class Layout(NamedTuple):
    """Fields of the same names in `ThreadForest`, of any number of threads."""

    position: Int[Array, "rows L"]
    hidden_block: Int[Array, "rows L"]
    sampled: Bool[Array, "rows L"]


def lay_out(
    tokens: Int[Array, "rows L"], prompt_length: Int[Array, " rows"], length: Int[Array, " rows"]
) -> Layout:
    """Computes the layout of token sequences.

    Args:
      tokens: the token sequences.
      prompt_length: number of tokens of each thread's prompt.
      length: number of tokens of each thread; all tokens after them are padding.
    """
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]  # [1, L]
    inside = place < length[:, None]  # [rows, L]
    after_prompt = inside & (place >= prompt_length[:, None])
    is_last = place == length[:, None] - 1

    def count_before(mask: Bool[Array, "rows L"]) -> Int[Array, "rows L"]:
        return jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask

    # A `<spawn>` opens a block if all earlier ones were closed by a `<joined>`. [rows, L]
    spawn = after_prompt & (tokens == protocol.SPAWN)
    joined = after_prompt & (tokens == protocol.JOINED) & ~is_last
    in_answer = count_before(after_prompt & (tokens == protocol.JOIN)) > 0
    opens = spawn & (count_before(spawn) == count_before(joined)) & ~in_answer

    # Between its `<spawn>` and the `<joined>` that follows, a block is open. [rows, L]
    rounds = jnp.cumsum(opens, axis=1, dtype=jnp.int32)
    in_block = inside & (rounds > jnp.cumsum(joined, axis=1, dtype=jnp.int32))
    in_joined = jnp.cumsum(joined, axis=1) > count_before(
        after_prompt & (tokens == protocol.END_JOINED)
    )

    # A `<joined>` takes the position of the `<spawn>` before it, and so hides what is between.
    opened_at = jax.lax.cummax(jnp.where(opens, place, 0), axis=1)  # [rows, L]
    hidden = jnp.cumsum(jnp.where(joined, place - opened_at, 0), axis=1, dtype=jnp.int32)

    return Layout(
        position=jnp.where(inside, place - hidden, 0),
        hidden_block=jnp.where(in_block, rounds, 0),
        sampled=after_prompt & ~in_joined,
    )
