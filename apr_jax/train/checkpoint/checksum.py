"""Sums that tell whether weights and JSON are still what was saved: storage returns flipped bits
without a word.

The sum of an array is that of its words, each scrambled together with its place, modulo 2^32.
Scrambling is one to one, so one damaged word always changes the sum; other damage passes with a
chance of about 2^-32. Integer addition knows no order: the sum is the same on every mesh, is taken
where the array lies, and a process needs only its own shards."""

import hashlib
import json
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def array_sums(tree: Any) -> dict[str, int]:
    """The sum of every leaf by its path; all processes call it, and all get the same."""
    leaves = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    on_device = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    found: dict[str, Any] = jax.device_get(_device_sums(on_device)) if on_device else {}
    return {
        path: int(found[path] if path in found else _host_sum(leaf))
        for path, leaf in leaves.items()
    }


def changed(tree: Any, sums: dict[str, int]) -> list[str]:
    """Paths of the leaves whose sums are not those given, and of those that one side lacks."""
    found = array_sums(tree)
    return sorted(path for path in found.keys() | sums.keys() if found.get(path) != sums.get(path))


def json_sum(*values: Any) -> str:
    """SHA-256 of JSON values, in hex, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest(params: Any) -> str:
    """Names the weights, wherever they lie: 16 hex digits of SHA-256 over every leaf and its
    path.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


@jax.jit
def _device_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(leaf: jax.Array) -> jax.Array:
        words = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        words = jax.lax.bitcast_convert_type(words, _WORDS[words.dtype.itemsize])
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, stride in enumerate(_strides(leaf.shape)):
            place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride)
        return jnp.sum(
            _scramble(words.astype(jnp.uint32) ^ _scramble(place, jnp), jnp), dtype=jnp.uint32
        )

    return {path: total(leaf) for path, leaf in leaves.items()}


def _host_sum(leaf: Any) -> int:
    """The same in numpy."""
    array = np.ascontiguousarray(leaf)
    words = array.reshape(-1).view(_WORDS[array.dtype.itemsize]).astype(np.uint32)
    place = np.arange(len(words), dtype=np.uint32)
    return int(np.sum(_scramble(words ^ _scramble(place, np), np), dtype=np.uint32))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [int(np.prod(shape[axis + 1 :])) % 2**32 for axis in range(len(shape))]


def _scramble(words: Any, xp: ModuleType) -> Any:
    """Another 32-bit word for each, every bit of which hangs on every bit of the first (the
    finalizer of MurmurHash3).
    """
    words = (words ^ (words >> 16)) * xp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * xp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
