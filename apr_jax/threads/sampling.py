"""Draws a token and gives its log-prob under the distribution it was drawn from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def draw(
    logits: Float[Array, "W V"],
    thread_key: UInt32[Array, "W 2"],
    index: Int[Array, " W"],
    temperature: Float[Array, " W"],
) -> tuple[Int[Array, " W"], Float[Array, " W"]]:
    """Gumbel-max sampling from softmax(logits / temperature); temperature 0 takes the most likely token.

    Args:
      thread_key: key data of the threads. It is folded with `index`, the token's place in the thread's stream: positions
        repeat after a join and would draw the same noise twice.
      temperature: 0 is greedy, and its log-probs are those at temperature 1.

    Returns:
      tokens int32 and their log-probs.
    """
    greedy = temperature <= 0
    logprobs = jax.nn.log_softmax(logits / jnp.where(greedy, 1.0, temperature)[:, None], axis=-1)

    def noise(key_data: Array, at: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key_data), at), logits.shape[1:])

    score = logprobs + jnp.where(greedy[:, None], 0.0, jax.vmap(noise)(thread_key, index))
    token = jnp.argmax(score, axis=-1).astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
