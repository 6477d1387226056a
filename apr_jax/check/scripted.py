"""A policy without a network: logits looked up by a hash of what the thread sees.

The hash runs through the cache token by token, so a cache that is not rewound or prefilled rightly,
or a context longer than the bound it is decoded under, gives another token at once. `manners` says
how well the policy keeps the protocol: 0 throws control pieces anywhere, 9 hardly ever breaks a
rule. In between it lies in wait: it keeps the protocol, but in one state of ten it breaks it as
surely as it keeps it elsewhere, so that streams go wrong at every place, not only at their
beginning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.threads import protocol as p

VOCAB = 14
TEXT = range(len(p.CONTROL_PIECES), VOCAB)
_TABLE = 4093
_MODULUS = 65_521
_START = 7  # Hash of nothing.
_PLACES = 5  # think, opened, message, answer, joined block: where the last token leaves the reader.
_NEXT = {p.SPAWN: 1, p.MSG: 2, p.END_SPAWN: 0, p.JOIN: 3, p.JOINED: 4, p.END_JOINED: 0}
# Tokens that keep the protocol in each place, with how much likelier than the others they are (a
# logit).
_ALLOWED = {
    0: dict.fromkeys(TEXT, 0.0) | {p.SPAWN: 1.2, p.JOIN: 0.7},
    1: {p.MSG: 2.0, p.END_SPAWN: -1.0},
    2: dict.fromkeys(TEXT, 0.0) | {p.MSG: 1.0, p.END_SPAWN: 0.8},
    3: dict.fromkeys(TEXT, 0.0) | {p.EOS: 1.5},
    4: {p.END_JOINED: 1.0},
}


def policy(seed: int, manners: float) -> np.ndarray:
    """Draws the logits of a random policy, float32 [_TABLE, _PLACES, VOCAB].

    Args:
      seed: decides which policy it is.
      manners: how well it keeps the protocol, from 0 to 9.
    """
    logits = np.random.default_rng(seed).normal(size=(_TABLE, _PLACES, VOCAB)).astype(np.float32)
    keeps = np.full(_TABLE, manners, np.float32)
    if manners < 9:
        keeps[::10] = -manners
    for place, tokens in _ALLOWED.items():
        for token, taste in tokens.items():
            logits[:, place, token] += keeps + taste
    return logits


def init_cache(slots: int, cache_length: int) -> dict[str, jax.Array]:
    """Makes an empty cache for the device engine."""
    return {
        "hash": jnp.zeros((slots, cache_length), jnp.int32),
        "place": jnp.zeros((slots, cache_length), jnp.int32),
    }


def decode(
    params: Any,
    tokens: jax.Array,
    cache: dict[str, jax.Array],
    positions: jax.Array,
    cache_length: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Decodes for the device engine, see `threads.tree_rollout`.

    Entry p of the cache is the hash of the tokens at positions 0..p, and the place where they leave
    the reader. Nothing at or beyond `cache_length` is read or written, and the hash of a token that
    stands there is rubbish.
    """
    bound = cache_length
    slot = jnp.arange(tokens.shape[0])
    logits = []
    for step in range(tokens.shape[1]):
        at = positions[:, step]
        token = tokens[:, step]
        before = {
            name: jnp.where(
                at > 0,
                jnp.where(at < bound, leaf.at[slot, at - 1].get(mode="fill", fill_value=0), 5),
                start,
            )
            for (name, leaf), start in zip(sorted(cache.items()), (_START, 0), strict=True)
        }
        state = _mix(before["hash"], token)
        place = _step(before["place"], token)
        store = jnp.where(at < bound, at, cache["hash"].shape[1])
        cache = {
            "hash": cache["hash"].at[slot, store].set(state, mode="drop"),
            "place": cache["place"].at[slot, store].set(place, mode="drop"),
        }
        logits.append(params[state % _TABLE, jnp.minimum(place, _PLACES - 1)])
    return jnp.stack(logits, axis=1), cache


def logits_of(params: np.ndarray) -> Callable[[Sequence[int]], np.ndarray]:
    """Makes the same policy for the reference interpreter.

    It recomputes everything from the context.
    """

    def look_up(seen: Sequence[int]) -> np.ndarray:
        state = _START
        place = 0
        for token in seen:
            state = _mix(state, token)
            place = place if place == 4 and token == p.MSG else _NEXT.get(token, place)
        return params[state % _TABLE, place]

    return look_up


def _mix(state: Any, token: Any) -> Any:
    return (state * 31 + token * 1009 + 17) % _MODULUS


def _step(place: Any, token: Any) -> Any:
    following = place
    for control, target in _NEXT.items():
        following = jnp.where(token == control, target, following)
    return jnp.where((place == 4) & (token == p.MSG), place, following)
