"""Sums that tell whether weights and JSON are still what was saved.

They are needed because storage may return flipped bits without an error.

The sum of an array is the sum of its words modulo 2^32, where each word is scrambled together with
its index first. Scrambling is one to one, so a single damaged word always changes the sum; other
damage goes unnoticed with a chance of about 2^-32. Integer addition does not depend on the order.
So the sum is the same on every mesh, it is computed where the array lies, and a process needs only
its own shards.
"""

import hashlib
import json
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Number of bytes -> type of the words into which an array of such elements is read.
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def array_sums(tree: Any) -> dict[str, int]:
    """Returns path -> sum of every leaf. All processes must call it, and all get the same."""
    leaves = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    on_device = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    device_sums: dict[str, Any] = jax.device_get(_device_sums(on_device)) if on_device else {}
    return {
        path: int(device_sums[path]) if path in device_sums else _host_sum(leaf)
        for path, leaf in leaves.items()
    }


def changed(tree: Any, sums: dict[str, int]) -> list[str]:
    """Returns the sorted paths of leaves whose sums differ, or are missing on either side."""
    now = array_sums(tree)
    return sorted(path for path in now.keys() | sums.keys() if now.get(path) != sums.get(path))


def json_sum(*values: Any) -> str:
    """Returns the SHA-256 of JSON values, in hex; the order of their keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest(params: Any) -> str:
    """Returns a name of the weights: 16 hex digits of SHA-256 over every leaf and its path.

    It does not depend on where the weights are stored.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


@jax.jit
def _device_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns path -> sum of arrays on the devices."""

    def total(leaf: jax.Array) -> jax.Array:
        bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        words = jax.lax.bitcast_convert_type(bits, _WORDS[bits.dtype.itemsize])
        index = jnp.zeros(leaf.shape, jnp.uint32)  # Of each element in the flattened array.
        for axis, stride in enumerate(_strides(leaf.shape)):
            index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride)
        scrambled = _scramble(words.astype(jnp.uint32) ^ _scramble(index, jnp), jnp)
        return jnp.sum(scrambled, dtype=jnp.uint32)

    return {path: total(leaf) for path, leaf in leaves.items()}


def _host_sum(leaf: Any) -> int:
    """Returns the sum of an array on the host: the same number as `_device_sums`."""
    array = np.ascontiguousarray(leaf)
    words = array.reshape(-1).view(_WORDS[array.dtype.itemsize]).astype(np.uint32)
    index = np.arange(len(words), dtype=np.uint32)
    return int(np.sum(_scramble(words ^ _scramble(index, np), np), dtype=np.uint32))


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Returns, for each axis, how many elements of the flattened array a step along it passes."""
    return [int(np.prod(shape[axis + 1 :])) % 2**32 for axis in range(len(shape))]


def _scramble(words: Any, xp: ModuleType) -> Any:
    """Maps 32-bit words one to one, so that each bit of the result depends on all bits of the word.

    This is the finalizer of MurmurHash3.

    Args:
      words: uint32 array.
      xp: `numpy` or `jax.numpy`.
    """
    words = (words ^ (words >> 16)) * xp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * xp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
