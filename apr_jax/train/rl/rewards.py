"""Rewards: what a tree earned, less what it cost, from the verdict and the forest's own counts.

    reward = correct - token price x total tokens - sequential price x sequential tokens - penalty
    if overlong

Plain numpy on the host, a number a tree.
"""

import numpy as np

from apr_jax.threads import ThreadForest
from apr_jax.train.config import RewardConfig


def tree_rewards(
    correct: np.ndarray, forest: ThreadForest, price: float, config: RewardConfig
) -> np.ndarray:
    """The reward of each tree, float64 [B].

    Args:
      correct: [B], 1 for a right answer.
      forest: numpy leaves.
      price: of a sampled token, as it stands at this step.
    """
    cost = price * forest.total_tokens + config.sequential_price * forest.sequential_tokens
    penalty = config.overlong_penalty if config.overlong == "penalised" else 0.0
    return correct - cost - penalty * overlong(forest)


def overlong(forest: ThreadForest) -> np.ndarray:
    """Trees, bool [B], of which some thread, root or not, ran out of window or budget: what it
    would say is unknown.
    """
    return np.asarray(forest.truncations) > 0


def counted_trees(forest: ThreadForest, config: RewardConfig) -> np.ndarray:
    """Trees, bool [B], that teach and have a part in means: all but the masked ones."""
    return (
        ~overlong(forest) if config.overlong == "masked" else np.ones(len(forest.truncations), bool)
    )


def next_price(price: float, tokens: float, config: RewardConfig) -> float:
    """max(0, price + price_step (tokens / budget - 1)): dual ascent on `mean tokens <= budget`.

    The price is the multiplier of that constraint: it rises while trees are longer than the budget,
      falls while they are
    shorter, and comes to rest where the budget is met, or at 0 if it needs no price.

    Args:
      price: of this step.
      tokens: mean total tokens of this step's trees.
    """
    if not config.token_budget:
        return price
    return max(0.0, price + config.price_step * (tokens / config.token_budget - 1))
