"""Draws a token and gives its log-prob under the distribution it was drawn from.

Engine and reference interpreter share this file, so it is proved by itself (tests/threads/test_sampling.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from apr_jax.threads import protocol as p

_CLASS_OF_CONTROL = {
    p.SPAWN: p.ALLOW_SPAWN,
    p.MSG: p.ALLOW_MSG,
    p.END_SPAWN: p.ALLOW_END_SPAWN,
    p.JOIN: p.ALLOW_JOIN,
    p.EOS: p.ALLOW_EOS,
}


def token_classes(vocab: int) -> np.ndarray:
    """[V] uint8, the class of each token id."""
    control = [_CLASS_OF_CONTROL.get(token, p.ALLOW_OTHER) for token in range(len(p.CONTROL_PIECES))]
    return np.asarray((control + [p.ALLOW_TEXT] * vocab)[:vocab], np.uint8)


def draw(
    logits: Float[Array, "W V"],
    thread_key: UInt32[Array, "W 2"],
    index: Int[Array, " W"],
    temperature: Float[Array, " W"],
    top_k: Int[Array, " W"],
    top_p: Float[Array, " W"],
    allowed: UInt8[Array, " W"],
) -> tuple[Int[Array, " W"], Float[Array, " W"]]:
    """Gumbel-max sampling from softmax(logits / temperature) over the allowed tokens, cut by top-k, then by top-p.

    Args:
      thread_key: key data of the threads. It is folded with `index`, the token's place in the thread's stream: positions
        repeat after a join and would draw the same noise twice.
      temperature: 0 takes the most likely token; its log-probs are those at temperature 1, and top-k and top-p play no part.
      top_k: 0 is off; top_p: 1 is off. Of equally likely tokens those with lower ids are kept.
      allowed: classes of tokens (`protocol.ALLOW_*`) that may be drawn; at least one that the vocabulary has.

    Returns:
      tokens int32 and their log-probs.
    """
    mask = (allowed[:, None] & token_classes(logits.shape[1])) > 0
    greedy = temperature <= 0
    scaled = jnp.where(mask, logits / jnp.where(greedy, 1.0, temperature)[:, None], -jnp.inf)
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    top_k, top_p = jnp.where(greedy, 0, top_k), jnp.where(greedy, 1.0, top_p)
    cuts = (top_k > 0) | (top_p < 1)

    def cut() -> Array:
        left = jax.nn.log_softmax(jnp.where(_kept(logprobs, top_k, top_p), logprobs, -jnp.inf), axis=-1)
        return jnp.where(cuts[:, None], left, logprobs)  # Bit for bit what it is in a batch where nobody cuts.

    # Sorting costs more than all the rest: it is skipped in batches where nobody asks for it.
    logprobs = jax.lax.cond(jnp.any(cuts), cut, lambda: logprobs)

    def noise(key_data: Array, at: Array) -> Array:
        return jax.random.gumbel(
            jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=p.KEYS), at), logits.shape[1:]
        )

    noisy = jax.lax.cond(
        jnp.all(greedy),
        lambda: logprobs,
        lambda: logprobs + jnp.where(greedy[:, None], 0.0, jax.vmap(noise)(thread_key, index)),
    )
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def _kept(logprobs: Float[Array, "W V"], top_k: Int[Array, " W"], top_p: Float[Array, " W"]) -> Bool[Array, "W V"]:
    """The tokens that top-k and top-p leave. Top-p counts probability among those that top-k left."""
    vocab = logprobs.shape[1]
    order = jnp.argsort(-logprobs, axis=1, stable=True)
    likely_first = jnp.take_along_axis(logprobs, order, axis=1)
    rank = jnp.arange(vocab)[None, :]
    in_k = rank < jnp.where(top_k > 0, top_k, vocab)[:, None]
    prob = jax.nn.softmax(jnp.where(in_k, likely_first, -jnp.inf), axis=1)
    # A token is kept if those before it do not reach top_p yet; the first one always is.
    in_p = (jnp.cumsum(prob, axis=1) - prob < top_p[:, None]) | (top_p >= 1)[:, None]
    place = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(in_k & in_p, place, axis=1)
