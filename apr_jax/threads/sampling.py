"""Draws a token and gives its log-prob under the distribution it was drawn from.

Engine and reference interpreter share this file, so it is proved by itself
(tests/threads/test_sampling.py)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from apr_jax.threads import protocol as p
from apr_jax.threads.keys import token_key

_CLASS_OF_CONTROL = {
    p.SPAWN: p.ALLOW_SPAWN,
    p.MSG: p.ALLOW_MSG,
    p.END_SPAWN: p.ALLOW_END_SPAWN,
    p.JOIN: p.ALLOW_JOIN,
    p.EOS: p.ALLOW_EOS,
}


def token_classes(vocab: int) -> np.ndarray:
    """[V] uint8, the class of each token id."""
    control = [
        _CLASS_OF_CONTROL.get(token, p.ALLOW_OTHER) for token in range(len(p.CONTROL_PIECES))
    ]
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
    """Gumbel-max sampling from softmax(logits / temperature) over the allowed tokens, cut by top-k,
    then by top-p.

    Args:
      thread_key: key data of the threads. It is folded with `index`, the token's place in the
        thread's stream: positions repeat after a join and would draw the same noise twice.
      temperature: 0 takes the most likely token; its log-probs are those at temperature 1, and
        top-k and top-p play no part.
      top_k: 0 is off; top_p: 1 is off. Of equally likely tokens those with lower ids are kept.
      allowed: classes of tokens (`protocol.ALLOW_*`) that may be drawn; at least one that the
        vocabulary has.

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
        left = jax.nn.log_softmax(
            jnp.where(_kept(logprobs, top_k, top_p), logprobs, -jnp.inf), axis=-1
        )
        # Bit for bit what it is in a batch where nobody cuts.
        return jnp.where(cuts[:, None], left, logprobs)

    # Sorting costs more than all the rest: it is skipped in batches where nobody asks for it.
    logprobs = jax.lax.cond(jnp.any(cuts), cut, lambda: logprobs)

    def noise(thread: Array, place: Array) -> Array:
        return gumbel_noise(token_key(thread, place), logits.shape[1])

    noisy = jax.lax.cond(
        jnp.all(greedy),
        lambda: logprobs,
        lambda: logprobs + jnp.where(greedy[:, None], 0.0, jax.vmap(noise)(thread_key, index)),
    )
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def gumbel_noise(key: jax.Array, vocab: int) -> Float[Array, " V"]:
    """[V] independent standard Gumbel numbers, -log(-log(u)), exact at both ends of u.

    `jax.random.gumbel` makes them of 23 random bits: no number is larger than 15.9, so tokens of
    less than about 1e-7 are hardly ever drawn, however many of them there are. Here u has 64 bits.

    A block of threefry holds two words. Each is the high word of one token's u and the low word of
    another's, so V tokens take V / 2 blocks. The high words are independent; what the two tokens
    share lies below 2^-32 of either u.
    """
    half = (vocab + 1) // 2
    # The key data of split keys are the blocks, whole; `jax.random.bits` would fold each to a word.
    block = jax.random.key_data(jax.random.split(key, half))  # [V / 2, 2]
    high = jnp.concatenate([block[:, 0], block[:, 1]])[:vocab]
    low = jnp.concatenate([block[:, 1], block[:, 0]])[:vocab]
    return gumbel_of_words(high, low)


def gumbel_of_words(high: UInt32[Array, " V"], low: UInt32[Array, " V"]) -> Float[Array, " V"]:
    """-log(-log(u)) where 1 - u is the 64-bit number (high, low) as a fraction of 2^64."""
    # A float32 is fine near 0 and coarse near 1: take the distance to the nearer end of (0, 1).
    from_one = high < jnp.uint32(2**31)
    distance = _fraction(jnp.where(from_one, high, ~high), jnp.where(from_one, low, ~low))
    # An exponential number, -log(u).
    exponential = -jnp.where(from_one, jnp.log1p(-distance), jnp.log(distance))
    return -jnp.log(exponential)


def _fraction(high: UInt32[Array, " V"], low: UInt32[Array, " V"]) -> Float[Array, " V"]:
    """(number + 1/2) / 2^64, so never 0.

    All factors are powers of two, so the result is the same to the bit whether or not the compiler
    fuses products and sums.
    """
    return high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) * 2.0**-64 + 2.0**-65)


def _kept(
    logprobs: Float[Array, "W V"], top_k: Int[Array, " W"], top_p: Float[Array, " W"]
) -> Bool[Array, "W V"]:
    """The tokens that top-k and top-p leave. Top-p counts probability among those that top-k
    left.
    """
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
