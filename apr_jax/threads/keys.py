"""Where every random key of a run comes from: one table of domains, and the fold that keeps them
apart.

A key is folded along a path, and a path that means one thing must never be equal to a path that
means another: the third step and the third tree, folded into the same key, give the same key. So
before each number in a path (a step, a tree, a child, a token) stands the `Domain` that says what
the number counts:

    weights            seed, WEIGHTS
    RL's rollout       seed, RL_STEP, step
    validation         seed, VALIDATION, first problem of the batch
    evaluation         seed, EVALUATION
    a tree's root      the rollout's key, TREE, the tree's identity
    a child            its parent's key, CHILD, number of the spawn, place in it
    a token's noise    its thread's key, TOKEN, place in the stream
"""

import enum

import jax
from jaxtyping import Array, Int, UInt32

KEYS = "threefry2x32"  # The kind of all random keys: it gives the same noise on every platform.
# What a key of this kind holds: `jax.random.key` would drop further bits without a word.
LARGEST_SEED = 2**32 - 1


class Domain(enum.IntEnum):
    """What a key is for, and so what the next number of its path counts.

    Every sampled stream follows from these values: to change one is to change them all.
    """

    WEIGHTS = 1
    RL_STEP = 2
    VALIDATION = 3
    EVALUATION = 4
    TREE = 5
    CHILD = 6
    TOKEN = 7


def run_key(seed: int, domain: Domain, *path: int | Int[Array, ""]) -> jax.Array:
    """The key of one purpose of a run, a typed key.

    Args:
      seed: of the run, from 0 to LARGEST_SEED.
      path: what the domain counts, if anything.

    Raises:
      ValueError: a seed of which only a part would be used.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed={seed} must be from 0 to {LARGEST_SEED}")
    return _fold(jax.random.key(seed, impl=KEYS), domain, *path)


def root_key(key: jax.Array, tree: Int[Array, " B"]) -> UInt32[Array, "B 2"]:
    """Key data of the root threads: from the rollout's key and the tree's identity alone."""
    return jax.vmap(lambda identity: jax.random.key_data(_fold(key, Domain.TREE, identity)))(tree)


def child_key(
    parent: UInt32[Array, "2"], spawn_round: Int[Array, ""], child: Int[Array, ""]
) -> UInt32[Array, "2"]:
    """Key data of a child: folded from its path, so no schedule can change a sample. Unbatched."""
    key = jax.random.wrap_key_data(parent, impl=KEYS)
    return jax.random.key_data(_fold(key, Domain.CHILD, spawn_round, child))


def token_key(thread: UInt32[Array, "2"], place: Int[Array, ""]) -> jax.Array:
    """The typed key of a token's noise: from its thread's key data and its place. Unbatched."""
    return _fold(jax.random.wrap_key_data(thread, impl=KEYS), Domain.TOKEN, place)


def _fold(key: jax.Array, *path: int | Int[Array, ""]) -> jax.Array:
    for number in path:
        key = jax.random.fold_in(key, number)
    return key
