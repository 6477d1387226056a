"""Low-rank adapters (LoRA, Hu et al. 2021): a model is trained by adding small products to it.

Of a matrix W [in, out] of the frozen model, W + scale x A B is trained, with A [in, r] and
B [r, out] in place of W. B starts at zero, so a training starts from the frozen model. The target
`control` trains whole rows in place of products: those of the control pieces, which a pretrained
model never saw, in the embedding and the output projection.

Adapters are float32, whatever the type of the parameters (`ModelConfig.param_dtype`).

`merge` makes the parameters that everything else reads: rollout, rescoring, checkpoints. Nothing
outside of an update knows of adapters.

Adapters are a flat dict: `q_a` and `q_b` for the target `q`, and `control_embed` and
`control_unembed`. Those of all layers are stacked on a leading axis N, as the parameters are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from apr_jax.model.transformer import Params


class Target(NamedTuple):
    """A matrix of each layer to which an adapter is added.

    Attributes:
      parameter: the stacked parameter of which the matrix is a part.
      half: which half of the parameter it is, if that holds two: [N, in, 2, out].
      product: A B as an einsum, with n for layers and r for the rank.
    """

    parameter: str
    half: int | None
    product: str


TARGETS = {
    "q": Target("q", None, "ndr,nrhk->ndhk"),
    "k": Target("kv", 0, "ndr,nrgk->ndgk"),
    "v": Target("kv", 1, "ndr,nrgk->ndgk"),
    "o": Target("out", None, "nhkr,nrd->nhkd"),
    "gate": Target("gate_up", 0, "ndr,nrf->ndf"),
    "up": Target("gate_up", 1, "ndr,nrf->ndf"),
    "down": Target("down", None, "nfr,nrd->nfd"),
}
CONTROL = "control"


def init_adapters(
    params: Params, targets: Sequence[str], rank: int, control: int, key: jax.Array
) -> Params:
    """Makes the adapters with which a training begins; merged, they change nothing.

    An A is normal with standard deviation 1 / sqrt(inputs), and does not depend on which other
    targets there are.

    Args:
      params: of the frozen model.
      targets: names in `TARGETS`, and `CONTROL`.
      rank: r.
      control: number of control pieces, whose rows are the first ones.
      key: of the random numbers.
    """
    adapters: Params = {}
    for number, (name, target) in enumerate(TARGETS.items()):
        if name not in targets:
            continue
        layers, *shape = _matrix_shape(params, target)
        left = target.product.partition(",")[0]
        inputs = len(left) - 2  # All axes of A but those of layers and rank.
        fan_in = math.prod(shape[:inputs])
        noise = jax.random.normal(
            jax.random.fold_in(key, number), (layers, *shape[:inputs], rank), jnp.float32
        )
        adapters[f"{name}_a"] = noise * fan_in**-0.5
        adapters[f"{name}_b"] = jnp.zeros((layers, rank, *shape[inputs:]), jnp.float32)
    if CONTROL in targets:
        adapters["control_embed"] = _float32(params["embed"][:control])
        if "unembed" in params:
            adapters["control_unembed"] = _float32(params["unembed"][:, :control])
    return adapters


def frozen(params: Params, targets: Sequence[str]) -> Params:
    """Returns those parameters of the layers to which adapters are added."""
    names = {target.parameter for name, target in TARGETS.items() if name in targets}
    return {name: params["layers"][name] for name in sorted(names)}


def merge(adapters: Params, params: Params, base: Params, scale: float) -> Params:
    """Makes the parameters of the model with its adapters.

    The sums are computed in float32, and rounded to the type of the parameters once.

    Args:
      adapters: see `init_adapters`.
      params: the model's parameters, whatever adapters are merged into them: only values that no
        adapter changes are read.
      base: see `frozen`.
      scale: factor of all products A B.
    """
    layers = dict(params["layers"])
    for name, matrix in base.items():
        layers[name] = (matrix + _change(adapters, name, matrix, scale)).astype(matrix.dtype)
    merged = params | {"layers": layers}
    if "control_embed" in adapters:
        merged["embed"] = _with_first_rows(params["embed"], adapters["control_embed"])
    if "control_unembed" in adapters:
        columns = _with_first_rows(params["unembed"].T, adapters["control_unembed"].T)
        merged["unembed"] = columns.T
    return merged


def _change(adapters: Params, parameter: str, matrix: Array, scale: float) -> Array:
    """Returns what the adapters add to a stacked parameter."""
    changes: dict[int | None, Array] = {}
    for name, target in TARGETS.items():
        if target.parameter == parameter and f"{name}_a" in adapters:
            # The default precision of a TPU would round the factors to bfloat16.
            product = jnp.einsum(
                target.product,
                adapters[f"{name}_a"],
                adapters[f"{name}_b"],
                precision=jax.lax.Precision.HIGHEST,
            )
            changes[target.half] = scale * product
    if None in changes:
        return changes[None]
    nothing = jnp.zeros_like(matrix[:, :, 0])
    return jnp.stack([changes.get(0, nothing), changes.get(1, nothing)], axis=2)


def _with_first_rows(matrix: Float[Array, "V D"], rows: Float[Array, "C D"]) -> Array:
    """Replaces the first rows of a matrix."""
    vocab = matrix.shape[0]
    count = rows.shape[0]
    # A choice element by element needs no communication where the rows are split over devices.
    is_first = jnp.arange(vocab)[:, None] < count  # [V, 1]
    rows = rows.astype(matrix.dtype)
    return jnp.where(is_first, jnp.pad(rows, ((0, vocab - count), (0, 0))), matrix)


def _float32(values: ArrayLike) -> Array:
    """Copies values into a float32 array of JAX."""
    return jnp.asarray(values).astype(jnp.float32)


def _matrix_shape(params: Params, target: Target) -> tuple[int, ...]:
    """Returns the shape of a target's stacked matrices, without an axis of halves."""
    shape = params["layers"][target.parameter].shape
    if target.half is None:
        return tuple(shape)
    return (*shape[:2], *shape[3:])
