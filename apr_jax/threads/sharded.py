"""The rollout on a mesh.

Every data shard decodes its own trees in its own loop, and the shards do not communicate.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from apr_jax.threads.engine import check_key, tree_rollout
from apr_jax.threads.forest import ThreadForest, Work
from apr_jax.threads.keys import KEYS
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.prefill import Decode, InitCache
from apr_jax.threads.prompts import Prompts


def make_rollout(
    decode: Decode,
    init_cache: InitCache,
    limits: Limits,
    schedule: Schedule,
    mesh: Mesh,
    axes: tuple[str, ...] = ("data", "fsdp"),
    prepare: Callable[[Any], Any] = lambda params: params,
    specs: Callable[[Any], Any] = lambda params: PartitionSpec(),
) -> Callable[[Any, Prompts, jax.Array], tuple[ThreadForest, Work]]:
    """Makes the jitted `rollout(params, prompts, key) -> (forest, work)` for a mesh.

    Trees are split over `axes`, and `schedule.slots` counts the decode slots of one shard. The
    parameters are gathered before the loop, so that no decode step waits for another shard. The
    devices of one shard decode the same trees in step. They have all parameters whole and do the
    same work, unless `specs` splits parameters among them: then `decode` adds up what they compute.
    A tree comes out the same on any mesh, because its keys are folded from its identity.

    The fields of `work` have a leading axis with one entry a shard.

    Args:
      decode: the model's decoding, see `tree_rollout`.
      init_cache: makes the model's empty cache, see `tree_rollout`.
      limits: bounds of each tree.
      schedule: how one shard decodes.
      mesh: the devices.
      axes: mesh axes over which trees are split.
      prepare: makes the parameters that `decode` takes, once a rollout, from those that are passed
        in. It works on the parameters as they are laid out on the mesh.
      specs: says how the prepared parameters are split over mesh axes that are not in `axes`.

    Raises:
      ValueError: (at the call) the batch does not divide into the shards, or the key is of another
        kind than threefry.
    """
    shards = math.prod(mesh.shape[axis] for axis in axes)
    split = PartitionSpec(axes)
    whole = PartitionSpec()

    def shard(params: Any, prompts: Prompts, key_data: jax.Array) -> tuple[ThreadForest, Work]:
        key = jax.random.wrap_key_data(key_data, impl=KEYS)
        forest, work = tree_rollout(decode, init_cache, params, prompts, key, limits, schedule)
        return forest, jax.tree.map(lambda count: count[None], work)

    @jax.jit
    def rollout(params: Any, prompts: Prompts, key: jax.Array) -> tuple[ThreadForest, Work]:
        batch = prompts.tokens.shape[0]
        if batch % shards:
            raise ValueError(
                f"a batch of {batch} trees must be a multiple of the mesh's {shards} data shards"
            )
        check_key(key)
        prepared = prepare(params)  # Before they are gathered.
        mapped = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(specs(prepared), split, whole),
            out_specs=split,
            check_vma=False,
        )
        return mapped(prepared, prompts, jax.random.key_data(key))

    return rollout
