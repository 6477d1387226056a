"""Sums of arrays: the same on every mesh and on the host, another one for any damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from apr_jax.model.sharding import make_mesh
from apr_jax.train.checkpoint.checksum import array_sums, changed, digest, json_sum

_DTYPES = (np.float32, jnp.bfloat16, np.float16, np.int32, np.uint32, np.int8, bool)


def _tree(seed=0):
    random = np.random.default_rng(seed)
    tree = {
        np.dtype(dtype).name: (random.normal(size=(8, 3, 4)) * 9).astype(dtype) for dtype in _DTYPES
    }
    return tree | {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), np.float32)}


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_sum_does_not_depend_on_array_placement(axes):
    tree = _tree()
    mesh = make_mesh(*axes)
    for spec in (
        PartitionSpec(),
        PartitionSpec(("data", "fsdp")),
        PartitionSpec(None, None, "tensor"),
    ):
        placed = {
            name: jax.device_put(
                leaf, NamedSharding(mesh, spec if leaf.ndim == 3 else PartitionSpec())
            )
            for name, leaf in tree.items()
        }
        assert array_sums(placed) == array_sums(tree)


def test_any_flipped_bit_changes_the_sum():
    tree = _tree()
    random = np.random.default_rng(1)
    sums = array_sums(tree)
    assert changed(tree, sums) == []
    for name, leaf in tree.items():
        if name in ("bool", "empty"):
            continue
        for _ in range(40):
            raw = bytearray(np.ascontiguousarray(leaf).tobytes())
            place = int(random.integers(8 * len(raw)))
            raw[place // 8] ^= 1 << place % 8
            hurt = np.frombuffer(raw, leaf.dtype).reshape(leaf.shape)
            for damaged in (hurt, jnp.asarray(hurt)):
                assert changed(tree | {name: damaged}, sums) == [f"['{name}']"]


def test_damage_to_many_words_does_not_cancel():
    """Signs, exponents: the same bit of two or of all words, which a linear sum would take for
    nothing.
    """
    values = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
    random = np.random.default_rng(3)
    sums = array_sums({"x": values})
    assert changed({"x": -values}, sums)
    words = values.view(np.uint32).reshape(-1)
    for bit in (31, 30, 23, 0):
        for _ in range(50):
            hurt = words.copy()
            hurt[random.choice(len(words), 2, replace=False)] ^= np.uint32(1 << bit)
            assert changed({"x": hurt.view(np.float32).reshape(values.shape)}, sums)


def test_values_that_changed_places_change_the_sum():
    """A plain sum would not see it."""
    values = np.arange(1000, dtype=np.float32)
    sums = array_sums({"x": values})
    assert changed({"x": values[::-1].copy()}, sums)
    assert changed({"x": np.roll(values, 1)}, sums)
    assert changed({"x": np.where(values == 3, 4, np.where(values == 4, 3, values))}, sums)


def test_missing_or_additional_leaf_is_a_change():
    sums = array_sums(_tree())
    assert changed({}, sums) == sorted(sums)
    assert changed(_tree() | {"more": np.zeros(1)[:0].astype(np.float32)}, sums) == ["['more']"]


def test_json_sum_looks_at_values_alone():
    assert json_sum({"a": 1, "b": (2, 3)}) == json_sum({"b": [2, 3], "a": 1})
    assert len({json_sum({"a": value}) for value in (1, 2, "1", None, [1])}) == 5


def test_digest_names_weights_and_their_places():
    tree = {"a": np.arange(4.0), "b": np.arange(4.0) + 1}
    assert digest(tree) == digest(jax.tree.map(np.copy, tree))
    assert len({digest(t) for t in (tree, {"a": tree["b"], "b": tree["a"]}, {"a": tree["a"]})}) == 3
