"""What is learned: cross-entropy of demonstrations, and the policy gradient of sampled trees.

The unit of reinforcement is the tree: its advantage multiplies the SUM of the log-probs of the
sampled tokens of ALL its threads, and the batch is divided by its number of trees and by a constant
of the run. So neither long threads nor many threads weigh less or more than their decisions do, and
the gradient is exactly that of the expected reward, up to that constant (docs/objective.md,
tests/train/rl/test_enumeration.py). Other weights of the tokens reproduce what others do.

Both losses are sums over tokens, returned with their metrics as `Parts`: a batch that is too large
for one pass is cut into chunks of rows, and the parts of the chunks add up."""

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
# Over the tokens that are rescored.
MEANS = (
    "entropy",
    "clip_share",
    "logprob_difference",
    "logprob_difference_worst",
    "outside_clip_share",
)
Tokens = Float[Array, "R L"]

# From this d = reference log-prob - log-prob on, k3 grows as a straight line: the policy samples
# the token a thousand times more rarely than the reference. At the published weight of KL, 0.001,
# such a token pulls as hard as an advantage of 1.
K3_LINEAR_FROM = math.log(1_000)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Sums over the sampled tokens of some rows; what `+` combines to those of all rows.

    Attributes:
      tokens: number of sampled tokens.
      entropy: of the distributions they were drawn from.
      kl: estimate of KL(policy, reference); 0 where it is part of the reward.
      clipped: tokens whose gradient the clip, PPO's or the dual one, switched off.
      difference: |log-prob - recorded log-prob|.
      worst: the largest such difference.
      outside: tokens whose ratio to the recorded probability is outside of 1 - c to 1 + c, whether
        or not the clip switches them off.
    """

    tokens: jax.Array
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
        return cls(*(jnp.zeros(()) for _ in dataclasses.fields(cls)))

    def metrics(self, trees: int) -> Metrics:
        """Means a token, except KL: a tree, as in the loss."""
        tokens = jnp.maximum(self.tokens, 1)
        return {
            "entropy": self.entropy / tokens,
            "kl": self.kl / trees,
            "clip_share": self.clipped / tokens,
            "logprob_difference": self.difference / tokens,
            "logprob_difference_worst": self.worst,
            "outside_clip_share": self.outside / tokens,
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
) -> tuple[Float[Array, ""], Parts]:
    """-sum over sampled tokens of w (v min(q A, clip(q, 1 - c, 1 + c) A) - kl k + entropy H).

    q = exp(log-prob - behaviour log-prob) is the token's ratio, so the first update's gradient is A
    x the sum of the gradients of the log-probs (REINFORCE); k is one of `KL`, H the entropy of what
    the token was drawn from. v is 1, or where the behaviour log-probs were recomputed
    `truncated_importance` of the token.

    Args:
      logprobs: of the policy that learns, at the temperature sampled from.
      entropy: H; without config.entropy only reported.
      reference: log-probs of the reference policy, no gradient.
      rows: holds the recorded log-probs, which tokens were sampled, and whose they are.
      weights: w, from `token_weights` of the whole batch.
      advantages: A of all B trees of the batch, also of those without a token in these rows.
      behaviour: log-probs of the sampling policy by the training pass, no gradient; None takes the
        recorded ones.

    Returns:
      the loss and its parts. Given tokens and padding have no part in either.
    """
    mask = rows.sampled
    advantage = jnp.where(mask, advantages[jnp.maximum(rows.tree, 0)], 0.0)
    difference = jnp.where(mask, logprobs - rows.logprob, 0.0)
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
    absolute = jnp.abs(difference)
    parts = Parts(
        tokens=jnp.sum(mask, dtype=logprobs.dtype),
        entropy=jnp.sum(entropy),
        kl=jnp.sum(kl),
        clipped=jnp.sum(clipped, dtype=logprobs.dtype),
        difference=jnp.sum(absolute),
        worst=jnp.max(absolute),
        outside=jnp.sum(jnp.abs(jnp.expm1(difference)) > config.clip, dtype=logprobs.dtype),
    )
    return -jnp.sum(jnp.where(mask, weights * gain, 0.0)), jax.lax.stop_gradient(parts)


def clipped_gain(
    ratio: Tokens, advantage: Tokens, clip: float, dual_clip: float = 0.0
) -> tuple[Tokens, Bool[Array, "R L"]]:
    """min(q A, clip(q, 1 - c, 1 + c) A) (PPO; Schulman et al. 2017); where A < 0 no less than d A
    (Ye et al. 2020).

    Without d, a token that became likely although it did harm pulls with a force that grows with
    its ratio.

    Args:
      clip: c.
      dual_clip: d, above 1; 0 is off.

    Returns:
      the gain, and where it no longer depends on the ratio.
    """
    bounded = jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    gain = jnp.minimum(ratio * advantage, bounded)
    clipped = bounded < ratio * advantage
    if dual_clip:
        floor = dual_clip * advantage
        deep = (advantage < 0) & (gain < floor)
        gain, clipped = jnp.where(deep, floor, gain), clipped | deep
    return gain, clipped


def truncated_importance(difference: Tokens, cap: float) -> Tokens:
    """min(exp(difference), cap): corrects a token for having been drawn by rounded probabilities
    (Yao et al. 2025).

    Args:
      difference: recomputed - recorded log-prob.
      cap: at least 1; bounds what one token can weigh.
    """
    return jnp.exp(jnp.minimum(difference, math.log(cap)))


def k3(d: Tokens) -> Tokens:
    """e^d - d - 1, continued from `K3_LINEAR_FROM` on by its tangent.

    Of a token that the policy has left behind, e^d overflows (d > 88 in float32), and long before
    that one such token rules the gradient of a whole batch. A tangent, because a plain bound would
    let go of just these tokens: its gradient is 0."""
    # What isn't chosen below must not overflow either: its gradient would be NaN.
    near = jnp.minimum(d, K3_LINEAR_FROM)
    exact = jnp.expm1(near) - near
    slope = math.expm1(K3_LINEAR_FROM)
    tangent = slope - K3_LINEAR_FROM + slope * (d - K3_LINEAR_FROM)
    return jnp.where(d < K3_LINEAR_FROM, exact, tangent)


# Estimates of a token's KL(policy, reference) from d = reference log-prob - log-prob (Schulman
# 2020), as terms of a loss: what counts there is the gradient, and each has another one
# (docs/objective.md).
KL: dict[str, Callable[[Tokens], Tokens]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d**2 / 2,
    "k3": k3,
    "reward": jnp.zeros_like,  # The whole tree's k1 was taken off its reward: `tree_kl`.
}


def tree_kl(reference: Tokens, rows: Rows, trees: int) -> Float[Array, " B"]:
    """Sum over a tree's sampled tokens of behaviour log-prob - reference log-prob: k1 of the whole
    tree.
    """
    k1 = jnp.where(rows.sampled, rows.logprob - reference, 0.0)
    return jax.ops.segment_sum(k1.reshape(-1), jnp.maximum(rows.tree, 0).reshape(-1), trees)


def token_weights(
    rows: Rows, counted: np.ndarray, loss_aggregation: str, tokens_per_tree: float = 1.0
) -> np.ndarray:
    """What each token of a batch weighs in `policy_loss`: float64 [R, L], 0 where none was sampled.

    "tree": 1 / (trees x tokens_per_tree): the loss is the mean over trees of sums over all their
    tokens, divided by a
      constant that gives it the size of a mean over tokens.
    "token": 1 / sampled tokens of the batch: long trees take weight from short ones (DAPO; Yu et
    al. 2025). "sequence": 1 / (threads x tokens of the thread): mean over all threads of the batch
    of means over their tokens, what
      results when each thread is a sample of its own (GRPO). A tree weighs by its number of
      threads.

    Args:
      rows: the whole batch, numpy leaves.
      counted: bool [B]; the tokens of other trees weigh 0 and are not divided by.
      tokens_per_tree: sampled tokens of a typical tree. It must be the same number in all steps of
        a run: then it only scales the gradient of "tree". The other two are means over tokens
        already, and are not divided by it.
    """
    mask = rows.sampled & counted[np.maximum(rows.tree, 0)]
    if loss_aggregation == "tree":
        return mask / (max(1, counted.sum()) * tokens_per_tree)
    if loss_aggregation == "token":
        return mask / max(1, mask.sum())
    width = rows.segment.max(initial=0) + 1
    thread = np.arange(len(mask))[:, None] * width + rows.segment
    length = np.bincount(thread[mask], minlength=len(mask) * width)
    return mask / np.maximum(1, length[thread] * np.count_nonzero(length))


def zero_advantage_trees(
    advantages: np.ndarray, counted: np.ndarray, config: ObjectiveConfig
) -> np.ndarray:
    """Trees, bool [B], of which no token can change the gradient: to rescore them would be work for
    nothing.

    They are those that are masked, and those with advantage 0, as of groups in which all earned the
    same. A term of KL or entropy in the loss lets every tree speak; so do weights other than
    "tree", which divide by the tokens of all."""
    if config.kl or config.entropy or config.loss_aggregation != "tree":
        return np.zeros(len(advantages), bool)
    return ~counted | (advantages == 0)


def cross_entropy(logprobs: Float[Array, "R L"], rows: Rows) -> Float[Array, ""]:
    """-mean log-prob of the sampled tokens of demonstrations, all tokens alike."""
    mask = rows.sampled
    return -jnp.sum(jnp.where(mask, logprobs, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
