"""Bring your own model: a recurrent network, which knows nothing of apr_jax, decodes thread trees.

    python examples/own_model.py

A rollout needs two functions. `init_cache(slots, cache_length)` makes the memory of W decode slots.
`decode` reads tokens [W, S] at positions [W, S] into that memory and returns logits [W, S, V]. When
its children have joined, a thread's position goes back to where it spawned them, so a recurrent
network keeps the state that it had after every position. A position at or beyond the window marks
padding, for which nothing is stored.
"""

import functools

import jax
import jax.numpy as jnp

from apr_jax.threads import Limits, Schedule, draw_tree, make_prompts, thread_names, tree_rollout
from apr_jax.threads.protocol import BOS

VOCAB = 16
WIDTH = 32
LIMITS = Limits(
    window=48,
    max_thread_tokens=96,
    max_threads=9,
    children=3,
    max_depth=2,
    max_tokens=120,
    constrain=True,
)
SCHEDULE = Schedule(slots=4, prefill_batch=2, prefill_chunk=8)


def init_params(key):
    embed, inward, outward = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(embed, (VOCAB, WIDTH)),
        "inward": jax.random.normal(inward, (WIDTH, WIDTH)) * WIDTH**-0.5,
        "outward": jax.random.normal(outward, (WIDTH, VOCAB)),
    }


def init_cache(slots, cache_length):
    return jnp.zeros((slots, cache_length, WIDTH))


def decode(params, tokens, cache, positions, cache_length):
    slot = jnp.arange(tokens.shape[0])
    logits = []
    for token, position in zip(tokens.T, positions.T, strict=True):  # [W] each
        stored = cache.at[slot, position - 1].get(mode="fill", fill_value=0.0)
        before = jnp.where(position[:, None] > 0, stored, 0.0)  # [W, WIDTH]
        state = jnp.tanh(params["embed"][token] + before @ params["inward"])
        cache = cache.at[slot, position].set(state, mode="drop")
        logits.append(state @ params["outward"])
    return jnp.stack(logits, axis=1), cache


if __name__ == "__main__":
    prompts = make_prompts([[BOS, 10, 11], [BOS, 12]], width=3, temperature=1.0)
    params = init_params(jax.random.key(0))
    rollout = jax.jit(
        functools.partial(tree_rollout, decode, init_cache, limits=LIMITS, schedule=SCHEDULE)
    )
    forest, work = jax.device_get(rollout(params, prompts, jax.random.key(2)))
    for tree in range(2):
        print(f"tree {tree}: {forest.children[tree]} children, {forest.total_tokens[tree]} tokens")
        names = thread_names(forest, tree)
        lines = draw_tree(forest, tree)
        for thread_index in names:
            print(f"  {names[thread_index]:<10}{lines[thread_index]}")
