"""The transformer: a decoder in the style of Llama 2, its caches, its places on a mesh, its files.

The model knows no thread and no task. Parameters are a plain tree of arrays, and everything else is
a pure function of them:

    from apr_jax.model import ModelConfig, forward, init_params, make_decode, prepare_decode

    config = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, head_size=16, mlp=192)
    params = init_params(config, vocab=32, key=jax.random.key(0))

Training and rescoring compute the logits of whole rows in which several threads are packed. Each
token's `segment` says which thread it belongs to, and `hidden_block` hides it from later tokens:

    logits = forward(params, config, tokens, position, segment, hidden_block)      # [R, L, V]

A rollout (`apr_jax.threads`) reads token after token into a cache:

    decode, init_cache = make_decode(config, schedule.cache_lengths(limits.window))
    tree_rollout(decode, init_cache, prepare_decode(params, config), prompts, key, limits, schedule)

On several devices `make_mesh` lays out the devices, and `shardings` says where each parameter (or
an optimizer's moments) lives. `save_hf` and `load_hf` exchange weights with other programs.

Where to look for what: `transformer` is the network, `attention` reads packed rows, `kv_cache`
keeps what decoding has read, `sharding` knows the mesh, and `hf` the files of Hugging Face.
"""

from typing import TYPE_CHECKING

from apr_jax.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from apr_jax.model.config import ModelConfig
    from apr_jax.model.hf import load_hf, save_hf, to_hf
    from apr_jax.model.sharding import batch_sharding, make_mesh, shardings
    from apr_jax.model.transformer import (
        Params,
        count_params,
        forward,
        init_params,
        make_decode,
        prepare_decode,
    )

# Exported name -> module that defines it.
_DEFINED_IN = {
    "ModelConfig": "config",
    "Params": "transformer",
    "batch_sharding": "sharding",
    "count_params": "transformer",
    "forward": "transformer",
    "init_params": "transformer",
    "load_hf": "hf",
    "make_decode": "transformer",
    "make_mesh": "sharding",
    "prepare_decode": "transformer",
    "save_hf": "hf",
    "shardings": "sharding",
    "to_hf": "hf",
}

__all__ = [
    "ModelConfig",
    "Params",
    "batch_sharding",
    "count_params",
    "forward",
    "init_params",
    "load_hf",
    "make_decode",
    "make_mesh",
    "prepare_decode",
    "save_hf",
    "shardings",
    "to_hf",
]

# Every command reads configs, which need `ModelConfig` alone; Flax and Pallas take a second to
# import.
__getattr__ = lazy_names(__name__, _DEFINED_IN)
