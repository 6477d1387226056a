"""The least time that a compiled program can take on a chip (a roofline).

    seconds = max(FLOPs of products / peak,
                  bytes of main memory / memory bandwidth,
                  bytes of collectives / interconnect bandwidth)

The three overlap at best, so this is a lower bound. The work of Pallas kernels is added by
`kernels.py`.
"""

import collections
import dataclasses
import math
import re
from typing import Any

from jax.sharding import Mesh

from apr_jax.config import Experiment
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache.cache_tpu import KERNEL
from apr_jax.model.transformer import decode_share
from apr_jax.plan.chips import Chip, collective_seconds, extent_of, group_bandwidth
from apr_jax.plan.count import Count, Counter
from apr_jax.plan.hlo import parse
from apr_jax.plan.kernels import decode_bytes, itemsize, position_bytes, work
from apr_jax.plan.programs import Forests, carried_bytes, forest_chunks


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """The cost of all collectives of one kind among groups of one size.

    Attributes:
      kind: one of `count.COLLECTIVES`.
      devices: devices that take part in one collective.
      copies: replicas of the weights that these devices hold together; 1 if the collective stays
        within the fsdp and tensor axes.
      count: how often such a collective runs.
      bytes: bytes that a device takes part with.
      seconds: time of all of them.
    """

    kind: str
    devices: int
    copies: int
    count: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """The counted work of one compiled program, for one run on one device.

    Attributes:
      name: one of `programs.STAGES`.
      argument_bytes: size of parameters, optimizer state and batch.
      output_bytes: size of the results; those that take the place of arguments are also counted in
        `alias_bytes`.
      temp_bytes: size of activations and other working space.
      alias_bytes: size of arguments whose memory the results take over (donation).
      flops: FLOPs of matrix products, attention included.
      useful_flops: the part of them that the model needs: nothing is computed twice, and no pair of
        tokens that do not see each other.
      bytes: bytes read from and written to HBM.
      collective_costs: the collectives.
      compute, memory, interconnect: seconds of each, if it alone limited the program.
      tokens: tokens that a run works through, on all devices.
      decode: length of the contexts -> (HBM bytes of a decode step, bytes of the weights and of the
        cache up to that length); for the rollout only.
      compiled: seconds that compiling took.
      carried_bytes: size of the trees that RL with carry-over keeps on the devices meanwhile,
        besides what the program needs.
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
    carried_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The most memory that a device needs while the program runs."""
        program = self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes
        return program + self.carried_bytes

    @property
    def bound(self) -> str:
        """What limits the program: "compute", "HBM" or "interconnect"."""
        times = {"compute": self.compute, "HBM": self.memory, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        """The least seconds that the program can take."""
        return max(self.compute, self.memory, self.interconnect)


def analyse(
    name: str, text: str, memory: Any, config: Experiment, mesh: Mesh, chip: Chip, seconds: float
) -> Stage:
    """Counts a program of `programs.lower`, once it is compiled.

    Args:
      name: one of `programs.STAGES`.
      text: the program's text (`plan.compile_text`).
      memory: the compiler's analysis of its memory (`plan.compile_text`).
      config: the experiment.
      mesh: the devices that it was compiled for.
      chip: their kind.
      seconds: time that compiling took.
    """
    shares = Shares.of(config, mesh)
    devices = list(mesh.devices.flat)
    computations, entry = parse(text)
    counter = Counter(computations, lambda source: turns(source, name, config, shares))
    count = counter.of(entry)

    # Add the work of the Pallas kernels. `slowed` counts it as if the matrix unit were full, with
    # more FLOPs for the longer time.
    rows = config.train.sft.batch_rows if name == "supervised" else config.train.rl.micro_batch_rows
    heads = rows / shares.shards * config.model.heads / shares.tensor
    own = config
    if name == "rollout":
        share = decode_share(config.model, mesh.shape["tensor"])
        own = dataclasses.replace(config, model=share)
    kernels = [(work(kernel, own, heads, chip), times) for kernel, times in count.kernels.items()]
    attention = sum(each.flops * times for each, times in kernels)
    slowed = sum(each.flops * each.fill * times for each, times in kernels)
    count.bytes += sum(each.bytes * times for each, times in kernels)

    replica = mesh.size // mesh.shape["data"]
    collective_costs = _collective_costs(count, chip, devices, replica)
    tokens, useful = _needed(name, config)
    # The trees that a step found and those that it leaves: a step that is stopped is done again
    # from the former. The rollout has both among its arguments and results.
    carried = 2 * carried_bytes(config, mesh) if name in ("rescoring", "update") else 0
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
        decode=_decode_bytes(counter, entry, own) if name == "rollout" else {},
        compiled=seconds,
        carried_bytes=carried,
    )


