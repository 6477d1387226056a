"""The objective and rescoring: hand numbers, finite differences, masks, padding, packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import LIMITS, MODEL, TEMPERATURE, VOCAB, record
from helpers.recorded import params as model_params

from apr_jax.data.packing import Rows, pack_forest
from apr_jax.threads import protocol as p
from apr_jax.train.config import ObjectiveConfig
from apr_jax.train.rl.objective import (
    K3_LINEAR_FROM,
    KL,
    ROLLOUT_ERRORS,
    clipped_gain,
    cross_entropy,
    policy_loss,
    token_weights,
    tree_kl,
)
from apr_jax.train.rl.rescoring import sampled_logprobs, token_logprobs

OBJECTIVE = ObjectiveConfig(clip=0.2, kl=0.3)


def _rows(threads, length):
    """Places the threads one after the other, as many a row as fit (tokens, sampled, tree, hidden
    block, position).
    """
    rows = []
    used = length
    for tokens, sampled, tree, hidden_block, position in threads:
        if used + len(tokens) > length:
            rows.append(
                [np.zeros(length, np.int32) for _ in range(5)] + [np.full(length, -1, np.int32)]
            )
            used = 0
            segment = 0
        segment += 1
        at = slice(used, used + len(tokens))
        for field, value in zip(
            rows[-1], (tokens, position, segment, hidden_block, sampled, tree), strict=True
        ):
            field[at] = value
        used += len(tokens)
    tokens, position, segment, hidden_block, sampled, tree = (
        np.stack(column) for column in zip(*rows, strict=True)
    )
    blank = np.zeros(tokens.shape, np.float32)
    return Rows(
        tokens,
        position,
        segment,
        hidden_block,
        sampled.astype(bool),
        tree,
        blank,
        blank.astype(np.uint8),
    )


def _threads(seed, count=6):
    """Random threads: prompt, thoughts, hidden spawn block, joined block, more thoughts.

    The joined block consists of prompt tokens and takes the positions of the spawn block.
    """
    rng = np.random.default_rng(seed)
    threads = []
    for _ in range(count):
        prompt, think, block, joined, after = (rng.integers(1, 5) for _ in range(5))
        hidden_block = np.repeat([0, 0, 1, 0, 0], (prompt, think, block, joined, after))
        sampled = np.repeat([False, True, True, False, True], (prompt, think, block, joined, after))
        before = np.arange(prompt + think + block)
        position = np.concatenate([before, prompt + think + np.arange(joined + after)])
        tokens = rng.integers(1, VOCAB, len(hidden_block))
        threads.append((tokens, sampled, rng.integers(0, 3), hidden_block, position))
    return threads


def _weights(rows, loss_aggregation="tree"):
    return jnp.asarray(token_weights(rows, np.ones(rows.tree.max() + 1, bool), loss_aggregation))


def test_loss_by_hand():
    # Two trees in one row: tree 0 has two sampled tokens, tree 1 one; the middle token is given.
    rows = Rows(
        tokens=np.array([[1, 2, 3, 1, 2]]),
        position=np.zeros((1, 5), np.int32),
        segment=np.array([[1, 1, 1, 2, 2]]),
        hidden_block=np.zeros((1, 5), np.int32),
        sampled=np.array([[False, True, True, False, True]]),
        tree=np.array([[0, 0, 0, 1, 1]]),
        logprob=np.log([[1.0, 0.5, 0.25, 1.0, 0.5]]).astype(np.float32),
        allowed=np.zeros((1, 5), np.uint8),
    )
    logprobs = jnp.log(jnp.asarray([[0.1, 0.5, 0.5, 0.1, 0.25]]))
    reference = jnp.log(jnp.asarray([[0.9, 0.25, 0.5, 0.9, 0.25]]))
    advantages = jnp.asarray([1.0, -2.0])
    config = ObjectiveConfig(clip=0.2, kl=0.1)
    loss, parts = policy_loss(
        logprobs, -logprobs, reference, rows, _weights(rows), advantages, config
    )
    # Ratios 1, 2 (clipped to 1.2: A > 0) and 0.5 (A < 0: the clipped 0.8 x -2 is smaller, so it is
    # taken).
    gain = 1 * 1 + 1.2 * 1 + 0.8 * -2
    k3 = 0.5 - np.log(0.5) - 1  # Only the first sampled token differs from the reference.
    np.testing.assert_allclose(loss, -(gain - 0.1 * k3) / 2, rtol=1e-6)
    metrics = parts.metrics(trees=2)
    np.testing.assert_allclose(metrics["clip_share"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], k3 / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["logprob_difference"], 2 * np.log(2) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["logprob_difference_worst"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["outside_clip_share"], 2 / 3, rtol=1e-6)
    # An older policy drew the second token: its ratio counts as before, and is no error.
    older = jnp.asarray([[False, False, True, False, False]])
    its_loss, parts = policy_loss(
        logprobs, -logprobs, reference, rows, _weights(rows), advantages, config, older=older
    )
    assert its_loss == loss
    current = parts.metrics(trees=2)
    assert {name for name in metrics if current[name] != metrics[name]} == {*ROLLOUT_ERRORS} - {
        "logprob_difference_worst"
    }
    np.testing.assert_allclose(current["logprob_difference"], np.log(2) / 2, rtol=1e-6)
    np.testing.assert_allclose(current["outside_clip_share"], 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], -np.log([0.5, 0.5, 0.25]).mean(), rtol=1e-6)
    np.testing.assert_allclose(
        cross_entropy(logprobs, rows), -np.log([0.5, 0.5, 0.25]).mean(), rtol=1e-6
    )


@functools.partial(jax.jit, static_argnames="config")
def _loss(logits, rows, weights, advantages, reference, config=OBJECTIVE):
    logprobs, entropy = sampled_logprobs(logits, rows)
    return policy_loss(logprobs, entropy, reference, rows, weights, advantages, config)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"kl": 0.3},
        {"kl": 0.0, "dual_clip": 1.5},
        {"kl": 0.3, "kl_estimator": "k1"},
        {"kl": 0.3, "kl_estimator": "k2", "entropy": 0.2},
    ],
    ids=repr,
)
def test_gradient_matches_finite_differences(options):
    with jax.enable_x64(True):
        rows = _rows(_threads(0), 24)
        keys = jax.random.split(jax.random.key(0), 3)
        logits = jax.random.normal(keys[0], (*rows.tokens.shape, VOCAB), jnp.float64)
        direction = jax.random.normal(keys[1], logits.shape, jnp.float64)
        behaviour, _ = sampled_logprobs(logits, rows)
        # Some ratios are clipped, none sits on the kink.
        noise = 0.5 * jax.random.normal(keys[2], behaviour.shape, jnp.float64)
        weights = _weights(rows)
        rows = dataclasses.replace(rows, logprob=behaviour + noise)
        rest = (
            rows,
            weights,
            jnp.asarray([1.0, -0.5, 2.0]),
            behaviour * 0.9,
            ObjectiveConfig(clip=0.2, **options),
        )
        slope = jnp.vdot(jax.grad(_loss)(logits, *rest), direction)
        step = 1e-6 * direction
        change = _loss(logits + step, *rest) - _loss(logits - step, *rest)
        np.testing.assert_allclose(slope, change / 2e-6, rtol=1e-6)


def test_given_tokens_and_padding_get_exactly_zero_gradient():
    rows = _rows(_threads(1), 24)
    logits = jax.random.normal(jax.random.key(0), (*rows.tokens.shape, VOCAB))
    reference = jnp.full(rows.tokens.shape, -1.0)
    weights = _weights(rows)
    config = dataclasses.replace(OBJECTIVE, entropy=0.1)
    grad = jax.grad(_loss)(logits, rows, weights, jnp.asarray([1.0, -1.0, 0.5]), reference, config)
    predicts_sampled = np.pad(rows.sampled[:, 1:], ((0, 0), (0, 1)))
    moved = np.abs(np.asarray(grad)).max(-1) > 0
    np.testing.assert_array_equal(moved, predicts_sampled)
    # Garbage at given tokens changes nothing, not even NaN.
    garbage = jnp.where(rows.sampled, reference, jnp.nan)
    advantages = jnp.asarray([1.0, -1.0, 0.5])
    clean = policy_loss(reference, reference, reference, rows, weights, advantages, config)
    soiled = policy_loss(
        garbage,
        garbage,
        garbage,
        rows,
        jnp.where(rows.sampled, weights, jnp.nan),
        advantages,
        config,
    )
    assert jax.tree.leaves(clean) == jax.tree.leaves(soiled)


def _model_loss(params, rows, weights, advantages, kl=0.1, supervised=0.0):
    """The policy's loss, and so many times the supervised one."""
    logprobs, entropy = token_logprobs(params, MODEL, rows, TEMPERATURE)
    config = ObjectiveConfig(clip=0.2, kl=kl)
    loss = policy_loss(logprobs, entropy, logprobs * 0.5, rows, weights, advantages, config)[0]
    return loss + supervised * cross_entropy(logprobs, rows)


