"""Supervised training from an imported model: its network, weights and tokenizer are taken, and
what disagrees with it is named before anything is trained.
"""

import dataclasses
import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from helpers import anagrams, foreign
from helpers.whole_runs import changed, write_config

from apr_jax.cli import main
from apr_jax.data.build import build, check_built
from apr_jax.errors import UsageError, UserError
from apr_jax.model.config import ModelConfig
from apr_jax.model.hf import load_hf
from apr_jax.model.transformer import cast_weights, init_params
from apr_jax.train.checkpoint import (
    import_folder,
    load_checkpoint,
    load_pretrained,
    save_pretrained,
)
from apr_jax.train.checkpoint.exported import export_file
from apr_jax.train.checkpoint.hf_folder import export_folder
from apr_jax.train.config import LoraConfig
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.session import adopt_network, adopt_positions
from apr_jax.train.sft import train_sft

NETWORK = ModelConfig(
    layers=1, width=16, heads=2, kv_heads=1, head_size=8, mlp=16, tied=False, qk_norm=True
)
OPEN = dataclasses.replace(anagrams.experiment(6), model=ModelConfig())
METHOD = "parallel"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    path = folder / "model.safetensors"
    save_pretrained(import_folder(foreign.write_folder(folder / "theirs", NETWORK)), path)
    return path


@pytest.fixture(scope="module")
def data(imported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = load_pretrained(imported).tokenizer
    build(OPEN, folder, methods=[METHOD], progress=False, workers=1, tokenizer=tokenizer)
    return folder


def with_model(**fields):
    return dataclasses.replace(OPEN, model=ModelConfig(**fields))


def test_data_are_built_with_the_tokenizer_of_the_import(imported, data, capfd):
    tokenizer = load_pretrained(imported).tokenizer
    assert (data / "tokenizer.model").read_bytes() == tokenizer.to_bytes()
    assert json.loads((data / "data.json").read_text())["vocab_size"] == tokenizer.vocab_size
    check_built(OPEN, data)
    with pytest.raises(UsageError, match="was built with tokenizer_sha256='"):
        build(OPEN, data, methods=[METHOD], progress=False, workers=1)


def test_an_open_network_is_that_of_the_import():
    adopted = adopt_network(with_model(remat="layer", qk_norm=True), NETWORK, "file")
    assert adopted.model == dataclasses.replace(NETWORK, remat="layer")
    half = dataclasses.replace(NETWORK, dtype="bfloat16", param_dtype="bfloat16")
    assert adopt_network(OPEN, half, "file").model == NETWORK
    kept_so = adopt_network(with_model(param_dtype="bfloat16"), NETWORK, "file")
    assert kept_so.model == dataclasses.replace(NETWORK, param_dtype="bfloat16")
    long = dataclasses.replace(NETWORK, max_positions=8192)
    assert adopt_network(dataclasses.replace(OPEN, model=NETWORK), long, "file").model == long
    assert adopt_network(with_model(max_positions=512), long, "file").model.max_positions == 512
    in_rl = adopt_positions(dataclasses.replace(OPEN, model=NETWORK), long)
    assert in_rl.model == long
    same = dataclasses.replace(OPEN, model=NETWORK)
    assert adopt_network(same, NETWORK, "file") == same


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_base": 5.0}, r"config model\.rope_base=5\.0: file has 10000\.0; give the same, or"),
        ({"qkv_bias": True}, r"config model\.qkv_bias=True: file has False"),
        (vars(NETWORK) | {"layers": 2}, r"config model\.layers=2: file has 1"),
        (vars(NETWORK) | {"qk_norm": False}, r"config model\.qk_norm=False: file has True"),
    ],
)
def test_a_network_that_disagrees_is_refused_by_name(fields, message):
    with pytest.raises(UsageError, match=message):
        adopt_network(with_model(**fields), NETWORK, "file")


def test_sizes_are_open_all_together():
    with pytest.raises(ValueError, match=r"model\.width=0 must be at least 1"):
        ModelConfig(layers=2)
    with pytest.raises(UsageError, match="config model: leaves its sizes open, but this needs"):
        init_params(ModelConfig(), 20, jax.random.key(0))


def test_what_disagrees_is_refused_in_one_line_before_training(imported, data, tmp_path, capfd):
    """By the command, with status 2: no model for an open network, other sizes, other data."""
    other = tmp_path / "data"
    build(OPEN, other, methods=[METHOD], progress=False, workers=1)
    config = str(write_config(OPEN, tmp_path / "open.py"))
    command = ["train", "sft", "--config", config, "--workdir", str(tmp_path / "run")]
    init = ["--init", str(imported)]
    for more, message in (
        (["--data", str(data)], "config model: leaves its sizes open; give the model to start"),
        (
            ["--data", str(data), *init, "--set", "model.tied=false", "--set", "model.rope_base=2"],
            f"config model.rope_base=2.0: {imported} has 10000.0",
        ),
        (["--data", str(other), *init], f"data {other}: was built with another tokenizer than"),
    ):
        capfd.readouterr()
        assert main.run([*command, *more]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert message in said
    assert not (tmp_path / "run").exists()


def test_training_keeps_no_weights_on_the_host(imported, data, tmp_path, monkeypatch):
    """The state has copies on the devices; what `--init` was read into is free again."""
    held = []

    def note(init):
        pretrained = load_pretrained(init)
        held.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(pretrained.params))
        return pretrained

    def train(*_, **__):
        gc.collect()
        return [reference() is None for reference in held]

    monkeypatch.setattr("apr_jax.train.sft.load_pretrained", note)
    monkeypatch.setattr("apr_jax.train.sft.train", train)
    gone = train_sft(OPEN, data, tmp_path / "run", METHOD, progress=False, init=imported)
    assert len(gone) > 5
    assert all(gone)


