"""The head of a large vocabulary: log-probs in blocks of columns, and what memory that takes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.whole_runs import changed

from apr_jax.data.packing import Rows
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import batch_sharding, make_mesh, shardings
from apr_jax.model.transformer import init_params
from apr_jax.threads import protocol as p
from apr_jax.train.rl import rescoring
from apr_jax.train.rl.rescoring import token_logprobs
from apr_jax.train.state import TrainState, init_state
from apr_jax.train.step import (
    ForestBatch,
    make_rescore,
    make_rl_step,
    make_sft_step,
)

MODEL = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_size=8, mlp=16)
VOCAB = 46
ROWS, LENGTH = 4, 24
LARGE_VOCAB = 128_256
LARGE_LENGTH = 4_608
GIB = 2**30


@functools.cache
def random_rows() -> Rows:
    """Two threads a row and some padding; a third of the tokens drawn among some classes only."""
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    column = np.broadcast_to(np.arange(LENGTH), shape)
    segment = np.where(column < 10, 1, np.where(column < 21, 2, 0))
    allowed = np.where(rng.random(shape) < 0.33, p.ALLOW_TEXT | p.ALLOW_EOS, 0)
    return Rows(
        tokens=rng.integers(10, VOCAB, shape).astype(np.int32),
        position=np.where(column < 10, column, column - 10).astype(np.int32),
        segment=segment.astype(np.int32),
        hidden_block=np.zeros(shape, np.int32),
        sampled=(segment > 0) & (column % 10 > 1),
        tree=np.where(segment > 0, 0, -1).astype(np.int32),
        logprob=np.zeros(shape, np.float32),
        allowed=allowed.astype(np.uint8),
    )


def value_and_grad(model: ModelConfig, mesh: jax.sharding.Mesh | None = None):
    """(params, rows) -> log-probs and entropies, and the gradient of a random sum of both."""
    weights = jax.random.normal(jax.random.key(1), (2, ROWS, LENGTH))

    def loss_of(params, rows):
        scores = token_logprobs(params, model, rows, 0.7, mesh)
        return jnp.vdot(weights, jnp.stack(scores)), scores

    def call(params, rows):
        (_, scores), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, rows)
        return scores, gradient

    return jax.jit(call)


def limit_columns(monkeypatch, columns: int, rows: int = ROWS) -> None:
    """Makes blocks of so many columns on devices of so many rows."""
    monkeypatch.setattr(rescoring, "BLOCK_BYTES", 4 * VOCAB * rows * columns)


def assert_close(got, expected) -> None:
    """Float32 to a few roundings of the largest number of each array."""

    def compare(mine, theirs):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())

    jax.tree.map(compare, got, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_blocks_equal_the_whole_head(monkeypatch, tied):
    """Also in sizes that do not divide the columns; blocks of one column, and but one short."""
    model = dataclasses.replace(MODEL, tied=tied)
    params = init_params(model, VOCAB, jax.random.key(0))
    whole = value_and_grad(model)(params, random_rows())
    assert float(jnp.abs(whole[0][1]).max()) > 1
    for columns in (1, 5, LENGTH - 2):
        limit_columns(monkeypatch, columns)
        assert_close(value_and_grad(model)(params, random_rows()), whole)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [
        (2, 1, 2),
        pytest.param(1, 2, 1, marks=pytest.mark.thorough),
        pytest.param(2, 2, 2, marks=pytest.mark.thorough),
    ],
)
def test_blocks_on_a_mesh_equal_the_whole_head(monkeypatch, data, fsdp, tensor):
    """The vocabulary is split over `tensor`. Gradients are added over devices outside the loop."""
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
    params = init_params(MODEL, VOCAB, jax.random.key(0))
    whole = value_and_grad(MODEL)(params, random_rows())

    limit_columns(monkeypatch, 5, ROWS // (data * fsdp))
    placed = jax.device_put(params, shardings(params, mesh))
    rows = jax.device_put(random_rows(), batch_sharding(mesh))
    compiled = value_and_grad(MODEL, mesh).lower(placed, rows).compile()
    assert_close(compiled(placed, rows), whole)

    if tensor == 1:
        loops = re.findall(r"op_name=\"[^\"]*while/body[^\"]*\"", compiled.as_text())
        assert loops
        reduces = [line for line in compiled.as_text().splitlines() if " all-reduce(" in line]
        assert reduces
        assert not [line for line in reduces if "while/body" in line]


def large_rows() -> Rows:
    """The shapes of one row that is as long as a thread of scale paper."""
    shape = (1, LARGE_LENGTH)
    kinds = {"sampled": jnp.bool_, "logprob": jnp.float32, "allowed": jnp.uint8}
    names = [field.name for field in dataclasses.fields(Rows)]
    return Rows(**{name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.int32)) for name in names})


def large_state(mesh: jax.sharding.Mesh) -> TrainState:
    """The shapes of a state whose model has a large vocabulary."""
    params = jax.eval_shape(lambda key: init_params(MODEL, LARGE_VOCAB, key), jax.random.key(0))
    return jax.eval_shape(lambda params: init_state(params, optax.sgd(0.1), mesh), params)


def temporary_bytes(program, *shapes) -> int:
    return program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_large_vocabulary_never_stands_whole_in_supervised_training():
    """The logits of this row are 2.2 GiB; the whole step took 8.9 GiB."""
    mesh = make_mesh(1)
    step = make_sft_step(MODEL, optax.sgd(0.1), mesh)
    assert temporary_bytes(step, large_state(mesh), large_rows()) < 0.5 * GIB


@pytest.mark.thorough
def test_large_vocabulary_never_stands_whole_in_rescoring_and_rl(config):
    mesh = make_mesh(1)
    settings = changed(config, model=MODEL)
    chunks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), large_rows())
    weights = jax.ShapeDtypeStruct((2, 1, LARGE_LENGTH), jnp.float32)
    batch = ForestBatch(chunks, weights, jax.ShapeDtypeStruct((), jnp.int32))
    state = large_state(mesh)
    advantages = jax.ShapeDtypeStruct((3,), jnp.float32)

    rescore = make_rescore(settings, mesh)
    assert temporary_bytes(rescore, state.params, batch) < 0.5 * GIB
    step = make_rl_step(settings, optax.sgd(0.1), mesh)
    assert temporary_bytes(step, state, batch, advantages) < 0.5 * GIB
