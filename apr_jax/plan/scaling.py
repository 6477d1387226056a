"""Weak scaling on paper: the supervised step when chips and rows grow together, from one compiled program.

A device's own work stays what it was. What it says to the others grows in two ways: a sum over the data axis passes
(d - 1) / d of its bytes, which soon stops growing, and each collective crosses more links, HOP seconds each, which does not.
Beyond the largest slice, data axes are joined by the data centre's network, at DCN bytes/s a chip.
"""

import dataclasses
import math

from apr_jax.plan.chips import Chip
from apr_jax.plan.roofline import Stage

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


def weak_scaling(stage: Stage, chip: Chip, mesh: dict[str, int], parameters: int) -> tuple[Point, ...]:
    """Steps on 8, 16, ... 1,024 chips, each with the rows that a chip of `stage` has; from as many chips as one copy of the
    weights takes.

    Args:
      stage: the supervised step, counted for `mesh`.
      parameters: of the model; their gradients are added up over the data axis in bfloat16.
    """
    points, inner, axes = [], mesh["fsdp"] * mesh["tensor"], 2 if chip.ring in (0, 16) else 3
    talks = sum(talk.count for talk in stage.talks)
    link, gradient_bytes = 2 * chip.link / chip.devices, 2 * parameters / inner
    base = stage.interconnect - _sum_seconds(gradient_bytes, mesh["data"], link)
    for chips in (8 << n for n in range(8)):
        data = chips * chip.devices // inner
        if not data:
            continue
        slices = math.ceil(chips / chip.pod)
        side = min(chips, chip.pod) ** (1 / axes)
        interconnect = base + _sum_seconds(gradient_bytes, data // slices or 1, link)
        latency = talks * HOP * axes * side / 2
        network = _sum_seconds(gradient_bytes, slices, DCN / chip.devices)
        # Latency is not hidden: a collective waits for its own data, and the next product for it.
        seconds = max(stage.compute, stage.memory, interconnect, network) + latency
        points.append(Point(chips, interconnect, latency, network, seconds))
    return tuple(points)


def _sum_seconds(size: float, group: int, bandwidth: float) -> float:
    return 2 * size * (group - 1) / group / bandwidth
