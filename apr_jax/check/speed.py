"""A training step and a decode step, timed against two limits.

One limit is that of the machine, measured here: the FLOP/s of dense products and the bytes/s of a
copy. The other is what `apr plan` predicts for the compiled program, on chips that it knows (TPUs)
and on the CPU.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apr_jax.check.findings import Finding
from apr_jax.config import Experiment, load
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache.cache_tpu import KERNEL
from apr_jax.model.sharding import make_mesh, on_tpu
from apr_jax.model.transformer import init_params, make_decode, prepare_decode
from apr_jax.plan.chips import chip_of
from apr_jax.plan.count import Counter
from apr_jax.plan.hlo import parse
from apr_jax.plan.kernels import decode_bytes, itemsize, position_bytes
from apr_jax.plan.measure_cpu import (
    counted_step,
    measure_bandwidth,
    median_seconds,
    sft_program,
)
from apr_jax.plan.plan import compile_text
from apr_jax.plan.programs import vocabulary
from apr_jax.plan.roofline import analyse, product_parameters
from apr_jax.scales import scale_file
from apr_jax.train.metrics.flops import measure_peak, training_flops

# The least share of the machine's limit that a step may reach. A step far below it does not compute
# where it should, or shares the device with another program.
_LEAST_SHARE = 0.02
_CPU_ROWS = 8
_ROWS_OF_A_DEVICE = 2  # On accelerators.
_LAYERS = 4  # Of the published 18, so that it compiles in seconds and trains on every chip.


def sized_for(mesh: Mesh) -> Experiment:
    """Makes the experiment whose steps are timed, of a size that fits the devices.

    It is scale nano on CPUs, and elsewhere the first layers of scale paper. All devices split the
    rows.
    """
    if mesh.devices.flat[0].platform == "cpu":
        config = load(scale_file("nano"))
        rows = -(-_CPU_ROWS // mesh.size) * mesh.size
        model = config.model
    else:
        config = load(scale_file("paper"))
        rows = _ROWS_OF_A_DEVICE * mesh.size
        model = dataclasses.replace(config.model, layers=_LAYERS)
    sft = dataclasses.replace(config.train.sft, batch_rows=rows, streams=1)
    train = dataclasses.replace(config.train, sft=sft)
    return dataclasses.replace(config, model=model, train=train)


def check_training_step() -> Finding:
    """Times a supervised step on all devices of the run."""
    mesh = make_mesh()
    config = sized_for(mesh)
    lowered, state, rows = sft_program(config, mesh, vocabulary(config))
    compiled = lowered.compile()
    peak = measure_peak(mesh, config.model.dtype)
    flops = float(training_flops(config.model, vocabulary(config), rows))
    chip = chip_of(mesh.devices.flat[0])

    planned = None
    if mesh.devices.flat[0].platform == "cpu":
        counted, moved = counted_step(compiled.as_text(), config, mesh)
        planned = max(counted / peak, moved / measure_bandwidth(mesh))
    elif chip is not None:
        text, memory = compile_text(lowered)
        planned = analyse("supervised", text, memory, config, mesh, chip, 0.0).seconds

    what = f"{config.train.sft.batch_rows} rows of {config.limits.max_thread_tokens:,} tokens"
    seconds = median_seconds(compiled, state, rows)
    return timed("training step", what, seconds, flops / peak, planned)


def check_decode_step() -> Finding:
    """Times a decode step of all decode slots on one device of this process."""
    device = jax.local_devices()[0]
    mesh = make_mesh(devices=[device])
    config = sized_for(mesh)
    length = config.limits.window // 2  # Positions that each context has.
    lowered, cache, inputs = decode_program(config, mesh)
    compiled = lowered.compile()
    peak = measure_peak(mesh, config.model.dtype)
    bandwidth = measure_bandwidth(mesh)
    flops, moved = needed_to_decode(config, length)
    limit = max(flops / peak, moved / bandwidth)
    chip = chip_of(device)

    planned = None
    if device.platform == "cpu":
        planned = counted_seconds(compiled.as_text(), config, length, peak, bandwidth)
    elif chip is not None:
        text, _ = compile_text(lowered)
        rates = (chip.device_peak, chip.device_bandwidth)
        planned = counted_seconds(text, config, length, *rates)

    def step(cache: Any, inputs: Any) -> tuple[Any, Any]:
        logits, cache = compiled(*inputs, cache)
        return cache, logits

    what = f"{config.schedule.slots} decode slots, contexts of {length:,}"
    return timed("decode step", what, median_seconds(step, cache, inputs), limit, planned)


def decode_program(config: Experiment, mesh: Mesh) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """Lowers a decode step for a mesh of one device.

    Returns:
      the lowered `decode(params, tokens, positions, cache) -> (logits, cache)`, which takes over
      the memory of its cache; an empty cache; the other arguments.
    """
    window = config.limits.window
    slots = config.schedule.slots
    lengths = config.schedule.cache_lengths(window)
    size = vocabulary(config)
    decode, init_cache = make_decode(config.model, lengths, on_tpu(mesh))

    def step(params: Any, tokens: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
        return decode(params, tokens, cache, positions, window)

    def arguments() -> tuple[Any, Any]:
        params = init_params(config.model, size, jax.random.key(0))
        inputs = (
            prepare_decode(params, config.model, on_tpu(mesh)),
            jnp.full((slots, 1), size - 1, jnp.int32),  # [W, 1] tokens
            jnp.full((slots, 1), window // 2 - 1, jnp.int32),  # [W, 1] positions
        )
        return inputs, init_cache(slots, window)

    inputs, cache = jax.device_put(jax.jit(arguments)(), mesh.devices.flat[0])
    return jax.jit(step, donate_argnums=3).lower(*inputs, cache), cache, inputs


def needed_to_decode(config: Experiment, length: int) -> tuple[float, float]:
    """Computes the FLOPs and the bytes that a decode step cannot do without.

    It multiplies each token with all weights and attends to `length` positions. It reads the
    weights once, and the keys and values of all decode slots.

    Args:
      config: the experiment.
      length: positions of each context.
    """
    model: ModelConfig = config.model
    weights = product_parameters(model) + vocabulary(config) * model.width
    pairs = model.layers * model.heads * model.head_size * length
    flops = config.schedule.slots * (2.0 * weights + 4.0 * pairs)
    cache = config.schedule.slots * length * model.layers * position_bytes(model)
    return flops, float(weights * itemsize(model) + cache)


def counted_seconds(
    text: str, config: Experiment, length: int, peak: float, bandwidth: float
) -> float:
    """Computes the time of a compiled decode step at given rates, as `apr plan` counts it.

    Args:
      text: the program.
      config: the experiment.
      length: positions of each context.
      peak: FLOP/s of the device.
      bandwidth: bytes/s of its memory.
    """
    computations, entry = parse(text)
    count = Counter(computations).of(entry)
    by_kernel = decode_bytes(config, length, config.limits.window)
    moved = count.bytes + count.kernels[KERNEL] * by_kernel
    return max(count.flops / peak, moved / bandwidth)


def timed(subject: str, what: str, seconds: float, limit: float, planned: float | None) -> Finding:
    """Makes the finding of a measured time.

    Args:
      subject: what was timed.
      what: its size, in words.
      seconds: the measured time.
      limit: the time at the measured limit of the machine.
      planned: the time that `apr plan` predicts; None if it does not know the chip.
    """
    share = limit / seconds
    text = f"{what}: {1000 * seconds:.3g} ms, {share:.0%} of this machine's measured limit"
    if planned is None:
        text += "; `apr plan` does not know this chip"
    else:
        text += f"; `apr plan` predicts {1000 * planned:.3g} ms at least"
    figures = {"seconds": seconds, "limit": limit, "planned": planned}
    if not (np.isfinite(seconds) and share >= _LEAST_SHARE):
        text += f"; less than {_LEAST_SHARE:.0%}: is another program on the device?"
        return Finding(subject, "fault", text, figures=figures, seconds=seconds)
    return Finding(subject, "ok", text, figures=figures, seconds=seconds)
