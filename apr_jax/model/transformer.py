"""A decoder in the style of Llama 2: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

What the families Llama 3, Qwen2 and Qwen3 have beyond that is part of `ModelConfig`.

One layer (`decoder_layer`) and one output head serve training, rescoring, prefill and decoding, so
rollout and training cannot disagree. The parameters of all layers are stacked on a leading axis N.
Training scans over that axis where it computes layers again (`ModelConfig.remat`), and so does
decoding on TPU, where the program is compiled in the time of one layer. Otherwise the layers are
unrolled, because there a scan copies what it carries.

Shapes: R rows, L row length, W decode slots, S tokens a step, M positions of the cache, N layers,
D width, H heads, G key/value heads, K head size, F MLP size, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from apr_jax.errors import UsageError
from apr_jax.model.attention.packed import ATTENTION, attend_packed
from apr_jax.model.config import ModelConfig, RopeScaling
from apr_jax.model.kv_cache import cache, cache_tpu
from apr_jax.model.sharding import batch_sharding, spec_of

Params = dict[str, Any]
TENSOR = "tensor"  # The mesh axis whose devices share heads, MLP and vocabulary.
# Where layers are computed again (`ModelConfig.remat`): what the backward pass keeps of a layer.
_KEPT: dict[str, Callable] = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
}


class Layer(nn.Module):
    """One decoder layer with its parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h: Array, position: Array, attention: Callable) -> tuple[Array, Any]:
        c = self.config

        def weight(name: str, shape: tuple[int, ...], fan_in: int) -> Array:
            return self.param(name, nn.initializers.normal(fan_in**-0.5), shape, jnp.float32)

        def scale(name: str, size: int) -> Array:
            return self.param(name, nn.initializers.ones, (size,), jnp.float32)

        def bias(name: str, shape: tuple[int, ...]) -> Array:
            return self.param(name, nn.initializers.zeros, shape, jnp.float32)

        # Products that end in the residual stream start smaller the more layers add to it.
        out_fan_in = c.heads * c.head_size * 2 * c.layers
        down_fan_in = c.mlp * 2 * c.layers
        params = {
            "attn_norm": scale("attn_norm", c.width),
            "q": weight("q", (c.width, c.heads, c.head_size), c.width),
            "kv": weight("kv", (c.width, 2, c.kv_heads, c.head_size), c.width),
            "out": weight("out", (c.heads, c.head_size, c.width), out_fan_in),
            "mlp_norm": scale("mlp_norm", c.width),
            "gate_up": weight("gate_up", (c.width, 2, c.mlp), c.width),
            "down": weight("down", (c.mlp, c.width), down_fan_in),
        }
        if c.qkv_bias:
            params["q_bias"] = bias("q_bias", (c.heads, c.head_size))
            params["kv_bias"] = bias("kv_bias", (2, c.kv_heads, c.head_size))
        if c.qk_norm:
            params["q_norm"] = scale("q_norm", c.head_size)
            params["k_norm"] = scale("k_norm", c.head_size)
        return decoder_layer(to_matrices(params, c), c, h, position, attention)


def to_matrices(layer: Params, config: ModelConfig) -> Params:
    """Turns one layer's parameters into the matrices that it multiplies with.

    They are [D, n] or [n, D], in the dtype of the computation, and so are biases, [n]. Norms stay
    as they are.
    """
    width = config.width
    dtype = jnp.dtype(config.dtype)
    flat = {
        "q": layer["q"].reshape(width, -1),
        "k": layer["kv"][:, 0].reshape(width, -1),
        "v": layer["kv"][:, 1].reshape(width, -1),
        "out": layer["out"].reshape(-1, width),
        "gate": layer["gate_up"][:, 0],
        "up": layer["gate_up"][:, 1],
        "down": layer["down"],
    }
    if config.qkv_bias:
        flat["q_bias"] = layer["q_bias"].reshape(-1)
        flat["k_bias"] = layer["kv_bias"][0].reshape(-1)
        flat["v_bias"] = layer["kv_bias"][1].reshape(-1)
    matrices = {name: matrix.astype(dtype) for name, matrix in flat.items()}
    norms = {name: value for name, value in layer.items() if name.endswith("_norm")}
    return matrices | norms


