"""`apr bench decode`: every layout of devices decodes exactly the stated tokens, and the limit is
that of the bytes which a step has to read.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import foreign

from apr_jax.bench import decode_model
from apr_jax.bench.decode_model import Layout, bench_decode, bytes_a_step, engine
from apr_jax.cli import main
from apr_jax.errors import UsageError
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import cast_weights, init_params
from apr_jax.train.checkpoint import import_folder, save_pretrained

TINY = ModelConfig(layers=2, width=8, heads=2, kv_heads=1, head_size=4, mlp=8)


def params(config=TINY):
    return init_params(config, 32, jax.random.key(0))


@pytest.mark.parametrize(
    ("batch", "layout"),
    [
        (3, Layout(devices=1, tensor=1)),
        pytest.param(4, Layout(devices=2, tensor=1), marks=pytest.mark.thorough),
        pytest.param(1, Layout(devices=2, tensor=2), marks=pytest.mark.thorough),
    ],
)
def test_every_sequence_gets_its_tokens(batch, layout):
    assert engine(params(), TINY, batch, 5, layout).run() == batch * 5


def test_layouts_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="--devices 99: must be at most 8, the devices of this"):
        Layout(devices=99, tensor=1)
    with pytest.raises(UsageError, match="--tensor 3: must divide --devices 4"):
        Layout(devices=4, tensor=3)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    folder = foreign.write_folder(tmp_path / "theirs", TINY)
    model = import_folder(folder)
    with pytest.raises(
        UsageError, match="--batch 3: must be a multiple of 2, which is --devices 4 by"
    ):
        next(bench_decode(model, TINY, [3], 5, Layout(devices=4, tensor=2), [], 1))


def test_llama_cpp_is_left_out_where_its_file_cannot_hold_the_network(capsys):
    peers = ["transformers", "llama.cpp"]
    assert decode_model._readers(peers, TINY) == peers
    assert decode_model._readers(peers, dataclasses.replace(TINY, qkv_bias=True)) == peers[:1]
    assert "without llama.cpp: its file is written of a Llama" in capsys.readouterr().err


def test_a_step_reads_all_weights_once_and_every_cache():
    weights = sum(leaf.size for leaf in jax.tree.leaves(params()))
    cache = (24 + 6) * 2 * 2 * 1 * 4  # Positions, layers, keys and values, heads, size.
    assert bytes_a_step(params(), TINY, 3, 12) == 4 * (weights + 3 * cache)

    half = ModelConfig(**vars(TINY) | {"dtype": "bfloat16", "tied": False})
    untied = cast_weights(params(half), "bfloat16")
    norms = (2 * 2 + 1) * 8
    assert bytes_a_step(untied, half, 3, 12) == 2 * (weights + 3 * cache) + 2 * norms


@pytest.mark.thorough
def test_the_command_keeps_its_rates(tmp_path, monkeypatch):
    """Without another engine: our rate, and the memory's."""
    monkeypatch.setattr(decode_model, "installed", list)
    network = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_size=8, mlp=16)
    model = tmp_path / "model.safetensors"
    save_pretrained(import_folder(foreign.write_folder(tmp_path / "theirs", network)), model)
    json_file = tmp_path / "decode.json"
    command = ["bench", "decode", "--model", str(model), "--batch", "2", "--new", "3"]
    assert main.run([*command, "--dtype", "bfloat16", "--json", str(json_file)]) == 0

    found = json.loads(json_file.read_text())
    assert (found["model"], found["dtype"], found["new_tokens"]) == (model.name, "bfloat16", 3)
    (part,) = found["parts"]
    assert part["batch"] == 2 and part["bytes_a_step"] > 0
    assert part["result"]["names"] == ["apr_jax", "reading weights and cache alone"]
    assert np.shape(part["result"]["rates"]) == (2, 5)
