"""Position, hidden block and sampled of every token, read off the streams alone.

They follow from the protocol, so the device loop does not write them step by step. Only the last
token of a stream can be out of place (it ended its thread), and no thread ends inside a joined
block; so every `<joined>` but a last one was given, and a `<spawn>` opens a block unless a block is
open or the answer has begun."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from apr_jax.threads import protocol


class Layout(NamedTuple):
    """[rows, L] each, as in ThreadForest."""

    position: Int[Array, "rows L"]
    hidden_block: Int[Array, "rows L"]
    sampled: Bool[Array, "rows L"]


def lay_out(
    tokens: Int[Array, "rows L"], given: Int[Array, " rows"], length: Int[Array, " rows"]
) -> Layout:
    """Args:
    given: tokens of the thread's prompt; `length`: tokens of the stream, all else is padding.
    """
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    inside = at < length[:, None]
    own = inside & (at >= given[:, None])
    last = at == length[:, None] - 1

    def before(mask: Array) -> Array:
        return jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask

    spawn = own & (tokens == protocol.SPAWN)
    joined = own & (tokens == protocol.JOINED) & ~last
    answered = before(own & (tokens == protocol.JOIN)) > 0
    opens = spawn & (before(spawn) == before(joined)) & ~answered
    rounds = jnp.cumsum(opens, axis=1, dtype=jnp.int32)
    in_block = inside & (rounds > jnp.cumsum(joined, axis=1, dtype=jnp.int32))
    in_joined = jnp.cumsum(joined, axis=1) > before(own & (tokens == protocol.END_JOINED))
    opened_at = jax.lax.cummax(jnp.where(opens, at, 0), axis=1)
    hidden = jnp.cumsum(jnp.where(joined, at - opened_at, 0), axis=1, dtype=jnp.int32)
    return Layout(
        position=jnp.where(inside, at - hidden, 0),
        hidden_block=jnp.where(in_block, rounds, 0),
        sampled=own & ~in_joined,
    )
