"""Reinforcement learning over whole thread trees.

A step grows G trees for each problem, gives each tree a reward, compares the rewards, and follows

    gradient = sum over trees of  advantage x sum over the sampled tokens of ALL its threads
                                  of the gradient of the log-prob

divided by the number of trees and a constant of the run. docs/objective.md derives it; the test
tests/train/rl/test_enumeration.py proves it.

    tree_rewards      rewards.py      the reward of each tree: its verdict less its cost
    ADVANTAGES        advantages.py   name -> how much better a tree did than expected
    token_logprobs    rescoring.py    log-probs of recorded tokens by the training pass
    token_weights     objective.py    what each token weighs in the loss
    policy_loss       objective.py    the loss of an update
    cross_entropy     objective.py    the loss of supervised training
    train_rl          trainer.py      the whole run; not imported here, it needs all of `train`

For another JAX project: `policy_loss`, `token_weights` and `ADVANTAGES` need log-probs and packed
`Rows`, and no model. examples/learn_to_spawn.py uses them so.
"""

from apr_jax.train.rl.advantages import ADVANTAGES
from apr_jax.train.rl.objective import (
    Parts,
    cross_entropy,
    policy_loss,
    token_weights,
    tree_kl,
    zero_advantage_trees,
)
from apr_jax.train.rl.rescoring import sampled_logprobs, token_logprobs
from apr_jax.train.rl.rewards import counted_trees, next_price, tree_rewards

__all__ = [
    "ADVANTAGES",
    "Parts",
    "counted_trees",
    "cross_entropy",
    "next_price",
    "policy_loss",
    "sampled_logprobs",
    "token_logprobs",
    "token_weights",
    "tree_kl",
    "tree_rewards",
    "zero_advantage_trees",
]
