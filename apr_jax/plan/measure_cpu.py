"""`apr plan --topology cpu`: predicts the time of a training step on this CPU, and measures it.

This is the one prediction that can be checked without a TPU. Peak and memory bandwidth are measured
first. Then a step of rows that hold one thread each is compiled, counted and run. The processor's
caches are not modelled: everything that an operation reads counts as read from memory.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.data.packing import Rows
from apr_jax.io.json_files import write_json
from apr_jax.io.terminal import Terminal
from apr_jax.model.attention.packed import BLOCK
from apr_jax.model.transformer import init_params
from apr_jax.plan.count import Counter
from apr_jax.plan.hlo import parse
from apr_jax.plan.programs import ANY_STEPS
from apr_jax.train.distributed import HeldRows
from apr_jax.train.metrics.flops import measure_peak
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.session import build_mesh
from apr_jax.train.state import TrainState, init_state
from apr_jax.train.step import make_sft_step, place_rows

_REPEATS = 5
# Bandwidth is measured by copying so many float32 numbers: 256 MiB, more than any cache holds.
_COPIED = 1 << 26


@dataclasses.dataclass(frozen=True)
class Measured:
    """Prediction and measurement of a supervised step on this machine.

    Attributes:
      config: name of the experiment.
      devices: number of CPU devices.
      peak: measured FLOP/s of dense products on all devices.
      bandwidth: measured bytes/s of a copy, read and written, on all devices.
      flops, bytes: counted work of the step on all devices.
      compute: seconds of the FLOPs at the peak.
      memory: seconds of the bytes at the bandwidth.
      seconds: measured seconds of the step, the median of five.
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
        """Predicted seconds of the step."""
        return max(self.compute, self.memory)

    @property
    def error(self) -> float:
        """Relative error of the prediction: predicted / measured - 1."""
        return self.predicted / self.seconds - 1


def measure(config: Experiment, vocab: int) -> Measured:
    """Predicts and measures a supervised step of an experiment.

    Args:
      config: the experiment.
      vocab: size of the tokenizer.

    Raises:
      UsageError: the CPU devices do not fit the config's mesh.
    """
    mesh = build_mesh(config)
    lowered, state, rows = sft_program(config, mesh, vocab)
    compiled = lowered.compile()
    flops, moved = counted_step(compiled.as_text(), config, mesh)

    # Measure what the machine can do, and what the step takes.
    peak = measure_peak(mesh, config.model.dtype)
    bandwidth = measure_bandwidth(mesh)
    return Measured(
        config=config.name,
        devices=mesh.size,
        peak=peak,
        bandwidth=bandwidth,
        flops=flops,
        bytes=moved,
        compute=flops / peak,
        memory=moved / bandwidth,
        seconds=median_seconds(compiled, state, rows),
    )


def sft_program(config: Experiment, mesh: Mesh, vocab: int) -> tuple[Any, TrainState, Rows]:
    """Lowers the supervised step of an experiment for devices that are here.

    Returns:
      the lowered step, a state, and rows that hold one thread each.
    """
    sft = config.train.sft
    optimizer = make_optimizer(sft.optimizer, sft.steps or ANY_STEPS)
    state = init_state(init_params(config.model, vocab, jax.random.key(0)), optimizer, mesh)
    held = len(HeldRows.of(sft.batch_rows, mesh).mine)
    own_rows = _one_thread_a_row(held, config.limits.max_thread_tokens, vocab)
    rows = place_rows(own_rows, sft.batch_rows, mesh)
    step: Any = make_sft_step(config.model, optimizer, mesh)
    return step.lower(state, rows), state, rows


def counted_step(text: str, config: Experiment, mesh: Mesh) -> tuple[float, float]:
    """Counts the FLOPs and the bytes of a supervised step on all CPU devices of the mesh.

    Args:
      text: the compiled step.
      config: the experiment.
      mesh: the devices that it was compiled for.
    """
    computations, entry = parse(text)
    blocks = math.ceil(config.limits.max_thread_tokens / BLOCK)

    def turns(source: str) -> float:
        # Loops without a constant end run over the key blocks that a block of queries sees, on
        # average half of the row's. In the forward pass the queries' own block is handled before
        # the loop.
        return (blocks + 1) / 2 if "transpose" in source else (blocks - 1) / 2

    count = Counter(computations, turns).of(entry)
    return count.flops * mesh.size, count.bytes * mesh.size


def median_seconds(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any) -> float:
    """Measures `state, result = step(state, batch)`: the median of five, after one for warmth."""
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        state, result = step(state, batch)
        jax.block_until_ready((state, result))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def show_measured(step: Measured, path: Path | None = None) -> None:
    """Prints prediction and measurement in a line, and writes them as JSON if a path is given."""
    if path:
        values = dataclasses.asdict(step) | {"predicted": step.predicted, "error": step.error}
        write_json(path, values)
    Terminal(highlight=False).print(
        f"supervised step of {step.config} on {step.devices} CPU devices: {step.flops:.3g} FLOPs"
        f" at {step.peak / 1e9:.0f} GFLOP/s {step.compute:.3f} s, {step.bytes:.3g} bytes at"
        f" {step.bandwidth / 1e9:.1f} GB/s {step.memory:.3f} s; predicted {step.predicted:.3f}"
        f" s, measured {step.seconds:.3f} s, error {step.error:+.0%}"
    )


def _one_thread_a_row(rows: int, length: int, size: int) -> Rows:
    """Rows of random tokens of a vocabulary of `size`; every field is [rows, length].

    Each row is filled by one thread.
    """
    shape = (rows, length)
    return Rows(
        tokens=np.random.default_rng(0).integers(0, size, shape, np.int32),
        position=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segment=np.ones(shape, np.int32),
        hidden_block=np.zeros(shape, np.int32),
        sampled=np.ones(shape, np.bool_),
        tree=np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], shape),
        logprob=np.zeros(shape, np.float32),
        allowed=np.zeros(shape, np.uint8),
    )


def measure_bandwidth(mesh: Mesh) -> float:
    """Bytes/s that all devices together read and write in a copy, the best of several copies."""
    size = _COPIED // mesh.size
    copy = jax.jit(lambda x: x + 1)
    arrays = [jax.device_put(jnp.ones(size), device) for device in mesh.local_devices]
    best = float("inf")
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready([copy(array) for array in arrays])
        best = min(best, time.perf_counter() - begin)
    return 2 * 4 * size * mesh.size / best
