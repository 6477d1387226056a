"""What TPUs can do: one table, and what a group of chips can say to each other.

Sources, read in 2026. Peak, memory, its bandwidth: Cloud TPU documentation,
cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, of a whole chip; v2 and v3: Jouppi et al. 2020, "A
Domain-Specific Supercomputer for Training Deep Neural Networks". One-way bandwidth of a link, and
where an axis closes to a ring: Austin et al. 2025, "How to Scale Your Model", chapter 2; of v2 and
v3 Jouppi et al. 2020. Width of the matrix unit:
`jax.experimental.pallas.tpu.get_tpu_info_for_chip`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation. What is a chip's is shared by its JAX devices.

    Attributes:
      peak: bfloat16 FLOP/s of a chip.
      memory: GiB of HBM of a chip.
      bandwidth: bytes/s of its HBM.
      link: bytes/s of one link to a neighbour, one way.
      ring: an axis of so many chips, or of a multiple of it, closes to a ring; 0 if only that of a
        whole pod does.
      matrix: rows and columns of its matrix units.
      devices: JAX devices of a chip.
      pod: chips of the largest slice.
      example: topologies that it has.
      cores: how libtpu joins a chip's cores into one device; None is its default.
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
        return self.peak / self.devices

    @property
    def device_memory(self) -> int:
        """Bytes."""
        return self.memory * 2**30 // self.devices

    @property
    def device_bandwidth(self) -> float:
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


def group_bandwidth(chip: Chip, extent: Sequence[int], group: Sequence[Sequence[int]]) -> float:
    """Bytes/s that each device of a group can take in from the others, all at once.

    An axis on which the group's chips differ gives a link, or two if the group goes all around a
    ring. The devices of a chip share its links. Within a chip it is the memory's bandwidth.

    Args:
      extent: chips of the slice along each axis.
      group: coordinates of the group's chips.
    """
    links = 0
    for axis, size in enumerate(extent):
        places = len({place[axis] for place in group})
        closed = chip.ring > 0 and size % chip.ring == 0
        links += 0 if places == 1 else 2 if places == size and closed else 1
    return links * chip.link / chip.devices if links else chip.device_bandwidth


def extent_of(devices: Sequence[Any]) -> tuple[int, ...]:
    """Chips along each axis of a slice, from the coordinates of its devices."""
    return tuple(1 + max(device.coords[axis] for device in devices) for axis in range(3))


def collective_seconds(kind: str, size: float, group: int, bandwidth: float) -> float:
    """Time of a collective that no link's latency counts in.

    Args:
      size: bytes of the whole, see `hlo.Collective`.
      group: devices that take part.
      bandwidth: of `group_bandwidth`.
    """
    share = (group - 1) / group if group > 1 else 0.0
    passes = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return passes * size / bandwidth if math.isfinite(bandwidth) else 0.0
