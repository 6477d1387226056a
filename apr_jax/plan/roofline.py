"""How long a compiled program takes at least: what it computes, moves and says, against what the
chip can do.

    seconds = max(products / peak, bytes / memory bandwidth, sum over collectives / interconnect
    bandwidth)

The three overlap at best, so it is a lower bound. What Pallas kernels do stands in `kernels.py`.
"""

import collections
import dataclasses
import re
from typing import Any

from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache.cache_tpu import KERNEL
from apr_jax.plan.chips import Chip, collective_seconds, extent_of, group_bandwidth
from apr_jax.plan.count import Count, Counter
from apr_jax.plan.hlo import parse
from apr_jax.plan.kernels import decode_bytes, itemsize, position_bytes, work
from apr_jax.plan.programs import Forests, forest_chunks


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """Collectives of one kind: how often, bytes a device takes part with, seconds.

    Attributes:
      devices: that take part in one.
      copies: of the weights that they hold; 1 if the collective stays within the fsdp and tensor
        axes.
    """

    kind: str
    devices: int
    copies: int
    count: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """One compiled program; all figures are those of one device and one run of it.

    Attributes:
      argument_bytes: parameters, optimizer state, batch.
      output_bytes: results; those in the arguments' place count in `alias_bytes` too.
      temp_bytes: activations and other working space.
      alias_bytes: arguments whose memory the results take over (donation).
      flops: of matrix products, attention included.
      useful_flops: of them, what the model needs: nothing computed twice, no pair that no token
        sees.
      bytes: read from and written to HBM.
      talks: collectives.
      compute, memory, interconnect: seconds of each, if it alone mattered.
      tokens: that a run of it works through, on all devices.
      decode: length of the contexts -> HBM bytes of a decode step, and of weights and cache up to
        there (rollout only).
      compiled: seconds of compiling.
    """

    name: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    flops: float
    useful_flops: float
    bytes: float
    collective_costs: tuple[CollectiveCost, ...]
    compute: float
    memory: float
    interconnect: float
    tokens: float
    decode: dict[int, tuple[float, float]]
    compiled: float

    @property
    def total_bytes(self) -> int:
        """Most memory that the program needs on a device."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "HBM": self.memory, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)


def analyse(
    name: str, text: str, memory: Any, config: Experiment, mesh: Mesh, chip: Chip, seconds: float
) -> Stage:
    """Counts a compiled program of `stages.lower`.

    Args:
      text: of the program, as `plan.compile_text` gives it.
      memory: of the compiler, likewise.
      seconds: that compiling took.
    """
    shape, devices = Shares.of(config, mesh), list(mesh.devices.flat)
    computations, entry = parse(text)
    counter = Counter(computations, lambda source: turns(source, name, config, shape))
    count = counter.of(entry)
    rows = config.train.sft.batch_rows if name == "supervised" else config.train.rl.micro_batch_rows
    heads = rows / shape.shards * config.model.heads / shape.tensor
    kernels = [
        (work(kernel, config, heads, chip), times) for kernel, times in count.kernels.items()
    ]
    attention = sum(each.flops * times for each, times in kernels)
    slowed = sum(each.flops * each.fill * times for each, times in kernels)
    count.bytes += sum(each.bytes * times for each, times in kernels)
    collective_costs = _collective_costs(count, chip, devices, mesh.size // mesh.shape["data"])
    tokens, useful = _needed(name, config)
    return Stage(
        name=name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        flops=count.flops + attention,
        useful_flops=useful / len(devices),
        bytes=count.bytes,
        collective_costs=collective_costs,
        compute=(count.flops + slowed) / chip.device_peak,
        memory=count.bytes / chip.device_bandwidth,
        interconnect=sum(cost.seconds for cost in collective_costs),
        tokens=tokens,
        decode=_decode_bytes(counter, entry, config) if name == "rollout" else {},
        compiled=seconds,
    )


@dataclasses.dataclass(frozen=True)
class Shares:
    """What of a batch and of the heads one device has."""

    shards: int
    tensor: int

    @classmethod
    def of(cls, config: Experiment, mesh: Mesh) -> "Shares":
        tensor = mesh.shape["tensor"]
        return cls(mesh.size // tensor, tensor if config.model.kv_heads % tensor == 0 else 1)


def turns(source: str, stage: str, config: Experiment, shape: Shares) -> float:
    """Turns of a loop whose end only the data knows, for forests as `Forests` has them; of all
    others 1.
    """
    if stage != "rollout":
        # The loop over the chunks of a forest stands directly in the step.
        return forest_chunks(config) if re.fullmatch(r"jit\(\w+\)/while", source) else 1
    scope = re.search(r"(decode_|prefill_|admit)(\d*)/while$", source)
    bounds, forests = config.schedule.bounds(config.limits.window), Forests.of(config)
    trees = -(-config.train.rl.problems * config.train.rl.group // shape.shards)
    if scope and scope.group(1) == "decode_":
        bound = int(scope.group(2))
        return decode_steps(config, shape) * (bound - _begin(bound, bounds)) / bounds[-1]
    if scope and scope.group(1) == "prefill_batch":
        # Each thread once, and each parent once more when its children have ended.
        return trees * (forests.threads + 1) / config.schedule.prefill_batch
    within = re.search(r"prefill_(\d+)/while", source)
    if within:
        # Contexts are short ones (prompts, messages), and parents' halfway to their end: all count
        # as half the first bound.
        first = int(within.group(1)) == bounds[0]
        return float(first) if scope else max(1.0, bounds[0] / 2 / config.schedule.prefill_chunk)
    return 1


def _begin(bound: int, bounds: tuple[int, ...]) -> int:
    """Where the loop before has ended."""
    return ([0, *bounds])[bounds.index(bound)]


def decode_steps(config: Experiment, shape: Shares) -> float:
    """Decode steps of a shard: the longest chain, or what its decode slots need for all tokens if
    that is more.
    """
    forests = Forests.of(config)
    trees = -(-config.train.rl.problems * config.train.rl.group // shape.shards)
    return max(forests.chain, trees * forests.tokens / config.schedule.slots)


def _needed(stage: str, config: Experiment) -> tuple[float, float]:
    """Tokens of a run of a stage, and the FLOPs that the model needs for them
    (`train.ceiling.training_flops`).
    """
    rl, length, forests = config.train.rl, config.limits.max_thread_tokens, Forests.of(config)
    trees = rl.problems * rl.group
    dense = 2.0 * product_parameters(config.model)
    if stage == "supervised":
        tokens = float(config.train.sft.batch_rows * length)
        return tokens, 3 * tokens * (dense + _pair_flops(config.model) * (length + 1) / 2)
    tokens = trees * forests.tokens
    seen = forests.tokens / forests.threads / 2
    forward = tokens * (dense + _pair_flops(config.model) * seen)
    passes = {"rollout": 1, "rescoring": 1, "update": 3}[stage]
    return tokens, passes * forward


def product_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with, the vocabulary's aside."""
    attention = model.width * model.head_size * 2 * (model.heads + model.kv_heads)
    return model.layers * (attention + 3 * model.width * model.mlp)


