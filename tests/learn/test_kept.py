"""A model in one small file: what evaluation needs comes back, and a file that is not one is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.errors import UserError
from apr_jax.learn.checkpoint import load_checkpoint
from apr_jax.learn.kept import keep
from apr_jax.learn.restored import Restored
from apr_jax.model.transformer import init_params


@pytest.fixture
def restored(config):
    tokenizer = Tokenizer.train(["22,26:2+48-4~!"])
    untied = dataclasses.replace(config, model=dataclasses.replace(config.model, tied=False))
    params = jax.device_get(init_params(untied.model, tokenizer.vocab_size, jax.random.key(0)))
    return Restored(params, untied, "apr", "rl", tokenizer, 7, "somewhere")


def test_all_but_the_last_bits_comes_back(restored, tmp_path):
    path = tmp_path / "new" / "apr.safetensors"
    keep(restored, path)
    found = load_checkpoint(path)
    assert (found.config, found.method, found.stage, found.step) == (restored.config, "apr", "rl", 7)
    assert found.tokenizer.to_bytes() == restored.tokenizer.to_bytes() and found.path == str(path)
    rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), restored.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, rounded)
    # A file kept again is the same.
    keep(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_file_that_is_no_model_is_named(restored, tmp_path):
    path = tmp_path / "apr.safetensors"
    with pytest.raises(UserError, match="apr.safetensors: no such file"):
        load_checkpoint(path)
    save_file({"a": np.ones(2)}, path)
    with pytest.raises(UserError, match="apr.safetensors: is not a whole model that `apr keep` wrote"):
        load_checkpoint(path)
    keep(restored, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="apr.safetensors: is not a whole model"):
        load_checkpoint(path)
