"""Shows whether a policy discovers spawning.

HiddenDigit, the smallest task there is, is learned by RL after demonstrations, and from nothing.

    python examples/learn_to_spawn.py

The example puts the rollout, the objective and a transformer into a training loop of its own. A
root is asked `3+4` and should answer 7. In half of the demonstrations the root guesses, in the
other half it asks a child that knows (tasks/toy.py). A policy that imitates them perfectly is right
in 0.55 of all cases, and one that always asks is right in all. RL rewards right answers alone. From
random weights, the policy was never shown what a child is for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apr_jax.data.encode import tokenize_tree
from apr_jax.data.packing import pack_forest, pack_trees
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import init_params, make_decode, prepare_decode
from apr_jax.tasks.toy import HiddenDigit
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import BOS
from apr_jax.threads import Limits, Schedule, draw_tree, make_prompts, thread_names, tree_rollout
from apr_jax.train.answers import extract_answers
from apr_jax.train.config import ObjectiveConfig
from apr_jax.train.rl.advantages import leave_one_out
from apr_jax.train.rl.objective import cross_entropy, policy_loss, token_weights
from apr_jax.train.rl.rescoring import token_logprobs

TASK = HiddenDigit()
TOKENIZER = SentencePieceTokenizer.train(["0123456789+=?"])
MODEL = ModelConfig(layers=2, width=64, heads=2, kv_heads=2, head_size=32, mlp=128)
LIMITS = Limits(
    window=24, max_thread_tokens=32, max_threads=2, children=1, max_tokens=16, constrain=True
)
SCHEDULE = Schedule(slots=64, prefill_batch=16, prefill_chunk=8)
PROBLEMS = 16  # Problems of a step of RL.
GROUP = 16  # Trees of one problem.


def supervised(params, steps):
    """Trains on demonstrations, 128 a step, and returns the parameters."""
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, rows):
        def loss(params):
            logprobs, _ = token_logprobs(params, MODEL, rows)
            return cross_entropy(logprobs, rows)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        seeds = range(128 * step, 128 * (step + 1))
        threads = [TASK.demonstrate(TASK.draw(seed), "ask", seed) for seed in seeds]
        rows = pack_trees(
            [tokenize_tree(thread, TOKENIZER) for thread in threads],
            LIMITS.max_thread_tokens,
            rows=128,
        )
        params, state = update(params, state, rows)
    return params


@jax.jit
def rollout(params, prompts, key):
    """Decodes a forest on the device, one tree a prompt."""
    decode, init_cache = make_decode(MODEL, SCHEDULE.cache_lengths(LIMITS.window))
    weights = prepare_decode(params, MODEL)
    forest, _ = tree_rollout(decode, init_cache, weights, prompts, key, LIMITS, SCHEDULE)
    return forest


def sample(params, step):
    """Samples the trees of one step; returns the forest (numpy) and which trees are right, [B]."""
    problems = [TASK.draw(PROBLEMS * step + k) for k in range(PROBLEMS) for _ in range(GROUP)]
    ids = [[BOS, *TOKENIZER.encode(TASK.prompt(problem))] for problem in problems]
    prompts = make_prompts(ids, width=4, temperature=1.0)
    forest = jax.device_get(rollout(params, prompts, jax.random.key(step)))
    answers = extract_answers(forest, TOKENIZER)
    right = [TASK.score(*pair).correct for pair in zip(problems, answers, strict=True)]
    return forest, np.array(right, np.float32)


def reinforced(params, steps, say):
    """Trains on sampled trees by RL, and returns the parameters.

    `say` is called with each step, its share of right answers and its children a tree.
    """
    optimizer = optax.adam(1e-3)
    config = ObjectiveConfig()
    state = optimizer.init(params)
    all_count = np.ones(PROBLEMS * GROUP, bool)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, rows, weights, advantages):
        def loss(params):
            logprobs, entropy = token_logprobs(params, MODEL, rows)
            loss, _ = policy_loss(
                logprobs, entropy, rows.logprob, rows, weights, advantages, config
            )
            return loss

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        forest, right = sample(params, step)
        say(step, right.mean(), forest.children.mean())
        groups = (PROBLEMS, GROUP)
        advantages = leave_one_out(right.reshape(groups), all_count.reshape(groups)).reshape(-1)
        rows = pack_forest(forest, 64, LIMITS.max_thread_tokens)
        weights = token_weights(rows, all_count, "tree").astype(np.float32)
        params, state = update(params, state, jax.tree.map(jnp.asarray, rows), weights, advantages)
    return params


def main(imitate=350, steps=81, scratch=301):
    """Prints both trainings, and a tree of the policy that was shown what a child is for."""

    def say(step, right, children):
        if step % 20 == 0:
            print(f"  step {step:>4}: right {right:.2f}, children a tree {children:.2f}")

    random = init_params(MODEL, TOKENIZER.vocab_size, jax.random.key(0))
    print("RL after demonstrations:")
    taught = reinforced(supervised(random, imitate), steps, say)
    forest, _ = sample(taught, steps)
    names = thread_names(forest, 0)
    lines = draw_tree(forest, 0)
    for thread_index in names:
        print(f"  {names[thread_index]:<6}{lines[thread_index]}")
    print("RL from random weights:")
    reinforced(init_params(MODEL, TOKENIZER.vocab_size, jax.random.key(0)), scratch, say)


if __name__ == "__main__":
    main()
