"""The transformer as the policy of a rollout.

The packages `model` and `threads` do not know each other; they meet here.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import BATCH_AXES, on_tpu, shardings
from apr_jax.model.transformer import (
    TENSOR,
    Params,
    cast_weights,
    decode_specs,
    make_decode,
    prepare_decode,
)
from apr_jax.threads import (
    CarryOver,
    CarryOverRollout,
    Limits,
    Prompts,
    Schedule,
    ThreadForest,
    Work,
    make_carry_over_rollout,
    make_rollout,
)


def make_policy_rollout(
    model: ModelConfig,
    limits: Limits,
    schedule: Schedule,
    mesh: Mesh,
    axes: tuple[str, ...] = BATCH_AXES,
) -> Callable[[Any, Prompts, jax.Array], tuple[ThreadForest, Work]]:
    """Makes the jitted rollout of a transformer, see `threads.make_rollout`.

    It takes the parameters as training holds them. The devices of the mesh axis `tensor` share the
    work on each tree, unless trees are split over that axis too.
    """
    tensor = 1 if TENSOR in axes else mesh.shape[TENSOR]
    return make_rollout(**_policy(model, limits, schedule, mesh, tensor), axes=axes)


def make_policy_carry_over(
    model: ModelConfig, limits: Limits, schedule: Schedule, carry_over: CarryOver, mesh: Mesh
) -> CarryOverRollout:
    """Makes the jitted rollout of a transformer that leaves unfinished trees to its next call.

    See `threads.make_carry_over_rollout`; devices share trees as in `make_policy_rollout`.
    """
    policy = _policy(model, limits, schedule, mesh, mesh.shape[TENSOR])
    return make_carry_over_rollout(**policy, carry_over=carry_over)


def _policy(
    model: ModelConfig, limits: Limits, schedule: Schedule, mesh: Mesh, tensor: int
) -> dict[str, Any]:
    """Returns what both kinds of rollout are made of.

    `tensor` is that of `make_decode`.
    """
    cache_lengths = schedule.cache_lengths(limits.window)
    decode, init_cache = make_decode(model, cache_lengths, on_tpu(mesh), tensor)
    return {
        "decode": decode,
        "init_cache": init_cache,
        "limits": limits,
        "schedule": schedule,
        "mesh": mesh,
        "prepare": lambda params: cast_and_prepare(params, model, mesh, tensor),
        "specs": lambda prepared: decode_specs(prepared, model, tensor),
    }


def cast_and_prepare(params: Params, model: ModelConfig, mesh: Mesh, tensor: int = 1) -> Params:
    """Makes the parameters that decoding takes from those of training, laid out on the mesh.

    They are cast where they are, so that what is gathered for a rollout is of the smaller type.
    `tensor` is that of `make_decode`.
    """
    weights = cast_weights(params, model.dtype)
    # Without the constraint XLA gathers float32 and casts afterwards.
    weights = jax.lax.with_sharding_constraint(weights, shardings(weights, mesh))
    return prepare_decode(weights, model, on_tpu(mesh), tensor)
