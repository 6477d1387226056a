"""Draws a token, and gives its log-prob under the distribution it was drawn from.

The engine and the reference interpreter share this file, so it is proved by itself
(tests/threads/test_sampling.py).

Shapes: W decode slots, S of them that are served at a time, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from apr_jax.threads import protocol as p
from apr_jax.threads.keys import token_key

# The most logits (decode slots x vocabulary) from which tokens are drawn at once. Log-probs, noise
# and sorting take several arrays of this size.
_BLOCK = 2**20
_CLASS_OF_CONTROL = {
    p.SPAWN: p.ALLOW_SPAWN,
    p.MSG: p.ALLOW_MSG,
    p.END_SPAWN: p.ALLOW_END_SPAWN,
    p.JOIN: p.ALLOW_JOIN,
    p.EOS: p.ALLOW_EOS,
}


def token_classes(vocab: int) -> np.ndarray:
    """Lists the class (`protocol.ALLOW_*`) of each token id, uint8 [V]."""
    control = [
        _CLASS_OF_CONTROL.get(token, p.ALLOW_OTHER) for token in range(len(p.CONTROL_PIECES))
    ]
    text = [p.ALLOW_TEXT] * vocab
    return np.asarray((control + text)[:vocab], np.uint8)


def draw(
    logits: Float[ArrayLike, "W V"],
    thread_key: UInt32[ArrayLike, "W 2"],
    index: Int[ArrayLike, " W"],
    temperature: Float[ArrayLike, " W"],
    top_k: Int[ArrayLike, " W"],
    top_p: Float[ArrayLike, " W"],
    allowed: UInt8[ArrayLike, " W"],
) -> tuple[Int[Array, " W"], Float[Array, " W"]]:
    """Draws a token for each decode slot.

    The distribution is softmax(logits / temperature) over the allowed tokens, cut by top-k and then
    by top-p. The draw adds Gumbel noise to the log-probs and takes the largest sum.

    With a large vocabulary the decode slots are served some at a time, which bounds the memory. No
    slot's draw depends on those of others, so it changes no bit.

    Args:
      logits: the model's logits of the next token.
      thread_key: key data of the threads.
      index: the token's place in its thread's token sequence, which is folded into the key. (Its
        position would not do: positions repeat after a join and would draw the same noise twice.)
      temperature: 0 takes the most likely token. Its log-prob is that at temperature 1, and top-k
        and top-p play no part.
      top_k: number of most likely tokens that are kept; 0 keeps all. Of equally likely tokens those
        with lower ids are kept.
      top_p: probability that the kept tokens must reach together; 1 keeps all.
      allowed: classes of tokens (`protocol.ALLOW_*`) that may be drawn, at least one of which the
        vocabulary has.

    Returns:
      tokens int32 and their log-probs.
    """
    slots, vocab = logits.shape
    size = _slots_at_once(slots, vocab)
    arguments = (logits, thread_key, index, temperature, top_k, top_p, allowed)
    if size == slots:
        return _draw_at_once(*arguments)

    def cut(x: ArrayLike) -> Array:
        x = jnp.asarray(x)
        return x.reshape(slots // size, size, *x.shape[1:])

    token, logprob = jax.lax.map(lambda some: _draw_at_once(*some), tuple(map(cut, arguments)))
    return token.reshape(slots), logprob.reshape(slots)


def _slots_at_once(slots: int, vocab: int) -> int:
    """Returns how many decode slots are served at a time: a divisor of their number."""
    most = max(1, min(slots, _BLOCK // vocab))
    return max(size for size in range(1, most + 1) if slots % size == 0)


def _draw_at_once(
    logits: Float[ArrayLike, "S V"],
    thread_key: UInt32[ArrayLike, "S 2"],
    index: Int[ArrayLike, " S"],
    temperature: Float[ArrayLike, " S"],
    top_k: Int[ArrayLike, " S"],
    top_p: Float[ArrayLike, " S"],
    allowed: UInt8[ArrayLike, " S"],
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Does what `draw` does, for all given decode slots together."""
    vocab = logits.shape[1]
    is_allowed = (allowed[:, None] & token_classes(vocab)) > 0  # [S, V]
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    logprobs = jax.nn.log_softmax(jnp.where(is_allowed, scaled, -jnp.inf), axis=-1)  # [S, V]

    top_k = jnp.where(greedy, 0, top_k)
    top_p = jnp.where(greedy, 1.0, top_p)
    has_cut = (top_k > 0) | (top_p < 1)  # [S]

    def cut() -> Float[Array, "S V"]:
        kept = jnp.where(_kept(logprobs, top_k, top_p), logprobs, -jnp.inf)
        # Slots without a cut keep, bit for bit, what they have in a batch where no slot has one.
        return jnp.where(has_cut[:, None], jax.nn.log_softmax(kept, axis=-1), logprobs)

    # Sorting costs more than all the rest, so it is skipped in batches without a cut.
    logprobs = jax.lax.cond(jnp.any(has_cut), cut, lambda: logprobs)

    def noise(thread: UInt32[Array, "2"], place: Int[Array, ""]) -> Float[Array, " V"]:
        return gumbel_noise(token_key(thread, place), vocab)

    def with_noise() -> Float[Array, "S V"]:
        return logprobs + jnp.where(greedy[:, None], 0.0, jax.vmap(noise)(thread_key, index))

    noisy = jax.lax.cond(jnp.all(greedy), lambda: logprobs, with_noise)
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)  # [S]
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def gumbel_noise(key: jax.Array, vocab: int) -> Float[Array, " V"]:
    """Returns independent standard Gumbel numbers, -log(-log(u)), exact at both ends of u.

    `jax.random.gumbel` makes them of 23 random bits: no number is larger than 15.9, so tokens of
    less than about 1e-7 are hardly ever drawn, however many of them there are. Here u has 64 bits.

    A block of threefry holds two words. Each is the high word of one token's u and the low word of
    another's, so V tokens take V / 2 blocks. The high words are independent; what the two tokens
    share lies below 2^-32 of either u.
    """
    half = (vocab + 1) // 2
    # The key data of split keys are whole blocks; `jax.random.bits` would fold each to a word.
    block = jax.random.key_data(jax.random.split(key, half))  # [V / 2, 2]
    high = jnp.concatenate([block[:, 0], block[:, 1]])[:vocab]
    low = jnp.concatenate([block[:, 1], block[:, 0]])[:vocab]
    return gumbel_of_words(high, low)


