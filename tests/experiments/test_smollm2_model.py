"""The comparison of an imported network with that of transformers, on a small random model."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest
from helpers import foreign

from apr_jax.model.config import ModelConfig
from apr_jax.train.checkpoint import import_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
smollm2_model = pytest.importorskip("smollm2_model")
pytestmark = pytest.mark.thorough

MODEL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_size=8, mlp=48)


@pytest.fixture
def folder(tmp_path):
    foreign.write_folder(tmp_path / "hf", MODEL)
    # As a recent transformers writes it: a special piece is text, not a table.
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": json.loads(path.read_text())["eos_token"]["content"]}))
    return tmp_path / "hf"


def test_an_imported_network_is_the_same(folder):
    found = smollm2_model.compare(folder, import_folder(folder), foreign.SENTENCES)
    assert found["texts"] == found["same_continuations"] == len(foreign.SENTENCES)
    assert found["worst_difference"] < 1e-4 < found["largest_logit"]
    assert found["perplexity"] == pytest.approx(found["perplexity_of_transformers"], rel=1e-4)


def test_other_weights_are_told_apart(folder):
    ours = import_folder(folder)
    ours.params["layers"] = jax.tree.map(lambda leaf: leaf * 1.1, ours.params["layers"])
    found = smollm2_model.compare(folder, ours, foreign.SENTENCES)
    assert found["worst_difference"] > smollm2_model.MOST_DIFFERENCE


def test_another_tokenizer_is_named_with_its_first_other_ids(folder):
    class LastTokenLost:
        def encode(self, text):
            return ours.tokenizer.encode(text)[:-1]

    ours = import_folder(folder)
    other = dataclasses.replace(ours, tokenizer=LastTokenLost())
    with pytest.raises(
        SystemExit, match=r"hf: our tokenizer encodes 'The .* as \[\] from token \d"
    ):
        smollm2_model.compare(folder, other, foreign.SENTENCES)


def test_there_are_texts_enough():
    texts = smollm2_model.TEXTS.read_text().splitlines()
    assert len(texts) == len(set(texts)) == 50


@pytest.mark.parametrize(
    ("changed", "equal"),
    [
        ({}, True),
        ({"worst_difference": 2e-3}, False),
        ({"same_continuations": 49}, False),
        ({"perplexity": 94.5801}, False),
    ],
)
def test_each_level_decides_whether_the_networks_are_equal(changed, equal):
    found = {
        "texts": 50,
        "same_continuations": 50,
        "worst_difference": 2e-4,
        "perplexity": 94.57991,
        "perplexity_of_transformers": 94.57989,
    }
    assert smollm2_model.are_equal(found | changed) == equal
