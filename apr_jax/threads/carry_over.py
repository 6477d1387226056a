"""A rollout that does not wait for its longest tree: unfinished trees go on in the next call.

Each call begins new groups of trees beside those that earlier calls left unfinished, and returns as
soon as enough groups are finished. The life of a tree over several calls:

1. It begins in one call, with the policy of that call.
2. When the call has enough, only the table of threads is kept of the unfinished trees
   (`CarriedTrees`). Caches are thrown away, and threads that ran become READY.
3. The next call reads their contexts into its own cache with its own policy, and goes on where they
   stood, be it within a spawn block or an answer. A tree whose policy does not change between calls
   gets the tokens of a rollout without carry-over.
4. All trees of its group are finished, and the group is returned whole. Each token has the version
   of the policy that drew it.

A call leaves its groups in the order of their age, so that older trees get decode slots first in
the next call. If that call runs on fewer shards, it finds several such lists one behind the other.
Whatever the order, a call returns the oldest of its finished groups.

The staleness of a tree is the number of versions between its first policy and the one that is about
to learn from it. To bound it, a call also finishes every group that would become too old. These are
among the E carried groups, and a call returns P groups, so E may be at most P.

Versions are written once a call, not once a token: after a call, all tokens by which a token
sequence has grown get the version of the call. So a decode step is the same with and without
carry-over.

Shapes: P groups that a call begins and returns, E groups that it carries over, G trees a group, B
trees, T threads a tree, L tokens a thread.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from apr_jax.threads.engine import check_start, grow
from apr_jax.threads.forest import NO_PARENT, ThreadForest, Work
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.prefill import Decode, InitCache
from apr_jax.threads.prompts import Prompts
from apr_jax.threads.scheduler import (
    Threads,
    finished_trees,
    initial_threads,
    suspend,
    to_forest,
)

_Trees = TypeVar("_Trees")  # A pytree in whose leaves the first axis is made of trees.


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """When a rollout with carry-over returns.

    Attributes:
      group: G, trees of a group. Groups are returned whole.
      max_staleness: the most versions that may lie between the first token of a returned tree and
        the call that returns it, at least 1.
    """

    group: int
    max_staleness: int

    def __post_init__(self):
        for field in ("group", "max_staleness"):
            if getattr(self, field) < 1:
                raise ValueError(f"carry over.{field}={getattr(self, field)} must be at least 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CarriedTrees:
    """Trees between two calls, the oldest first. In all leaves the first axis is made of trees.

    Attributes:
      threads: the table of their threads, in which none is RUNNING, as a dict of the fields of
        `Threads`. Rows are counted from the root of each tree, so that trees can change places.
      prompts: the prompts of the B trees.
      version: [B * T, L] version of the policy that drew each sampled token; of other tokens it
        means nothing.
      begun: [B] version of the policy with which each tree began.
    """

    threads: dict[str, jax.Array]
    prompts: Prompts
    version: jax.Array
    begun: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrownTrees:
    """The B = P * G trees that a call returns, group by group.

    Attributes:
      forest: the trees.
      version: [B, T, L] version of the policy that drew each sampled token; 0 elsewhere.
      begun: [B] version of the policy with which each tree began.
      tree: [B] identity of each tree, as in its `Prompts`.
    """

    forest: ThreadForest
    version: jax.Array
    begun: jax.Array
    tree: jax.Array


def new_trees(
    prompts: Prompts, key: jax.Array, version: Int[ArrayLike, ""], limits: Limits
) -> CarriedTrees:
    """Makes trees that consist of their prompts alone; no token of them is drawn yet.

    Args:
      prompts: their prompts.
      key: the key from which their randomness is folded, together with `prompts.tree`.
      version: version of the policy that is about to begin them.
      limits: what a tree may do.
    """
    check_start(prompts, key, limits)
    prompts = jax.tree.map(jnp.asarray, prompts)
    threads = initial_threads(prompts, key, limits)
    return CarriedTrees(
        threads=_to_relative_rows(threads, limits),
        prompts=prompts,
        version=jnp.zeros_like(threads.tokens),
        begun=jnp.full_like(prompts.tree, version),
    )


def carry_over_rollout(
    decode: Decode,
    init_cache: InitCache,
    params: Any,
    carried: CarriedTrees,
    prompts: Prompts,
    key: jax.Array,
    version: Int[ArrayLike, ""],
    limits: Limits,
    schedule: Schedule,
    carry_over: CarryOver,
) -> tuple[GrownTrees, CarriedTrees, Work]:
    """Goes on with carried trees, begins new ones, and returns as many as it begins.

    Args:
      decode: the model, see `tree_rollout`.
      init_cache: makes the model's empty cache, see `tree_rollout`.
      params: the model's parameters, those of this call.
      carried: E groups that earlier calls left, or, for a first call, `new_trees`.
      prompts: the prompts of P new groups, group by group.
      key: the key of the new trees; `prompts.tree` tells them apart.
      version: version of `params`, which grows by 1 from call to call.
      limits: what a tree may do, the same in all calls.
      schedule: how the device works through the trees.
      carry_over: the size of a group, and the bound on staleness.

    Returns:
      P finished groups, the oldest ones; E groups for the next call; and what the call cost.

    Raises:
      ValueError: trees do not divide into groups, there are more than P carried groups, a prompt
        does not fit the window, or the key is of another kind.
    """
    returned = _count_groups(prompts, carry_over)  # P
    groups = returned + _count_groups(carried.prompts, carry_over)  # P + E
    if groups > 2 * returned:
        raise ValueError(
            f"carry over: {groups - returned} carried groups must be at most {returned}, the groups"
            " that a call returns: all of them may have to be"
        )

    begun_now = new_trees(prompts, key, version, limits)
    trees = jax.tree.map(lambda *both: jnp.concatenate(both), carried, begun_now)
    # Groups that began `max_staleness` versions ago must be finished by this call. [P + E]
    is_due = _by_group(trees.begun, groups)[:, 0] <= version - carry_over.max_staleness

    def finished_groups(threads: Threads) -> Bool[Array, " groups"]:
        return jnp.all(_by_group(finished_trees(threads, limits), groups), axis=1)

    def is_enough(threads: Threads) -> Bool[Array, ""]:
        finished = finished_groups(threads)
        return (jnp.sum(finished) >= returned) & jnp.all(finished | ~is_due)

    before = _to_table(trees.threads, limits)
    state, work = grow(
        decode, init_cache, params, before, trees.prompts, limits, schedule, is_enough
    )
    after = suspend(state.threads, state.slots)

    place = jnp.arange(limits.max_thread_tokens)[None, :]  # [1, L]
    is_new = place >= before.length[:, None]  # [B * T, L]
    trees = CarriedTrees(
        threads=_to_relative_rows(after, limits),
        prompts=trees.prompts,
        version=jnp.where(is_new, version, trees.version),
        begun=trees.begun,
    )

    # The oldest finished groups are returned; the others are left, the oldest first.
    begun = _by_group(trees.begun, groups)[:, 0]  # [P + E]
    order = jnp.lexsort((begun, ~finished_groups(after)))  # [P + E]
    others = jnp.sort(order[returned:])  # [E]
    others = others[jnp.argsort(begun[others], stable=True)]
    grown = _take_groups(trees, order[:returned], groups)
    left = _take_groups(trees, others, groups)
    return _to_grown_trees(grown, limits), left, work


def _count_groups(prompts: Prompts, carry_over: CarryOver) -> int:
    """Returns the number of groups of these trees.

    Raises:
      ValueError: trees do not divide into groups.
    """
    trees: int = prompts.tokens.shape[0]
    if trees % carry_over.group:
        raise ValueError(
            f"carry over: {trees} trees must be a multiple of {carry_over.group}, a group"
        )
    return trees // carry_over.group


def _by_group(values: Array, groups: int) -> Array:
    """Cuts the first axis into groups."""
    return values.reshape(groups, values.shape[0] // groups, *values.shape[1:])


def _take_groups(trees: _Trees, chosen: Int[Array, " n"], groups: int) -> _Trees:
    """Returns the chosen groups of trees that consist of `groups` groups."""

    def take(leaf: Array) -> Array:
        rows = _by_group(leaf, groups)[chosen]
        return rows.reshape(-1, *leaf.shape[1:])

    return jax.tree.map(take, trees)


def _to_relative_rows(threads: Threads, limits: Limits) -> dict[str, jax.Array]:
    """Returns the fields of a table in which rows count from the root of each tree."""
    return vars(_shift_rows(threads, -_root_rows(threads, limits)))


def _to_table(fields: dict[str, jax.Array], limits: Limits) -> Threads:
    """Undoes `_to_relative_rows`, for trees that may have changed places."""
    threads = Threads(**fields)
    return _shift_rows(threads, _root_rows(threads, limits))


def _root_rows(threads: Threads, limits: Limits) -> Int[Array, " rows"]:
    """Returns for each row the row of the root of its tree."""
    return jnp.arange(threads.rows) // limits.max_threads * limits.max_threads


def _shift_rows(threads: Threads, by: Int[Array, " rows"]) -> Threads:
    """Adds `by` to every field that holds an index of a row."""
    return dataclasses.replace(
        threads,
        parent=jnp.where(threads.parent == NO_PARENT, NO_PARENT, threads.parent + by),
        first_child=threads.first_child + by,
        index_low=threads.index_low + by,
        index_high=threads.index_high + by,
    )


def _to_grown_trees(trees: CarriedTrees, limits: Limits) -> GrownTrees:
    """Makes the result of a call from its finished trees."""
    forest = to_forest(Threads(**trees.threads), limits)
    version = trees.version.reshape(forest.tokens.shape)
    return GrownTrees(
        forest=forest,
        version=jnp.where(forest.sampled, version, 0),
        begun=trees.begun,
        tree=trees.prompts.tree,
    )