@pytest.mark.thorough
def test_training_goes_on_from_an_import_and_rl_from_there(imported, data, tmp_path, capfd):
    start = load_pretrained(imported)
    config = str(write_config(OPEN, tmp_path / "open.py"))
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    shutil.copytree(data, tmp_path / "data")
    built = ["data", "build", "--config", config, "--out", str(tmp_path / "data")]
    assert main.run([*built, "--method", METHOD, "--init", str(imported)]) == 0
    trained = ["train", "sft", "--config", config, "--workdir", str(sft), "--method", METHOD]
    assert main.run([*trained, "--init", str(imported)]) == 0
    found = load_checkpoint(sft)
    assert found.config.model == NETWORK
    assert found.tokenizer.to_bytes() == start.tokenizer.to_bytes()

    # Two steps of a learning rate of 1e-3 move a weight a little; other weights would be elsewhere.
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), found.params, start.params)
    assert 0 < max(jax.tree.leaves(moved)) < 5e-3

    # The same command goes on (here: has nothing to do), and another model is refused.
    assert main.run([*trained, "--init", str(imported)]) == 0
    capfd.readouterr()
    assert main.run([*trained, "--init", str(sft)]) == 1
    assert "was saved with init='" in capfd.readouterr().err

    train_rl(OPEN, tmp_path / "data", rl, sft, progress=False)
    assert load_checkpoint(rl).config.model == NETWORK
    assert main.run(["solve", '{"letters": "abl"}', "--checkpoint", str(rl)]) == 0
    assert "root" in capfd.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 2])
def test_parameters_stay_in_bfloat16_from_an_import_to_rl(rank, imported, data, tmp_path, capfd):
    """Of all weights and with adapters: in each checkpoint, and in a file and a folder of it."""
    lora = LoraConfig(rank=rank)
    kept = changed(
        with_model(dtype="bfloat16", param_dtype="bfloat16"), sft={"lora": lora}, rl={"lora": lora}
    )
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    train_sft(kept, data, sft, METHOD, progress=False, init=imported)
    train_rl(kept, data, rl, sft, progress=False)

    start = cast_weights(load_pretrained(imported).params, "bfloat16")
    for run in (sft, rl):
        found = load_checkpoint(run)
        assert found.config.model.param_dtype == "bfloat16"
        assert types(found.params) == types(start)
        export_file(found, tmp_path / "model.safetensors")
        again = load_checkpoint(tmp_path / "model.safetensors")
        assert types(again.params) == types(start)
        matrices = (again.params["layers"]["q"], found.params["layers"]["q"])
        np.testing.assert_array_equal(*matrices, "the file has all bits of the matrices")

    # The same command goes on from the types that were saved (here: has nothing to do). With other
    # ones it is another run, and RL on them another model.
    train_sft(kept, data, sft, METHOD, progress=False, init=imported)
    wide = changed(kept, model=dataclasses.replace(kept.model, param_dtype="float32"))
    with pytest.raises(UserError, match=r"model\.param_dtype='bfloat16' \(now 'float32'\)"):
        train_sft(wide, data, sft, METHOD, progress=False, init=imported)
    with pytest.raises(UsageError, match=r"model\.param_dtype='bfloat16', not 'float32'"):
        train_rl(wide, data, tmp_path / "other", sft, progress=False)

    export_folder(found.pretrained, tmp_path / "folder")
    params, _ = load_hf(tmp_path / "folder")
    np.testing.assert_array_equal(
        params["layers"]["q"], np.asarray(found.params["layers"]["q"], np.float32)
    )


def types(params):
    return jax.tree.map(lambda leaf: str(leaf.dtype), params)


def test_training_needs_no_init_where_the_sizes_are_given(data, tmp_path, monkeypatch):
    """Random weights, and the tokenizer of the data."""
    seen = []
    monkeypatch.setattr("apr_jax.train.sft.train", lambda run, *_, **__: seen.append(run))
    sized = dataclasses.replace(OPEN, model=dataclasses.replace(NETWORK, dtype="float32"))
    train_sft(sized, data, tmp_path / "run", METHOD, progress=False)
    assert seen[0].origin == ""
    assert seen[0].tokenizer.to_bytes() == (data / "tokenizer.model").read_bytes()
