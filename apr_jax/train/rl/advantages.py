"""Advantages: how much better a tree did than expected, from the rewards of one step's trees.

All functions take rewards [problems, G] and `counted` [problems, G], and give advantages of the
same shape. A group is the G trees of one problem. A tree that is not counted gets 0 and has no part
in any mean; so has a group of which fewer than two trees are counted, where the advantage compares
within the group.

docs/objective.md says which of them leave the gradient unbiased, and
tests/train/rl/test_enumeration.py proves it."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Rewards = Float[Array, "problems G"]
Counted = Bool[Array, "problems G"]


def raw(rewards: Rewards, counted: Counted) -> Rewards:
    """A = r: plain REINFORCE."""
    return jnp.where(counted, rewards, 0.0)


def batch_mean(rewards: Rewards, counted: Counted) -> Rewards:
    """A = r - mean of all n counted trees. The mean holds the tree's own reward, so the gradient is
    (n - 1) / n of the true one."""
    mean = jnp.sum(rewards, where=counted) / jnp.maximum(jnp.sum(counted), 1)
    return jnp.where(counted, rewards - mean, 0.0)


def group_mean(rewards: Rewards, counted: Counted) -> Rewards:
    """A = r - mean of the group (GRPO without the division; Liu et al. 2025, "Dr. GRPO"): (G - 1) /
    G of the gradient.
    """
    return _zero_where_zero_std(rewards, counted, rewards - _mean(rewards, counted))


def group_std(rewards: Rewards, counted: Counted) -> Rewards:
    """A = (r - mean of the group) / standard deviation of the group (GRPO; Shao et al. 2024).
    Biased.

    The deviation is that of the group itself (divided by G). A group without variance gets zeros.
    """
    away = rewards - _mean(rewards, counted)
    deviation = jnp.sqrt(_mean(away**2, counted))
    return _zero_where_zero_std(
        rewards, counted, away / jnp.where(has_zero_std(rewards, counted)[:, None], 1.0, deviation)
    )


def leave_one_out(rewards: Rewards, counted: Counted) -> Rewards:
    """A = r - mean of the other trees of the group (RLOO; Kool et al. 2019): unbiased, G / (G - 1)
    times `group_mean`.

    Raises:
      ValueError: G is 1.
    """
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"leave_one_out needs groups of at least 2 trees, not {group}")
    size = jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), 2)
    return _zero_where_zero_std(
        rewards, counted, (rewards - _mean(rewards, counted)) * (size / (size - 1))
    )


ADVANTAGES: dict[str, Callable[[Rewards, Counted], Rewards]] = {
    "none": raw,
    "batch": batch_mean,
    "group": group_mean,
    "group_std": group_std,
    "leave_one_out": leave_one_out,
}


def has_zero_std(rewards: Rewards, counted: Counted) -> Bool[Array, " problems"]:
    """All counted trees of the group earned the same, so that it teaches nothing about them."""
    highest = jnp.max(rewards, axis=1, where=counted, initial=-jnp.inf)
    return highest <= jnp.min(rewards, axis=1, where=counted, initial=jnp.inf)


def count_zero_std(rewards: Rewards, counted: Counted) -> Int[Array, ""]:
    """Number of groups without variance."""
    return jnp.sum(has_zero_std(rewards, counted), dtype=jnp.int32)


def _mean(rewards: Rewards, counted: Counted) -> Float[Array, "problems 1"]:
    size = jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), 1)
    return jnp.sum(rewards, axis=1, keepdims=True, where=counted) / size


def _zero_where_zero_std(rewards: Rewards, counted: Counted, advantages: Rewards) -> Rewards:
    """Rounding of the mean must not turn into a gradient."""
    return jnp.where(counted & ~has_zero_std(rewards, counted)[:, None], advantages, 0.0)
