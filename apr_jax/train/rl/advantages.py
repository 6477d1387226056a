"""Advantages: how much better a tree did than expected, from the rewards of one step's trees.

All functions take `rewards` [problems, G] and `counted` [problems, G] and return advantages of the
same shape. A group is the G trees of one problem. A tree that is not counted gets the advantage 0
and no part in any mean here. Where the advantage compares trees within their group, all trees of a
group get 0 if fewer than two of them are counted.

docs/objective.md says which advantages leave the gradient unbiased, and the test
tests/train/rl/test_enumeration.py proves it.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Rewards = Float[Array, "problems G"]
Counted = Bool[Array, "problems G"]


def raw(rewards: Rewards, counted: Counted) -> Rewards:
    """Returns A = r: plain REINFORCE."""
    return jnp.where(counted, rewards, 0.0)


def batch_mean(rewards: Rewards, counted: Counted) -> Rewards:
    """Returns A = r - mean reward of all n counted trees.

    The mean holds the tree's own reward, so the gradient is (n - 1) / n of the true one.
    """
    mean = jnp.sum(rewards, where=counted) / jnp.maximum(jnp.sum(counted), 1)
    return jnp.where(counted, rewards - mean, 0.0)


def group_mean(rewards: Rewards, counted: Counted) -> Rewards:
    """Returns A = r - mean reward of the group.

    This is GRPO without its division ("Dr. GRPO", Liu et al. 2025). The mean holds the tree's own
    reward, so the gradient is (G - 1) / G of the true one.
    """
    return _zero_where_zero_std(rewards, counted, rewards - _mean(rewards, counted))


def group_std(rewards: Rewards, counted: Counted) -> Rewards:
    """Returns A = (r - mean of the group) / standard deviation of the group.

    This is the advantage of GRPO (Shao et al. 2024). The gradient is biased. The variance is
    divided by G, not by G - 1. A group without variance gets zeros.
    """
    difference = rewards - _mean(rewards, counted)  # [problems, G]
    deviation = jnp.sqrt(_mean(difference**2, counted))  # [problems, 1]
    # Where the deviation is 0, its place is taken by 1: the result is replaced by 0 anyway.
    divisor = jnp.where(has_zero_std(rewards, counted)[:, None], 1.0, deviation)
    return _zero_where_zero_std(rewards, counted, difference / divisor)


def leave_one_out(rewards: Rewards, counted: Counted) -> Rewards:
    """Returns A = r - mean reward of the other trees of the group (RLOO; Kool et al. 2019).

    The gradient is unbiased. The advantage is G / (G - 1) times that of `group_mean`.

    Raises:
      ValueError: G is 1.
    """
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"leave_one_out needs groups of at least 2 trees, not {group}")
    size = jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), 2)  # [problems, 1]
    difference = rewards - _mean(rewards, counted)  # [problems, G]
    return _zero_where_zero_std(rewards, counted, difference * (size / (size - 1)))


ADVANTAGES: dict[str, Callable[[Rewards, Counted], Rewards]] = {
    "none": raw,
    "batch": batch_mean,
    "group": group_mean,
    "group_std": group_std,
    "leave_one_out": leave_one_out,
}


def has_zero_std(rewards: Rewards, counted: Counted) -> Bool[Array, " problems"]:
    """Returns the groups in which all counted trees earned the same, so that no tree did better.

    A group without a counted tree is one of them.
    """
    highest = jnp.max(rewards, axis=1, where=counted, initial=-jnp.inf)
    lowest = jnp.min(rewards, axis=1, where=counted, initial=jnp.inf)
    return highest <= lowest


def count_zero_std(rewards: Rewards, counted: Counted) -> Int[Array, ""]:
    """Returns the number of groups in which all counted trees earned the same."""
    return jnp.sum(has_zero_std(rewards, counted), dtype=jnp.int32)


def _mean(rewards: Rewards, counted: Counted) -> Float[Array, "problems 1"]:
    """Returns the mean over the counted trees of each group, or 0 where there are none."""
    size = jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), 1)
    return jnp.sum(rewards, axis=1, keepdims=True, where=counted) / size


def _zero_where_zero_std(rewards: Rewards, counted: Counted, advantages: Rewards) -> Rewards:
    """Returns the advantages, with exact zeros for zero-std groups and for trees not counted.

    Without this, the rounding error of a group's mean would turn into a gradient.
    """
    return jnp.where(counted & ~has_zero_std(rewards, counted)[:, None], advantages, 0.0)
