"""Llama-2 style decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

One layer (`Layer`) and one head serve training, replay, prefill and decoding, so rollout and training cannot disagree.
The parameters of all layers are stacked on a leading axis N: training scans over it, decoding unrolls it because a scanned
cache would be copied at every step.

Shapes: R rows, L row length, W lanes, S tokens a step, M window, N layers, D width, H heads, G key/value heads, K head size,
F MLP size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apr_jax.model.attention import attend, rotate, visible
from apr_jax.model.config import ModelConfig

Params = dict[str, Any]
# One (keys, values) pair a layer, each [W, G, M, K]. The lane axis comes first in every leaf: the rollout relies on it.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


class Layer(nn.Module):
    """One decoder layer. `extend` turns the new keys and values into those to attend to, and says which are visible."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h: Array, position: Array, extend: Callable) -> tuple[Array, Any]:
        c = self.config
        dtype = jnp.dtype(c.dtype)

        def weight(name: str, shape: tuple[int, ...], fan_in: int) -> Array:
            return self.param(name, nn.initializers.normal(fan_in**-0.5), shape, jnp.float32).astype(dtype)

        rows, steps, _ = h.shape
        x = rms_norm(h, self.param("attn_norm", nn.initializers.ones, (c.width,), jnp.float32)).reshape(-1, c.width)
        kv = weight("kv", (c.width, 2, c.kv_heads, c.head_size), c.width)
        q, k, v = (
            (x @ w.reshape(c.width, -1)).reshape(rows, steps, -1, c.head_size)
            for w in (weight("q", (c.width, c.heads, c.head_size), c.width), kv[:, 0], kv[:, 1])
        )
        q, k = rotate(q, position, c.rope_base), rotate(k, position, c.rope_base)
        keys, values, mask, cache = extend(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
        out = weight("out", (c.heads, c.head_size, c.width), c.heads * c.head_size * 2 * c.layers)
        attended = attend(q, keys, values, mask).reshape(rows * steps, -1)
        h = h + (attended @ out.reshape(-1, c.width)).reshape(h.shape)

        x = rms_norm(h, self.param("mlp_norm", nn.initializers.ones, (c.width,), jnp.float32)).reshape(-1, c.width)
        gate_up = weight("gate_up", (c.width, 2, c.mlp), c.width)
        down = weight("down", (c.mlp, c.width), c.mlp * 2 * c.layers)
        h = h + ((nn.silu(x @ gate_up[:, 0]) * (x @ gate_up[:, 1])) @ down).reshape(h.shape)
        return h, cache


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"]) -> Float[Array, "*batch D"]:
    """Root mean square normalization in float32: x / sqrt(mean(x^2) + 1e-6) x scale."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def init_params(config: ModelConfig, vocab: int, key: jax.Array) -> Params:
    """Random float32 parameters; those of the layers are stacked on a leading axis N."""
    keys = jax.random.split(key, config.layers + 2)
    layer = Layer(config)
    blank = jnp.zeros((1, 1, config.width), jnp.dtype(config.dtype))

    def init_layer(layer_key: jax.Array) -> Params:
        return layer.init(layer_key, blank, jnp.zeros((1, 1), jnp.int32), _within_rows(jnp.ones((1, 1, 1), bool)))[
            "params"
        ]

    params: Params = {
        "embed": jax.random.normal(keys[0], (vocab, config.width)) * config.width**-0.5,
        "layers": jax.vmap(init_layer)(keys[2:]),
        "final_norm": jnp.ones(config.width),
    }
    if not config.tied:
        params["unembed"] = jax.random.normal(keys[1], (config.width, vocab)) * config.width**-0.5
    return params


def count_params(params: Params) -> tuple[int, int]:
    """Number of parameters: all, and without the embedding and its output twin."""
    total = sum(x.size for x in jax.tree.leaves(params))
    return total, total - params["embed"].size - (params["unembed"].size if "unembed" in params else 0)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "R L"],
    position: Int[Array, "R L"],
    segment: Int[Array, "R L"],
    island: Int[Array, "R L"],
) -> Float[Array, "R L V"]:
    """Logits of packed rows, for training and replay: the logits at j are those of the token after j. Float32."""
    mask = visible(segment, island)
    layer = Layer(config)

    def body(h: Array, layer_params: Params) -> tuple[Array, None]:
        return layer.apply({"params": layer_params}, h, position, _within_rows(mask))[0], None

    if config.remat == "layer":
        body = jax.checkpoint(body)
    h, _ = jax.lax.scan(body, _embed(params, config, tokens), params["layers"])
    return _head(params, config, h)


def make_decode(config: ModelConfig) -> tuple[Callable, Callable]:
    """The model as `threads/` wants it: `decode(params, tokens, cache, positions)` and `init_cache(lanes, window)`.

    `decode` reads `tokens` [W, S] at `positions` [W, S] into the cache and returns logits [W, S, V] and the cache. Entry j of
    the cache holds position j; a query at position p sees entries 0..p. A position at or beyond the window marks padding:
    nothing is stored and its logits mean nothing.
    """
    layer = Layer(config)

    def init_cache(lanes: int, window: int) -> Cache:
        shape = (lanes, config.kv_heads, window, config.head_size)
        return tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.layers))

    def decode(params: Params, tokens: Array, cache: Cache, positions: Array) -> tuple[Array, Cache]:
        window = cache[0][0].shape[2]
        mask = jnp.arange(window)[None, None, :] <= positions[:, :, None]
        h = _embed(params, config, tokens)
        new = []
        for index in range(config.layers):
            layer_params = jax.tree.map(lambda x, i=index: x[i], params["layers"])
            h, kv = layer.apply({"params": layer_params}, h, positions, _into_cache(cache[index], positions, mask))
            new.append(kv)
        return _head(params, config, h), tuple(new)

    return decode, init_cache


def _within_rows(mask: Array) -> Callable:
    return lambda k, v: (k, v, mask, None)


def _into_cache(cache: tuple[Array, Array], positions: Array, mask: Array) -> Callable:
    lane = jnp.arange(positions.shape[0])[:, None]

    def extend(k: Array, v: Array) -> tuple[Array, Array, Array, tuple[Array, Array]]:
        keys, values = (
            old.at[lane, :, positions].set(new.transpose(0, 2, 1, 3), mode="drop")
            for old, new in zip(cache, (k, v), strict=True)
        )
        return keys, values, mask, (keys, values)

    return extend


def _embed(params: Params, config: ModelConfig, tokens: Array) -> Array:
    return params["embed"].astype(config.dtype)[tokens]


def _head(params: Params, config: ModelConfig, h: Array) -> Array:
    x = rms_norm(h, params["final_norm"])
    unembed = params["embed"].T if config.tied else params["unembed"]
    return jnp.einsum("rsd,dv->rsv", x, unembed.astype(config.dtype), preferred_element_type=jnp.float32)
