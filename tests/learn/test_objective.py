"""The objective and replay: hand numbers, finite differences, masks, padding, packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.data.packing import Rows
from apr_jax.learn.objective import cross_entropy, tree_sum_loss
from apr_jax.learn.replay import sampled_logprobs, token_logprobs
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import init_params

CONFIG = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, head_size=8, mlp=24)
VOCAB = 12


def _rows(threads, length):
    """Places the threads one after the other, as many a row as fit (tokens, sampled, tree, island, position)."""
    rows, used = [], length
    for tokens, sampled, tree, island, position in threads:
        if used + len(tokens) > length:
            rows.append([np.zeros(length, np.int32) for _ in range(5)] + [np.full(length, -1, np.int32)])
            used, segment = 0, 0
        segment += 1
        at = slice(used, used + len(tokens))
        for field, value in zip(rows[-1], (tokens, position, segment, island, sampled, tree), strict=True):
            field[at] = value
        used += len(tokens)
    tokens, position, segment, island, sampled, tree = (np.stack(column) for column in zip(*rows, strict=True))
    blank = np.zeros(tokens.shape, np.float32)
    return Rows(tokens, position, segment, island, sampled.astype(bool), tree, blank, blank.astype(np.uint8))


def _threads(seed, count=6):
    """Random threads with a spawn block (an island that positions forget) and given tokens in the middle."""
    rng = np.random.default_rng(seed)
    threads = []
    for _ in range(count):
        prompt, think, block, joined, after = (rng.integers(1, 5) for _ in range(5))
        island = np.repeat([0, 0, 1, 0, 0], (prompt, think, block, joined, after))
        sampled = np.repeat([False, True, True, False, True], (prompt, think, block, joined, after))
        before = np.arange(prompt + think + block)
        position = np.concatenate([before, prompt + think + np.arange(joined + after)])
        tokens = rng.integers(1, VOCAB, len(island))
        threads.append((tokens, sampled, rng.integers(0, 3), island, position))
    return threads


def test_loss_by_hand():
    # Two trees in one row: tree 0 has two sampled tokens, tree 1 one; the middle token is given.
    rows = Rows(
        tokens=np.array([[1, 2, 3, 1, 2]]),
        position=np.zeros((1, 5), np.int32),
        segment=np.array([[1, 1, 1, 2, 2]]),
        island=np.zeros((1, 5), np.int32),
        sampled=np.array([[False, True, True, False, True]]),
        tree=np.array([[0, 0, 0, 1, 1]]),
        logprob=np.log([[1.0, 0.5, 0.25, 1.0, 0.5]]).astype(np.float32),
        allowed=np.zeros((1, 5), np.uint8),
    )
    logprobs = jnp.log(jnp.asarray([[0.1, 0.5, 0.5, 0.1, 0.25]]))
    reference = jnp.log(jnp.asarray([[0.9, 0.25, 0.5, 0.9, 0.25]]))
    loss, parts = tree_sum_loss(logprobs, -logprobs, reference, rows, jnp.asarray([1.0, -2.0]), clip=0.2, kl=0.1)
    # Ratios 1, 2 (clipped to 1.2: A > 0) and 0.5 (A < 0: the clipped 0.8 x -2 is smaller, so it is taken).
    gain = 1 * 1 + 1.2 * 1 + 0.8 * -2
    k3 = 0.5 - np.log(0.5) - 1  # Only the first sampled token differs from the reference.
    np.testing.assert_allclose(loss, -(gain - 0.1 * k3) / 2, rtol=1e-6)
    metrics = parts.metrics(trees=2)
    np.testing.assert_allclose(metrics["clip_share"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], k3 / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["logprob_difference"], 2 * np.log(2) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["logprob_difference_worst"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], -np.log([0.5, 0.5, 0.25]).mean(), rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logprobs, rows), -np.log([0.5, 0.5, 0.25]).mean(), rtol=1e-6)


@jax.jit
def _loss(logits, rows, advantages, reference):
    logprobs, entropy = sampled_logprobs(logits, rows)
    return tree_sum_loss(logprobs, entropy, reference, rows, advantages, clip=0.2, kl=0.3)[0]


def test_gradient_matches_finite_differences():
    with jax.enable_x64(True):
        rows = _rows(_threads(0), 24)
        keys = jax.random.split(jax.random.key(0), 3)
        logits = jax.random.normal(keys[0], (*rows.tokens.shape, VOCAB), jnp.float64)
        direction = jax.random.normal(keys[1], logits.shape, jnp.float64)
        behaviour, _ = sampled_logprobs(logits, rows)
        # Some ratios are clipped, none sits on the kink.
        noise = 0.5 * jax.random.normal(keys[2], behaviour.shape, jnp.float64)
        rows = dataclasses.replace(rows, logprob=behaviour + noise)
        advantages, reference = jnp.asarray([1.0, -0.5, 2.0]), behaviour * 0.9
        slope = jnp.vdot(jax.grad(_loss)(logits, rows, advantages, reference), direction)
        step = 1e-6 * direction
        change = _loss(logits + step, rows, advantages, reference) - _loss(logits - step, rows, advantages, reference)
        np.testing.assert_allclose(slope, change / 2e-6, rtol=1e-6)


def test_given_tokens_and_padding_get_exactly_zero_gradient():
    rows = _rows(_threads(1), 24)
    logits = jax.random.normal(jax.random.key(0), (*rows.tokens.shape, VOCAB))
    reference = jnp.full(rows.tokens.shape, -1.0)
    grad = jax.grad(_loss)(logits, rows, jnp.asarray([1.0, -1.0, 0.5]), reference)
    predicts_sampled = np.pad(rows.sampled[:, 1:], ((0, 0), (0, 1)))
    moved = np.abs(np.asarray(grad)).max(-1) > 0
    np.testing.assert_array_equal(moved, predicts_sampled)
    # Garbage at given tokens changes nothing, not even NaN.
    garbage = jnp.where(rows.sampled, reference, jnp.nan)
    advantages = jnp.asarray([1.0, -1.0, 0.5])
    clean = tree_sum_loss(reference, reference, reference, rows, advantages, clip=0.2, kl=0.3)
    soiled = tree_sum_loss(garbage, garbage, garbage, rows, advantages, clip=0.2, kl=0.3)
    assert jax.tree.leaves(clean) == jax.tree.leaves(soiled)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(CONFIG, VOCAB, key))(jax.random.key(3))


def _model_loss(params, rows, advantages):
    logprobs, entropy = token_logprobs(params, CONFIG, rows)
    return tree_sum_loss(logprobs, entropy, logprobs * 0.5, rows, advantages, clip=0.2, kl=0.1)[0]


_model_gradient = jax.jit(jax.value_and_grad(_model_loss))


def test_packing_and_padding_change_neither_loss_nor_gradient(params):
    threads = _threads(2)
    advantages = jnp.asarray([1.0, -0.5, 2.0])
    packed, alone = _rows(threads, 57), _rows(threads, max(len(t[0]) for t in threads))
    assert len(packed.tokens) < len(alone.tokens) == len(threads)
    expected, gradient = _model_gradient(params, alone, advantages)
    assert abs(float(expected)) > 0.1
    loss, got = _model_gradient(params, packed, advantages)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, gradient)


def test_a_tree_weighs_the_same_however_many_trees_threads_or_rows_there_are(params):
    """Adding a tree with advantage 0 only changes the count that divides."""
    threads = [(*t[:2], 0, *t[3:]) for t in _threads(4, count=3)]
    more = threads + [(*t[:2], 1, *t[3:]) for t in _threads(5, count=5)]
    alone = _model_loss_without_kl(params, _rows(threads, 40), jnp.asarray([1.5]))
    joined = _model_loss_without_kl(params, _rows(more, 40), jnp.asarray([1.5, 0.0]))
    np.testing.assert_allclose(joined, alone / 2, rtol=1e-5)


@jax.jit
def _model_loss_without_kl(params, rows, advantages):
    logprobs, entropy = token_logprobs(params, CONFIG, rows)
    return tree_sum_loss(logprobs, entropy, logprobs, rows, advantages, clip=0.2, kl=0.0)[0]


def test_logprob_of_a_token_comes_from_the_column_before_at_the_temperature():
    rows = _rows(_threads(6, count=2), 40)
    logits = np.asarray(jax.random.normal(jax.random.key(1), (*rows.tokens.shape, VOCAB)))
    logprobs, entropy = sampled_logprobs(jnp.asarray(logits), rows, temperature=0.7)
    for row, column in np.argwhere(rows.sampled):
        p = np.exp(logits[row, column - 1] / 0.7)
        p /= p.sum()
        np.testing.assert_allclose(logprobs[row, column], np.log(p[rows.tokens[row, column]]), rtol=1e-5)
        np.testing.assert_allclose(entropy[row, column], -(p * np.log(p)).sum(), rtol=1e-5)
    assert (np.asarray(logprobs)[~rows.sampled] == 0).all()
