"""Supervised training: packed rows against one thread a row, padded to the longest thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from apr_jax.bench.demos import make_recipe
from apr_jax.bench.measure import Contestant
from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Workers, demonstrations, unflatten
from apr_jax.data.packing import Rows, pack_streams
from apr_jax.data.streams import Stream
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.learn.optimizer import make_optimizer
from apr_jax.learn.run import build_mesh
from apr_jax.learn.state import init_state
from apr_jax.learn.steps import make_sft_step, place_rows
from apr_jax.model.transformer import init_params

_TREES = 48


@contextmanager
def contest(config: Experiment) -> Iterator[list[Contestant]]:
    """Both take the same threads once through the same step, the same number of rows at a time."""
    sft = config.learn.sft
    recipe, problems = make_recipe(config, _TREES)
    with Workers(1) as one:
        trees = [unflatten(tree) for chunk, _ in demonstrations(recipe, problems, _TREES, one) for tree in chunk]
    streams = [stream for tree in trees for stream in tree]
    tokens = sum(len(stream.tokens) for stream in streams)
    longest = max(len(stream.tokens) for stream in streams)

    mesh = build_mesh(config)
    optimizer = make_optimizer(sft.optimizer, sft.steps)
    step = make_sft_step(config, optimizer, mesh)
    params = init_params(config.model, Tokenizer(recipe.tokenizer).vocab_size, jax.random.key(config.seed))

    def contestant(name: str, rows: Rows) -> Contestant:
        batches = _batches(rows, sft.rows)

        def run() -> float:
            state: Any = init_state(params, optimizer, mesh)
            for batch in batches:
                state, _ = step(state, place_rows(batch, mesh))
            jax.block_until_ready(state)
            return tokens

        return Contestant(f"{name}, {len(batches)} steps", run, "tokens")

    yield [
        contestant(f"packed rows of {config.limits.stream}", pack_streams(trees, config.limits.stream)),
        contestant(f"one thread a row of {longest}", _one_a_row(streams, longest)),
    ]


def _one_a_row(streams: list[Stream], length: int) -> Rows:
    """Every stream in a row of its own: [number of streams, length]."""
    rows = [pack_streams([[stream]], length, rows=1) for stream in streams]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def _batches(rows: Rows, size: int) -> list[Rows]:
    """Cuts rows into batches of `size`; the last one is filled up with blank rows."""
    missing = -len(rows.tokens) % size
    blank = jax.tree.map(lambda x: np.zeros((missing, *x.shape[1:]), x.dtype), rows)
    full = jax.tree.map(lambda x, more: np.concatenate([x, more]), rows, blank)
    return [jax.tree.map(lambda x, at=at: x[at : at + size], full) for at in range(0, len(full.tokens), size)]