_model_gradient = jax.jit(jax.value_and_grad(_model_loss))


@pytest.mark.thorough
@pytest.mark.parametrize("loss_of", ["tree", "token", "sequence", "supervised"])
def test_packing_and_padding_change_neither_loss_nor_gradient(loss_of):
    """Of a recorded forest, nested two deep and with hidden blocks: packed as for an update, and
    one thread a row.
    """
    forest = record()
    params = model_params()
    advantages = jnp.asarray([1.0, -0.5, 2.0, -1.5, 0.7, -1.2])
    packed = pack_forest(forest, 1, LIMITS.max_thread_tokens + 7)
    alone = _one_thread_a_row(forest)
    assert forest.depth.max() == 2 and (packed.hidden_block > 0).sum() > 50
    assert 2 * len(packed.tokens) < len(alone.tokens) == (forest.length > 0).sum()

    def gradient_of(rows):
        if loss_of == "supervised":
            return _model_gradient(params, rows, 0 * _weights(rows), advantages, supervised=1.0)
        return _model_gradient(params, rows, _weights(rows, loss_of), advantages, supervised=0.0)

    expected, gradient = gradient_of(alone)
    assert abs(float(expected)) > 0.1
    loss, got = gradient_of(packed)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, gradient)


def _one_thread_a_row(forest):
    rows = []
    for tree, thread_index in np.argwhere(forest.length > 0):
        only = np.zeros_like(forest.length)
        only[tree, thread_index] = forest.length[tree, thread_index]
        rows.append(
            pack_forest(dataclasses.replace(forest, length=only), 1, LIMITS.max_thread_tokens)
        )
    return jax.tree.map(lambda *fields: np.concatenate(fields), *rows)


