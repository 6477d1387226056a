"""Llama-2 style decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

One layer (`Layer`) and one head serve training, rescoring, prefill and decoding, so rollout and
training cannot disagree. The parameters of all layers are stacked on a leading axis N. Training
scans over it where it computes layers again (`remat`); else it is unrolled, as in decoding, because
a scan would copy what it carries.

Shapes: R rows, L row length, W decode slots, S tokens a step, M window, N layers, D width, H heads,
G key/value heads, K head size, F MLP size, V vocabulary."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from apr_jax.model.attention.packed import ATTENTION, attend_packed
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache import cache, cache_tpu

Params = dict[str, Any]
# What the backward pass finds kept within a layer, where it computes the rest again
# (`ModelConfig.remat`).
_KEPT: dict[str, Callable] = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
}


class Layer(nn.Module):
    """Parameters of one decoder layer, and the layer itself."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h: Array, position: Array, attention: Callable) -> tuple[Array, Any]:
        c = self.config

        def weight(name: str, shape: tuple[int, ...], fan_in: int) -> Array:
            return self.param(name, nn.initializers.normal(fan_in**-0.5), shape, jnp.float32)

        params = {
            "attn_norm": self.param("attn_norm", nn.initializers.ones, (c.width,), jnp.float32),
            "q": weight("q", (c.width, c.heads, c.head_size), c.width),
            "kv": weight("kv", (c.width, 2, c.kv_heads, c.head_size), c.width),
            "out": weight(
                "out", (c.heads, c.head_size, c.width), c.heads * c.head_size * 2 * c.layers
            ),
            "mlp_norm": self.param("mlp_norm", nn.initializers.ones, (c.width,), jnp.float32),
            "gate_up": weight("gate_up", (c.width, 2, c.mlp), c.width),
            "down": weight("down", (c.mlp, c.width), c.mlp * 2 * c.layers),
        }
        return decoder_layer(to_matrices(params, c), c, h, position, attention)


def to_matrices(layer: Params, config: ModelConfig) -> Params:
    """The matrices that a layer multiplies with, [D, n] and [n, D], in the dtype of the
    computation.
    """
    width, dtype = config.width, jnp.dtype(config.dtype)
    flat = {
        "q": layer["q"].reshape(width, -1),
        "k": layer["kv"][:, 0].reshape(width, -1),
        "v": layer["kv"][:, 1].reshape(width, -1),
        "out": layer["out"].reshape(-1, width),
        "gate": layer["gate_up"][:, 0],
        "up": layer["gate_up"][:, 1],
        "down": layer["down"],
    }
    return {name: matrix.astype(dtype) for name, matrix in flat.items()} | {
        name: layer[name] for name in ("attn_norm", "mlp_norm")
    }


def decoder_layer(
    weights: Params,
    config: ModelConfig,
    h: Float[Array, "R S D"],
    position: Array,
    attention: Callable,
) -> tuple[Array, Any]:
    """One layer.

    `attention(q, k, v)` says what the queries find, and returns what it wants kept (a cache).
    """
    rows, steps, width = h.shape

    def heads(x: Array, matrix: Array) -> Float[Array, "R S heads K"]:
        return (x @ matrix).reshape(rows, steps, -1, config.head_size)

    x = rms_norm(h, weights["attn_norm"]).reshape(-1, width)
    q, k, v = heads(x, weights["q"]), heads(x, weights["k"]), heads(x, weights["v"])
    q, k = rotate(q, position, config.rope_base), rotate(k, position, config.rope_base)
    found, kept = attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    h = h + (found.reshape(rows * steps, -1) @ weights["out"]).reshape(h.shape)
    x = rms_norm(h, weights["mlp_norm"]).reshape(-1, width)
    h = h + ((nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]).reshape(
        h.shape
    )
    return h, kept


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"]) -> Float[Array, "*batch D"]:
    """Root mean square normalization in float32: x / sqrt(mean(x^2) + 1e-6) x scale."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotate(
    x: Float[Array, "R S heads K"], position: Int[Array, "R S"], base: float
) -> Float[Array, "R S heads K"]:
    """Rotary embedding (Su et al. 2021): the two halves of a head are turned by position x
    base^(-2i/K).
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(
        x.dtype
    )