@dataclasses.dataclass(frozen=True)
class Shares:
    """How a mesh divides the work.

    Attributes:
      shards: parts into which a batch is divided.
      tensor: parts into which the heads are divided.
    """

    shards: int
    tensor: int

    @classmethod
    def of(cls, config: Experiment, mesh: Mesh) -> "Shares":
        """Reads the shares from a mesh; heads that do not divide are not divided."""
        tensor = mesh.shape["tensor"]
        divides = config.model.kv_heads % tensor == 0
        return cls(mesh.size // tensor, tensor if divides else 1)


def turns(source: str, stage: str, config: Experiment, shares: Shares) -> float:
    """Estimates the iterations of a loop whose end depends on the data; 1 for any other loop.

    It is computed for the trees that `Forests` assumes.

    Args:
      source: the loop's JAX scopes; the engine names its loops by `decode_<cache length>`,
        `prefill_batch` and `prefill_<cache length>`.
      stage: the program, one of `programs.STAGES`.
      config: the experiment.
      shares: how the mesh divides the work.
    """
    if stage != "rollout":
        # The loop over the micro-batches of a forest is the outermost one of the step.
        return forest_chunks(config) if re.fullmatch(r"jit\(\w+\)/while", source) else 1

    cache_lengths = config.schedule.cache_lengths(config.limits.window)

    # Decode steps, divided among the loops by the positions for which each is compiled.
    decode = re.search(r"decode_(\d+)/while$", source)
    if decode:
        cache_length = int(decode.group(1))
        positions = cache_length - _begin(cache_length, cache_lengths)
        return decode_steps(config, shares) * positions / cache_lengths[-1]

    # Prefill batches: each thread is read once, and a parent again when its children have ended.
    if source.endswith("prefill_batch/while"):
        reads = _trees(config, shares) * (Forests.of(config).threads + 1)
        return reads / config.schedule.prefill_batch

    # Within a prefill batch. Most contexts are short (prompts and messages), those of parents are
    # halfway to their end; all count as half of the smallest cache length. Each cache length has a
    # loop of at most one iteration, its condition, and within that a loop over chunks.
    prefill = re.search(r"prefill_(\d+)/while", source)
    if prefill:
        if source.endswith(prefill.group(0)):
            return 1.0 if int(prefill.group(1)) == cache_lengths[0] else 0.0
        return max(1.0, cache_lengths[0] / 2 / config.schedule.prefill_chunk)
    return 1


def _begin(cache_length: int, cache_lengths: tuple[int, ...]) -> int:
    """Returns the context length at which the decode loop of a cache length begins."""
    index = cache_lengths.index(cache_length)
    return cache_lengths[index - 1] if index else 0


def decode_steps(config: Experiment, shares: Shares) -> float:
    """Returns the number of decode steps of a shard.

    It is the longest chain, or the steps that the decode slots need for all tokens if that is more.
    """
    forests = Forests.of(config)
    steps_for_all = _trees(config, shares) * forests.tokens / config.schedule.slots
    return max(forests.chain, steps_for_all)


def _trees(config: Experiment, shares: Shares) -> int:
    """Returns the number of trees in a shard's part of a rollout."""
    return math.ceil(config.train.rl.problems * config.train.rl.group / shares.shards)


def _needed(stage: str, config: Experiment) -> tuple[float, float]:
    """Returns the tokens of one run of a stage, and the FLOPs that the model needs for them.

    FLOPs are counted as in `train.metrics.flops`: a backward pass costs two forward passes.
    """
    rl = config.train.rl
    dense = 2.0 * product_parameters(config.model)
    if stage == "supervised":
        length = config.limits.max_thread_tokens
        tokens = float(config.train.sft.batch_rows * length)
        seen = (length + 1) / 2  # Mean number of tokens that a token sees, itself included.
        return tokens, 3 * tokens * (dense + _pair_flops(config.model) * seen)

    forests = Forests.of(config)
    tokens = rl.problems * rl.group * forests.tokens
    seen = forests.tokens / forests.threads / 2
    forward = tokens * (dense + _pair_flops(config.model) * seen)
    passes = {"rollout": 1, "rescoring": 1, "update": 3}[stage]
    return tokens, passes * forward


def product_parameters(model: ModelConfig) -> int:
    """Counts the parameters that a token is multiplied with, without the vocabulary's."""
    attention = model.width * model.head_size * 2 * (model.heads + model.kv_heads)
    return model.layers * (attention + 3 * model.width * model.mlp)


def _pair_flops(model: ModelConfig) -> float:
    """FLOPs of attention for each pair of a token and a token that it sees, in all layers."""
    return 4.0 * model.layers * model.heads * model.head_size


def _collective_costs(
    count: Count, chip: Chip, devices: list[Any], replica: int
) -> tuple[CollectiveCost, ...]:
    """Adds up the collectives of a program by kind, size of the group, and replicas in the group.

    `replica` is the number of neighbours in `devices` that hold one replica of the weights
    together.
    """
    extent = extent_of(devices)
    sums: dict[tuple[str, int, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for collective, times in count.collectives.items():
        group = collective.group or range(len(devices))
        coordinates = [devices[index].coords for index in group]
        bandwidth = group_bandwidth(chip, extent, coordinates)
        seconds = collective_seconds(collective.kind, collective.bytes, len(group), bandwidth)
        replicas = len({index // replica for index in group})

        total = sums[collective.kind, len(group), replicas]
        total[0] += times
        total[1] += times * collective.bytes
        total[2] += times * seconds
    return tuple(CollectiveCost(*key, *total) for key, total in sorted(sums.items()))


def _decode_bytes(
    counter: Counter, entry: str, config: Experiment
) -> dict[int, tuple[float, float]]:
    """Returns HBM bytes of a decode step by the length of its contexts.

    Returns:
      length -> (bytes that a step moves, bytes that it must move: the device's weights, and its
      keys and values of all decode slots up to that length). The lengths are the cache lengths of
      the decode loops. Where the kernel reads only the part of the cache that is in use, they are
      fractions of the window.
    """
    model = config.model
    window = config.limits.window
    weights = product_parameters(model) * itemsize(model)
    position = model.layers * position_bytes(model)
    cache_lengths = config.schedule.cache_lengths(window)

    by_length = {}
    for source, step in counter.loops(entry):
        scope = re.search(r"decode_(\d+)/while$", source)
        if not scope:
            continue
        cache_length = int(scope.group(1))
        begin = _begin(cache_length, cache_lengths)
        kernel_runs = step.kernels[KERNEL]
        lengths = [window >> n for n in range(5)] if kernel_runs else [cache_length]
        for length in lengths:
            if begin < length <= cache_length:
                moved = step.bytes + kernel_runs * decode_bytes(config, length, cache_length)
                least = weights + config.schedule.slots * length * position
                by_length[length] = moved, float(least)
    return dict(sorted(by_length.items()))
