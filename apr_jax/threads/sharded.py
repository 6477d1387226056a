"""The rollout on a mesh, with and without carry-over.

Every data shard decodes its own trees in its own loop, and the shards do not communicate.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Int

from apr_jax.threads.carry_over import (
    CarriedTrees,
    CarryOver,
    GrownTrees,
    carry_over_rollout,
    new_trees,
)
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
    split = PartitionSpec(axes)
    whole = PartitionSpec()

    def shard(params: Any, prompts: Prompts, key_data: jax.Array) -> tuple[ThreadForest, Work]:
        key = jax.random.wrap_key_data(key_data, impl=KEYS)
        forest, work = tree_rollout(decode, init_cache, params, prompts, key, limits, schedule)
        return forest, jax.tree.map(lambda count: count[None], work)

    @jax.jit
    def rollout(params: Any, prompts: Prompts, key: jax.Array) -> tuple[ThreadForest, Work]:
        _check_batch(prompts.tokens.shape[0], _count_shards(mesh, axes))
        check_key(key)
        prepared = prepare(params)  # Still split over the mesh; `shard_map` gathers the result.
        mapped = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(specs(prepared), split, whole),
            out_specs=split,
            check_vma=False,
        )
        return mapped(prepared, prompts, jax.random.key_data(key))

    return rollout


CarryOverRollout = Callable[
    [Any, CarriedTrees, Prompts, jax.Array, ArrayLike], tuple[GrownTrees, CarriedTrees, Work]
]


def make_carry_over_rollout(
    decode: Decode,
    init_cache: InitCache,
    limits: Limits,
    schedule: Schedule,
    carry_over: CarryOver,
    mesh: Mesh,
    axes: tuple[str, ...] = ("data", "fsdp"),
    prepare: Callable[[Any], Any] = lambda params: params,
    specs: Callable[[Any], Any] = lambda params: PartitionSpec(),
) -> CarryOverRollout:
    """Makes the jitted `rollout(params, carried, prompts, key, version)` for a mesh.

    It returns what `carry_over_rollout` does. Each shard has its own share of the groups and stops
    when enough of that share is finished. So the number of shards and the schedule decide which
    groups a call returns, and thereby which policy draws a token. As long as the policy does not
    change, no tree depends on them.

    Args:
      decode: the model's decoding, see `tree_rollout`.
      init_cache: makes the model's empty cache, see `tree_rollout`.
      limits: bounds of each tree.
      schedule: how one shard decodes.
      carry_over: the size of a group, and the bound on staleness.
      mesh: the devices.
      axes: mesh axes over which trees are split.
      prepare: makes the parameters that `decode` takes, see `make_rollout`.
      specs: says how these are split over other mesh axes, see `make_rollout`.

    Raises:
      ValueError: (at the call) the groups do not divide into the shards.
    """
    split = PartitionSpec(axes)
    whole = PartitionSpec()

    def shard(
        params: Any,
        carried: CarriedTrees,
        prompts: Prompts,
        key_data: jax.Array,
        version: jax.Array,
    ) -> tuple[GrownTrees, CarriedTrees, Work]:
        key = jax.random.wrap_key_data(key_data, impl=KEYS)
        grown, left, work = carry_over_rollout(
            decode,
            init_cache,
            params,
            carried,
            prompts,
            key,
            version,
            limits,
            schedule,
            carry_over,
        )
        return grown, left, jax.tree.map(lambda count: count[None], work)

    @jax.jit
    def rollout(
        params: Any,
        carried: CarriedTrees,
        prompts: Prompts,
        key: jax.Array,
        version: Int[ArrayLike, ""],
    ) -> tuple[GrownTrees, CarriedTrees, Work]:
        for trees in (carried.prompts.tokens.shape[0], prompts.tokens.shape[0]):
            _check_batch(trees, _count_shards(mesh, axes), carry_over.group)
        check_key(key)
        prepared = prepare(params)  # Still split over the mesh; `shard_map` gathers the result.
        mapped = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(specs(prepared), split, split, whole, whole),
            out_specs=split,
            check_vma=False,
        )
        return mapped(
            prepared, carried, prompts, jax.random.key_data(key), jnp.asarray(version, jnp.int32)
        )

    return rollout


def place_new_trees(
    prompts: Prompts,
    key: jax.Array,
    limits: Limits,
    mesh: Mesh,
    axes: tuple[str, ...] = ("data", "fsdp"),
) -> CarriedTrees:
    """Makes the trees that the first call of a rollout with carry-over goes on with.

    They begin with version 0 of the policy.

    Args:
      prompts: their prompts.
      key: the key of the trees, see `new_trees`.
      limits: bounds of each tree.
      mesh: the devices.
      axes: mesh axes over which trees are split.
    """
    layout = NamedSharding(mesh, PartitionSpec(axes))

    def make(prompts: Prompts, key: jax.Array) -> CarriedTrees:
        return new_trees(prompts, key, jnp.int32(0), limits)

    return jax.jit(make, out_shardings=layout)(prompts, key)


def _count_shards(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _check_batch(batch: int, shards: int, group: int = 1) -> None:
    """Raises ValueError unless a batch of whole groups can be split over the shards."""
    if batch % (shards * group):
        times = f", times the {group} trees of a group" if group > 1 else ""
        raise ValueError(
            f"a batch of {batch} trees must be a multiple of the mesh's {shards} data shards{times}"
        )
