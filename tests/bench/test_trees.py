"""The host loop of `apr bench rollout` writes the same trees as the engine."""

import jax
import numpy as np
import pytest

from apr_jax.bench.trees import answer
from apr_jax.check import scripted
from apr_jax.threads import Limits, Status, interpret, make_prompts
from apr_jax.threads import protocol as p

LIMITS = Limits(window=60, max_thread_tokens=160, max_threads=64, children=3, max_depth=2)


def generate_with(look_up):
    """A greedy `generate` without a cache."""

    def generate(contexts):
        written = []
        for context in contexts:
            seen = list(context)
            while len(seen) < LIMITS.window:
                seen.append(int(np.argmax(look_up(seen))))
                if seen[-1] in (p.EOS, p.END_SPAWN):
                    break
            written.append(seen[len(context) :])
        return written

    return generate


@pytest.mark.slow
def test_host_loop_writes_the_trees_of_the_interpreter():
    compared = children = 0
    for seed in range(60):
        look_up = scripted.logits_of(scripted.policy(seed, manners=9.0))
        for first in scripted.TEXT:
            prompt = [p.BOS, first]
            forest = interpret(look_up, make_prompts([prompt], 2), 0, jax.random.key(0), LIMITS)
            # A host loop does not treat threads that break the protocol as the engine does. All
            # other trees must agree to the token.
            if forest.refusals.any() or set(forest.status[forest.length > 0].tolist()) != {
                Status.DONE
            }:
                continue
            answers, tokens = answer([prompt], generate_with(look_up), LIMITS)
            root = forest.tokens[0, : forest.length[0]].tolist()
            assert tokens == forest.total_tokens
            assert answers[0] == root[root.index(p.JOIN) + 1 : -1]
            compared += 1
            children += int(forest.children)
    assert compared >= 20 and children >= 20