def test_tree_weight_does_not_depend_on_the_forest():
    """It is the same however many trees, threads or rows there are.

    Adding a tree with advantage 0 only changes the count that divides.
    """
    threads = [(*t[:2], 0, *t[3:]) for t in _threads(4, count=3)]
    more = threads + [(*t[:2], 1, *t[3:]) for t in _threads(5, count=5)]
    alone, joined = _rows(threads, 40), _rows(more, 40)
    loss = jax.jit(functools.partial(_model_loss, kl=0.0))
    params = model_params()
    np.testing.assert_allclose(
        loss(params, joined, _weights(joined), jnp.asarray([1.5, 0.0])),
        loss(params, alone, _weights(alone), jnp.asarray([1.5])) / 2,
        rtol=1e-5,
    )


def test_weights_of_tokens_by_hand():
    """Tree 0: threads with 2 and 1 sampled tokens; tree 1: one with 3; tree 2: one with 2, in the
    next row.
    """
    given = np.zeros(1, bool)
    chosen = np.ones(3, bool)

    def thread(count, tree):
        sampled = np.concatenate([given, chosen[:count]])
        return (
            np.ones(count + 1, np.int32),
            sampled,
            tree,
            np.zeros(count + 1, np.int32),
            np.arange(count + 1),
        )

    rows = _rows([thread(2, 0), thread(1, 0), thread(3, 1), thread(2, 2)], 9)
    everyone = np.ones(3, bool)
    two = np.array([True, False, True])

    def per_thread(loss_aggregation, counted):
        weights = token_weights(rows, counted, loss_aggregation)
        assert (weights[~rows.sampled] == 0).all()
        return weights[rows.sampled].tolist()

    assert per_thread("tree", everyone) == [1 / 3] * 8
    assert per_thread("token", everyone) == [1 / 8] * 8
    assert per_thread("sequence", everyone) == [
        1 / 8,
        1 / 8,
        1 / 4,
        1 / 12,
        1 / 12,
        1 / 12,
        1 / 8,
        1 / 8,
    ]
    # The divisor of a run is for "tree", which else sums over tokens; the other two are means
    # already.
    for loss_aggregation, divisor in (("tree", 4.0), ("token", 1.0), ("sequence", 1.0)):
        divided = token_weights(rows, everyone, loss_aggregation, tokens_per_tree=4.0)
        np.testing.assert_array_equal(
            divided * divisor, token_weights(rows, everyone, loss_aggregation)
        )
    # Without tree 1 its tokens weigh nothing, and nothing is divided by them.
    assert per_thread("tree", two) == [1 / 2] * 3 + [0] * 3 + [1 / 2] * 2
    assert per_thread("token", two) == [1 / 5] * 3 + [0] * 3 + [1 / 5] * 2
    assert per_thread("sequence", two) == [1 / 6, 1 / 6, 1 / 3, 0, 0, 0, 1 / 6, 1 / 6]
    for loss_aggregation in ("tree", "token", "sequence"):
        assert not any(per_thread(loss_aggregation, np.zeros(3, bool)))


