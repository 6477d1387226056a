"""What an update gets: the chunks of a packed forest, and those of them that hold tokens."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from apr_jax.data.packing import pack_forest, padding_share
from apr_jax.learn.steps import place_forest, replayed_rows

LENGTH = 12


def _forest(threads, size):
    """One tree of so many threads of `size` tokens."""
    shape = 1, threads, LENGTH
    names = ("tokens", "position", "island", "sampled", "logprob", "allowed")
    recorded = {name: np.ones(shape, np.int32) for name in names}
    return SimpleNamespace(length=np.full((1, threads), size, np.int32), **recorded)


@pytest.mark.parametrize(("threads", "rows", "chunks"), [(1, 2, 1), (4, 2, 1), (5, 4, 2), (9, 6, 3), (0, 0, 0)])
def test_chunks_without_a_token_are_not_replayed_and_not_counted(mesh, threads, rows, chunks):
    packed = pack_forest(_forest(threads, LENGTH // 2), 2, LENGTH)  # Two threads a row.
    replayed = replayed_rows(packed, 2)
    assert len(replayed.tokens) == rows
    assert (replayed.segment > 0).sum() == threads * LENGTH // 2
    if rows:
        assert padding_share(replayed) == pytest.approx(1 - threads / 2 / rows)
    batch = place_forest(packed, np.ones(packed.tokens.shape), 2, mesh)
    assert int(batch.used) == chunks
    whole = jax.tree.map(lambda x: np.asarray(x).reshape(-1, LENGTH), batch.chunks)
    jax.tree.map(np.testing.assert_array_equal, whole, packed)
