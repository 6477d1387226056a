"""The work of the Pallas kernels, into which the compiler cannot see.

It is counted as products and bytes of one run of a kernel on one device.
"""

import dataclasses
import math

import jax.numpy as jnp

from apr_jax.config import Experiment
from apr_jax.model.attention.packed_tpu import block_size, near_blocks
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache import cache_tpu
from apr_jax.plan.chips import Chip

# Products for each pair of a query block and a key block.
_PRODUCTS = {"attend_forward": 2, "attend_backward": 5}


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """Work of one run of a Pallas kernel.

    Attributes:
      flops: FLOPs of its products.
      fill: how many times longer the products take than they would on a full matrix unit.
      bytes: bytes of main memory, beyond the operands that `count` knows of.
    """

    flops: float
    fill: float
    bytes: float


def work(kernel: str, config: Experiment, heads: float, chip: Chip) -> KernelWork:
    """Returns the work of one run of a kernel: a decode step, or attention over packed rows.

    Args:
      kernel: its name.
      config: the experiment.
      heads: number of heads times number of rows on the device; each row holds one thread.
      chip: the kind of chip.
    """
    if kernel == cache_tpu.KERNEL:
        return _decode_work(config, chip)
    return _attention_work(kernel, config, heads, chip)


def _decode_work(config: Experiment, chip: Chip) -> KernelWork:
    """Returns the work of a decode step whose contexts are half a window long.

    That is the mean of all decode steps, among them those of short contexts in smaller blocks.
    """
    model = config.model
    length = config.limits.window / 2
    flops = 4.0 * config.schedule.slots * model.heads * model.kv_heads * model.head_size * length
    moved = decode_bytes(config, length, config.limits.window)
    return KernelWork(flops, max(1.0, chip.matrix / model.heads), moved)


def _attention_work(kernel: str, config: Experiment, heads: float, chip: Chip) -> KernelWork:
    """Returns the work of attention, forward or backward, in blocks."""
    model = config.model
    size = block_size(config.limits.max_thread_tokens)
    count = math.ceil(config.limits.max_thread_tokens / size)

    # A block of queries sees its own block of keys and all earlier ones.
    pairs = heads * count * (count + 1) / 2
    flops = pairs * _PRODUCTS[kernel] * 2 * size * size * model.head_size

    # Two arrays are read again for each later block, in two bytes a number.
    pairs_again = heads * count * (count - 1) / 2
    moved = pairs_again * 2 * size * model.head_size * 2

    # Of queries far from their keys the backward pass stores and fetches the sums of the gradient,
    # in four bytes a number, once for each of far * (far + 1) / 2 pairs of blocks. `count` knows of
    # one transfer of each far block, for their memory is a result of the kernel.
    if kernel == "attend_backward":
        far = max(0, count - near_blocks(model.head_size, size))
        transfers = heads * (far * (far + 1) - far)
        moved += transfers * size * model.head_size * 4
    return KernelWork(flops, max(1.0, chip.matrix / model.head_size), moved)


def decode_bytes(config: Experiment, length: float, cache_length: int) -> float:
    """Bytes of one layer's cache that a decode step reads and writes.

    Each decode slot reads its blocks up to `length`, of which the last is half in vain on average,
    and writes a tile of rows back.

    Args:
      config: the experiment.
      length: positions of each context.
      cache_length: positions of the cache, on which the size of a block depends.
    """
    model = config.model
    size = cache_tpu.block_size(model.kv_heads * model.head_size, itemsize(model), cache_length)
    return config.schedule.slots * position_bytes(model) * (length + size / 2 + cache_tpu.TILE)


def position_bytes(model: ModelConfig) -> int:
    """Bytes of the keys and values of one position in one layer."""
    return 2 * model.kv_heads * model.head_size * itemsize(model)


def itemsize(model: ModelConfig) -> int:
    """Bytes of a number that the model computes with."""
    return int(jnp.dtype(model.dtype).itemsize)