def gumbel_of_words(
    high: UInt32[ArrayLike, " V"], low: UInt32[ArrayLike, " V"]
) -> Float[Array, " V"]:
    """Computes -log(-log(u)), where 1 - u is the 64-bit number (high, low) divided by 2^64."""
    # A float32 is fine near 0 and coarse near 1: take the distance to the nearer end of (0, 1).
    is_near_one = high < jnp.uint32(2**31)
    distance = _fraction(jnp.where(is_near_one, high, ~high), jnp.where(is_near_one, low, ~low))

    # -log(u) is an exponential number.
    exponential = -jnp.where(is_near_one, jnp.log1p(-distance), jnp.log(distance))
    return -jnp.log(exponential)


def _fraction(high: UInt32[Array, " V"], low: UInt32[Array, " V"]) -> Float[Array, " V"]:
    """Computes (number + 1/2) / 2^64, which is never 0.

    All factors are powers of two, so the result is the same to the bit whether or not the compiler
    fuses products and sums.
    """
    return high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) * 2.0**-64 + 2.0**-65)


def _kept(
    logprobs: Float[ArrayLike, "S V"], top_k: Int[ArrayLike, " S"], top_p: Float[ArrayLike, " S"]
) -> Bool[Array, "S V"]:
    """Returns which tokens top-k and top-p keep.

    Top-p counts probability among the tokens that top-k keeps.
    """
    vocab = logprobs.shape[1]
    order = jnp.argsort(-logprobs, axis=1, stable=True)
    likely_first = jnp.take_along_axis(logprobs, order, axis=1)  # [S, V], as all that follow

    rank = jnp.arange(vocab)[None, :]
    within_k = rank < jnp.where(top_k > 0, top_k, vocab)[:, None]

    # A token is kept if those before it do not reach top_p yet; so the first one always is.
    prob = jax.nn.softmax(jnp.where(within_k, likely_first, -jnp.inf), axis=1)
    before = jnp.cumsum(prob, axis=1) - prob
    within_p = (before < top_p[:, None]) | (top_p >= 1)[:, None]

    # Back to the order of token ids.
    rank_of_token = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(within_k & within_p, rank_of_token, axis=1)
