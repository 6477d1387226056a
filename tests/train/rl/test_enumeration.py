"""Proof of the estimator: on toy policies every thread tree is listed, with its probability
(toys.py).

The expectation of the objective's gradient over all batches must be the derivative of the exact
expected reward, which is computed without any of the code under test: the probability of a tree is
the product of those of its choices. What is biased is shown to be, with the figures of
docs/objective.md:

    python -m pytest tests/train/rl/test_enumeration.py -s
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.toys import (
    BOTH,
    NESTED,
    PARENT_ONLY,
    PROMPT,
    PURE,
    STATES,
    TOYS,
    VOCAB,
    Trees,
    decode,
    enumerate_trees,
    expected_estimate,
    init_cache,
    states_of,
)

from apr_jax.data.packing import pack_forest
from apr_jax.threads import Schedule, Status, make_prompts, tree_rollout
from apr_jax.train.rl.advantages import ADVANTAGES
from apr_jax.train.rl.objective import policy_loss, token_weights
from apr_jax.train.rl.rescoring import sampled_logprobs

DIVISOR = 137.25  # Tokens of a tree, by which a run divides its loss.


@dataclasses.dataclass(frozen=True)
class Setting:
    """A toy with random logits and a random reward a tree, and the exact gradient of the expected
    reward.
    """

    trees: Trees
    table: jax.Array
    rewards: jax.Array
    exact: np.ndarray


@functools.cache
def _setting(toy):
    trees = enumerate_trees(toy)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(STATES, VOCAB)))
    rewards = jnp.asarray(rng.normal(size=len(trees)))
    return Setting(trees, table, rewards, _exact(trees, table, rewards))


def _exact(trees, table, rewards):
    return np.asarray(jax.grad(lambda table: jnp.sum(trees.probabilities(table) * rewards))(table))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _quick_or_thorough(toy):
    """The quick tests take the toy with grandchildren alone."""
    marks = () if toy is NESTED else (pytest.mark.thorough,)
    return pytest.param(toy, marks=marks, id=toy.name)


@pytest.fixture(params=map(_quick_or_thorough, TOYS))
def setting(request):
    return _setting(request.param)


def _estimate(setting, size=2, table=None, rewards=None, **options):
    """The expected gradient times the run's divisor, which scales every term of the loss and
    changes no direction.
    """
    objective = {name: options.pop(name) for name in list(options) if hasattr(PURE, name)}
    config = dataclasses.replace(PURE, **objective)
    estimate = expected_estimate(
        setting.trees,
        setting.table if table is None else table,
        setting.rewards if rewards is None else rewards,
        size,
        config,
        tokens_per_tree=DIVISOR,
        **options,
    )
    divided_by = DIVISOR if config.loss_aggregation == "tree" else 1.0
    return divided_by * np.asarray(estimate)


def _compare(got, exact):
    """The scale of the estimate along the exact gradient, and the share of its length that points
    elsewhere.
    """
    scale = np.vdot(got, exact) / np.vdot(exact, exact)
    return scale, np.linalg.norm(got - scale * exact) / np.linalg.norm(got)


def _show(name, setting, got, exact):
    scale, elsewhere = _compare(got, exact)
    print(
        f"\n{setting.trees.toy.name:12} {name:32} scale {scale:6.3f}   elsewhere {elsewhere:6.1%}",
        end="",
    )
    return elsewhere


def test_the_enumeration_is_complete(setting):
    trees = setting.trees
    np.testing.assert_allclose(jnp.sum(trees.probabilities(setting.table)), 1.0, atol=1e-12)
    assert len(trees) >= 18
    assert np.linalg.norm(setting.exact) > 1e-2


def test_the_toys_are_what_they_are_called():
    nested = _setting(NESTED).trees.forest
    assert nested.depth.max() == 2 and nested.children.max() == 4
    widths = {toy.name: _choosing_kinds(_setting(toy).trees) for toy in TOYS}
    assert widths["parent only"] == {0}
    assert widths["child only"] == {1}
    assert widths["both"] == {0, 1, 2}  # Two kinds of children.
    assert widths["nested"] == {0, 1, 2}
    assert (_setting(PARENT_ONLY).trees.forest.truncations > 0).any()


def _choosing_kinds(trees):
    states = np.flatnonzero(trees.allowed.sum(axis=1) > 1)
    return set((states // (VOCAB * 6)).tolist())


@pytest.mark.parametrize(("advantage", "size"), [("none", 1), ("none", 2), ("leave_one_out", 2)])
def test_expected_gradient_is_that_of_expected_reward(setting, advantage, size):
    np.testing.assert_allclose(
        _estimate(setting, size, advantage=advantage), setting.exact, atol=1e-12
    )


@pytest.mark.thorough
@pytest.mark.parametrize("advantage", ["batch", "group"])
def test_own_reward_in_the_mean_shortens_the_gradient(setting, advantage):
    """It does nothing else to it."""
    np.testing.assert_allclose(
        _estimate(setting, advantage=advantage), setting.exact / 2, atol=1e-12
    )


@pytest.mark.thorough
@pytest.mark.parametrize(("advantage", "scale"), [("none", 1.0), ("batch", 0.5), ("group", 0.0)])
def test_mean_of_a_batch_covers_all_its_problems(advantage, scale):
    """The mean of a group covers one problem.

    Two problems that pay differently, one tree of each: nothing but the other problem can take the
    tree's own reward off.
    """
    setting = _setting(BOTH)
    other = np.asarray(setting.rewards)[::-1] + 1.0
    trees = setting.trees
    table = setting.table
    each = [
        jax.grad(lambda table, paid=paid: trees.probabilities(table) @ paid)(table)
        for paid in (setting.rewards, other)
    ]
    exact = np.asarray(sum(each)) / 2
    got = _estimate(setting, rewards=np.stack([setting.rewards, other]), advantage=advantage)
    np.testing.assert_allclose(got, scale * exact, atol=1e-12)
    assert np.linalg.norm(exact - setting.exact) > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"advantage": "group_std"}, 0.1),
        # Least where all trees are about as long.
        (
            {"advantage": "leave_one_out", "loss_aggregation": "token"},
            0.01,
        ),
        ({"advantage": "leave_one_out", "loss_aggregation": "sequence"}, 0.1),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_what_is_biased_points_elsewhere(setting, options, least):
    """Not a matter of scale: no step size turns it into the gradient."""
    got = _estimate(setting, **options)
    assert _show(" ".join(options.values()), setting, got, setting.exact) > least


def test_the_deviation_of_a_group_weighs_problems_by_difficulty():
    """With group_std, the scale of a problem's gradient depends on its share of right answers.

    The numbers are for groups of 5 trees, and shares of 50% and 5%.
    """

    def scale(rate, name):
        rewards = np.array(list(itertools.product([0.0, 1.0], repeat=5)))
        chance = np.prod(np.where(rewards == 1, rate, 1 - rate), axis=1)
        first = np.asarray(ADVANTAGES[name](jnp.asarray(rewards), np.ones(rewards.shape, bool)))[
            :, 0
        ]
        # The gradient of P(right) is multiplied by E[A | right] - E[A | wrong].
        mean = [
            (chance * first)[rewards[:, 0] == r].sum() / chance[rewards[:, 0] == r].sum()
            for r in (1, 0)
        ]
        return mean[0] - mean[1]

    assert scale(0.5, "leave_one_out") == pytest.approx(1) == scale(0.05, "leave_one_out")
    assert scale(0.5, "group") == pytest.approx(0.8) == scale(0.05, "group")
    even = scale(0.5, "group_std")
    hard = scale(0.05, "group_std")
    print(f"\ngroup_std, G = 5: scale {even:.2f} at 50% right, {hard:.2f} at 5%", end="")
    assert even == pytest.approx(1.72, abs=0.005)  # The numbers of docs/objective.md.
    assert hard == pytest.approx(1.95, abs=0.005)


@pytest.mark.thorough
def test_masking_overlong_trees_is_biased_unlike_a_penalty():
    setting = _setting(PARENT_ONLY)
    overlong = setting.trees.forest.truncations > 0
    masked = _estimate(setting, advantage="leave_one_out", counted=~overlong)
    assert _show("leave_one_out masked", setting, masked, setting.exact) > 0.05
    rewards = setting.rewards - 0.5 * overlong
    exact = _exact(setting.trees, setting.table, rewards)
    np.testing.assert_allclose(
        _estimate(setting, advantage="leave_one_out", rewards=rewards), exact, atol=1e-12
    )


@pytest.mark.thorough
def test_later_ppo_epochs_are_biased():
    """The ratio of one token stands for that of the tree; the first step, at ratio 1, is exact with
    any clip.
    """
    setting = _setting(BOTH)
    np.testing.assert_allclose(
        _estimate(setting, 1, clip=0.01, dual_clip=1.5), _estimate(setting, 1, clip=0.2), atol=1e-15
    )
    moved = setting.table + 0.3 * jnp.asarray(
        np.random.default_rng(2).normal(size=setting.table.shape)
    )
    exact = _exact(setting.trees, moved, setting.rewards)
    got = _estimate(
        setting, advantage="leave_one_out", table=moved, behaviour=setting.table, clip=1e6
    )
    assert _show("second PPO epoch", setting, got, exact) > 0.02


# --- KL and entropy. All four estimates against gradients worked out from the table, without the
# code under test.


def _reference(setting):
    return jnp.asarray(np.random.default_rng(1).normal(size=setting.table.shape))


def _visited_gradient(setting, of_logprobs):
    """Gradient of E[sum of a function of each visited state's distribution], which states are
    visited held fixed.
    """
    trees = setting.trees
    probabilities = jax.lax.stop_gradient(trees.probabilities(setting.table))

    def total(table):
        return jnp.sum(probabilities * trees.visited(of_logprobs(trees.logprobs(table))))

    return np.asarray(jax.grad(total)(setting.table))


def _full_gradient(setting, of_logprobs):
    trees = setting.trees

    def total(table):
        return jnp.sum(
            trees.probabilities(table) * trees.visited(of_logprobs(trees.logprobs(table)))
        )

    return np.asarray(jax.grad(total)(setting.table))


def _divergence(setting):
    """KL(policy, reference) of each state; the reference may do what the policy may."""
    reference = setting.trees.logprobs(_reference(setting))
    return lambda logprobs: jnp.sum(jnp.exp(logprobs) * (logprobs - reference), axis=-1)


def _reverse_divergence(setting):
    reference = setting.trees.logprobs(_reference(setting))
    return lambda logprobs: jnp.sum(jnp.exp(reference) * (reference - logprobs), axis=-1)


def _entropy(logprobs):
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _kl_estimate(setting, estimator, **options):
    nothing = jnp.zeros(len(setting.trees))
    return -_estimate(
        setting,
        rewards=nothing,
        kl=1.0,
        kl_estimator=estimator,
        reference=_reference(setting),
        **options,
    )


def test_k1_in_the_loss_has_no_gradient(setting):
    np.testing.assert_allclose(_kl_estimate(setting, "k1", size=1), 0.0, atol=1e-12)


@pytest.mark.thorough
def test_k2_has_the_gradient_of_each_tokens_divergence(setting):
    exact = _visited_gradient(setting, _divergence(setting))
    np.testing.assert_allclose(_kl_estimate(setting, "k2", size=1), exact, atol=1e-12)
    assert np.abs(exact).max() > 1e-2


@pytest.mark.thorough
def test_k3_has_the_gradient_of_the_reverse_divergence(setting):
    exact = _visited_gradient(setting, _reverse_divergence(setting))
    np.testing.assert_allclose(_kl_estimate(setting, "k3", size=1), exact, atol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize(("advantage", "size"), [("none", 1), ("leave_one_out", 2)])
def test_k1_reward_has_the_whole_trees_divergence_gradient(setting, advantage, size):
    exact = _full_gradient(setting, _divergence(setting))
    got = _kl_estimate(setting, "reward", size=size, advantage=advantage)
    np.testing.assert_allclose(got, exact, atol=1e-12)


@pytest.mark.thorough
def test_what_the_other_terms_leave_out(setting):
    """They hold the visited states fixed: that a choice leads to where the policies differ (or are
    even) is not seen.
    """
    tree = _full_gradient(setting, _divergence(setting))
    assert _show("KL k2", setting, _kl_estimate(setting, "k2", size=1), tree) > 0.05
    assert _show("KL k3", setting, _kl_estimate(setting, "k3", size=1), tree) > 0.05
    got = _estimate(setting, size=1, rewards=jnp.zeros(len(setting.trees)), entropy=1.0)
    np.testing.assert_allclose(got, _visited_gradient(setting, _entropy), atol=1e-12)
    assert _show("entropy", setting, got, _full_gradient(setting, _entropy)) > 0.05


# --- Mutations: what must not happen breaks the proof.


def _parents_only(forest):
    return forest.sampled & (forest.depth == 0)[..., None]


def _children_only(forest):
    return forest.sampled & (forest.depth > 0)[..., None]


def _without_grandchildren(forest):
    return forest.sampled & (forest.depth < 2)[..., None]


def _given_tokens_too(forest):
    place = np.arange(forest.tokens.shape[-1])
    return (place < forest.length[..., None]) & (place > 0)


def _without_spawn_blocks(forest):
    return forest.sampled & (forest.hidden_block == 0)


@pytest.mark.parametrize(
    ("counted", "toy"),
    [
        (_parents_only, BOTH),
        (_children_only, BOTH),
        (_without_grandchildren, NESTED),
        (_given_tokens_too, BOTH),
        (_given_tokens_too, NESTED),
        (_without_spawn_blocks, BOTH),
    ],
)
def test_a_wrong_share_of_tokens_breaks_the_proof(toy, counted):
    setting = _setting(toy)
    got = _estimate(setting, 1, sampled=counted(setting.trees.forest))
    assert _show(counted.__name__.strip("_"), setting, got, setting.exact) > 0.05


def test_sequence_mean_instead_of_sum_breaks_the_proof(setting):
    got = _estimate(setting, 1, loss_aggregation="sequence")
    assert _show("sequence mean, one tree", setting, got, setting.exact) > 0.05


# --- The same toys, sampled on the device and trained.


@pytest.mark.thorough
@pytest.mark.parametrize(
    "toy", [pytest.param(BOTH, marks=pytest.mark.slow), NESTED], ids=lambda toy: toy.name
)
def test_a_sampled_run_finds_the_known_optimum(toy):
    """Every joined child pays, tokens cost: the best tree is known from the list, and one policy
    always makes it.
    """
    with jax.enable_x64(False):
        trees = _setting(toy).trees
        forest = trees.forest
        pay = jax.jit(lambda f: _pay(f, jnp))
        values = _pay(forest, np)
        best = int(values.argmax())
        states, tokens = trees.made[best]
        assert len(set(zip(states.tolist(), tokens.tolist(), strict=True))) == len(
            set(states.tolist())
        ), "realisable"
        table = jnp.zeros((STATES, VOCAB), jnp.float32)

        def expected(table):
            return float(jnp.sum(trees.probabilities(table) * values))

        assert expected(table) < values[best] - 0.3
        optimizer = optax.adam(0.1)
        state = optimizer.init(table)
        rollout = _make_rollout(toy)
        gradient = jax.jit(jax.grad(_sampled_loss), static_argnums=1)
        for step in range(60):
            forest = jax.device_get(rollout(trees.logits(table), jax.random.key(step)))
            rows = pack_forest(forest, 64, toy.limits.max_thread_tokens)
            counted = np.ones(64, bool)
            advantages = ADVANTAGES["leave_one_out"](pay(forest)[None], counted[None])[0]
            weights = token_weights(rows, counted, "tree").astype(np.float32)
            grads = gradient(table, trees, rows, states_of(rows), weights, advantages)
            updates, state = optimizer.update(grads, state)
            table = optax.apply_updates(table, updates)
        print(
            f"\n{toy.name}: expected reward {expected(table):.3f} of {values[best]:.3f} after 60"
            " steps",
            end="",
        )
        assert expected(table) > values[best] - 0.05


def _pay(forest, xp):
    """Returns the reward of each tree [B]; `xp` is numpy or jax.numpy."""
    joined = xp.sum((forest.status == Status.DONE) & (forest.depth > 0), axis=1)
    return (forest.status[:, 0] == Status.DONE) * (0.4 * joined - 0.01 * forest.total_tokens)


def _make_rollout(toy):
    prompts = make_prompts([PROMPT] * 64, 2, temperature=1.0)
    schedule = Schedule(slots=16, prefill_batch=4, prefill_chunk=4)

    @jax.jit
    def rollout(logits, key):
        return tree_rollout(decode, init_cache, logits, prompts, key, toy.limits, schedule)[0]

    return rollout


def _sampled_loss(table, trees, rows, states, weights, advantages):
    logits = trees.logits(table)[states]
    logprobs, entropy = sampled_logprobs(logits, rows)
    return policy_loss(
        logprobs, entropy, jax.lax.stop_gradient(logprobs), rows, weights, advantages, PURE
    )[0]
