"""Weak scaling of the supervised step, computed from one compiled program.

The numbers of chips and of rows grow together. The work of each device stays the same, but
collectives take longer for two reasons. A device passes (n - 1) / n of a collective's bytes if n
devices with different rows take part, which soon stops growing. And a collective crosses more
links, HOP seconds each, which does not stop. Beyond the largest slice, the data axis spans slices
that the data centre's network joins, at DCN bytes/s a chip.
"""

import dataclasses
import math

from apr_jax.plan.chips import Chip
from apr_jax.plan.roofline import CollectiveCost, Stage

HOP = 1e-6  # Seconds for each link ("How to Scale Your Model", chapter 2).
DCN = 6.25e9  # Bytes/s for each chip (the same).


@dataclasses.dataclass(frozen=True)
class Point:
    """The time of a step on a number of chips, in seconds.

    Attributes:
      chips: the number of chips.
      interconnect: time in which bytes pass the links within slices.
      latency: time in which signals cross links; nothing hides it.
      network: time of sums over slices.
      seconds: time of the step.
    """

    chips: int
    interconnect: float
    latency: float
    network: float
    seconds: float


def weak_scaling(
    stage: Stage, chip: Chip, mesh: dict[str, int], parameters: int
) -> tuple[Point, ...]:
    """Computes the time of the step on 8, 16, ... 1,024 chips, each with a chip's rows of `stage`.

    Numbers of chips that cannot hold one replica of the weights are left out.

    Args:
      stage: the supervised step, counted for `mesh`.
      chip: the kind of chip.
      mesh: axis -> its size.
      parameters: parameters of the model; their gradients are added up over slices in bfloat16.
    """
    replica = mesh["fsdp"] * mesh["tensor"]  # Devices that hold one replica of the weights.
    axes = 2 if chip.ring in (0, 16) else 3  # Slices are tori of so many dimensions.
    collectives = sum(cost.count for cost in stage.collective_costs)
    points = []
    for chips in (8 << n for n in range(8)):
        replicas = chips * chip.devices // replica
        if not replicas:
            continue
        slices = math.ceil(chips / chip.pod)

        times = replicas / slices / mesh["data"]
        interconnect = sum(_seconds(cost, times) for cost in stage.collective_costs)

        # A signal crosses half of each axis.
        side = min(chips, chip.pod) ** (1 / axes)
        latency = collectives * HOP * axes * side / 2

        # An all-reduce over slices moves the two bytes of a gradient twice.
        network = 2 * (2 * parameters / replica) * _passed(slices) / (DCN / chip.devices)

        # Latency is not hidden: a collective waits for its own data, and the next product for it.
        seconds = max(stage.compute, stage.memory, interconnect, network) + latency
        points.append(Point(chips, interconnect, latency, network, seconds))
    return tuple(points)


def _seconds(cost: CollectiveCost, times: float) -> float:
    """Returns the time of a collective when the number of weight replicas grows by `times`."""
    if cost.copies == 1:
        return cost.seconds
    return cost.seconds * _passed(cost.devices * times) / _passed(cost.devices)


def _passed(devices: float) -> float:
    """Returns the share of a collective's bytes that a device passes on."""
    return (devices - 1) / devices
