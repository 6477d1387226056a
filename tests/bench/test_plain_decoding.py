"""Plain decoding decodes exactly the stated number of tokens, none of them a control token."""

import jax
import jax.numpy as jnp
import pytest

from apr_jax.bench import plain_decoding
from apr_jax.bench.peers import open_peer
from apr_jax.errors import UsageError
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import init_params

TINY = ModelConfig(layers=1, width=8, heads=1, kv_heads=1, head_size=8, mlp=8)


@pytest.mark.slow
def test_every_sequence_gets_its_tokens(monkeypatch):
    monkeypatch.setitem(plain_decoding.SHAPES, "nano", TINY)
    monkeypatch.setattr(plain_decoding, "NEW", 9)
    monkeypatch.setattr(plain_decoding, "BUCKETS", (28,))
    params = init_params(TINY, plain_decoding.VOCAB, jax.random.key(0))
    assert plain_decoding.engine("nano", params, 16).run() == 16 * 9
    for limit in plain_decoding.machine("nano", 16, steps=3):
        assert limit.run() == 16 * 3


def test_no_control_token_is_wanted():
    def model(params, tokens, cache, positions, bound):
        return jnp.zeros((*tokens.shape, 20)).at[..., 3].set(9.0), cache

    logits, _ = plain_decoding.only_text(model)(
        None, jnp.zeros((2, 1), jnp.int32), None, jnp.zeros((2, 1), jnp.int32), 4
    )
    assert (logits.argmax(-1) >= 10).all()


def test_an_unknown_peer_is_named(tmp_path):
    with pytest.raises(UsageError, match="no peer 'gpt'; there are transformers, llama.cpp, vllm"):
        open_peer("gpt", tmp_path)
