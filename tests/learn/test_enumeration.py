"""Proof of the estimator: on a tiny policy every thread tree is enumerated, with its probability.

The expectation of the objective's gradient over all trees must be the derivative of the exact expected reward. The
trees are enumerated by the reference interpreter, which a script of choices drives; the probability of a tree is the
product of the probabilities of the choices, computed without any of the code under test.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.data.packing import pack_forest
from apr_jax.learn.objective import tree_sum_loss
from apr_jax.learn.replay import sampled_logprobs
from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.threads import protocol as p

VOCAB = 12
LIMITS = Limits(window=7, stream=16, slots=3, children=2, max_depth=1)
# After each token (the policy sees no more) what may follow: so few that all trees can be listed.
FOLLOWS = {
    p.BOS: (10, p.SPAWN, p.JOIN),
    10: (p.MSG, p.END_SPAWN, p.JOIN, p.EOS),
    p.SPAWN: (p.MSG, 10),
    p.MSG: (10,),
    p.END_JOINED: (10, p.JOIN),
    p.JOIN: (10, p.EOS),
}


class _Script:
    """Makes the interpreter take given choices; beyond them the first one, noting how many there were."""

    def __init__(self, choices):
        self.choices, self.made, self.widths = choices, [], []

    def __call__(self, seen):
        options = FOLLOWS[seen[-1]]
        choice = self.choices[len(self.made)] if len(self.made) < len(self.choices) else 0
        self.made.append((seen[-1], options[choice]))
        self.widths.append((choice, len(options)))
        logits = np.full(VOCAB, -100.0, np.float32)
        logits[options[choice]] = 0.0
        return logits


def _enumerate():
    """All trees and the (token before, token chosen) pairs of each, depth-first over the choices."""
    trees, choices = [], []
    while choices is not None:
        script = _Script(choices)
        forest = interpret(script, make_prompts([[p.BOS]], 1), 0, jax.random.key(0), LIMITS)
        trees.append((forest, script.made))
        widths = script.widths
        while widths and widths[-1][0] == widths[-1][1] - 1:
            widths.pop()
        choices = [choice for choice, _ in widths[:-1]] + [widths[-1][0] + 1] if widths else None
    return trees


@pytest.fixture(scope="module")
def trees():
    return _enumerate()


def _logits(table):
    allowed = np.zeros((VOCAB, VOCAB), bool)
    for token, following in FOLLOWS.items():
        allowed[token, list(following)] = True
    return jnp.where(allowed, table, -1e3)


def _probabilities(table, trees):
    logprobs = jax.nn.log_softmax(_logits(table), axis=-1)
    pairs = [np.array(made).T for _, made in trees]
    return jnp.stack([jnp.exp(jnp.sum(logprobs[before, chosen])) for before, chosen in pairs])


def _expected_estimate(table, trees, rewards, counted=lambda forest: forest.sampled):
    """-sum over trees of P(tree) x gradient of the objective for a batch of that tree."""
    batch = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *[forest for forest, _ in trees])
    rows = pack_forest(dataclasses.replace(batch, sampled=counted(batch)), rows=8, length=LIMITS.stream)
    probabilities = jax.lax.stop_gradient(_probabilities(table, trees))

    def loss(table):
        logprobs, entropy = sampled_logprobs(_logits(table)[rows.tokens], rows)
        current = dataclasses.replace(rows, logprob=jax.lax.stop_gradient(logprobs))
        # The batch holds every tree once; weighing each by its probability makes the mean over trees an expectation.
        advantages = rewards * probabilities * len(trees)
        return tree_sum_loss(logprobs, entropy, logprobs, current, advantages, clip=0.2, kl=0.0)[0]

    return -jax.grad(loss)(table)


@pytest.fixture(scope="module")
def setting(trees):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        table = jnp.asarray(rng.normal(size=(VOCAB, VOCAB)))
        rewards = jnp.asarray(rng.normal(size=len(trees)))
        exact = jax.grad(lambda table: jnp.sum(_probabilities(table, trees) * rewards))(table)
        return table, rewards, np.asarray(exact)


def test_the_enumeration_is_complete(trees, setting):
    with jax.enable_x64(True):
        np.testing.assert_allclose(jnp.sum(_probabilities(setting[0], trees)), 1.0, atol=1e-12)
    assert len(trees) > 100
    assert sum(int(forest.children) == 2 for forest, _ in trees) > 10


def test_the_expected_gradient_is_the_gradient_of_the_expected_reward(trees, setting):
    table, rewards, exact = setting
    with jax.enable_x64(True):
        np.testing.assert_allclose(_expected_estimate(table, trees, rewards), exact, atol=1e-9)
    assert np.abs(exact).max() > 1e-2


def _parents_only(forest):
    return forest.sampled & (np.arange(LIMITS.slots)[:, None] == 0)


def _children_only(forest):
    return forest.sampled & (np.arange(LIMITS.slots)[:, None] > 0)


def _given_tokens_too(forest):
    return (np.arange(LIMITS.stream) < forest.length[..., None]) & (np.arange(LIMITS.stream) > 0)


def _without_spawn_blocks(forest):
    return forest.sampled & (forest.island == 0)


@pytest.mark.parametrize("counted", [_parents_only, _children_only, _given_tokens_too, _without_spawn_blocks])
def test_a_wrong_share_of_tokens_breaks_the_proof(trees, setting, counted):
    table, rewards, exact = setting
    with jax.enable_x64(True):
        wrong = np.asarray(_expected_estimate(table, trees, rewards, counted))
    assert np.abs(wrong - exact).max() > 1e-4
