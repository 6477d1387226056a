"""Where parameters and batches live on a mesh: one small table from logical axes to mesh axes.

Mesh axes: `data` and `fsdp` split the batch; `fsdp` also splits the parameters over their width;
`tensor` splits heads and MLP."""

from typing import Any

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
}

# Parameter name -> its logical axes (those under "layers" with the leading layer axis).
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
}


def make_mesh(
    data: int = 0, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None
) -> Mesh:
    """A mesh of `devices` (by default all there are); data=0 takes what fsdp and tensor leave.

    In one process the axes may need fewer devices than there are: the first ones are taken. TPUs
    are laid out as `over_torus` says.

    Raises:
      ValueError: there are not enough devices, data=0 can't take up all the others, or some process
        would be left out.
    """
    devices = jax.devices() if devices is None else devices
    total = len(devices)
    needed = data * fsdp * tensor if data else total
    whole = needed % (fsdp * tensor) == 0 and needed > 0
    if not whole or needed > total or (needed < total and jax.process_count() > 1):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor}: does not fit the {total} devices"
            " there are"
        )
    shape = (needed // (fsdp * tensor), fsdp, tensor)
    if needed == total and devices[0].platform == "tpu":
        return Mesh(over_torus(shape, devices), AXES)
    return Mesh(np.asarray(devices[:needed]).reshape(shape), AXES)


def on_tpu(mesh: Mesh) -> bool:
    """Whether its devices are TPUs, also those of a topology that is only compiled for."""
    return bool(mesh.devices.flat[0].platform == "tpu")


def over_torus(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """A slice's devices, as an array of `shape` each of whose axes has neighbours in as many
    directions as it can.

    Links of several directions carry at once what links of one would have to carry in turn: four
    chips as a square take half the time of four in a line. So the prime factors of an axis, the
    last axis (which talks most) first, are dealt to the torus' directions one after the other; the
    cores of a chip are the first of them. Devices that fill no box keep their order."""
    places = np.asarray(
        [(getattr(device, "core_on_chip", 0), *device.coords) for device in devices]
    )
    places -= places.min(axis=0)
    extent = places.max(axis=0) + 1
    if len({*map(tuple, places)}) < len(devices) or extent.prod() != len(devices):
        return np.asarray(devices).reshape(shape)
    torus = np.empty(extent, object)
    torus[tuple(places.T)] = devices
    left = [int(size) for size in extent]
    # Of each direction: (axis, factor), neighbours first.
    dealt: list[list[tuple[int, int]]] = [[] for _ in left]
    for axis in reversed(range(len(shape))):
        for factor in _primes(shape[axis]):
            having = [d for d, size in enumerate(left) if size % factor == 0]
            direction = min(
                having, key=lambda d: (d > 0, sum(to == axis for to, _ in dealt[d]), -left[d])
            )
            left[direction] //= factor
            dealt[direction].append((axis, factor))
    cut = [each for parts in dealt for each in reversed(parts)]
    order = sorted(range(len(cut)), key=lambda part: cut[part][0])
    return torus.reshape([factor for _, factor in cut]).transpose(order).reshape(shape)


def _primes(number: int) -> list[int]:
    factor = next((f for f in range(2, number + 1) if number % f == 0), None)
    return [factor, *_primes(number // factor)] if factor else []


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Partition of a parameter; an axis that its mesh axis does not divide stays whole."""
    axes = (RULES[logical] for logical in LOGICAL_AXES[name])
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of any tree whose leaves mirror parameters (parameters themselves, optimizer
    moments); others are replicated.

    A leaf mirrors a parameter when the last name on its path is a parameter's and its rank fits.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        name = names[-1] if names else ""
        if name in LOGICAL_AXES and len(leaf.shape) == len(LOGICAL_AXES[name]):
            return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (or trees) over data and fsdp; the other axes of a batch stay whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
