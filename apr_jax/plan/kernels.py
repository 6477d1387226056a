"""What the Pallas kernels do, which the compiler cannot see into: products and bytes of one run on
one device.
"""

import dataclasses

import jax.numpy as jnp

from apr_jax.config import Experiment
from apr_jax.model.attention.packed_tpu import block_size
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache import cache_tpu
from apr_jax.plan.chips import Chip

_PRODUCTS = {"attend_forward": 2, "attend_backward": 5}  # Block products a pair of blocks.


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """Of one run.

    Attributes:
      flops: of its products.
      fill: how many times as long they take as on a full matrix unit.
      bytes: of main memory, beyond the operands that `count` knows of.
    """

    flops: float
    fill: float
    bytes: float


def work(kernel: str, config: Experiment, heads: float, chip: Chip) -> KernelWork:
    """Of a run: attention over `heads` heads of rows of one thread each, or a decode step half-way
    through the window.

    That is the mean of all decode steps, those of short contexts in smaller blocks among them.
    """
    model = config.model
    if kernel == cache_tpu.KERNEL:
        length = config.limits.window / 2
        flops = (
            4.0 * config.schedule.slots * model.heads * model.kv_heads * model.head_size * length
        )
        moved = decode_bytes(config, length, config.limits.window)
        return KernelWork(flops, max(1.0, chip.matrix / model.heads), moved)
    size = block_size(config.limits.max_thread_tokens)
    count = -(-config.limits.max_thread_tokens // size)
    flops = heads * count * (count + 1) / 2 * _PRODUCTS[kernel] * 2 * size * size * model.head_size
    # Read more than once are two arrays, again for each later block.
    again = heads * count * (count - 1) / 2 * 2 * size * model.head_size * 2
    return KernelWork(flops, max(1.0, chip.matrix / model.head_size), again)


def decode_bytes(config: Experiment, length: float, bound: int) -> float:
    """Of a layer's cache up to `bound`: all decode slots' blocks up to `length`, the last half in
    vain, and the rows written back.
    """
    model = config.model
    size = cache_tpu.block_size(model.kv_heads * model.head_size, itemsize(model), bound)
    return config.schedule.slots * position_bytes(model) * (length + size / 2 + cache_tpu.TILE)


def position_bytes(model: ModelConfig) -> int:
    """Keys and values of one position in one layer."""
    return 2 * model.kv_heads * model.head_size * itemsize(model)


def itemsize(model: ModelConfig) -> int:
    """Bytes of a number that the model computes with."""
    return int(jnp.dtype(model.dtype).itemsize)
