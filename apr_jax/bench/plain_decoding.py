"""Measures plain batched decoding: our engine, made for trees, at the work of other engines.

Every sequence reads a random prompt and goes on for exactly NEW tokens, greedily and with random
weights, which the peers read from a folder. Our engine decodes a forest whose trees are roots
without children: control tokens are never sampled, and the window ends each thread.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from apr_jax.bench.paired import Contestant
from apr_jax.bench.peers import Peer
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh, on_tpu
from apr_jax.model.transformer import Params, decode_specs, make_decode
from apr_jax.threads import Limits, Prompts, Schedule, ThreadForest, make_prompts, make_rollout
from apr_jax.threads import protocol as p
from apr_jax.train.policy import cast_and_prepare
from apr_jax.train.step import place_whole

VOCAB = 64
PROMPT = 24  # Tokens of a prompt.
NEW = 512  # Tokens that are decoded after it.
SHAPES = {
    "nano": ModelConfig(layers=4, width=128, heads=4, kv_heads=4, head_size=32, mlp=352),
    "mini": ModelConfig(layers=6, width=192, heads=6, kv_heads=6, head_size=32, mlp=512),
}
BATCHES = (1, 16, 64)
# Decode slots of one device. With more of them, more sequences share each weight that is read. With
# fewer, the key/value cache fits into the processor's caches.
SLOTS = {"nano": 16, "mini": 4}
BUCKETS = (96, 160, 224, 288, 352, 416, 480)


def engine(shape: str, params: Params, batch: int) -> Contestant:
    """Makes the contestant of our engine, on all devices that the batch can use."""
    devices = _devices(batch)
    slots = min(SLOTS[shape], batch // len(devices))
    schedule = Schedule(
        slots=slots, prefill_batch=slots, prefill_chunk=PROMPT, context_buckets=BUCKETS
    )
    return decoding(SHAPES[shape], params, batch, NEW, schedule, devices)


def decoding(
    config: ModelConfig,
    params: Params,
    batch: int,
    new: int,
    schedule: Schedule,
    devices: list[Any],
    tensor: int = 1,
) -> Contestant:
    """Makes a contestant of our engine: prompts of PROMPT tokens go on for exactly `new` tokens.

    Args:
      config: the model's shape.
      params: its weights.
      batch: number of sequences.
      new: tokens that are decoded after each prompt.
      schedule: how each shard of the devices decodes.
      devices: the devices.
      tensor: number of devices that share the work on each sequence.
    """
    length = PROMPT + new
    limits = Limits(window=length, max_thread_tokens=length, max_threads=1, children=1, max_depth=0)
    decode_text = text_rollout(config, params, limits, schedule, devices, tensor)
    random = np.random.default_rng(0)
    vocab = params["embed"].shape[0]
    first_text = len(p.CONTROL_PIECES)  # Ids below are control tokens.

    def run() -> float:
        ids = random.integers(first_text, vocab, (batch, PROMPT - 1))
        prompts = make_prompts([[p.BOS, *row] for row in ids.tolist()], PROMPT)
        tokens = int(decode_text(prompts).total_tokens.sum())
        if tokens != batch * new:
            raise RuntimeError(
                f"bench decode: {tokens} tokens were decoded in place of {batch * new}"
            )
        return tokens

    return Contestant("apr_jax", run, "tokens")


def text_rollout(
    config: ModelConfig,
    params: Params,
    limits: Limits,
    schedule: Schedule,
    devices: list[Any],
    tensor: int = 1,
) -> Callable[[Prompts], ThreadForest]:
    """Makes a rollout in which no thread spawns, joins or ends by itself.

    Returns:
      a function from prompts to their forest; the weights are on the devices already, laid out for
      decoding.
    """
    mesh = make_mesh(tensor=tensor, devices=devices)
    decode, init_cache = make_decode(
        config, schedule.cache_lengths(limits.window), on_tpu(mesh), tensor
    )

    def specs(prepared: Params) -> Params:
        return decode_specs(prepared, config, tensor)

    rollout = make_rollout(only_text(decode), init_cache, limits, schedule, mesh, specs=specs)

    def prepare(params: Params) -> Params:
        return cast_and_prepare(params, config, mesh, tensor)

    placed = place_whole(params, mesh)
    layout = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(jax.eval_shape(prepare, placed))
    )
    prepared = jax.jit(prepare, out_shardings=layout)(placed)
    return lambda prompts: rollout(prepared, prompts, jax.random.key(0))[0]


def only_text(decode: Callable) -> Callable:
    """Wraps a model's decode function so that it never chooses a control token."""

    def decode_text(
        params: Any, tokens: Array, cache: Any, positions: Array, cache_length: int
    ) -> tuple[Array, Any]:
        logits, cache = decode(params, tokens, cache, positions, cache_length)
        is_control = jnp.arange(logits.shape[-1]) < len(p.CONTROL_PIECES)  # [V]
        return jnp.where(is_control, -1e9, logits), cache

    return decode_text


