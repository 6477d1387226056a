"""How full packed rows are: demonstrations and forests of the scales that a laptop trains."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apr_jax.config import load
from apr_jax.data import dataset
from apr_jax.data.build import build
from apr_jax.data.demonstrate import unflatten
from apr_jax.data.packing import pack_forest, padding_share
from apr_jax.data.pipeline import sft_batches
from apr_jax.train.step import rescored_rows

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
METHODS = ("apr", "sos+")
MOST = 0.08


@pytest.fixture(scope="module", params=["nano", pytest.param("mini", marks=pytest.mark.thorough)])
def built(request, tmp_path_factory):
    """The scale's config, and the folder of 800 demonstrations of each method."""
    config = load(EXPERIMENTS / f"{request.param}.py")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, demonstrations=800, heldout=40)
    )
    path = tmp_path_factory.mktemp(request.param)
    build(config, path, methods=METHODS, progress=False, workers=1)
    return config, path


def _forest(trees):
    """Demonstrations as the rollout would record them."""
    shape = (
        len(trees),
        max(map(len, trees)),
        max(len(stream.tokens) for tree in trees for stream in tree),
    )
    names = ("tokens", "position", "hidden_block", "sampled")
    forest = SimpleNamespace(
        length=np.zeros(shape[:2], np.int32),
        logprob=np.zeros(shape, np.float32),
        allowed=np.zeros(shape, np.uint8),
    )
    vars(forest).update({name: np.zeros(shape, np.int32) for name in names})
    for index, tree in enumerate(trees):
        for thread_index, stream in enumerate(tree):
            forest.length[index, thread_index] = len(stream.tokens)
            for name in names:
                getattr(forest, name)[index, thread_index, : len(stream.tokens)] = getattr(
                    stream, name
                )
    return forest


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_supervised_batches_are_full(built, method):
    config, path = built
    *full, _ = sft_batches(
        path, method, config.train.sft.batch_rows, config.limits.max_thread_tokens, seed=0, epochs=2
    )
    assert len(full) > 20
    assert max(padding_share(batch) for batch in full) <= MOST


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_the_rows_of_forests_are_full(built, method):
    """As many trees as a step of the scale has, in chunks of its own size.

    A forest of SoS+ is some tens of rows, so that the empty rows of its last chunk weigh as much as
    they happen to be many (32 rows have none, 33 have seven): only the rows that hold tokens are
    judged. A forest of APR has hundreds, and its last chunk counts, however little is in it.
    """
    config, path = built
    rl = config.train.rl
    source = dataset.read(path, method, "train")
    trees = [unflatten(source[k]) for k in range(len(source))]
    size = rl.problems * rl.group
    draw = np.random.default_rng(0)
    for _ in range(9):
        forest = _forest([trees[k] for k in draw.choice(len(trees), size, replace=False)])
        rows = rescored_rows(
            pack_forest(forest, rl.micro_batch_rows, config.limits.max_thread_tokens),
            rl.micro_batch_rows,
        )
        held = rows.segment > 0
        assert held.sum() == forest.length.sum(), "all tokens are there"
        filled = held.any(axis=1)
        assert filled[: -rl.micro_batch_rows].all() and filled[-rl.micro_batch_rows], (
            "empty are rows of the last chunk alone, and not all"
        )
        share = padding_share(rows) if method == "apr" else 1 - held[filled].mean()
        assert share <= MOST
