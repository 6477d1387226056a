"""The losses: cross-entropy of demonstrations, and the policy gradient of sampled trees.

The unit of reinforcement is the tree. Its advantage multiplies the SUM of the log-probs of the
sampled tokens of ALL its threads, and the sum over trees is divided by the number of trees and by a
constant of the run. So a decision weighs the same in a long thread and in a short one, in a tree of
many threads and in one of few, and the gradient is exactly that of the expected reward, up to the
constant (docs/objective.md, tests/train/rl/test_enumeration.py). Other choices of
`loss_aggregation` weigh the tokens as published methods do.

`policy_loss` is a sum over tokens and returns its metrics as sums too (`Parts`). So a batch that is
too large for one pass can be cut into chunks of rows, whose losses and parts add up.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from apr_jax.data.packing import Rows
from apr_jax.train.config import ObjectiveConfig

Metrics = dict[str, jax.Array]
# Metrics of how far the log-probs of rollout and training are apart: means (or a maximum) over the
# rescored tokens that the policy of this step drew.
ROLLOUT_ERRORS = ("logprob_difference", "logprob_difference_worst", "outside_clip_share")
# Metrics that are means (or a maximum) over the rescored tokens: undefined where there are none.
MEANS = ("entropy", "clip_share", *ROLLOUT_ERRORS)
Tokens = Float[Array, "R L"]

# Where d = reference log-prob - log-prob is larger than this, `k3` goes on as a straight line. The
# policy then samples the token a thousand times more rarely than the reference does; at the
# published weight of KL, 0.001, the gradient of such a token is as large as that of an advantage
# of 1.
K3_LINEAR_FROM = math.log(1_000)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Sums over the sampled tokens of some rows. `a + b` holds the sums over the rows of both.

    Attributes:
      tokens: number of sampled tokens.
      current: number of those that were drawn by the policy of this step, and not by an older one.
      entropy: sum of the entropies of the distributions from which they were drawn.
      kl: sum of the estimates of KL(policy, reference); 0 where KL is part of the reward.
      clipped: number of tokens whose gradient the clip, PPO's or the dual one, switched off.
      difference: sum of |log-prob - recorded log-prob| over the `current` tokens.
      worst: the largest such difference.
      outside: number of `current` tokens whose ratio to the recorded probability is not between
        1 - c and 1 + c, whether or not the clip switches their gradient off.
    """

    tokens: jax.Array
    current: jax.Array
    entropy: jax.Array
    kl: jax.Array
    clipped: jax.Array
    difference: jax.Array
    worst: jax.Array
    outside: jax.Array

    def __add__(self, other: "Parts") -> "Parts":
        summed = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(summed, worst=jnp.maximum(self.worst, other.worst))

    @classmethod
    def zero(cls) -> "Parts":
        """Returns the parts of no rows."""
        return cls(*(jnp.zeros(()) for _ in dataclasses.fields(cls)))

    def metrics(self, trees: int) -> Metrics:
        """Returns means over the sampled tokens; that of `kl` is over trees, as in the loss.

        The measures of the rollout's error are over the `current` tokens.
        """
        tokens = jnp.maximum(self.tokens, 1)
        current = jnp.maximum(self.current, 1)
        return {
            "entropy": self.entropy / tokens,
            "kl": self.kl / trees,
            "clip_share": self.clipped / tokens,
            "logprob_difference": self.difference / current,
            "logprob_difference_worst": self.worst,
            "outside_clip_share": self.outside / current,
        }


