"""Adapters as a folder of Hugging Face's library peft: on the frozen model they are the merged one.

`pip install 'apr_jax[hf]'` brings peft, transformers and torch.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import foreign
from safetensors.numpy import load_file

from apr_jax.cli import main
from apr_jax.errors import UsageError
from apr_jax.model.config import ModelConfig
from apr_jax.model.lora import frozen, merge
from apr_jax.train.checkpoint import load_adapters
from apr_jax.train.checkpoint.hf_folder import export_folder
from apr_jax.train.checkpoint.hf_import import import_folder
from apr_jax.train.checkpoint.peft_folder import export_adapters
from apr_jax.train.checkpoint.restored import Adapted
from apr_jax.train.config import LoraConfig
from apr_jax.train.lora import make_adapters

NETWORK = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, head_size=8, mlp=12, tied=False)
LORA = LoraConfig(rank=3, alpha=5.0)


def adapted_of(pretrained, lora=LORA):
    """Adapters on their way."""
    fresh = make_adapters(pretrained.params, lora, seed=1)
    rng = np.random.default_rng(0)
    moved = {
        name: np.asarray(leaf + rng.normal(0, 0.3, leaf.shape), np.float32)
        for name, leaf in fresh.items()
    }
    return Adapted(moved, lora, pretrained.tokenizer, "somewhere")


def import_made(folder, **fields):
    network = dataclasses.replace(NETWORK, **fields)
    return import_folder(foreign.write_folder(folder, network))


def test_tensors_have_the_names_and_shapes_of_peft(tmp_path):
    adapted = adapted_of(import_made(tmp_path / "theirs"))
    export_adapters(adapted, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (3, 5.0)
    assert described["target_modules"] == [
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    first = adapted.tokenizer.piece_count
    ids = list(range(first, first + 10))
    assert described["trainable_token_indices"] == {"embed_tokens": ids, "lm_head": ids}

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 + 2
    layer = "base_model.model.model.layers.1."
    assert tensors[f"{layer}self_attn.k_proj.lora_A.weight"].shape == (3, 16)
    assert tensors[f"{layer}self_attn.k_proj.lora_B.weight"].shape == (16, 3)
    assert tensors[f"{layer}self_attn.o_proj.lora_A.weight"].shape == (3, 32)
    assert tensors[f"{layer}mlp.down_proj.lora_B.weight"].shape == (16, 3)

    # An export replaces an earlier one, and nothing else.
    fewer = dataclasses.replace(LORA, targets=("v",))
    export_adapters(adapted_of(import_made(tmp_path / "theirs2"), fewer), tmp_path / "out")
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 4
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert described["target_modules"] == ["v_proj"]
    assert "trainable_token_indices" not in described
    with pytest.raises(UsageError, match=r"holds config.json, which `apr export` did not write"):
        export_adapters(adapted, tmp_path / "theirs")


@pytest.mark.thorough
# peft 0.21 asks for an attribute that transformers 5.24 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("fields", [{}, {"tied": True, "qk_norm": True}, {"qkv_bias": True}])
def test_peft_computes_the_merged_model(tmp_path, fields):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pretrained = import_made(tmp_path / "theirs", **fields)
    adapted = adapted_of(pretrained)
    add = jax.jit(merge, static_argnums=3)
    base = frozen(pretrained.params, LORA.targets)
    params = jax.device_get(add(adapted.adapters, pretrained.params, base, LORA.scale))
    export_folder(pretrained, tmp_path / "base")
    export_folder(dataclasses.replace(pretrained, params=params), tmp_path / "merged")
    export_adapters(adapted, tmp_path / "adapter")

    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32
        ).eval()

    first = pretrained.tokenizer.piece_count
    with torch.no_grad():
        tokens = torch.tensor([[first, 5, 40, first + 3, 7, first + 9, 60, 5]])
        frozen_logits = load("base")(tokens).logits
        expected = load("merged")(tokens).logits
        model = peft.PeftModel.from_pretrained(load("base"), str(tmp_path / "adapter"))
        got = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    scale = float(expected.abs().max())
    assert float((frozen_logits - expected).abs().max()) > 0.1 * scale
    np.testing.assert_allclose(got, expected, atol=1e-5 * scale)
    np.testing.assert_allclose(merged, expected, atol=1e-5 * scale)

    # peft itself saves what we wrote: the same names, shapes and values.
    model = peft.PeftModel.from_pretrained(load("base"), str(tmp_path / "adapter"))
    model.save_pretrained(tmp_path / "theirs_again")
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs_again" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], name)


def test_what_has_no_adapters_is_refused_in_one_line(checkpoint, tmp_path, capfd):
    """A training of all weights, an exported file, and a file to write to."""
    file = tmp_path / "model.safetensors"
    export = ["export", "--checkpoint", str(checkpoint), "--out"]
    assert main.run([*export, str(file)]) == 0
    for command, message in (
        ([*export, str(tmp_path / "out"), "--adapter"], "has no adapters, because all weights"),
        ([*export, str(file), "--adapter"], "must be the name of a folder, because of --adapter"),
        (
            ["export", "--checkpoint", str(file), "--out", str(tmp_path / "out"), "--adapter"],
            "is a file, which holds weights with the adapters merged; give the folder",
        ),
    ):
        capfd.readouterr()
        assert main.run(command) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert message in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="has no adapters"):
        load_adapters(checkpoint)