def init_params(config: ModelConfig, vocab: int, key: jax.Array) -> Params:
    """Random float32 parameters; those of the layers are stacked on a leading axis N."""
    keys = jax.random.split(key, config.layers + 2)
    layer = Layer(config)
    blank = jnp.zeros((1, 1, config.width), jnp.dtype(config.dtype))

    def init_layer(layer_key: jax.Array) -> Params:
        return layer.init(
            layer_key, blank, jnp.zeros((1, 1), jnp.int32), lambda q, k, v: (q, None)
        )["params"]

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
    return total, total - params["embed"].size - (
        params["unembed"].size if "unembed" in params else 0
    )


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "R L"],
    position: Int[Array, "R L"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    mesh: Mesh | None = None,
) -> Float[Array, "R L V"]:
    """Logits of packed rows, for training and rescoring: the logits at j are those of the token
    after j. Float32.

    Args:
      segment, hidden block, mesh: see `attend_packed`.
    """
    layer = Layer(config)

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return attend_packed(q, k, v, segment, hidden_block, mesh), None

    def body(h: Array, layer_params: Params) -> tuple[Array, None]:
        return layer.apply({"params": layer_params}, h, position, attention)[0], None

    h = _embed(params, config, tokens)
    if config.remat in _KEPT:
        h, _ = jax.lax.scan(jax.checkpoint(body, policy=_KEPT[config.remat]), h, params["layers"])
    else:
        # A scan would copy what the backward pass needs of each layer into and out of stacked
        # arrays (docs/training.md).
        for index in range(config.layers):
            h, _ = body(h, jax.tree.map(lambda x, i=index: x[i], params["layers"]))
    return _head(params, config, h)


def make_decode(
    config: ModelConfig, bounds: tuple[int, ...], tpu: bool = False
) -> tuple[Callable, Callable]:
    """The model as `threads/` wants it: `decode(params, tokens, cache, positions, bound)` and
    `init_cache(decode slots, bound)`.

    `decode` reads `tokens` [W, S] at `positions` [W, S] into the cache and returns logits [W, S, V]
    and the cache. A query at position p sees positions 0..p. A position at or beyond the window
    marks padding: nothing is stored and its logits mean nothing.

    Args:
      bounds: `schedule.cache_lengths(window)`.
      tpu: the cache is laid out for TPU, and read by its kernel.
    """
    kind: Any = cache_tpu if tpu else cache

    def init_cache(slots: int, bound: int) -> tuple[Any, ...]:
        return tuple(kind.empty(config, slots, bound, bounds) for _ in range(config.layers))

    def decode(
        params: Params, tokens: Array, cache: Any, positions: Array, bound: int
    ) -> tuple[Array, Any]:
        h = _embed(params, config, tokens)
        new = []
        for layer, before in zip(params["layers"], cache, strict=True):
            h, after = decoder_layer(
                layer, config, h, positions, kind.over(before, positions, bound, bounds)
            )
            new.append(after)
        return _head(params, config, h), tuple(new)

    return decode, init_cache


def prepare_decode(params: Params, config: ModelConfig) -> Params:
    """Parameters as `decode` takes them: each layer's matrices apart, cut out once and not at every
    step.
    """
    layers = [
        to_matrices(jax.tree.map(lambda x, i=index: x[i], params["layers"]), config)
        for index in range(config.layers)
    ]
    return params | {"layers": layers}


def _embed(params: Params, config: ModelConfig, tokens: Array) -> Array:
    return params["embed"].astype(config.dtype)[tokens]


def _head(params: Params, config: ModelConfig, h: Array) -> Array:
    x = rms_norm(h, params["final_norm"])
    unembed = params["embed"].T if config.tied else params["unembed"]
    return jnp.einsum(
        "rsd,dv->rsv", x, unembed.astype(config.dtype), preferred_element_type=jnp.float32
    )