def policy_loss(
    logprobs: Tokens,
    entropy: Tokens,
    reference: Tokens,
    rows: Rows,
    weights: Tokens,
    advantages: Float[Array, " B"],
    config: ObjectiveConfig,
    behaviour: Tokens | None = None,
    older: Bool[Array, "R L"] | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """Computes -sum over sampled tokens of w (v min(q A, clip(q, 1 - c, 1 + c) A) - kl k + ent H).

    q = exp(log-prob - behaviour log-prob) is the token's ratio. In the first epoch q is 1 for a
    token that the policy of this step drew, so the gradient is the sum of A x the gradients of the
    log-probs (REINFORCE). For a token of an older policy, q is the ratio to that policy. k is one
    of `KL`. H is the entropy of the distribution from which the token was drawn, and ent its
    weight. v is 1, or, where the behaviour log-probs were recomputed, the token's
    `truncated_importance`.

    Args:
      logprobs: log-probs under the policy that learns, at the temperature of the sampling.
      entropy: H. If config.entropy is 0 it is only reported.
      reference: log-probs under the reference policy, without gradient.
      rows: packed rows: the recorded log-probs, which tokens were sampled, and to which tree each
        token belongs.
      weights: w, from `token_weights` of the whole batch.
      advantages: A of all B trees of the batch, also of trees without a token in these rows.
      config: the objective.
      behaviour: log-probs under the policy of this step before its first update, recomputed by the
        training pass, without gradient; None if the recorded ones are to be taken for q.
      older: which tokens were drawn by the policy of an earlier step; None if none was.

    Returns:
      the loss and its parts. Prompt tokens and padding have no part in either.
    """
    mask = rows.sampled  # [R, L]
    advantage = jnp.where(mask, advantages[jnp.maximum(rows.tree, 0)], 0.0)  # [R, L]
    difference = jnp.where(mask, logprobs - rows.logprob, 0.0)  # [R, L]

    if behaviour is None:
        gain, clipped = clipped_gain(jnp.exp(difference), advantage, config.clip, config.dual_clip)
    else:
        ratio = jnp.exp(jnp.where(mask, logprobs - behaviour, 0.0))
        gain, clipped = clipped_gain(ratio, advantage, config.clip, config.dual_clip)
        error = jnp.where(mask, behaviour - rows.logprob, 0.0)
        gain = truncated_importance(error, config.importance_cap) * gain

    kl = KL[config.kl_estimator](jnp.where(mask, reference - logprobs, 0.0))
    entropy = jnp.where(mask, entropy, 0.0)
    if config.kl:
        gain = gain - config.kl * kl
    if config.entropy:
        gain = gain + config.entropy * entropy

    # The log-probs of an older policy differ because the policy has changed, which is no error.
    current = mask if older is None else mask & ~older
    absolute = jnp.where(current, jnp.abs(difference), 0.0)
    is_outside = current & (jnp.abs(jnp.expm1(difference)) > config.clip)
    parts = Parts(
        tokens=jnp.sum(mask, dtype=logprobs.dtype),
        current=jnp.sum(current, dtype=logprobs.dtype),
        entropy=jnp.sum(entropy),
        kl=jnp.sum(kl),
        clipped=jnp.sum(clipped, dtype=logprobs.dtype),
        difference=jnp.sum(absolute),
        worst=jnp.max(absolute),
        outside=jnp.sum(is_outside, dtype=logprobs.dtype),
    )
    return -jnp.sum(jnp.where(mask, weights * gain, 0.0)), jax.lax.stop_gradient(parts)


def clipped_gain(
    ratio: Tokens, advantage: Tokens, clip: float, dual_clip: float = 0.0
) -> tuple[Tokens, Bool[Array, "R L"]]:
    """Computes min(q A, clip(q, 1 - c, 1 + c) A), where A < 0 bounded from below by d A.

    The clip is that of PPO (Schulman et al. 2017), the bound that of Ye et al. (2020). Without d,
    the gradient of a token with a negative advantage that has become likely grows with its ratio,
    without a bound.

    Args:
      ratio: q.
      advantage: A of the tree of each token.
      clip: c.
      dual_clip: d, above 1; 0 turns the lower bound off.

    Returns:
      the gain, and whether it no longer depends on the ratio.
    """
    bounded = jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    gain = jnp.minimum(ratio * advantage, bounded)
    clipped = bounded < ratio * advantage
    if dual_clip:
        floor = dual_clip * advantage
        below_floor = (advantage < 0) & (gain < floor)
        gain = jnp.where(below_floor, floor, gain)
        clipped = clipped | below_floor
    return gain, clipped


def truncated_importance(difference: Tokens, cap: float) -> Tokens:
    """Computes min(exp(difference), cap), an importance weight (Yao et al. 2025).

    It corrects for the rollout having drawn the token by probabilities that were rounded otherwise
    than those of the training pass.

    Args:
      difference: recomputed log-prob - recorded log-prob.
      cap: the most that one token can weigh, at least 1.
    """
    return jnp.exp(jnp.minimum(difference, math.log(cap)))


def k3(d: Tokens) -> Tokens:
    """Computes e^d - d - 1, for d above `K3_LINEAR_FROM` replaced by its tangent there.

    Where the policy hardly ever samples a token any more, e^d overflows (d > 88 in float32), and
    long before that one such token dominates the gradient of a whole batch. A constant bound would
    have the gradient 0 for just these tokens; a tangent keeps pulling them back.
    """
    # The branch that is not chosen below must not overflow either: its gradient would be NaN.
    near = jnp.minimum(d, K3_LINEAR_FROM)
    exact = jnp.expm1(near) - near
    slope = math.expm1(K3_LINEAR_FROM)
    tangent = slope - K3_LINEAR_FROM + slope * (d - K3_LINEAR_FROM)
    return jnp.where(d < K3_LINEAR_FROM, exact, tangent)


# Estimates of a token's KL(policy, reference) from d = reference log-prob - log-prob (Schulman
# 2020). As terms of a loss they are judged by their gradients, which differ (docs/objective.md).
KL: dict[str, Callable[[Tokens], Tokens]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d**2 / 2,
    "k3": k3,
    "reward": jnp.zeros_like,  # No term of the loss: `tree_kl` was taken off the tree's reward.
}


def tree_kl(reference: Tokens, rows: Rows, trees: int) -> Float[Array, " B"]:
    """Sums recorded log-prob - reference log-prob over the sampled tokens of each tree.

    This is the estimate k1 of a whole tree's KL(sampling policy, reference).
    """
    k1 = jnp.where(rows.sampled, rows.logprob - reference, 0.0)  # [R, L]
    return jax.ops.segment_sum(k1.reshape(-1), jnp.maximum(rows.tree, 0).reshape(-1), trees)


def token_weights(
    rows: Rows,
    counted: np.ndarray,
    loss_aggregation: str,
    tokens_per_tree: float = 1.0,
    tokens: int | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Computes what each token of a batch weighs in `policy_loss`: float64 [R, L].

    The weight is 0 where no token was sampled. Elsewhere it depends on `loss_aggregation`:

    "tree": 1 / (trees x tokens_per_tree). The loss is the mean over trees of the sum over all their
      tokens, divided by a constant that gives it the size of a mean over tokens.
    "token": 1 / sampled tokens of the batch. Long trees take weight from short ones (DAPO; Yu et
      al. 2025).
    "sequence": 1 / (threads of the batch x tokens of the thread). The loss is the mean over all
      threads of the mean over their tokens, as if each thread were a sample of its own (GRPO). A
      tree weighs by its number of threads.

    Args:
      rows: rows of the batch, numpy leaves.
      counted: bool [B]. Tokens of trees that are not counted weigh 0, and no divisor counts them.
      loss_aggregation: one of the three above.
      tokens_per_tree: sampled tokens of a typical tree. It must be the same number in all steps of
        a run; then it only scales the gradient of "tree". The other two are means over tokens
        already and do not use it.
      tokens: sampled tokens of all counted trees of the batch, if `rows` has only some of them.
      threads: threads of these trees in which a token was sampled, if `rows` has only some of them.
    """
    mask = rows.sampled & counted[np.maximum(rows.tree, 0)]
    if loss_aggregation == "tree":
        return mask / (max(1, counted.sum()) * tokens_per_tree)
    if loss_aggregation == "token":
        return mask / max(1, mask.sum() if tokens is None else tokens)

    # "sequence": number the threads of all rows, and count the tokens of each.
    width = rows.segment.max(initial=0) + 1
    thread = np.arange(len(mask))[:, None] * width + rows.segment  # [R, L]
    length = np.bincount(thread[mask], minlength=len(mask) * width)  # [R width]
    if threads is None:
        threads = int(np.count_nonzero(length))
    return mask / np.maximum(1, length[thread] * threads)


def zero_advantage_trees(
    advantages: np.ndarray, counted: np.ndarray, config: ObjectiveConfig
) -> np.ndarray:
    """Finds the trees whose tokens cannot change the gradient, bool [B].

    To rescore them would be wasted work. These are the trees that are not counted, and those with
    the advantage 0, for example of groups in which all trees earned the same. With a term of KL or
    entropy there are none, because it gives every tree a gradient. With a loss aggregation other
    than "tree" there are none either, because its divisor counts the tokens of all trees.
    """
    if config.kl or config.entropy or config.loss_aggregation != "tree":
        return np.zeros(len(advantages), bool)
    return ~counted | (advantages == 0)


def cross_entropy(logprobs: Float[Array, "R L"], rows: Rows) -> Float[Array, ""]:
    """Computes the mean of -log-prob over all sampled tokens of demonstrations."""
    mask = rows.sampled
    return -jnp.sum(jnp.where(mask, logprobs, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