def test_clips_by_hand():
    """Ratio 3, where the token became likely: PPO bounds the gain of a good one, only the dual clip
    the loss of a bad one.
    """
    ratio, advantage = (
        jnp.asarray([[3.0, 3.0, 0.5, 0.5, 1.5, 1.0]]),
        jnp.asarray([[2.0, -2.0, 2.0, -2.0, -2.0, -2.0]]),
    )
    gain, clipped = clipped_gain(ratio, advantage, clip=0.2)
    np.testing.assert_allclose(gain, [[2.4, -6.0, 1.0, -1.6, -3.0, -2.0]], rtol=1e-6)
    assert clipped.tolist() == [[True, False, False, True, False, False]]
    gain, clipped = clipped_gain(ratio, advantage, clip=0.2, dual_clip=2.0)
    np.testing.assert_allclose(gain, [[2.4, -4.0, 1.0, -1.6, -3.0, -2.0]], rtol=1e-6)
    assert clipped.tolist() == [[True, True, False, True, False, False]]
    slope = jax.grad(lambda ratio: jnp.sum(clipped_gain(ratio, advantage, 0.2, 2.0)[0]))(ratio)
    assert slope.tolist() == [[0.0, 0.0, 2.0, 0.0, -2.0, -2.0]]


def test_kl_estimates_by_hand():
    """Policy 0.5, reference 0.25: d = -log 2."""
    away = jnp.log(jnp.asarray([[0.5]]))
    expected = {"k1": np.log(2), "k2": np.log(2) ** 2 / 2, "k3": 0.5 + np.log(2) - 1, "reward": 0.0}
    for name, value in expected.items():
        np.testing.assert_allclose(KL[name](away), [[value]], rtol=1e-6)
    # Over the policy's own draws, k1 and k3 average to the divergence; k2 only where the two are
    # close.
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.3, 0.3, 0.4])
    divergence = (p * np.log(p / q)).sum()
    for name in ("k1", "k3"):
        np.testing.assert_allclose(
            (p * np.asarray(KL[name](jnp.log(q / p)[None])[0])).sum(), divergence, rtol=1e-5
        )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "reward"])
def test_token_left_behind_has_finite_loss_and_gradient(estimator):
    """The policy has left the token behind, and e^d overflows from d = 88 on."""
    rows = _rows(_threads(1), 24)
    config = ObjectiveConfig(kl=0.001, kl_estimator=estimator, advantage="leave_one_out")
    reference = jnp.full(rows.tokens.shape, -1.0)

    def loss(logprobs):
        advantages = jnp.asarray([1.0, -1.0, 0.5])
        return policy_loss(
            logprobs, -logprobs, reference, rows, _weights(rows), advantages, config
        )[0]

    for behind in (30.0, 1e4):
        value, slope = jax.value_and_grad(loss)(reference - behind)
        assert np.isfinite(value) and np.isfinite(slope).all()
        assert np.abs(slope).max() < 2e4 * float(_weights(rows).max())


