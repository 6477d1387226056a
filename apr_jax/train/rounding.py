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
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

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
    upper = (bits + _noise(values.shape, key)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def _noise(shape: tuple[int, ...], key: jax.Array) -> UInt32[Array, "*shape"]:
    """Makes random numbers below 2^16: a hash of each element's index and of a word of the key.

    `jax.random.bits` would do, but on CPU it holds three words for each element at once. These
    numbers become part of the loop that rounds, and take no memory.
    """
    index = jnp.zeros(shape, jnp.uint32)  # Of each element in the flattened array.
    for axis, size in enumerate(shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    word = jax.random.bits(key, (), jnp.uint32)
    return _mix(_mix(index) + word) >> 16


def _mix(words: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Maps words one to one such that each bit depends on all; the finalizer of MurmurHash3."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
