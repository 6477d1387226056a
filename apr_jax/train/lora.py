"""Adapters of a training: made at its start, merged into the model, changed by its updates.

The state of training holds the merged parameters beside the adapters. So rollout, rescoring,
validation and checkpoints read one and the same weights, and know nothing of adapters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from apr_jax.model.lora import frozen, init_adapters, merge
from apr_jax.model.sharding import shardings
from apr_jax.text.tokenizer import CONTROL_PIECES
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.config import LoraConfig
from apr_jax.train.distributed import place_on_mesh
from apr_jax.train.state import TrainState


def make_adapters(params: Any, lora: LoraConfig, seed: int) -> Any:
    """Makes the adapters with which a training begins; returns None if it has none.

    Args:
      params: of the frozen model.
      lora: the settings of the adapters.
      seed: of the run.
    """
    if not lora.rank:
        return None
    key = run_key(seed, Domain.ADAPTERS)
    return init_adapters(params, lora.targets, lora.rank, len(CONTROL_PIECES), key)


def new_adapters(params: Any, lora: LoraConfig, seed: int) -> Any:
    """Returns what `make_adapters` makes, on the host.

    So several processes lay out the same values on their mesh.
    """
    make = jax.jit(make_adapters, static_argnums=(1, 2))
    return jax.device_get(make(params, lora, seed)) if lora.rank else None


def place_frozen(params: Any, lora: LoraConfig, mesh: Mesh) -> Any:
    """Lays out on the mesh what adapters are added to; returns None if there are none.

    Args:
      params: of the frozen model: numpy arrays, or arrays that are on the mesh already.
      lora: the settings of the adapters.
      mesh: the mesh.
    """
    if not lora.rank:
        return None
    base = frozen(params, lora.targets)

    def lay_out(leaf: Any, sharding: NamedSharding) -> jax.Array:
        is_placed = isinstance(leaf, jax.Array) and leaf.sharding == sharding
        return leaf if is_placed else place_on_mesh(leaf, sharding)

    return jax.tree.map(lay_out, base, shardings(base, mesh))


def make_merge(state: TrainState, base: Any, lora: LoraConfig) -> Callable[[Any], Any] | None:
    """Returns the function from adapters to parameters of the model; None if there are none.

    Args:
      state: the state of training.
      base: what the adapters are added to, see `place_frozen`.
      lora: the settings of the adapters.
    """
    if state.adapters is None:
        return None
    return functools.partial(merge, params=state.params, base=base, scale=lora.scale)


def gradient_of_trained(grads: Any, state: TrainState, merged: Callable[[Any], Any] | None) -> Any:
    """Turns the gradient of the model's parameters into that of what is trained.

    With adapters this is the chain rule through `merged`; without, the gradient as it is.

    Args:
      grads: the gradient with respect to all parameters.
      state: the state of training.
      merged: see `make_merge`.
    """
    if merged is None:
        return grads
    _, pull_back = jax.vjp(merged, state.adapters)
    return pull_back(grads)[0]