def decoder_layer(
    weights: Params,
    config: ModelConfig,
    h: Float[Array, "R S D"],
    position: Array,
    attention: Callable,
    partial: tuple[str, ...] = (),
) -> tuple[Array, Any]:
    """Applies one layer to the residual stream.

    Args:
      weights: the layer's matrices, see `to_matrices`.
      config: the model's shape.
      h: the residual stream.
      position: [R, S] of the tokens.
      attention: `attention(q [R, S, H, K], k [R, G, S, K], v [R, G, S, K]) -> (mean values
        [R, S, H, K], state)`, where the state is whatever the attention wants kept: a cache, or
        None.
      partial: names of the matrices whose rows are split over the mesh axis `tensor`. Each device
        multiplies by its own rows, and the products are added up over that axis.

    Returns:
      the residual stream after the layer, and the attention's state.
    """
    rows, steps, width = h.shape

    def norm(x: Array, name: str) -> Array:
        return rms_norm(x, weights[name], config.norm_epsilon)

    def heads(x: Array, name: str) -> Float[Array, "R S heads K"]:
        product = x @ weights[name]
        if config.qkv_bias:
            product = product + weights[f"{name}_bias"]
        return product.reshape(rows, steps, -1, config.head_size)

    def to_stream(x: Array, name: str) -> Float[Array, "R S D"]:
        if name not in partial:
            return (x @ weights[name]).reshape(h.shape)
        # The parts are rounded to a smaller type once, after they are added up.
        part = jnp.dot(x, weights[name], preferred_element_type=jnp.float32)
        return jax.lax.psum(part, TENSOR).astype(h.dtype).reshape(h.shape)

    # Attention.
    x = norm(h, "attn_norm").reshape(-1, width)  # [R * S, D]
    q = heads(x, "q")  # [R, S, H, K]
    k = heads(x, "k")  # [R, S, G, K]
    v = heads(x, "v")  # [R, S, G, K]
    if config.qk_norm:
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    q, k = rotate(q, position, config), rotate(k, position, config)
    values, state = attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    h = h + to_stream(values.reshape(rows * steps, -1), "out")

    # MLP.
    x = norm(h, "mlp_norm").reshape(-1, width)  # [R * S, D]
    gated = nn.silu(x @ weights["gate"]) * (x @ weights["up"])  # [R * S, F]
    h = h + to_stream(gated, "down")
    return h, state


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "*batch D"]:
    """Normalizes by the root mean square, in float32: x / sqrt(mean(x^2) + epsilon) * scale."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotate(
    x: Float[Array, "R S heads K"], position: Int[Array, "R S"], config: ModelConfig
) -> Float[Array, "R S heads K"]:
    """Applies the rotary embedding (Su et al. 2021).

    Entry i of a head's first half and entry i of its second half are turned as a pair, by the angle
    position * base^(-2i/K), unless the model stretches its wavelengths (`RopeScaling`).
    """
    half = x.shape[-1] // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [K / 2]
    if config.rope_scaling.factor != 1:
        frequency = _scale_frequency(frequency, config.rope_scaling)
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # [R, S, 1, K / 2]

    left = x[..., :half].astype(jnp.float32)
    right = x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def _scale_frequency(
    frequency: Float[Array, " half"], scaling: RopeScaling
) -> Float[Array, " half"]:
    """Slows pairs down that turn rarely over the original length, as Llama 3 does."""
    low = scaling.low_frequency_turns
    high = scaling.high_frequency_turns
    turns = scaling.original_length * frequency / (2 * jnp.pi)  # [K / 2]
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: the pair keeps its frequency.
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def init_params(config: ModelConfig, vocab: int, key: jax.Array) -> Params:
    """Draws random parameters; those of the layers are stacked on a leading axis N.

    They are drawn in float32, and cast to `config.param_dtype`.

    Raises:
      UsageError: the network is left open (`ModelConfig.is_open`).
    """
    if config.is_open:
        raise UsageError(
            "config model: leaves its sizes open, but this needs them; give model.layers,"
            " model.width and so on"
        )
    keys = jax.random.split(key, config.layers + 2)
    layer = Layer(config)
    blank = jnp.zeros((1, 1, config.width), jnp.dtype(config.dtype))
    position = jnp.zeros((1, 1), jnp.int32)

    def init_layer(layer_key: jax.Array) -> Params:
        return layer.init(layer_key, blank, position, lambda q, k, v: (q, None))["params"]

    params: Params = {
        "embed": jax.random.normal(keys[0], (vocab, config.width)) * config.width**-0.5,
        "layers": jax.vmap(init_layer)(keys[2:]),
        "final_norm": jnp.ones(config.width),
    }
    if not config.tied:
        params["unembed"] = jax.random.normal(keys[1], (config.width, vocab)) * config.width**-0.5
    return cast_weights(params, config.param_dtype)


def count_params(params: Params) -> tuple[int, int]:
    """Counts the parameters: all, and all without the embedding and the output projection."""
    total = sum(x.size for x in jax.tree.leaves(params))
    projections = sum(params[name].size for name in ("embed", "unembed") if name in params)
    return total, total - projections


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "R L"],
    position: Int[Array, "R L"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    mesh: Mesh | None = None,
    attend: Callable | None = None,
) -> Float[Array, "R L V"]:
    """Computes the float32 logits of packed rows.

    The logits at column j are those of the token after column j.

    Args: see `hidden_states`.
    """
    h = hidden_states(params, config, tokens, position, segment, hidden_block, mesh, attend)
    return head(params, config, h)


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "R L"],
    position: Int[Array, "R L"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    mesh: Mesh | None = None,
    attend: Callable | None = None,
) -> Float[Array, "R L D"]:
    """Computes the residual stream of packed rows after the last layer, which `head` reads.

    Args:
      params: see `init_params`.
      config: the model's shape.
      tokens: the packed rows.
      position: of each token in its thread's window.
      segment: thread of each token within its row, see `attend_packed`.
      hidden_block: the spawn block that the token belongs to, or 0.
      mesh: devices over which the rows are split, see `attend_packed`.
      attend: attends in place of `attend_packed`, for comparisons; None takes that one.
    """
    layer = Layer(config)
    attend = attend or attend_packed

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return attend(q, k, v, segment, hidden_block, mesh), None

    def body(h: Array, layer_params: Params) -> tuple[Array, None]:
        layer_params = _gathered(layer_params, config, mesh)
        return in_rows(layer.apply({"params": layer_params}, h, position, attention)[0]), None

    def in_rows(h: Array) -> Array:
        """Splits the stream by rows alone, so that devices gather weights and exchange no rows.

        Without it XLA may split the stream as the weights are, by width, where `fsdp` is the only
        axis of the mesh.
        """
        if mesh is None or mesh.size == 1:
            return h
        return jax.lax.with_sharding_constraint(h, batch_sharding(mesh))

    h = in_rows(_embed(params, config, tokens))  # [R, L, D]
    if config.remat in _KEPT:
        h, _ = jax.lax.scan(jax.checkpoint(body, policy=_KEPT[config.remat]), h, params["layers"])
    else:
        # A scan would copy what the backward pass needs of each layer into and out of stacked
        # arrays (docs/training.md).
        for layer_params in _unstacked(params):
            h, _ = body(h, layer_params)
    return h


def make_decode(
    config: ModelConfig, cache_lengths: tuple[int, ...], tpu: bool = False, tensor: int = 1
) -> tuple[Callable, Callable]:
    """Makes the two functions by which a rollout (`apr_jax.threads`) uses a model.

    `decode(params, tokens, cache, positions, cache_length)` reads `tokens` [W, S] at `positions`
    [W, S] into the cache and returns logits [W, S, V] and the cache. A query at position p sees
    positions 0..p. A position at or beyond the window marks padding: nothing is stored for it, and
    its logits mean nothing. `params` are those of `prepare_decode`.

    `init_cache(slots, cache_length)` makes an empty cache.

    Where `tensor` devices share the work, both functions are those of one of these devices, within
    a `shard_map` over the mesh axis `tensor`. The device computes and caches its own heads, its own
    columns of the MLP and its own part of the logits (`decode_specs`). Each device returns all
    logits.

    Args:
      config: the model's shape.
      cache_lengths: all lengths that the functions will be called with, increasing; the last is the
        window. A rollout's are `schedule.cache_lengths(window)`.
      tpu: whether the cache is laid out for TPU and read by the TPU kernel, and the layers are a
        loop.
      tensor: number of devices that share the work.
    """
    own = decode_share(config, tensor)
    shared = {"out": own.heads < config.heads, "down": own.mlp < config.mlp}
    partial = tuple(name for name, is_shared in shared.items() if is_shared)

    def init_cache(slots: int, cache_length: int) -> Any:
        if tpu:
            return cache_tpu.empty(own, slots, cache_length)
        return tuple(
            cache.empty(own, slots, cache_length, cache_lengths) for _ in range(config.layers)
        )

    def unrolled(
        layers: list[Params], h: Array, caches: Any, positions: Array, cache_length: int
    ) -> tuple[Array, Any]:
        updated = []
        for layer, layer_cache in zip(layers, caches, strict=True):
            attention = cache.over(layer_cache, positions, cache_length, cache_lengths)
            h, layer_cache = decoder_layer(layer, own, h, positions, attention, partial)
            updated.append(layer_cache)
        return h, tuple(updated)

    def scanned(
        layers: Params, h: Array, caches: Any, positions: Array, cache_length: int
    ) -> tuple[Array, Any]:
        def body(carry: tuple[Array, Any], one: tuple[Params, Array]) -> tuple[Any, None]:
            h, caches = carry
            layer, number = one
            attention = cache_tpu.over(caches, number, positions, cache_length)
            return decoder_layer(layer, own, h, positions, attention, partial), None

        numbers = jnp.arange(config.layers, dtype=jnp.int32)
        (h, caches), _ = jax.lax.scan(body, (h, caches), (layers, numbers))
        return h, caches

    run_layers: Callable = scanned if tpu else unrolled

    def decode(
        params: Params, tokens: Array, cache: Any, positions: Array, cache_length: int
    ) -> tuple[Array, Any]:
        h = _embed(params, own, tokens)  # [W, S, D]
        h, cache = run_layers(params["layers"], h, cache, positions, cache_length)
        logits = head(params, own, h)  # [W, S, V], or V / tensor of them
        if logits.shape[-1] < params["embed"].shape[0]:
            logits = jax.lax.all_gather(logits, TENSOR, axis=2, tiled=True)
        return logits, cache

    return decode, init_cache


def decode_share(config: ModelConfig, tensor: int) -> ModelConfig:
    """Returns the shape of what one of `tensor` devices computes of the model in decoding.

    Heads are shared if each device gets equally many, all of them of whole groups or of one group.
    What cannot be shared each device computes whole.
    """
    if tensor == 1:
        return config
    own = dataclasses.replace(config, tied=False)  # `prepare_decode` makes the output projection.
    fits_groups = config.kv_heads % tensor == 0 or tensor % config.kv_heads == 0
    if config.heads % tensor == 0 and fits_groups:
        heads = config.heads // tensor
        kv_heads = max(1, config.kv_heads // tensor)
        own = dataclasses.replace(own, heads=heads, kv_heads=kv_heads)
    if config.mlp % tensor == 0:
        own = dataclasses.replace(own, mlp=config.mlp // tensor)
    return own


def cast_weights(params: Params, dtype: str) -> Params:
    """Casts all parameters to a type, but those of norms to float32.

    The leaves may be those of JAX or numpy. A leaf that has its type already is not copied.
    """

    def cast(path: tuple[Any, ...], leaf: ArrayLike) -> ArrayLike:
        kept = jnp.dtype(jnp.float32 if path[-1].key.endswith("_norm") else dtype)
        return leaf if leaf.dtype == kept else leaf.astype(kept)

    return jax.tree_util.tree_map_with_path(cast, params)


def prepare_decode(
    params: Params, config: ModelConfig, tpu: bool = False, tensor: int = 1
) -> Params:
    """Makes the parameters that `decode` takes, with the matrices of each layer.

    On TPU those of all layers are stacked on a leading axis N. Elsewhere there is a list of layers,
    which are cut out once here, and not at every decode step.

    Args:
      params: see `init_params`.
      config: the model's shape.
      tpu: see `make_decode`.
      tensor: number of devices that share the work, see `make_decode`. The parameters are made for
        all of them.
    """
    own = decode_share(config, tensor)

    def prepare(layer: Params) -> Params:
        matrices = to_matrices(layer, config)
        if own.heads == config.heads:
            return matrices
        return _copy_kv_heads(matrices, config, own.kv_heads * tensor)

    if tensor > 1 and config.tied:
        # Every device looks up whole embeddings, and computes a part of the logits.
        params = params | {"unembed": params["embed"].T}
    if tpu:
        return params | {"layers": jax.vmap(prepare)(params["layers"])}
    layers = [prepare(layer) for layer in _unstacked(params)]
    return params | {"layers": layers}


def _copy_kv_heads(layer: Params, config: ModelConfig, count: int) -> Params:
    """Copies each key/value head so often that there are `count`, equal ones side by side.

    Devices that share the query heads of one group each have its keys and values.
    """
    copies = count // config.kv_heads
    if copies == 1:
        return layer

    def copy(x: Array) -> Array:
        by_head = x.reshape(*x.shape[:-1], config.kv_heads, config.head_size)
        return jnp.repeat(by_head, copies, axis=-2).reshape(*x.shape[:-1], -1)

    names = [name for name in ("k", "v", "k_bias", "v_bias") if name in layer]
    return layer | {name: copy(layer[name]) for name in names}


def decode_specs(params: Params, config: ModelConfig, tensor: int) -> Params:
    """Returns how the parameters of `prepare_decode` are split over the mesh axis `tensor`.

    All other mesh axes have them whole.

    Args:
      params: the prepared parameters; only their shapes are read.
      config: the model's shape.
      tensor: number of devices that share the work, see `make_decode`.
    """
    own = decode_share(config, tensor)
    rows, columns, whole = PartitionSpec(TENSOR), PartitionSpec(None, TENSOR), PartitionSpec()
    splits: dict[str, PartitionSpec] = {}
    if own.heads < config.heads:
        splits |= dict.fromkeys(("q", "k", "v"), columns)
        splits |= dict.fromkeys(("q_bias", "k_bias", "v_bias", "out"), rows)
    if own.mlp < config.mlp:
        splits |= {"gate": columns, "up": columns, "down": rows}

    specs = dict.fromkeys(params, whole)
    layers = params["layers"]
    if isinstance(layers, dict):  # Stacked on a leading axis.
        specs["layers"] = {name: PartitionSpec(None, *splits.get(name, whole)) for name in layers}
    else:
        specs["layers"] = [{name: splits.get(name, whole) for name in layer} for layer in layers]
    if tensor > 1 and params["embed"].shape[0] % tensor == 0:
        specs["unembed"] = columns
    return specs


def _gathered(layer: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    """Casts one layer's parameters and brings together what the mesh axis `fsdp` has split of them.

    The parts of the mesh axis `tensor` stay apart.
    """
    if mesh is None or mesh.size == 1:
        return layer

    def gather(name: str, weight: Array) -> Array:
        spec = spec_of(name, (config.layers, *weight.shape), mesh)[1:]
        kept = PartitionSpec(*(axis if axis == TENSOR else None for axis in spec))
        return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, kept))

    weights = cast_weights(layer, config.dtype)
    return {name: gather(name, weight) for name, weight in weights.items()}


def _unstacked(params: Params) -> list[Params]:
    """Cuts the stacked parameters into those of each layer.

    The gradient of a split is one concatenation. That of taking a layer by its index would be a sum
    of as many arrays as there are layers, each as large as the stack and zero but for one layer.
    """
    parts = {
        name: jax.lax.split(leaf, (1,) * len(leaf), axis=0)
        for name, leaf in params["layers"].items()
    }
    count = len(params["layers"]["q"])
    return [
        {name: jnp.squeeze(layers[index], axis=0) for name, layers in parts.items()}
        for index in range(count)
    ]


def _embed(params: Params, config: ModelConfig, tokens: Array) -> Array:
    return params["embed"].astype(config.dtype)[tokens]


def head(params: Params, config: ModelConfig, h: Float[Array, "R S D"]) -> Float[Array, "R S V"]:
    """Computes the float32 logits from the residual stream after the last layer.

    Of `params` it takes only those of the head, see `head_params`.
    """
    x = rms_norm(h, params["final_norm"], config.norm_epsilon)
    unembed = params["embed"].T if config.tied else params["unembed"]  # [D, V]
    return jnp.einsum(
        "rsd,dv->rsv", x, unembed.astype(config.dtype), preferred_element_type=jnp.float32
    )


def head_params(params: Params, config: ModelConfig) -> Params:
    """Returns those parameters that `head` reads."""
    names = ("final_norm", "embed" if config.tied else "unembed")
    return {name: params[name] for name in names}
