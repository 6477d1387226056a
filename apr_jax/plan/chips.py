"""Properties of TPU chips, and the time of collectives between them.

Sources, read in 2026:

- peak, memory and bandwidth of a whole chip: Cloud TPU documentation,
  cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; of v2 and v3: Jouppi et al. 2020, "A
  Domain-Specific Supercomputer for Training Deep Neural Networks";
- one-way bandwidth of a link, and where an axis closes to a ring: Austin et al. 2025, "How to Scale
  Your Model", chapter 2; of v2 and v3: Jouppi et al. 2020;
- width of the matrix unit: `jax.experimental.pallas.tpu.get_tpu_info_for_chip`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """The chip of a TPU generation. Its JAX devices share everything that it has.

    Attributes:
      peak: bfloat16 FLOP/s of a chip.
      memory: GiB of HBM of a chip.
      bandwidth: bytes/s of its HBM.
      link: bytes/s of one link to a neighbour, one way.
      ring: number of chips; an axis with a multiple of that many closes to a ring. 0 if only the
        axis of a whole pod does.
      matrix: rows, and columns, of its matrix units.
      devices: JAX devices of a chip.
      pod: chips of the largest slice.
      example: topologies of the generation, for messages.
      cores: how libtpu joins a chip's cores into one device; None is libtpu's default.
    """

    peak: float
    memory: int
    bandwidth: float
    link: float
    ring: int
    matrix: int
    devices: int
    pod: int
    example: str
    cores: str | None = None

    @property
    def device_peak(self) -> float:
        """bfloat16 FLOP/s of a JAX device."""
        return self.peak / self.devices

    @property
    def device_memory(self) -> int:
        """Bytes of HBM of a JAX device."""
        return self.memory * 2**30 // self.devices

    @property
    def device_bandwidth(self) -> float:
        """Bytes/s of HBM of a JAX device."""
        return self.bandwidth / self.devices


CHIPS = {
    "v2": Chip(46e12, 16, 700e9, 62e9, 0, 128, 2, 256, "v2:4x4"),
    "v3": Chip(123e12, 32, 900e9, 82e9, 0, 128, 2, 1024, "v3:4x4, v3:8x8 (= v3-128)"),
    "v4": Chip(275e12, 32, 1228e9, 45e9, 4, 128, 1, 4096, "v4:2x2x1, v4:4x4x4", "megacore"),
    "v5e": Chip(197e12, 16, 819e9, 45e9, 16, 128, 1, 256, "v5e:2x2, v5e:4x4, v5e:8x8, v5e:16x16"),
    "v5p": Chip(459e12, 95, 2765e9, 90e9, 4, 128, 1, 6144, "v5p:2x2x1, v5p:4x4x4, v5p:8x8x16"),
    "v6e": Chip(918e12, 32, 1640e9, 90e9, 16, 256, 1, 256, "v6e:2x2, v6e:4x4, v6e:16x16"),
    "tpu7x": Chip(2307e12, 192, 7380e9, 90e9, 4, 256, 2, 9216, "tpu7x:2x2x1, tpu7x:2x2x2"),
}

# What JAX calls the devices of each generation.
_KINDS = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(device: Any) -> Chip | None:
    """Returns the chip of a JAX device, or None if it is none that is known here."""
    generation = _KINDS.get(device.device_kind)
    return None if generation is None else CHIPS[generation]


def group_bandwidth(chip: Chip, extent: Sequence[int], group: Sequence[Sequence[int]]) -> float:
    """Bytes/s that each device of a group can receive while all devices of the group receive.

    Each axis on which the group's chips differ gives a chip one link, or two if the group goes all
    around a ring. The devices of a chip share its links. Within a chip the memory's bandwidth
    counts.

    Args:
      chip: the kind of chip.
      extent: chips of the slice along each axis.
      group: coordinates of the group's chips.
    """
    links = 0
    for axis, size in enumerate(extent):
        chips = len({coordinates[axis] for coordinates in group})
        is_ring = chip.ring > 0 and size % chip.ring == 0
        if chips == size and chips > 1 and is_ring:
            links += 2
        elif chips > 1:
            links += 1
    return links * chip.link / chip.devices if links else chip.device_bandwidth


def extent_of(devices: Sequence[Any]) -> tuple[int, ...]:
    """Returns the chips along each axis of a slice, from the coordinates of its devices."""
    return tuple(1 + max(device.coords[axis] for device in devices) for axis in range(3))


def collective_seconds(kind: str, size: float, group: int, bandwidth: float) -> float:
    """Seconds of a collective, without the latency of links.

    Args:
      kind: one of `count.COLLECTIVES`.
      size: bytes, see `count.Collective`.
      group: number of devices that take part.
      bandwidth: bytes/s that a device can receive, see `group_bandwidth`.
    """
    if not math.isfinite(bandwidth):
        return 0.0
    share = (group - 1) / group if group > 1 else 0.0  # A device has its own part already.
    # How many times a device receives `size` bytes. An all-reduce is a reduce-scatter and an
    # all-gather.
    passes = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return passes * size / bandwidth
