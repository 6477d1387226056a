"""What a training step makes of the machine: the FLOPs that the model needs, and the FLOP/s that
dense products reach here.

Their ratio is the metric `mfu`: model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix
B), but against a measured ceiling in place of a data sheet's peak, so that it means the same on a
laptop, on a shared machine and on a TPU."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from apr_jax.data.packing import Rows
from apr_jax.model.config import ModelConfig

_SECONDS = 0.1  # Of repeats, after the first one has compiled.
_CPU, _ACCELERATOR = (512, 1), (4096, 16)  # Size of the square matrices, products a run.


def training_flops(model: ModelConfig, vocab: int, rows: Rows) -> Any:
    """FLOPs of one forward and backward pass over packed rows; what is recomputed to save memory
    does not count.

        6 x tokens x parameters + 12 N H K x pairs

    A parameter takes a multiplication and an addition forward, and twice that backward.
    `parameters` are those that are
    multiplied with: all but the norms and the input embedding. A pair is a token and one that it
      sees, itself included:
    forward 2K FLOPs a head for its score and 2K for its value. The token at position p sees p + 1,
    hidden blocks or not. PaLM's formula has whole rows of T tokens in place of pairs; threads are
    short, and what they don't see is no work.

    Args:
      vocab: V.
      rows: numpy leaves or traced.
    """
    used = rows.segment > 0
    tokens, pairs = (x.sum(dtype="float32") for x in (used, (rows.position + 1) * used))
    attention = model.width * model.head_size * 2 * (model.heads + model.kv_heads)
    parameters = model.layers * (attention + 3 * model.width * model.mlp) + model.width * vocab
    return 6.0 * parameters * tokens + 12.0 * model.layers * model.heads * model.head_size * pairs


@functools.cache
def measure_peak(mesh: Mesh, dtype: str) -> float:
    """FLOP/s of dense square products on all devices of the mesh at once: the best of 0.1 s of
    repeats, kept for the process.

    Each process measures its own devices and takes the others' to be alike.
    """
    size, products = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
    ones = jnp.ones((size, size), dtype)

    @jax.jit
    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: x @ w, x)

    pairs = [jax.device_put((ones, ones / size), device) for device in mesh.local_devices]
    best = float("inf")
    jax.block_until_ready([multiply(*pair) for pair in pairs])
    end = time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready([multiply(*pair) for pair in pairs])
        best = min(best, time.perf_counter() - began)
    return mesh.size * products * 2 * size**3 / best
