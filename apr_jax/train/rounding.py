"""Rounding of trained weights to the type in which they are kept (`ModelConfig.param_dtype`).

An update in float32 is often smaller than half the distance of neighbouring bfloat16 numbers, which
is 1/512 to 1/256 of a weight. Rounded to the nearest number it would be lost, in every step again,
and a training at a small learning rate would change nothing. So a weight is rounded up or down at
random: the nearer the upper neighbour, the more often up. Its mean is then the float32 weight, and
many small updates move it as far as they would in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apr_jax.threads.keys import Domain, run_key


def widened(tree: Any) -> Any:
    """Casts all leaves to float32, in which updates are computed."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def rounded_as(values: Any, like: Any, step: Int[Array, ""]) -> Any:
    """Rounds float32 values to the types of other leaves, at random where these are bfloat16.

    The noise follows from the step and from the number of the leaf: it is the same on any mesh, and
    for any seed of a run. All updates of one step (`train.rl.ppo_epochs`) share it, which leaves
    their means as they are.

    Args:
      values: float32 leaves.
      like: leaves of float32, for which the values stay as they are, or bfloat16.
      step: number of the step.
    """
    leaves, structure = jax.tree.flatten(values)
    rounded = [
        _to_bfloat16(leaf, run_key(0, Domain.ROUNDING, step, number))
        if old.dtype == jnp.bfloat16
        else leaf
        for number, (leaf, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


def _to_bfloat16(values: Float[Array, "*shape"], key: jax.Array) -> Float[Array, "*shape"]:
    """Rounds finite float32 numbers to a neighbouring bfloat16 number, right in the mean.

    A bfloat16 number is the upper half of a float32 number. A random lower half is added, which
    carries into the upper one as often as the number lies near to the next.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16)
    upper = (bits + noise.astype(jnp.uint32)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
