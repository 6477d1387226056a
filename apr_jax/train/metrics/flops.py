"""How well a training step uses the machine.

The metric `mfu` is model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B): the FLOP/s
that the model needs, as a share of the peak that dense products reach on this machine. The peak is
measured and not taken from a data sheet, so that the metric means the same on a laptop, on a shared
machine and on a TPU.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from apr_jax.data.packing import Rows
from apr_jax.model.config import ModelConfig

# For how long products are timed, at least, and how often, after the first run has compiled them.
# On a machine that others use too a single run may take a thousand times as long as the best.
_SECONDS = 0.1
_RUNS = 20

# Size of the square matrices, and number of products in one run.
_CPU = (512, 1)
_ACCELERATOR = (4096, 16)


def training_flops(model: ModelConfig, vocab: int, rows: Rows) -> Any:
    """Computes the FLOPs of one forward and backward pass over packed rows.

    What is computed again to save memory does not count.

        6 x tokens x parameters + 12 N H K x pairs

    Each parameter takes a multiplication and an addition in the forward pass, and twice that in the
    backward pass. `parameters` are those by which the pass multiplies: all but the scales of norms
    and the input embedding.

    A pair is a token and one that it sees, itself included. In the forward pass it takes 2K FLOPs a
    head for the score and 2K for the value. The token at position p is counted as seeing p + 1
    tokens, whether or not there are hidden blocks. PaLM's formula has whole rows of T tokens in
    place of pairs; but threads are short, and tokens that they do not see are no work.

    Args:
      model: the network.
      vocab: V.
      rows: packed rows, numpy leaves or traced.
    """
    used = rows.segment > 0  # [R, L]
    tokens = used.sum(dtype="float32")
    pairs = ((rows.position + 1) * used).sum(dtype="float32")

    attention = model.width * model.head_size * 2 * (model.heads + model.kv_heads)
    mlp = 3 * model.width * model.mlp
    parameters = model.layers * (attention + mlp) + model.width * vocab
    return 6.0 * parameters * tokens + 12.0 * model.layers * model.heads * model.head_size * pairs


@functools.cache
def measure_peak(mesh: Mesh, dtype: str) -> float:
    """Measures the FLOP/s of dense square products on all devices of the mesh at once.

    It is the best of at least 20 runs and 0.1 s, measured once in a process. Each process measures
    its own devices, and assumes that those of the others are alike.
    """
    size, products = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
    ones = jnp.ones((size, size), dtype)

    @jax.jit
    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: x @ w, x)

    pairs = [jax.device_put((ones, ones / size), device) for device in mesh.local_devices]
    jax.block_until_ready([multiply(*pair) for pair in pairs])  # Compiles.

    seconds: list[float] = []
    while len(seconds) < _RUNS or sum(seconds) < _SECONDS:
        began = time.perf_counter()
        jax.block_until_ready([multiply(*pair) for pair in pairs])
        seconds.append(time.perf_counter() - began)

    flops = products * 2 * size**3
    return mesh.size * flops / min(seconds)
