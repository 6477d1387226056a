"""A rollout without any model: a script says what follows each token, and the tree is printed.

    python examples/scripted_policy.py

The root asks two children. Each of them counts down from its message and joins the number that it
ends at. Then the root answers.
"""

import jax
import jax.numpy as jnp

from apr_jax.threads import Limits, Schedule, draw_tree, make_prompts, thread_names, tree_rollout
from apr_jax.threads import protocol as p

DIGIT = len(p.CONTROL_PIECES)  # Ids from here on are text: DIGIT + n stands for the digit n.
VOCAB = DIGIT + 10
LIMITS = Limits(window=24, max_thread_tokens=48, max_threads=3, children=2)
SCHEDULE = Schedule(slots=2, prefill_batch=2, prefill_chunk=2)

# What follows each token in a child: the digit below a digit, <join> after 1, 0 after <join>, and
# <eos> after 0.
CHILD = [p.EOS] * VOCAB
CHILD[DIGIT + 2 :] = range(DIGIT + 1, VOCAB - 1)
CHILD[DIGIT + 1] = p.JOIN
CHILD[p.JOIN] = DIGIT
# What follows each position in the root, whose prompt ends with the digit 0 at position 1.
ROOT = [p.EOS, p.SPAWN, p.MSG, DIGIT + 5, p.MSG, DIGIT + 9, p.END_SPAWN]
# What follows each token in the root once its children have joined.
JOINED = {p.END_JOINED: p.JOIN, p.JOIN: DIGIT + 7, DIGIT + 7: p.EOS}


def init_cache(slots, cache_length):
    return jnp.zeros((slots, cache_length), jnp.int32)  # The tokens that a thread sees.


def decode(params, tokens, cache, positions, cache_length):
    """Chooses the next token by the last one, its position and the prompt.

    Any function of what the thread sees is a policy.
    """
    slot = jnp.arange(tokens.shape[0])[:, None]
    cache = cache.at[slot, positions].set(tokens, mode="drop")
    in_root = jnp.asarray(ROOT)[jnp.minimum(positions, len(ROOT) - 1)]
    for token, following in JOINED.items():
        in_root = jnp.where(tokens == token, following, in_root)
    in_child = jnp.asarray(CHILD)[tokens]
    is_root = cache[:, 1:2] == DIGIT
    following = jnp.where(is_root, in_root, in_child)  # [W, S]
    return jax.nn.one_hot(following, VOCAB) * 50.0, cache


if __name__ == "__main__":
    prompts = make_prompts([[p.BOS, DIGIT]], width=2)
    key = jax.random.key(0)
    forest, _ = jax.device_get(
        tree_rollout(decode, init_cache, None, prompts, key, LIMITS, SCHEDULE)
    )
    names = thread_names(forest, 0)
    lines = draw_tree(forest, 0)
    for thread_index, name in names.items():
        tokens = forest.tokens[0, thread_index, : forest.length[0, thread_index]].tolist()
        text = " ".join(
            p.CONTROL_PIECES[token] if token < DIGIT else str(token - DIGIT) for token in tokens
        )
        print(f"{name:<6}{lines[thread_index]:<24}{text}")