def contest(shape: str, params: Params, batch: int, peers: Sequence[Peer]) -> list[Contestant]:
    """Makes the contestants: our engine, and the peers, which were opened on the same weights."""
    others = [
        Contestant(peer.name, functools.partial(peer.decode, batch, PROMPT, NEW), "tokens")
        for peer in peers
    ]
    return [engine(shape, params, batch), *others]


def machine(shape: str, batch: int, steps: int = NEW) -> list[Contestant]:
    """Makes contestants that show the limits of the machine.

    One computes the matrix products of the same steps alone; the other reads the cache alone, once
    a step and at its mean length. Both use as many devices as our engine, with as many decode slots
    on each.
    """
    config = SHAPES[shape]
    devices = _devices(batch)
    slots = min(SLOTS[shape], batch // len(devices))
    rounds = batch // (slots * len(devices))  # The slots decode one sequence after another.
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.normal(size=(rows, columns)) / rows).astype(np.float32)

    width = config.width
    inner = config.heads * config.head_size
    weights = [
        (
            matrix(width, 3 * inner),
            matrix(inner, width),
            matrix(width, 2 * config.mlp),
            matrix(config.mlp, width),
        )
        for _ in range(config.layers)
    ]

    @jax.jit
    def multiply(x: Array, weights: Any, unembed: Array) -> Array:
        def step(_: Array, x: Array) -> Array:
            for qkv, out, gate_up, down in weights:
                x = (x @ qkv)[:, :inner] @ out
                x = (x @ gate_up)[:, : config.mlp] @ down
            return x + jnp.sum(x @ unembed)

        return jax.lax.fori_loop(0, steps * rounds, step, x)

    @jax.jit
    def read(cache: list[Array]) -> Array:
        def step(_: Array, total: Array) -> Array:
            return total + sum(jnp.sum(jnp.maximum(part, total)) for part in cache)

        return jax.lax.fori_loop(0, steps * rounds, step, jnp.zeros(()))

    mean_length = PROMPT + steps // 2
    side = np.ones((slots, config.kv_heads, mean_length, config.head_size), np.float32)
    cache = [side + index for index in range(2 * config.layers)]  # Keys and values of each layer.
    products = (matrix(slots, width), weights, matrix(width, VOCAB))

    def contestant(name: str, work: Callable, *arguments: Any) -> Contestant:
        copies = [jax.device_put(arguments, device) for device in devices]

        def run() -> float:
            jax.block_until_ready([work(*copy) for copy in copies])
            return batch * steps

        return Contestant(name, run, "tokens")

    return [
        contestant("matrix products alone", multiply, *products),
        contestant("reading the cache alone", read, cache),
    ]


def _devices(batch: int) -> list[Any]:
    """Returns the devices that a batch can use, with at least one sequence on each."""
    return jax.devices()[: max(1, min(len(jax.devices()), batch))]
