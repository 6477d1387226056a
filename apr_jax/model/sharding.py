"""Where parameters and batches live on a mesh: one small table from logical axes to mesh axes.

The mesh axes `data` and `fsdp` split the batch; `fsdp` also splits the parameters over their width;
`tensor` splits heads, MLP and vocabulary.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis.
RULES: dict[str, str | None] = {
    "layer": None,
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "pair": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    "control": None,
}

# Parameter name -> its logical axes. Parameters of layers have a leading layer axis.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "width"),
    "unembed": ("width", "vocab"),
    "final_norm": ("width",),
    "attn_norm": ("layer", "width"),
    "mlp_norm": ("layer", "width"),
    "q": ("layer", "width", "heads", "head"),
    "kv": ("layer", "width", "pair", "kv_heads", "head"),
    "out": ("layer", "heads", "head", "width"),
    "gate_up": ("layer", "width", "pair", "mlp"),
    "down": ("layer", "mlp", "width"),
    "q_bias": ("layer", "heads", "head"),
    "kv_bias": ("layer", "pair", "kv_heads", "head"),
    "q_norm": ("layer", "head"),
    "k_norm": ("layer", "head"),
    # Adapters (`model/lora.py`).
    **dict.fromkeys(("q_a", "k_a", "v_a", "gate_a", "up_a"), ("layer", "width", "rank")),
    "q_b": ("layer", "rank", "heads", "head"),
    **dict.fromkeys(("k_b", "v_b"), ("layer", "rank", "kv_heads", "head")),
    "o_a": ("layer", "heads", "head", "rank"),
    "down_a": ("layer", "mlp", "rank"),
    **dict.fromkeys(("gate_b", "up_b"), ("layer", "rank", "mlp")),
    **dict.fromkeys(("o_b", "down_b"), ("layer", "rank", "width")),
    "control_embed": ("control", "width"),
    "control_unembed": ("width", "control"),
}


def make_mesh(
    data: int = 0, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None
) -> Mesh:
    """Makes a mesh with the axes of `AXES`.

    In one process the axes may need fewer devices than there are; then the first ones are taken.
    TPUs are laid out by `over_torus`.

    Args:
      data: size of the data axis; 0 takes all devices that the other axes leave.
      fsdp: size of the fsdp axis.
      tensor: size of the tensor axis.
      devices: the devices; by default all there are.

    Raises:
      ValueError: there are not enough devices, data=0 cannot use all of them, or some process would
        have no device in the mesh.
    """
    devices = jax.devices() if devices is None else devices
    total = len(devices)
    needed = data * fsdp * tensor if data else total
    divides = needed % (fsdp * tensor) == 0 and needed > 0
    leaves_processes_out = needed < total and jax.process_count() > 1
    if not divides or needed > total or leaves_processes_out:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor}: does not fit the {total} devices"
            " there are"
        )

    shape = (needed // (fsdp * tensor), fsdp, tensor)
    if needed == total and devices[0].platform == "tpu":
        return Mesh(over_torus(shape, devices), AXES)
    return Mesh(np.asarray(devices[:needed]).reshape(shape), AXES)


def on_tpu(mesh: Mesh) -> bool:
    """Returns whether the mesh consists of TPUs, also of a topology that is only compiled for."""
    return bool(mesh.devices.flat[0].platform == "tpu")


def over_torus(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Arranges the TPUs of a slice as an array, such that each axis has links in many directions.

    The chips of a slice form a torus, with links to the neighbours in each direction. A collective
    along a mesh axis uses the links of all directions in which that axis extends at the same time:
    four chips as a square take half the time of four in a line. So the size of each mesh axis is
    split into prime factors, and these are dealt to the directions of the torus one by one.

    Args:
      shape: sizes of the mesh axes; the last axis communicates most, and is served first.
      devices: as many as the shape holds, in any order. Devices that fill no box keep their order.

    Returns:
      an array of `shape` of all devices.
    """
    torus = _torus_of(devices)
    if torus is None:
        return np.asarray(devices).reshape(shape)
    dealt = _deal_axes(shape, torus.shape)

    # Cut each direction into its parts, the part of neighbours innermost.
    parts = [part for direction in dealt for part in reversed(direction)]
    cut = torus.reshape([part.size for part in parts])

    # Bring the parts of a mesh axis together, in the order of the mesh axes, and merge them.
    by_axis = sorted(range(len(parts)), key=lambda index: parts[index].axis)
    return cut.transpose(by_axis).reshape(shape)


def _torus_of(devices: list[Any]) -> np.ndarray | None:
    """Arranges devices by their coordinates; returns None if they fill no box.

    The first direction is that of the cores of a chip.
    """
    places = np.asarray(
        [(getattr(device, "core_on_chip", 0), *device.coords) for device in devices]
    )
    places -= places.min(axis=0)
    extent = places.max(axis=0) + 1
    all_differ = len({*map(tuple, places)}) == len(devices)
    if not all_differ or extent.prod() != len(devices):
        return None
    torus = np.empty(extent, object)
    torus[tuple(places.T)] = devices
    return torus


class _Part(NamedTuple):
    """A prime factor of a mesh axis, dealt to a direction of the torus."""

    axis: int
    size: int


def _deal_axes(shape: tuple[int, ...], extent: tuple[int, ...]) -> list[list[_Part]]:
    """Deals the prime factors of all mesh axes to the directions of a torus.

    Returns:
      the parts of each direction; the first part lies between neighbours.
    """
    left = list(extent)  # What each direction can still take.
    dealt: list[list[_Part]] = [[] for _ in extent]
    # The last axis communicates most, so it chooses first.
    for axis in reversed(range(len(shape))):

        def preference(direction: int, axis: int = axis) -> tuple[bool, int, int]:
            """Prefers a chip's cores, then directions with fewest own parts and most left."""
            is_between_chips = direction > 0
            own_parts = sum(part.axis == axis for part in dealt[direction])
            return is_between_chips, own_parts, -left[direction]

        for factor in _prime_factors(shape[axis]):
            possible = [index for index, size in enumerate(left) if size % factor == 0]
            direction = min(possible, key=preference)
            left[direction] //= factor
            dealt[direction].append(_Part(axis, factor))
    return dealt


def _prime_factors(number: int) -> list[int]:
    """Returns the prime factors of a number from the smallest on; none of 1."""
    for factor in range(2, number + 1):
        if number % factor == 0:
            return [factor, *_prime_factors(number // factor)]
    return []


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns how a parameter is split over the mesh.

    An axis that its mesh axis does not divide is not split.
    """
    spec: list[str | None] = []
    for logical, size in zip(LOGICAL_AXES[name], shape, strict=True):
        axis = RULES[logical]
        spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*spec)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Gives the sharding of every leaf of a tree, such as parameters or an optimizer's moments.

    A leaf is split as the parameter whose name is the last one on the leaf's path, if the rank of
    both is the same; all other leaves are replicated.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        name = names[-1] if names else ""
        if name in LOGICAL_AXES and len(leaf.shape) == len(LOGICAL_AXES[name]):
            return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits rows (or trees) over data and fsdp; the other axes of a batch stay whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh splits a batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
