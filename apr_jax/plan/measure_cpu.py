"""`apr plan --topology cpu`: the same counting for this machine's CPU, and beside it the measured
time of the step.

The one place where a prediction can be checked without a TPU. Peak and memory bandwidth are
measured first; a step of rows of one thread each is then compiled, counted, and run. No cache is
modelled: what an operation reads counts as read from memory."""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.data.packing import Rows
from apr_jax.io.storage import write_text
from apr_jax.io.terminal import Terminal
from apr_jax.model.attention.packed import BLOCK
from apr_jax.model.transformer import init_params
from apr_jax.plan.count import Counter
from apr_jax.plan.hlo import parse
from apr_jax.plan.programs import ANY_STEPS, VOCAB
from apr_jax.train.metrics.flops import measure_peak
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.session import build_mesh
from apr_jax.train.state import init_state
from apr_jax.train.step import make_sft_step, place_rows

_REPEATS = 5
# float32 numbers of the copy that bandwidth is measured with: 256 MiB, beyond any cache.
_COPIED = 1 << 26


@dataclasses.dataclass(frozen=True)
class Measured:
    """Prediction and measurement of a supervised step on this machine; seconds.

    Attributes:
      peak: FLOP/s of dense products, all devices.
      bandwidth: bytes/s of a copy, read and written, all devices.
      compute, memory: what the step takes at least by each.
      seconds: median of five steps.
    """

    config: str
    devices: int
    peak: float
    bandwidth: float
    flops: float
    bytes: float
    compute: float
    memory: float
    seconds: float

    @property
    def predicted(self) -> float:
        return max(self.compute, self.memory)

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted / self.seconds - 1


def measure(config: Experiment) -> Measured:
    """Raises UsageError if the CPU devices don't fit the config's mesh."""
    mesh, sft = build_mesh(config), config.train.sft
    optimizer = make_optimizer(sft.optimizer, sft.steps or ANY_STEPS)
    state = init_state(init_params(config.model, VOCAB, jax.random.key(0)), optimizer, mesh)
    rows = place_rows(_one_thread_a_row(sft.batch_rows, config.limits.max_thread_tokens), mesh)
    step: Any = make_sft_step(config.model, optimizer, mesh)
    compiled = step.lower(state, rows).compile()
    computations, entry = parse(compiled.as_text())
    blocks = -(-config.limits.max_thread_tokens // BLOCK)

    def turns(source: str) -> float:
        # Loops without a constant end are those over the blocks that a block of queries sees, on
        # average half of the row's; in the forward pass its own block stands before the loop.
        return (blocks + 1) / 2 if "transpose" in source else (blocks - 1) / 2

    count = Counter(computations, turns).of(entry)
    peak, bandwidth = measure_peak(mesh, config.model.dtype), _bandwidth(mesh)
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        state, metrics = compiled(state, rows)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    flops, moved = count.flops * mesh.size, count.bytes * mesh.size
    return Measured(
        config=config.name,
        devices=mesh.size,
        peak=peak,
        bandwidth=bandwidth,
        flops=flops,
        bytes=moved,
        compute=flops / peak,
        memory=moved / bandwidth,
        seconds=statistics.median(seconds[1:]),
    )


def show_measured(found: Measured, path: Path | None = None) -> None:
    """Prints it in a line, and writes it as JSON if a path is given."""
    if path:
        values = dataclasses.asdict(found) | {"predicted": found.predicted, "error": found.error}
        write_text(path, json.dumps(values, indent=2) + "\n")
    Terminal(highlight=False).print(
        f"supervised step of {found.config} on {found.devices} CPU devices: {found.flops:.3g} FLOPs"
        f" at {found.peak / 1e9:.0f} GFLOP/s {found.compute:.3f} s, {found.bytes:.3g} bytes at"
        f" {found.bandwidth / 1e9:.1f} GB/s {found.memory:.3f} s; predicted {found.predicted:.3f}"
        f" s, measured {found.seconds:.3f} s, error {found.error:+.0%}"
    )


def _one_thread_a_row(rows: int, length: int) -> Rows:
    shape = (rows, length)
    return Rows(
        tokens=np.random.default_rng(0).integers(0, VOCAB, shape, np.int32),
        position=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segment=np.ones(shape, np.int32),
        hidden_block=np.zeros(shape, np.int32),
        sampled=np.ones(shape, np.bool_),
        tree=np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], shape),
        logprob=np.zeros(shape, np.float32),
        allowed=np.zeros(shape, np.uint8),
    )


def _bandwidth(mesh: Mesh) -> float:
    """Of all devices at once: the best of five copies."""
    size = _COPIED // mesh.size
    copy = jax.jit(lambda x: x + 1)
    arrays = [jax.device_put(jnp.ones(size), device) for device in mesh.local_devices]
    best = float("inf")
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready([copy(array) for array in arrays])
        best = min(best, time.perf_counter() - begin)
    return 2 * 4 * size * mesh.size / best
