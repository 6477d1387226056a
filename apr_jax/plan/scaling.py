"""Weak scaling on paper: the supervised step when chips and rows grow together, from one compiled
program.

A device's own work stays what it was. What it says to others grows in two ways: a collective of n
devices with different rows passes (n - 1) / n of its bytes, which soon stops growing, and each
crosses more links, HOP seconds each, which does not. Beyond the largest slice, data axes are joined
by the data centre's network, at DCN bytes/s a chip."""

import dataclasses
import math

from apr_jax.plan.chips import Chip
from apr_jax.plan.roofline import CollectiveCost, Stage

HOP = 1e-6  # Seconds a link ("How to Scale Your Model", chapter 2).
DCN = 6.25e9  # Bytes/s a chip (the same).


@dataclasses.dataclass(frozen=True)
class Point:
    """Step time on so many chips; seconds.

    Attributes:
      interconnect: bytes through links, within a slice.
      latency: of links crossed; it is not hidden.
      network: sums over slices.
      seconds: of the step.
    """

    chips: int
    interconnect: float
    latency: float
    network: float
    seconds: float


def weak_scaling(
    stage: Stage, chip: Chip, mesh: dict[str, int], parameters: int
) -> tuple[Point, ...]:
    """Steps on 8, 16, ... 1,024 chips, each with the rows that a chip of `stage` has; from as many
    chips as one copy of the weights takes.

    Args:
      stage: the supervised step, counted for `mesh`.
      parameters: of the model; their gradients are added up over slices in bfloat16.
    """
    points, inner, axes = [], mesh["fsdp"] * mesh["tensor"], 2 if chip.ring in (0, 16) else 3
    collective_costs = sum(cost.count for cost in stage.collective_costs)
    for chips in (8 << n for n in range(8)):
        data = chips * chip.devices // inner
        if not data:
            continue
        slices = math.ceil(chips / chip.pod)
        side = min(chips, chip.pod) ** (1 / axes)
        interconnect = sum(
            _seconds(cost, data / slices / mesh["data"]) for cost in stage.collective_costs
        )
        latency = collective_costs * HOP * axes * side / 2
        network = 2 * (2 * parameters / inner) * _passed(slices) / (DCN / chip.devices)
        # Latency is not hidden: a collective waits for its own data, and the next product for it.
        seconds = max(stage.compute, stage.memory, interconnect, network) + latency
        points.append(Point(chips, interconnect, latency, network, seconds))
    return tuple(points)


def _seconds(cost: CollectiveCost, times: float) -> float:
    """Of a talk, when there are so many times as many copies of the weights."""
    if cost.copies == 1:
        return cost.seconds
    return cost.seconds * _passed(cost.devices * times) / _passed(cost.devices)


def _passed(devices: float) -> float:
    """Share of its bytes that a device passes on."""
    return (devices - 1) / devices
