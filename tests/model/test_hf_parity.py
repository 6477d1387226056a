"""Every family of Hugging Face computes here what `transformers` computes: the first weight, the
output of each layer, the logits; in one pass and step by step.

`pip install 'apr_jax[hf]'` brings transformers and torch.
"""

import sys
from pathlib import Path

import jax
import pytest

from apr_jax.model.hf import load_hf

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
hf_parity = pytest.importorskip("hf_parity")
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module", params=hf_parity.FAMILIES)
def found(request, tmp_path_factory):
    return hf_parity.compare(request.param, tmp_path_factory.mktemp("parity"))


def test_first_weight_is_theirs(found):
    assert found["same_first_weight"]


def test_output_of_each_layer_is_theirs(found):
    assert found["layers"] < 1e-4


def test_logits_are_theirs_at_every_position(found):
    assert found["logits"] < 2e-4


def test_logits_of_a_long_text_are_theirs(found):
    assert found["far"] < 5e-4


def test_decoding_step_by_step_gives_their_logits(found):
    assert found["decoding"] < 2e-4


def test_exported_folder_is_loaded_by_transformers(found):
    assert found["same_exported"]


def test_bfloat16_is_as_near_to_float32_as_theirs(found):
    """Log-probs of both differ from those of float32 by rounding alone; the bound is theirs."""
    assert 0 < found["bfloat16_mean"] < 1.25
    assert found["bfloat16_largest"] < 1.5


@pytest.mark.parametrize("name", ["embed", "q", "gate_up"])
def test_other_weights_are_told_apart(name, tmp_path):
    hf_parity.make_network("Llama", tmp_path)
    params, config = load_hf(tmp_path)
    tokens = hf_parity.make_tokens()
    logits = hf_parity.one_pass(params, config, tokens)
    changed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1.01 if path[-1].key == name else leaf, params
    )
    assert abs(hf_parity.one_pass(changed, config, tokens) - logits).max() > 1e-3
    assert abs(hf_parity.step_by_step(changed, config, tokens) - logits).max() > 1e-3
