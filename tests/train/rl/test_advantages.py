"""Advantages against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.train.rl.advantages import ADVANTAGES, count_zero_std

ALL = np.ones((3, 4), bool)
# A mixed group, one where all fail, and one where all earn the same.
REWARDS = jnp.asarray(
    [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]], jnp.float32
)


@pytest.mark.parametrize(
    ("name", "mixed", "failed", "equal"),
    [
        ("none", [1, 0, 0, 1], [0] * 4, [0.1] * 4),
        ("batch", [0.8, -0.2, -0.2, 0.8], [-0.2] * 4, [-0.1] * 4),
        ("group", [0.5, -0.5, -0.5, 0.5], [0] * 4, [0] * 4),
        ("group_std", [1, -1, -1, 1], [0] * 4, [0] * 4),
        ("leave_one_out", [2 / 3, -2 / 3, -2 / 3, 2 / 3], [0] * 4, [0] * 4),
    ],
)
def test_advantages_match_numbers_by_hand(name, mixed, failed, equal):
    got = ADVANTAGES[name](REWARDS, ALL)
    np.testing.assert_allclose(got, [mixed, failed, equal], atol=1e-6)
    if name not in ("none", "batch"):
        assert (np.asarray(got)[1:] == 0).all(), "a group without variance must get exactly zero"


def test_zero_std_groups_are_counted():
    assert int(count_zero_std(REWARDS, ALL)) == 2


def test_group_std_uses_the_deviation_of_the_group_itself():
    # Deviation of 3, 0, 0 around 1 is sqrt(2), with G - 1 it would be sqrt(3).
    np.testing.assert_allclose(
        ADVANTAGES["group_std"](jnp.asarray([[3.0, 0, 0]]), np.ones((1, 3), bool)),
        [[2**0.5, -(0.5**0.5), -(0.5**0.5)]],
    )


def test_leave_one_out_needs_a_second_tree():
    with pytest.raises(ValueError, match="at least 2 trees, not 1"):
        ADVANTAGES["leave_one_out"](jnp.ones((3, 1)), np.ones((3, 1), bool))


@pytest.mark.parametrize("name", ["group", "group_std", "leave_one_out"])
def test_rounding_of_the_mean_is_no_advantage(name):
    equal = jnp.asarray(
        np.repeat(np.random.default_rng(0).normal(size=(200, 1)), 5, axis=1), jnp.float32
    )
    assert (np.asarray(equal - jnp.mean(equal, axis=1, keepdims=True)) != 0).any(), (
        "the case does not arise"
    )
    counted = np.ones(equal.shape, bool)
    assert not np.asarray(ADVANTAGES[name](equal, counted)).any()
    assert int(count_zero_std(equal, counted)) == 200


@pytest.mark.parametrize(
    ("name", "mixed", "lone"),
    [
        ("none", [1, 0, 4, 0], [0, 0, 6, 0]),
        ("batch", [-1.75, -2.75, 1.25, 0], [0, 0, 3.25, 0]),
        ("group", [-2 / 3, -5 / 3, 7 / 3, 0], [0] * 4),
        ("group_std", [-0.392232, -0.980581, 1.372813, 0], [0] * 4),
        ("leave_one_out", [-1, -2.5, 3.5, 0], [0] * 4),
    ],
)
def test_trees_that_are_not_counted_have_no_part(name, mixed, lone):
    """Means are 11 / 4 of the batch and 5 / 3 of the first group, deviation sqrt(26) / 3; infinite
    rewards are hidden.
    """
    rewards = jnp.asarray([[1.0, 0, 4, jnp.inf], [9, -9, 6, jnp.nan]])
    counted = np.array([[True, True, True, False], [False, False, True, False]])
    np.testing.assert_allclose(
        ADVANTAGES[name](rewards, counted), [mixed, lone], rtol=1e-5, atol=1e-6
    )
    assert int(count_zero_std(rewards, counted)) == 1, (
        "one tree alone cannot be better than its group"
    )
    assert not np.asarray(ADVANTAGES[name](rewards, np.zeros((2, 4), bool))).any()