def _pair_flops(model: ModelConfig) -> float:
    return 4.0 * model.layers * model.heads * model.head_size


def _collective_costs(
    count: Count, chip: Chip, devices: list[Any], copy: int
) -> tuple[CollectiveCost, ...]:
    """By kind and by who takes part; `copy` neighbours in `devices` hold one copy of the
    weights.
    """
    extent = extent_of(devices)
    found: dict[tuple[str, int, int], list[float]] = collections.defaultdict(
        lambda: [0.0, 0.0, 0.0]
    )
    for each, times in count.collectives.items():
        group = each.group or range(len(devices))
        places = [devices[index].coords for index in group]
        seconds = collective_seconds(
            each.kind, each.bytes, len(places), group_bandwidth(chip, extent, places)
        )
        key = each.kind, len(places), len({index // copy for index in group})
        for at, more in enumerate((times, times * each.bytes, times * seconds)):
            found[key][at] += more
    return tuple(CollectiveCost(*key, *sums) for key, sums in sorted(found.items()))


def _decode_bytes(
    counter: Counter, entry: str, config: Experiment
) -> dict[int, tuple[float, float]]:
    """For lengths of context, what a step moves, and what it must: the weights, and all decode
    slots' keys and values so far.

    The lengths are the loops' bounds, or, where the kernel reads what is live, parts of the window
    within a loop's bounds."""
    model = config.model
    weights, position = (
        product_parameters(model) * itemsize(model),
        model.layers * position_bytes(model),
    )
    found, bounds = {}, config.schedule.bounds(config.limits.window)
    for source, step in counter.loops(entry):
        if scope := re.search(r"decode_(\d+)/while$", source):
            bound, times = int(scope.group(1)), step.kernels[KERNEL]
            lengths = [config.limits.window >> n for n in range(5)] if times else [bound]
            for length in [length for length in lengths if _begin(bound, bounds) < length <= bound]:
                must = weights + config.schedule.slots * length * position
                found[length] = (
                    step.bytes + times * decode_bytes(config, length, bound),
                    float(must),
                )
    return dict(sorted(found.items()))
