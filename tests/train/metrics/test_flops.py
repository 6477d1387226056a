"""FLOPs against XLA's own count and by hand; the measured peak; the mfu of a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.whole_runs import logged

from apr_jax.data.packing import Rows
from apr_jax.model.config import ModelConfig
from apr_jax.train.metrics.flops import measure_peak, training_flops
from apr_jax.train.metrics.recorder import Recorder

_MODEL = ModelConfig(layers=3, width=8, heads=4, kv_heads=2, head_size=4, mlp=20)


def _rows(position, segment):
    blank = np.zeros_like(np.asarray(position))
    fields = {field.name: blank for field in dataclasses.fields(Rows)}
    return Rows(**fields | {"position": np.asarray(position), "segment": np.asarray(segment)})


def test_flops_by_hand():
    # A thread of 3, one of 5 whose 3 last tokens came after a join, so that their positions were
    # rewound; 2 of padding.
    rows = _rows([[0, 1, 2, 0, 1, 1, 2, 3, 9, 9]], [[1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    layer = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 20  # q, k and v, out, the MLP.
    parameters = 3 * layer + 8 * 50  # With the output projection.
    pairs = (1 + 2 + 3) + (1 + 2 + 2 + 3 + 4)
    expected = 6 * 8 * parameters + 12 * 3 * 4 * 4 * pairs
    assert float(training_flops(_MODEL, 50, rows)) == expected
    assert float(jax.jit(lambda rows: training_flops(_MODEL, 50, rows))(rows)) == expected


def test_flops_of_the_products_are_those_that_xla_counts():
    """Of the same products written out, forward and backward; attention over one whole causal row
    is half of the square.
    """
    tokens = 32
    vocab = 50
    layers = _MODEL.layers
    inner = _MODEL.heads * _MODEL.head_size
    shapes = [(8, inner), (8, 8), (8, 8), (inner, 8), (8, 20), (8, 20), (20, 8)] * layers + [
        (8, vocab)
    ]

    def products(weights, inputs):
        return sum(jnp.sum(x @ w) for x, w in zip(inputs, weights, strict=True))

    weights = [jnp.ones(shape) for shape in shapes]
    inputs = [jnp.ones((tokens, shape[0])) for shape in shapes]

    def count(function):
        return jax.jit(function).lower(weights, inputs).compile().cost_analysis()["flops"]

    forward = sum(2 * tokens * m * n for m, n in shapes)
    assert count(products) == pytest.approx(forward, rel=0.1)  # XLA adds the sums.
    rows = _rows([np.arange(tokens)], [np.ones(tokens, int)])
    attention = 3 * layers * 2 * 2 * inner * tokens * (tokens + 1) / 2
    assert float(training_flops(_MODEL, vocab, rows)) == 3 * forward + attention


def test_peak_is_measured_once_and_is_plausible(mesh):
    found = measure_peak(mesh, "float32")
    assert 1e8 < found < 1e16
    assert measure_peak(mesh, "float32") is found


def test_peak_is_that_of_the_fastest_run_though_the_first_stalls(mesh, monkeypatch):
    # When each run begins and ends.
    clock = iter(time for seconds in (2.5, *[0.25] * 30) for time in (0.0, seconds))
    monkeypatch.setattr("apr_jax.train.metrics.flops.time.perf_counter", lambda: next(clock))
    assert measure_peak.__wrapped__(mesh, "float32") == mesh.size * 2 * 512**3 / 0.25


def test_mfu_counts_flops_since_the_previous_line(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr("apr_jax.train.metrics.recorder.time.perf_counter", lambda: next(clock))
    with Recorder(
        tmp_path, 0, 4, 2, "sft", ("tokens",), ("loss",), progress=False, peak=50.0
    ) as recorder:
        for step, flops in enumerate((100.0, 300.0, 250.0, 250.0), 1):
            recorder.record(step, {"tokens": 1.0, "flops": flops})
        recorder.flush()
    lines = logged(tmp_path)
    assert [line["mfu"] for line in lines] == [400 / 20 / 50, 500 / 20 / 50]
    assert "flops" not in lines[0]