def test_k3_goes_on_as_its_tangent():
    """It is exact up to a ratio of a thousand."""
    d = jnp.asarray([[-30.0, -1.0, 0.0, 2.0, 6.9, K3_LINEAR_FROM, K3_LINEAR_FROM + 1, 88.0, 500.0]])
    [value], [slope] = KL["k3"](d), jax.grad(lambda d: jnp.sum(KL["k3"](d)))(d)
    near = np.asarray(d[0, :5], np.float64)
    np.testing.assert_allclose(value[:5], np.expm1(near) - near, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope[:5], np.expm1(near), rtol=1e-5, atol=1e-6)
    # Beyond, such a token still pulls to the reference, but no harder than an advantage of 1 at the
    # published weight.
    np.testing.assert_allclose(slope[6:], 999.0, rtol=1e-5)
    np.testing.assert_allclose(0.001 * slope[6:], 1.0, rtol=2e-3)
    np.testing.assert_allclose(value[6] - value[5], 999.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("cap", "clip", "exact"),
    [(0.0, 0.2, False), (0.0, 1e6, True), (100.0, 0.2, True), (1.2, 0.2, False)],
    ids=["off", "off, no clip", "wide", "tight"],
)
def test_recorded_log_probs_of_another_policy_can_give_the_exact_gradient(cap, clip, exact):
    """Sums the loss over all trees of one token, weighed by their recorded probabilities.

    The recorded log-probs are those of a sampler that rounds, or of an older policy. The exact
    gradient of the expected reward is p (r - E[r]). With PPO's clip against recorded log-probs,
    tokens are clipped in the first update already; a tight cap cuts the weights that exceed it.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits, rewards = jnp.asarray(rng.normal(size=VOCAB)), jnp.asarray(rng.normal(size=VOCAB))
        rounded = jax.nn.log_softmax(logits + 0.3 * jnp.asarray(rng.normal(size=VOCAB)))
        tokens = np.stack([np.zeros(VOCAB, np.int32), np.arange(VOCAB, dtype=np.int32)], axis=1)
        first = np.zeros((VOCAB, 2), np.int32)
        sampled = np.array([[False, True]] * VOCAB)
        recorded = jnp.stack([jnp.zeros(VOCAB), rounded], axis=1)
        tree = np.repeat(np.arange(VOCAB, dtype=np.int32)[:, None], 2, axis=1)
        rows = Rows(
            tokens,
            first + [0, 1],
            first + 1,
            first,
            sampled,
            tree,
            recorded,
            first.astype(np.uint8),
        )
        weights = jnp.exp(recorded) * sampled
        config = ObjectiveConfig(advantage="none", kl=0.0, clip=clip, importance_cap=cap)

        def gain(logits):
            logprobs = jnp.stack([jnp.zeros(VOCAB), jax.nn.log_softmax(logits)], axis=1)
            own = jax.lax.stop_gradient(logprobs) if cap else None
            return -policy_loss(logprobs, logprobs, logprobs, rows, weights, rewards, config, own)[
                0
            ]

        share = jax.nn.softmax(logits)
        got = jax.grad(gain)(logits)
        of_policy = share * (rewards - share @ rewards)
        assert (np.abs(got - of_policy).max() < 1e-12) == exact
        if cap == 1.2:
            ratio = share / jnp.exp(rounded)
            kept = jnp.minimum(1, cap / ratio) * share * rewards
            assert (ratio > cap).any()
            np.testing.assert_allclose(got, kept - share * kept.sum(), atol=1e-12)


def test_tree_kl_is_the_sum_over_sampled_tokens():
    rows = _rows(_threads(7), 24)
    rng = np.random.default_rng(0)
    rows = dataclasses.replace(rows, logprob=rng.normal(size=rows.tokens.shape).astype(np.float32))
    reference = rng.normal(size=rows.tokens.shape).astype(np.float32)
    got = tree_kl(jnp.where(rows.sampled, reference, jnp.nan), rows, 4)
    expected = [
        (rows.logprob - reference)[rows.sampled & (rows.tree == tree)].sum() for tree in range(4)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_entropy_evens_choices_among_allowed_tokens():
    """One choice between two allowed tokens: -w dH/dlogits = w p (log p + H)."""
    rows = _rows(
        [(np.array([10, 11]), np.array([False, True]), 0, np.zeros(2, np.int32), np.arange(2))], 2
    )
    rows = dataclasses.replace(rows, allowed=np.full((1, 2), p.ALLOW_TEXT, np.uint8))
    logits = jnp.zeros((1, 2, VOCAB)).at[0, 0, 10].set(1.0)
    config = ObjectiveConfig(kl=0.0, entropy=0.7)
    grad = jax.grad(_loss)(logits, rows, _weights(rows), jnp.zeros(1), jnp.zeros((1, 2)), config)
    share = np.array([np.e, 1.0]) / (1 + np.e)
    entropy = -(share * np.log(share)).sum()
    expected = np.zeros((1, 2, VOCAB))
    expected[0, 0, 10:] = 0.7 * share * (np.log(share) + entropy)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_token_logprob_comes_from_the_column_before():
    """Its logits are divided by the temperature first."""
    rows = _rows(_threads(6, count=2), 40)
    logits = np.asarray(jax.random.normal(jax.random.key(1), (*rows.tokens.shape, VOCAB)))
    logprobs, entropy = sampled_logprobs(jnp.asarray(logits), rows, temperature=0.7)
    for row, column in np.argwhere(rows.sampled):
        p = np.exp(logits[row, column - 1] / 0.7)
        p /= p.sum()
        np.testing.assert_allclose(
            logprobs[row, column], np.log(p[rows.tokens[row, column]]), rtol=1e-5
        )
        np.testing.assert_allclose(entropy[row, column], -(p * np.log(p)).sum(), rtol=1e-5)
    assert (np.asarray(logprobs)[~rows.sampled] == 0).all()
