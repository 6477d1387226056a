"""A forest of a small model, recorded by the reference interpreter: nested two deep, with hidden
blocks, drawn at temperature 0.7.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import forward, init_params
from apr_jax.threads import Limits, ThreadForest, interpret, make_prompts
from apr_jax.threads import protocol as p

MODEL = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, head_size=8, mlp=24, tied=False)
VOCAB = 12
TEMPERATURE = 0.7
LIMITS = Limits(
    window=24, max_thread_tokens=40, max_threads=7, children=2, max_depth=2, constrain=True
)
TREES = 6


@functools.cache
def params():
    """Random ones of which every tree but one spawns."""
    return jax.jit(lambda key: init_params(MODEL, VOCAB, key))(jax.random.key(4))


@functools.cache
def record() -> ThreadForest:
    """Numpy leaves, with the batch axis."""

    @jax.jit
    def last(params, tokens, count):
        place = jnp.arange(LIMITS.window)[None]
        inside = (place < count).astype(jnp.int32)
        return forward(params, MODEL, tokens[None], place, inside, 0 * inside)[0, count - 1]

    def logits_of(seen):
        return np.asarray(
            last(
                params(),
                np.pad(np.asarray(seen, np.int32), (0, LIMITS.window - len(seen))),
                len(seen),
            )
        )

    prompts = make_prompts(
        [[p.BOS, 10, 11][: 2 + tree % 2] for tree in range(TREES)], 3, temperature=TEMPERATURE
    )
    trees = [
        interpret(logits_of, prompts, tree, jax.random.key(5), LIMITS) for tree in range(TREES)
    ]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)
