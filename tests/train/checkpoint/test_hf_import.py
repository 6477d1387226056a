"""A Hugging Face folder becomes one file: no bit is lost, the control pieces get sensible rows, and
a folder that cannot be trained on is named in one line.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import foreign
from safetensors.numpy import load_file, save_file

from apr_jax.cli import main
from apr_jax.errors import UserError
from apr_jax.io.storage import save_tensors
from apr_jax.model.config import ModelConfig
from apr_jax.model.hf import load_hf
from apr_jax.text.tokenizer import BOS, CONTROL_PIECES, EOS, JOIN, PAD, SPAWN, UNK
from apr_jax.train.checkpoint import (
    import_folder,
    load_checkpoint,
    load_pretrained,
    save_pretrained,
)

TIED = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, head_size=8, mlp=24)
UNTIED = dataclasses.replace(TIED, tied=False, qkv_bias=True)
FIRST = len(CONTROL_PIECES)


@pytest.fixture
def folder(tmp_path):
    return foreign.write_folder(tmp_path / "model", TIED)


def edit(path, **changes):
    """Changes fields of a JSON file; None deletes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_weights_are_theirs_with_ten_rows_in_front(config, tmp_path):
    folder = foreign.write_folder(tmp_path / "model", config)
    theirs, _ = load_hf(folder)
    found = import_folder(folder)
    assert found.model == config
    assert found.tokenizer.vocab_size == len(found.params["embed"]) == FIRST + len(theirs["embed"])
    np.testing.assert_array_equal(found.params["embed"][FIRST:], theirs["embed"])
    jax.tree.map(np.testing.assert_array_equal, found.params["layers"], theirs["layers"])
    assert ("unembed" in found.params) == (not config.tied)
    heads = [found.params["embed"]]
    if not config.tied:
        np.testing.assert_array_equal(found.params["unembed"][:, FIRST:], theirs["unembed"])
        heads.append(found.params["unembed"].T)

    start, end = (foreign.SPECIAL.index(piece) for piece in ("<|im_start|>", "<|im_end|>"))
    for rows in heads:
        np.testing.assert_array_equal(rows[BOS], rows[FIRST + start])
        np.testing.assert_array_equal(rows[EOS], rows[FIRST + end])
        np.testing.assert_array_equal(rows[PAD], rows[EOS])  # They have no padding token.
        words = [token for word in (" answer", " result") for token in found.tokenizer.encode(word)]
        np.testing.assert_allclose(rows[JOIN], rows[words].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(rows[UNK], rows[FIRST:].mean(axis=0), rtol=1e-4, atol=1e-6)
        distinct = {rows[token].tobytes() for token in range(SPAWN, FIRST)}
        assert len(distinct) == FIRST - SPAWN


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_no_bit_is_lost_and_bfloat16_is_stored_as_it_is(folder, tmp_path, dtype):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_tensors({name: x.astype(dtype) for name, x in tensors.items()}, weights, {})
    found = import_folder(folder)
    path = tmp_path / "model.safetensors"
    save_pretrained(found, path)
    again = load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {np.dtype(np.float32)}
    assert again.model == found.model
    assert again.tokenizer.to_bytes() == found.tokenizer.to_bytes()
    stored = {str(x.dtype) for name, x in load_file(path).items() if name.startswith("layers")}
    assert stored == {"bfloat16" if dtype == jnp.bfloat16 else "float32"}


def test_ids_of_the_config_serve_where_the_tokenizer_names_no_piece(folder):
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[2, 0], bos_token_id=1, pad_token_id=0)
    rows = import_folder(folder).params["embed"]
    for token, foreign_id in ((EOS, 2), (BOS, 1), (PAD, 0)):
        np.testing.assert_array_equal(rows[token], rows[FIRST + foreign_id])


def test_the_command_writes_a_file_that_a_training_takes_and_an_evaluation_names(
    folder, tmp_path, capfd
):
    out = tmp_path / "model.safetensors"
    assert main.run(["import", str(folder), "--out", str(out)]) == 0
    assert f"model: {out} (" in capfd.readouterr().out
    assert load_pretrained(out).model == TIED
    for command in (
        ["solve", "1,2 -> 3", "--checkpoint", str(out)],
        ["export", "--checkpoint", str(out), "--out", str(tmp_path / "again.safetensors")],
    ):
        assert main.run(command) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert f"{out}: is an imported model, which was trained on no task yet" in said
        assert f"`apr train sft --init {out}`" in said


