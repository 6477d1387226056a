"""Does a policy discover spawning? HiddenDigit, the smallest task there is, learned from
demonstrations and from nothing.

    python examples/learn_to_spawn.py

The rollout, the objective and a transformer in a training loop of one's own. A root is asked `3+4`
and should answer 7. In the demonstrations it guesses or asks a child that knows, half and half
(tasks/toy.py): who imitates them perfectly is right in 0.55 of all cases, who always asks in all.
RL pays for right answers alone. From random weights nobody has shown what a child is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apr_jax.data.encode import tree_streams
from apr_jax.data.packing import pack_forest, pack_streams
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import init_params, make_decode, prepare_decode
from apr_jax.tasks import HiddenDigit
from apr_jax.text.tokenizer import BOS, Tokenizer
from apr_jax.threads import Limits, Schedule, make_prompts, tree_rollout
from apr_jax.threads.draw import draw_tree, thread_names
from apr_jax.train.answers import extract_answers
from apr_jax.train.config import ObjectiveConfig
from apr_jax.train.rl.advantages import leave_one_out
from apr_jax.train.rl.objective import cross_entropy, policy_loss, token_weights
from apr_jax.train.rl.rescoring import token_logprobs

TASK, TOKENIZER = HiddenDigit(), Tokenizer.train(["0123456789+=?"])
MODEL = ModelConfig(layers=2, width=64, heads=2, kv_heads=2, head_size=32, mlp=128)
LIMITS = Limits(
    window=24, max_thread_tokens=32, max_threads=2, children=1, max_tokens=16, constrain=True
)
SCHEDULE = Schedule(slots=64, prefill_batch=16, prefill_chunk=8)
PROBLEMS, GROUP = 16, 16  # Of a step of RL; a group is the trees of one problem.


def supervised(params, steps):
    """The parameters after `steps` updates on 128 demonstrations each."""
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, rows):
        grads = jax.grad(lambda p: cross_entropy(token_logprobs(p, MODEL, rows)[0], rows))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        seeds = range(128 * step, 128 * (step + 1))
        threads = [TASK.demonstration(TASK.problem(seed), "apr", seed) for seed in seeds]
        rows = pack_streams(
            [tree_streams(thread, TOKENIZER) for thread in threads],
            LIMITS.max_thread_tokens,
            rows=128,
        )
        params, state = update(params, state, rows)
    return params


@jax.jit
def rollout(params, prompts, key):
    """A forest on the device, one tree a prompt."""
    decode, init_cache = make_decode(MODEL, SCHEDULE.cache_lengths(LIMITS.window))
    return tree_rollout(
        decode, init_cache, prepare_decode(params, MODEL), prompts, key, LIMITS, SCHEDULE
    )[0]


def sample(params, step):
    """The forest of a step's problems (numpy), and which of its trees are right, [B]."""
    problems = [TASK.problem(PROBLEMS * step + k) for k in range(PROBLEMS) for _ in range(GROUP)]
    prompts = [[BOS, *TOKENIZER.encode(TASK.prompt(problem))] for problem in problems]
    forest = jax.device_get(
        rollout(params, make_prompts(prompts, width=4, temperature=1.0), jax.random.key(step))
    )
    answers = extract_answers(forest, TOKENIZER)
    return forest, np.array(
        [TASK.verify(*pair).correct for pair in zip(problems, answers, strict=True)], np.float32
    )


def reinforced(params, steps, say):
    """The parameters after `steps` updates on sampled trees; `say` is told each step's right
    answers and children a tree.
    """
    optimizer, config = optax.adam(1e-3), ObjectiveConfig()
    state, everybody = optimizer.init(params), np.ones(PROBLEMS * GROUP, bool)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, rows, weights, advantages):
        def loss(params):
            logprobs, entropy = token_logprobs(params, MODEL, rows)
            return policy_loss(logprobs, entropy, rows.logprob, rows, weights, advantages, config)[
                0
            ]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        forest, right = sample(params, step)
        say(step, right.mean(), forest.children.mean())
        groups = (PROBLEMS, GROUP)
        advantages = leave_one_out(right.reshape(groups), everybody.reshape(groups)).reshape(-1)
        rows = pack_forest(forest, 64, LIMITS.max_thread_tokens)
        weights = token_weights(rows, everybody, "tree").astype(np.float32)
        params, state = update(params, state, jax.tree.map(jnp.asarray, rows), weights, advantages)
    return params


def main(imitate=300, steps=81, scratch=301):
    """Prints both courses, and a tree of the policy that was shown what a child is for."""

    def say(step, right, children):
        if step % 20 == 0:
            print(f"  step {step:>4}: right {right:.2f}, children a tree {children:.2f}")

    random = init_params(MODEL, TOKENIZER.vocab_size, jax.random.key(0))
    print("RL after demonstrations:")
    taught = reinforced(supervised(random, imitate), steps, say)
    forest, _ = sample(taught, steps)
    names, slots = thread_names(forest, 0), draw_tree(forest, 0)
    print("\n".join(f"  {names[thread_index]:<6}{slots[thread_index]}" for thread_index in names))
    print("RL from random weights:")
    reinforced(init_params(MODEL, TOKENIZER.vocab_size, jax.random.key(0)), scratch, say)


if __name__ == "__main__":
    main()
