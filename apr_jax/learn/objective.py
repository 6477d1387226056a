"""What is learned: cross-entropy of demonstrations, and the tree-sum policy gradient of sampled trees.

The unit of reinforcement is the tree: its advantage multiplies the SUM of the log-probs of the sampled tokens of ALL
its threads, and the batch is divided by its number of trees alone. So neither long threads nor many threads weigh
less or more than their decisions do, and the gradient is exactly that of the expected reward
(tests/learn/test_enumeration.py).

Both losses are sums over tokens, returned with their metrics as `Parts`: a batch that is too large for one pass is
cut into chunks of rows, and the parts of the chunks add up.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apr_jax.data.packing import Rows

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Sums over the sampled tokens of some rows; what `+` combines to those of all rows.

    Attributes:
      tokens: number of sampled tokens.
      entropy: of the distributions they were drawn from.
      kl: k3 estimate of KL(policy, reference).
      clipped: tokens whose gradient the PPO clip switched off.
      difference: |log-prob - behaviour log-prob|.
      worst: the largest such difference.
    """

    tokens: jax.Array
    entropy: jax.Array
    kl: jax.Array
    clipped: jax.Array
    difference: jax.Array
    worst: jax.Array

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
        }


def tree_sum_loss(
    logprobs: Float[Array, "R L"],
    entropy: Float[Array, "R L"],
    reference: Float[Array, "R L"],
    rows: Rows,
    advantages: Float[Array, " B"],
    clip: float,
    kl: float,
) -> tuple[Float[Array, ""], Parts]:
    """-1/B sum over trees, threads, sampled tokens of min(q A, clip(q, 1 - c, 1 + c) A) - kl k3.

    q = exp(log-prob - behaviour log-prob) is the token's ratio, so the first update's gradient is A x the sum of the
    gradients of the log-probs (REINFORCE); k3 = exp(d) - d - 1 with d = reference - log-prob (Schulman 2020) is counted
    a tree like the gradient term.

    Args:
      logprobs: of the policy that learns, at the temperature sampled from.
      entropy: only reported.
      reference: log-probs of the reference policy, no gradient.
      rows: holds the behaviour log-probs, which tokens were sampled, and whose they are.
      advantages: of all B trees of the batch, also those without a token in these rows.
      clip: c.
      kl: weight of the KL penalty.

    Returns:
      the loss and its parts. Given tokens and padding have no part in either.
    """
    trees = advantages.shape[0]
    mask = rows.sampled
    advantage = jnp.where(mask, advantages[jnp.maximum(rows.tree, 0)], 0.0)
    difference = jnp.where(mask, logprobs - rows.logprob, 0.0)
    ratio = jnp.exp(difference)
    bounded = jnp.clip(ratio, 1 - clip, 1 + clip)
    gain = jnp.minimum(ratio * advantage, bounded * advantage)
    away = jnp.where(mask, reference - logprobs, 0.0)
    k3 = jnp.exp(away) - away - 1
    loss = -jnp.sum(gain - kl * k3) / trees
    absolute = jnp.abs(difference)
    parts = Parts(
        tokens=jnp.sum(mask, dtype=logprobs.dtype),
        entropy=jnp.sum(jnp.where(mask, entropy, 0.0)),
        kl=jnp.sum(k3),
        clipped=jnp.sum(bounded * advantage < ratio * advantage, dtype=logprobs.dtype),
        difference=jnp.sum(absolute),
        worst=jnp.max(absolute),
    )
    return loss, jax.lax.stop_gradient(parts)


def cross_entropy(logprobs: Float[Array, "R L"], rows: Rows) -> Float[Array, ""]:
    """-mean log-prob of the sampled tokens of demonstrations, all tokens alike."""
    mask = rows.sampled
    return -jnp.sum(jnp.where(mask, logprobs, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
