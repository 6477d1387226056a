"""Where parameters and batches live on a mesh: one small table from logical axes to mesh axes.

Mesh axes: `data` and `fsdp` split the batch; `fsdp` also splits the parameters over their width; `tensor` splits heads and MLP.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh of `devices` (by default all there are); data=0 takes what fsdp and tensor leave.

    In one process the axes may need fewer devices than there are: the first ones are taken. All of a TPU slice are ordered such
    that neighbours on an axis are neighbours in the torus, the last axis (which talks most) first.

    Raises:
      ValueError: there are not enough devices, data=0 can't take up all the others, or some process would be left out.
    """
    devices = jax.devices() if devices is None else devices
    total = len(devices)
    needed = data * fsdp * tensor if data else total
    whole = needed % (fsdp * tensor) == 0 and needed > 0
    if not whole or needed > total or (needed < total and jax.process_count() > 1):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor}: does not fit the {total} devices there are"
        )
    shape = (needed // (fsdp * tensor), fsdp, tensor)
    if needed == total and devices[0].platform == "tpu":
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    return Mesh(np.asarray(devices[:needed]).reshape(shape), AXES)


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Partition of a parameter; an axis that its mesh axis does not divide stays whole."""
    axes = (RULES[logical] for logical in LOGICAL_AXES[name])
    return PartitionSpec(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of any tree whose leaves mirror parameters (parameters themselves, optimizer moments); others are replicated.

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
