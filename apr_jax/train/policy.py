"""The transformer as the policy of a rollout.

The packages `model` and `threads` do not know each other; they meet here.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import BATCH_AXES, on_tpu, shardings
from apr_jax.model.transformer import Params, cast_weights, make_decode, prepare_decode
from apr_jax.threads import Limits, Prompts, Schedule, ThreadForest, Work, make_rollout


def make_policy_rollout(
    model: ModelConfig,
    limits: Limits,
    schedule: Schedule,
    mesh: Mesh,
    axes: tuple[str, ...] = BATCH_AXES,
) -> Callable[[Any, Prompts, jax.Array], tuple[ThreadForest, Work]]:
    """Makes the jitted rollout of a transformer, see `threads.make_rollout`.

    It takes the parameters as training holds them.
    """
    decode, init_cache = make_decode(model, schedule.cache_lengths(limits.window), on_tpu(mesh))
    return make_rollout(
        decode,
        init_cache,
        limits,
        schedule,
        mesh,
        axes,
        prepare=lambda params: cast_and_prepare(params, model, mesh),
    )


def cast_and_prepare(params: Params, model: ModelConfig, mesh: Mesh) -> Params:
    """Makes the parameters that decoding takes from those of training, laid out on the mesh.

    They are cast where they are, so that what is gathered for a rollout is of the smaller type.
    """
    weights = cast_weights(params, model)
    # Without the constraint XLA gathers float32 and casts afterwards.
    weights = jax.lax.with_sharding_constraint(weights, shardings(weights, mesh))
    return prepare_decode(weights, model)
