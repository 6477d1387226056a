"""Advantages: how much better a tree did than expected, from the rewards of one step's trees.

All functions take rewards [problems, G] and give advantages of the same shape. A group is the G trees of one problem.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rewards = Float[Array, "problems G"]


def raw(rewards: Rewards) -> Rewards:
    """A = r: plain REINFORCE."""
    return rewards


def batch_mean(rewards: Rewards) -> Rewards:
    """A = r - mean of all trees. Slightly biased towards zero: the mean holds the tree's own reward."""
    return rewards - jnp.mean(rewards)


def group_mean(rewards: Rewards) -> Rewards:
    """A = r - mean of the group (GRPO without the division; Liu et al. 2025, "Dr. GRPO")."""
    return _zero_where_flat(rewards, rewards - _mean(rewards))


def group_std(rewards: Rewards) -> Rewards:
    """A = (r - mean of the group) / standard deviation of the group (GRPO; Shao et al. 2024).

    The deviation is that of the group itself (divided by G). A group without variance gets zeros.
    """
    flat = is_flat(rewards)[:, None]
    deviation = jnp.where(flat, 1.0, jnp.std(rewards, axis=1, keepdims=True))
    return _zero_where_flat(rewards, (rewards - _mean(rewards)) / deviation)


def leave_one_out(rewards: Rewards) -> Rewards:
    """A = r - mean of the other trees of the group (RLOO; Kool et al. 2019): unbiased, G / (G - 1) times `group_mean`.

    Raises:
      ValueError: G is 1.
    """
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"leave_one_out needs groups of at least 2 trees, not {group}")
    return _zero_where_flat(rewards, (rewards - _mean(rewards)) * (group / (group - 1)))


ADVANTAGES: dict[str, Callable[[Rewards], Rewards]] = {
    "none": raw,
    "batch": batch_mean,
    "group": group_mean,
    "group_std": group_std,
    "leave_one_out": leave_one_out,
}


def is_flat(rewards: Rewards) -> Array:
    """[problems] bool: all trees of the group earned the same, so that it teaches nothing about them."""
    return jnp.max(rewards, axis=1) == jnp.min(rewards, axis=1)


def count_flat(rewards: Rewards) -> Int[Array, ""]:
    """Number of groups without variance."""
    return jnp.sum(is_flat(rewards), dtype=jnp.int32)


def _mean(rewards: Rewards) -> Array:
    return jnp.mean(rewards, axis=1, keepdims=True)


def _zero_where_flat(rewards: Rewards, advantages: Rewards) -> Rewards:
    """Rounding of the mean must not turn into a gradient."""
    return jnp.where(is_flat(rewards)[:, None], 0.0, advantages)
