"""The origin of every random key of a run: one table of purposes, and a fold that keeps them apart.

A key is folded along a path of numbers, and two paths that mean different things must never be
equal: the third step and the third tree, folded into the same key, would give the same key. So
before each number of a path (a step, a tree, a child, a token) stands the `Domain` that says what
the number counts:

    weights            seed, WEIGHTS
    adapters           seed, ADAPTERS
    RL's rollout       seed, RL_STEP, step
    validation         seed, VALIDATION, first problem of the batch
    evaluation         seed, EVALUATION
    a tree's root      the rollout's key, TREE, the tree's identity
    a child            its parent's key, CHILD, number of the spawn, place in that spawn
    a token's noise    its thread's key, TOKEN, place in the thread's token sequence
    rounding           0, ROUNDING, step, number of the parameter
"""

import enum

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, UInt32

KEYS = "threefry2x32"  # The kind of all random keys: it gives the same noise on every platform.
# A key of this kind holds 32 bits of a seed; `jax.random.key` drops further bits without a word.
LARGEST_SEED = 2**32 - 1


class Domain(enum.IntEnum):
    """What a key is for, and so what the next number of its path counts.

    All sampled tokens follow from these values: a change of one value changes every rollout.
    """

    WEIGHTS = 1
    RL_STEP = 2
    VALIDATION = 3
    EVALUATION = 4
    TREE = 5
    CHILD = 6
    TOKEN = 7
    ADAPTERS = 8
    ROUNDING = 9


def run_key(seed: int, domain: Domain, *path: Int[ArrayLike, ""]) -> jax.Array:
    """Makes the typed key for one purpose of a run.

    Args:
      seed: the run's seed, from 0 to LARGEST_SEED.
      domain: the purpose.
      path: what the domain counts, if it counts anything.

    Raises:
      ValueError: a part of the seed would be dropped.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed={seed} must be from 0 to {LARGEST_SEED}")
    return _fold(jax.random.key(seed, impl=KEYS), domain, *path)


def root_key(key: jax.Array, tree: Int[ArrayLike, " B"]) -> UInt32[Array, "B 2"]:
    """Folds the key data of root threads from the rollout's key and each tree's identity alone."""
    return jax.vmap(lambda identity: jax.random.key_data(_fold(key, Domain.TREE, identity)))(tree)


def child_key(
    parent: UInt32[ArrayLike, "2"], spawn_round: Int[ArrayLike, ""], child: Int[ArrayLike, ""]
) -> UInt32[Array, "2"]:
    """Folds the key data of a child from its path in the tree.

    So no schedule can change what it samples.
    """
    key = jax.random.wrap_key_data(parent, impl=KEYS)
    return jax.random.key_data(_fold(key, Domain.CHILD, spawn_round, child))


def token_key(thread: UInt32[ArrayLike, "2"], place: Int[ArrayLike, ""]) -> jax.Array:
    """Folds the typed key of one token's noise from its thread's key data and its place there."""
    return _fold(jax.random.wrap_key_data(thread, impl=KEYS), Domain.TOKEN, place)


def _fold(key: jax.Array, *path: Int[ArrayLike, ""]) -> jax.Array:
    for number in path:
        key = jax.random.fold_in(key, number)
    return key
