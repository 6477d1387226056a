"""A rollout without any model: a script says what follows each token, and the tree is printed.

    python examples/scripted_policy.py

The root asks two children; each counts down from its message and joins what it ended at; the root
answers."""

import jax
import jax.numpy as jnp

from apr_jax.threads import Limits, Schedule, make_prompts, tree_rollout
from apr_jax.threads import protocol as p
from apr_jax.threads.draw import draw_tree, thread_names

DIGIT = len(p.CONTROL_PIECES)  # Ids from here on are text: DIGIT + n stands for the digit n.
VOCAB = DIGIT + 10
LIMITS = Limits(window=24, max_thread_tokens=48, max_threads=3, children=2)


def init_cache(slots, bound):
    return jnp.zeros((slots, bound), jnp.int32)  # The tokens that a thread sees.


# In a child a digit is followed by the one below it, 1 by <join>, <join> by 0, and 0 by <eos>.
CHILD = [p.EOS] * VOCAB
CHILD[DIGIT + 1], CHILD[p.JOIN], CHILD[DIGIT + 2 :] = p.JOIN, DIGIT, range(DIGIT + 1, VOCAB - 1)
# The root goes by the position of its last token, which is the digit 0 at position 1; after the
# joined block by the token.
ROOT = [p.EOS, p.SPAWN, p.MSG, DIGIT + 5, p.MSG, DIGIT + 9, p.END_SPAWN]
JOINED = {p.END_JOINED: p.JOIN, p.JOIN: DIGIT + 7, DIGIT + 7: p.EOS}


def decode(params, tokens, cache, positions, bound):
    """Any function of what the thread sees is a policy.

    This one looks at the last token, its position and the prompt.
    """
    slot = jnp.arange(tokens.shape[0])[:, None]
    cache = cache.at[slot, positions].set(tokens, mode="drop")
    root = jnp.asarray(ROOT)[jnp.minimum(positions, len(ROOT) - 1)]
    for token, following in JOINED.items():
        root = jnp.where(tokens == token, following, root)
    is_root = cache[:, 1:2] == DIGIT
    return jax.nn.one_hot(jnp.where(is_root, root, jnp.asarray(CHILD)[tokens]), VOCAB) * 50.0, cache


if __name__ == "__main__":
    prompts = make_prompts([[p.BOS, DIGIT]], width=2)
    forest, _ = jax.device_get(
        tree_rollout(
            decode,
            init_cache,
            None,
            prompts,
            jax.random.key(0),
            LIMITS,
            Schedule(slots=2, prefill_batch=2, prefill_chunk=2),
        )
    )
    names, slots = thread_names(forest, 0), draw_tree(forest, 0)
    for thread_index, name in names.items():
        written = forest.tokens[0, thread_index, : forest.length[0, thread_index]].tolist()
        text = " ".join(
            p.CONTROL_PIECES[token] if token < DIGIT else str(token - DIGIT) for token in written
        )
        print(f"{name:<6}{slots[thread_index]:<24}{text}")
