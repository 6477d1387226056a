"""Rewards: what a tree earned less what it cost, from its verdict and the forest's own counts.

    reward = score
             + critical path x (1 - sequential tokens / total tokens), if the answer is right
             - token price x total tokens
             - sequential price x sequential tokens
             - penalty, if the tree is overlong and such trees are penalised

This is plain numpy on the host, one number for each tree.
"""

import numpy as np

from apr_jax.threads import ThreadForest
from apr_jax.train.config import RewardConfig


def tree_rewards(
    scores: np.ndarray,
    correct: np.ndarray,
    forest: ThreadForest,
    price: float,
    config: RewardConfig,
) -> np.ndarray:
    """Computes the reward of each tree, float64 [B].

    Args:
      scores: [B], what the answers are worth, from 0 to 1 (`tasks.Score.reward`).
      correct: [B], 1 where the answer is right, else 0 (`tasks.Score.correct`).
      forest: B trees, numpy leaves.
      price: price of a sampled token at this step.
      config: the terms of the reward.
    """
    cost = price * forest.total_tokens + config.sequential_price * forest.sequential_tokens  # [B]
    penalty = config.overlong_penalty if config.overlong == "penalised" else 0.0
    bonus = config.critical_path * parallel_share(forest) * correct  # [B]
    return scores + bonus - cost - penalty * overlong(forest)


def parallel_share(forest: ThreadForest) -> np.ndarray:
    """Computes 1 - sequential tokens / total tokens of each tree, float64 [B].

    It is 0 for a single thread, and near 1 for a tree whose tokens nearly all stand side by side.
    """
    total = np.maximum(forest.total_tokens, 1)  # [B]
    return 1.0 - np.asarray(forest.sequential_tokens, np.float64) / total


def overlong(forest: ThreadForest) -> np.ndarray:
    """Finds the trees, bool [B], in which any thread ran out of window or budget.

    What such a thread would have said is unknown.
    """
    return np.asarray(forest.truncations) > 0


def counted_trees(forest: ThreadForest, config: RewardConfig) -> np.ndarray:
    """Finds the trees, bool [B], that are not masked; masked ones have no part in any mean."""
    if config.overlong == "masked":
        return ~overlong(forest)
    return np.ones(len(forest.truncations), bool)


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
