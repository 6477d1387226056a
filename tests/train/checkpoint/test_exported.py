"""A model in one small file: what evaluation needs comes back, and a file that is not one is
named.
"""

import dataclasses
import json
import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from apr_jax.errors import UserError
from apr_jax.model.hf import save_hf
from apr_jax.model.transformer import init_params
from apr_jax.tasks import Condition, Method
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.checkpoint.exported import export_file
from apr_jax.train.checkpoint.restored import Restored, read_file_method


@pytest.fixture
def restored(config):
    tokenizer = SentencePieceTokenizer.train(["22,26:2+48-4~!"])
    untied = dataclasses.replace(config, model=dataclasses.replace(config.model, tied=False))
    params = jax.device_get(init_params(untied.model, tokenizer.vocab_size, jax.random.key(0)))
    return Restored(params, untied, "apr", "rl", tokenizer, 7, "somewhere")


def test_all_but_the_last_bits_comes_back(restored, tmp_path):
    path = tmp_path / "new" / "apr.safetensors"
    export_file(restored, path)
    found = load_checkpoint(path)
    assert (found.config, found.method, found.stage, found.step) == (
        restored.config,
        "apr",
        "rl",
        7,
    )
    assert found.tokenizer.to_bytes() == restored.tokenizer.to_bytes() and found.path == str(path)
    rounded = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), restored.params
    )
    jax.tree.map(np.testing.assert_array_equal, found.params, rounded)
    # A file kept again is the same.
    export_file(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_what_a_file_of_thread_trees_taught_comes_back(restored, tmp_path):
    path = tmp_path / "file.safetensors"
    learned = Method(parallel=True, depth=2, condition=Condition("children", 1, 4))
    export_file(dataclasses.replace(restored, method="file", file_method=learned), path)
    assert load_checkpoint(path).file_method == learned
    export_file(restored, path)
    assert load_checkpoint(path).file_method is None
    for wrong, where in (({"parallel": 3}, "parallel"), ("apr", ""), ({"x": 1}, "parallel")):
        with pytest.raises(UserError, match=f"m.safetensors: file_method.?{where} is not what"):
            read_file_method({"file_method": wrong}, "m.safetensors")


def test_a_file_that_is_no_model_is_named(restored, tmp_path):
    path = tmp_path / "apr.safetensors"
    with pytest.raises(UserError, match="apr.safetensors: no such file"):
        load_checkpoint(path)
    save_file({"a": np.ones(2)}, path)
    with pytest.raises(
        UserError, match="apr.safetensors: is not a whole model that `apr export` wrote"
    ):
        load_checkpoint(path)
    export_file(restored, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="apr.safetensors: is not a whole model"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_of_a_diverged_training_are_refused(restored, tmp_path, value):
    """Otherwise every answer would be wrong, and nothing would say why."""
    params = jax.tree.map(np.array, restored.params)
    params["embed"][1, 2] = value
    path = tmp_path / "apr.safetensors"
    export_file(dataclasses.replace(restored, params=params), path)
    with pytest.raises(UserError, match="apr.safetensors: the weights embed hold NaN or infinity"):
        load_checkpoint(path)


def test_a_flipped_bit_is_told(restored, tmp_path):
    """In a weight, where safetensors takes it for another number, and in what stands beside the
    weights.
    """
    path = tmp_path / "apr.safetensors"
    export_file(restored, path)
    whole = path.read_bytes()
    step = whole.index(b'step\\": 7') + len(b'step\\": ')
    for place in (len(whole) - 1, len(whole) - 1000, step):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(
            UserError,
            match=r"apr\.safetensors: is damaged \(its sums are not those that were saved\)",
        ):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path).step == 7


def test_a_file_without_sums_is_refused(restored, tmp_path):
    path = tmp_path / "apr.safetensors"
    export_file(restored, path)
    contents = path.read_bytes()
    about = json.loads(
        json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])["__metadata__"][
            "apr_jax"
        ]
    )
    del about["sums"]
    save_file({"a": np.ones(2, jnp.bfloat16)}, path, {"apr_jax": json.dumps(about)})
    with pytest.raises(
        UserError, match=r"is not a whole model that `apr export` wrote \(KeyError\('sums'\)\)"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(restored, tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        export_file(restored, tmp_path / "apr.safetensors")
        save_hf(restored.params, restored.config.model, tmp_path / "llama")
    finally:
        os.umask(old)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {
        path.name: mode for path in written
    }


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[3] / "experiments").rglob("*.safetensors")),
    ids=lambda path: path.stem,
)
def test_models_of_the_repository_are_what_was_saved(path):
    assert load_checkpoint(path).step >= 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "method",
            "\x1b[2Japr",
            r"method='\\x1b\[2Japr' must be the name of a method: at most 40 letters, digits",
        ),
        ("method", ["apr"], r"method=\['apr'\] must be the name of a method"),
        ("stage", "dpo", "stage='dpo' must be one of sft, rl"),
        (
            "step",
            "\x1b]0;owned\x07",
            r"step='\\x1b\]0;owned\\x07' must be a whole number of at least 0",
        ),
        ("step", True, "step=True must be"),
        ("step", -1, "step=-1 must be"),
    ],
)
def test_metadata_that_this_library_never_writes_is_refused(
    restored, tmp_path, monkeypatch, field, value, message
):
    """It stands in tables and file names; a stranger's file may hold anything there, and right sums
    of it.
    """
    path = tmp_path / "apr.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Restored, "__post_init__", lambda self: None)
        export_file(dataclasses.replace(restored, **{field: value}), path)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
