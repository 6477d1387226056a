"""Rewards: what a tree earned less what it cost, from its verdict and the forest's own counts.

    reward = score
             + critical path x (1 - sequential tokens / total tokens), if the answer is right
             - token price x total tokens
             - sequential price x sequential tokens
             - penalty, if the tree is overlong and such trees are penalised

This is plain numpy on the host, one number for each tree.
"""

import dataclasses

import numpy as np

from apr_jax.threads import ThreadForest
from apr_jax.train.config import RewardConfig


@dataclasses.dataclass(frozen=True)
class TreeCosts:
    """What rewards need to know of B trees besides their verdicts, int [B] each.

    The attributes are those of `ThreadForest`, so that a forest may stand in its place.
    """

    total_tokens: np.ndarray
    sequential_tokens: np.ndarray
    truncations: np.ndarray


def tree_rewards(
    scores: np.ndarray,
    correct: np.ndarray,
    trees: ThreadForest | TreeCosts,
    price: float,
    config: RewardConfig,
) -> np.ndarray:
    """Computes the reward of each tree, float64 [B].

    Args:
      scores: [B], what the answers are worth, from 0 to 1 (`tasks.Score.reward`).
      correct: [B], 1 where the answer is right, else 0 (`tasks.Score.correct`).
      trees: B trees, numpy leaves.
      price: price of a sampled token at this step.
      config: the terms of the reward.
    """
    cost = price * trees.total_tokens + config.sequential_price * trees.sequential_tokens  # [B]
    penalty = config.overlong_penalty if config.overlong == "penalised" else 0.0
    bonus = config.critical_path * parallel_share(trees) * correct  # [B]
    return scores + bonus - cost - penalty * overlong(trees)


def parallel_share(trees: ThreadForest | TreeCosts) -> np.ndarray:
    """Computes 1 - sequential tokens / total tokens of each tree, float64 [B].

    It is 0 for a single thread, and near 1 for a tree whose tokens nearly all stand side by side.
    """
    total = np.maximum(trees.total_tokens, 1)  # [B]
    return 1.0 - np.asarray(trees.sequential_tokens, np.float64) / total


def overlong(trees: ThreadForest | TreeCosts) -> np.ndarray:
    """Finds the trees, bool [B], in which any thread ran out of window or budget.

    What such a thread would have said is unknown.
    """
    return np.asarray(trees.truncations) > 0


def counted_trees(trees: ThreadForest | TreeCosts, config: RewardConfig) -> np.ndarray:
    """Finds the trees, bool [B], that are not masked; masked ones have no part in the objective."""
    if config.overlong == "masked":
        return ~overlong(trees)
    return np.ones(len(trees.truncations), bool)


def next_price(price: float, tokens: float, config: RewardConfig) -> float:
    """Returns the price of the next step: max(0, price + price_step (tokens / budget - 1)).

    This is dual ascent on the constraint `mean tokens <= budget`, whose multiplier is the price. It
    rises while trees are longer than the budget, falls while they are shorter, and comes to rest
    where the budget is met, or at 0 if the budget is met without a price.

    Args:
      price: price of a sampled token at this step.
      tokens: mean total tokens of the trees of this step.
      config: holds the budget and the step of the price.
    """
    if not config.token_budget:
        return price
    return max(0.0, price + config.price_step * (tokens / config.token_budget - 1))