def test_a_trained_model_is_a_pretrained_one_too(run, config, tmp_path):
    from apr_jax.model.transformer import init_params
    from apr_jax.train.checkpoint import Restored, export_file

    params = jax.device_get(init_params(config.model, run.tokenizer.vocab_size, jax.random.key(0)))
    path = tmp_path / "trained.safetensors"
    export_file(Restored(params, config, "apr", "sft", run.tokenizer, 7, "somewhere"), path)
    found = load_pretrained(path)
    assert (found.model, found.path) == (config.model, str(path))
    jax.tree.map(np.testing.assert_array_equal, found.params, load_checkpoint(path).params)


def test_a_flipped_bit_is_told(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    save_pretrained(import_folder(folder), path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged"):
        load_pretrained(path)


def refusal(folder, capfd):
    """The line by which the command refuses a folder, with status 2."""
    capfd.readouterr()
    out = folder.parent / "refused.safetensors"
    assert main.run(["import", str(folder), "--out", str(out)]) == 2
    assert not out.exists()
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.removesuffix("\n").isprintable()
    return said


def test_a_folder_without_a_tokenizer_is_named(folder, capfd):
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json, the tokenizer of the model" in refusal(folder, capfd)
    (folder / "vocab.json").write_text("{}")
    assert "has a slow tokenizer alone (vocab.json), and no tokenizer.json" in refusal(
        folder, capfd
    )


def test_a_tokenizer_that_is_none_is_named(folder, capfd):
    (folder / "tokenizer.json").write_text("[")
    assert "tokenizer.json: is not JSON" in refusal(folder, capfd)
    (folder / "tokenizer.json").write_text(
        '{"model": {"type": "\x1b[2J"}}'.replace("\x1b", "\\u001b")
    )
    assert "tokenizer.json: tokenizer: is no tokenizer.json" in refusal(folder, capfd)


def test_a_model_without_an_end_token_is_named(folder, capfd):
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert "has no end token: tokenizer_config.json has no eos_token, and" in refusal(folder, capfd)
    edit(folder / "config.json", eos_token_id=10**6)
    assert "config.json: eos_token_id=1000000 must be from 0 to" in refusal(folder, capfd)
    edit(folder / "tokenizer_config.json", eos_token="\x1b[2J")
    assert r"eos_token='\x1b[2J' is no piece of tokenizer.json" in refusal(folder, capfd)


def test_more_pieces_than_embeddings_are_named(tmp_path, capfd):
    count = foreign.byte_level().get_vocab_size()
    folder = foreign.write_folder(tmp_path / "model", TIED, embeddings=count - 1)
    assert f"has a piece of id {count - 1}, but the model has only" in refusal(folder, capfd)


def test_a_tokenizer_that_could_not_be_exported_is_named(folder, capfd):
    """Its ids have gaps, so the pieces behind them would get other ids."""
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    last = max(described["model"]["vocab"].values())
    described["model"]["vocab"]["far off"] = last + 3
    path.write_text(json.dumps(described))
    said = refusal(folder, capfd)
    assert "tokenizer.json: tokenizer: would read '<" in said and "its ids have gaps" in said


def test_another_architecture_is_named_with_those_that_are_read(folder, capfd):
    edit(folder / "config.json", architectures=["GPT2LMHeadModel"])
    said = refusal(folder, capfd)
    assert 'architectures=["GPT2LMHeadModel"]; apr_jax reads LlamaForCausalLM, Qwen2' in said


def test_quantised_weights_are_named(folder, capfd):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantization_config is set" in refusal(folder, capfd)
    edit(folder / "config.json", quantization_config=None)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.int8)}, folder / "model.safetensors")
    assert "must be one of F32, F16, BF16; take or save the model in one" in refusal(folder, capfd)


def test_a_missing_part_of_the_weights_is_named(folder, capfd):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "other": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors: no such file, but model.safetensors.index.json" in refusal(folder, capfd)


def test_an_export_of_ours_is_not_imported(folder, capfd):
    (folder / "apr_export.json").write_text('{"files": []}')
    assert "is an export of apr_jax" in refusal(folder, capfd)


def test_no_such_folder_and_a_wrong_name_for_the_file_are_named(folder, capfd):
    assert "No such file or directory" in refusal(folder.parent / "nowhere", capfd)
    assert main.run(["import", str(folder), "--out", str(folder.parent / "other")]) == 2
    assert "must end in .safetensors" in capfd.readouterr().err


@dataclasses.dataclass(frozen=True)
class Winged(ModelConfig):
    """A shape of another version."""

    wings: int = 2


def test_a_file_of_another_version_is_named(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    found = import_folder(folder)
    save_pretrained(dataclasses.replace(found, model=Winged(**vars(found.model))), path)
    with pytest.raises(
        UserError, match=r"model\.safetensors: is of another version .*model\.wings: Unexp"
    ):
        load_pretrained(path)
