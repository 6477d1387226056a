"""Rollout and training are one model: the training forward pass gives the log-probs that the rollout recorded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import forward, init_params, make_decode
from apr_jax.threads import Limits, Prompts, Schedule, tree_rollout
from apr_jax.threads import protocol as p

VOCAB = 16
CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=1, head_size=8, mlp=48, tied=False)
LIMITS = Limits(window=40, stream=72, slots=14, children=3, max_depth=2)


# What an untrained model is pushed to write after each token, so that it mostly keeps the protocol. 10 to 12 are written
# while thinking, 13 in answers, 14 and 15 in messages; a child has 15 behind it too, so it sometimes errs.
_FOLLOWS = {
    p.BOS: (10, 11, p.SPAWN),
    p.SPAWN: (p.MSG,),
    p.MSG: (14, 15),
    p.END_JOINED: (10, p.SPAWN, p.JOIN),
    p.JOIN: (13, p.EOS),
    10: (10, 11, 12, p.SPAWN),
    11: (10, 12, p.SPAWN),
    12: (10, 11, p.SPAWN, p.JOIN),
    13: (13, p.EOS),
    14: (14, 15),
    15: (10, 11, 12, p.MSG, p.END_SPAWN),
}


def _bias() -> jnp.ndarray:
    """[V, V] added to the logits after each token."""
    bias = np.zeros((VOCAB, VOCAB), np.float32)
    for token, following in _FOLLOWS.items():
        bias[token, list(following)] = 10
    return jnp.asarray(bias)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_replay_gives_the_behaviour_log_prob_of_every_sampled_token(temperature):
    trees, bias = 256, _bias()
    params = init_params(CONFIG, VOCAB, jax.random.key(1))
    decode, init_cache = make_decode(CONFIG)

    def biased(params, tokens, cache, positions):
        logits, cache = decode(params, tokens, cache, positions)
        return logits + bias[tokens], cache

    prompts = Prompts(
        tokens=jax.random.randint(jax.random.key(2), (trees, 4), 10, 13).at[:, 0].set(p.BOS),
        length=jnp.full(trees, 4, jnp.int32),
        tree=jnp.arange(trees, dtype=jnp.int32),
        temperature=jnp.full(trees, temperature, jnp.float32),
    )
    run = jax.jit(functools.partial(tree_rollout, biased, init_cache, limits=LIMITS, schedule=Schedule(24, 4, 5)))
    forest, _ = run(params, prompts, jax.random.key(3))
    assert int(forest.children.sum()) > 100 and int((forest.round > 0).sum()) > 5 and int((forest.depth == 2).sum()) > 5

    tokens, position, island, sampled, recorded = (
        x.reshape(-1, LIMITS.stream)
        for x in (forest.tokens, forest.position, forest.island, forest.sampled, forest.logprob)
    )
    segment = (jnp.arange(LIMITS.stream)[None, :] < forest.length.reshape(-1, 1)).astype(jnp.int32)
    logits = jax.jit(forward, static_argnums=1)(params, CONFIG, tokens, position, segment, island) + bias[tokens]
    logprobs = jax.nn.log_softmax(logits / temperature)[:, :-1]
    replayed = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    difference = jnp.where(sampled[:, 1:], jnp.abs(replayed - recorded[:, 1:]), 0)
    assert float(difference.max()) < 1e-4
    assert bool((recorded[:, 1:] * ~sampled[:, 1:] == 0).all())
