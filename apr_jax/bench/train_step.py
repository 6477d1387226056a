"""`apr bench train`: the supervised step against transformers in torch, against the machine's
limit, and against itself.

A step of RL comes by its parts (`reinforce.py`).

Every contestant takes one AdamW step on the same 8 rows of 1,024 columns: dense ones, or real
demonstrations packed. Torch attends to whole rows, also where they hold many threads: that is what
packing costs without attention by blocks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from apr_jax.bench import reinforce
from apr_jax.bench.demos import make_recipe
from apr_jax.bench.paired import Contestant, Result, measured
from apr_jax.bench.peers import Peer, installed, opened
from apr_jax.bench.plain_decoding import SHAPES
from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Workers, demonstrations, unflatten
from apr_jax.data.encode import NO_PARENT, Stream
from apr_jax.data.packing import Rows, pack_streams
from apr_jax.model import transformer
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import Params, init_params
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.config import OptimizerConfig
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import init_state
from apr_jax.train.step import make_sft_step, place_rows

ROWS, LENGTH, VOCAB = 8, 1_024, 64
_TREES = 64
_OPTIMIZER = OptimizerConfig(lr=1e-4, warmup=0)


def bench_train(
    config: Experiment, restored: Restored | None, problems: Path | None, repeats: int
) -> Iterator[Result]:
    """Measures and prints part after part.

    Args:
      config: whose demonstrations are packed.
      restored, problems: a model, and problems that it answers, for the parts of a step of RL; None
        for none.
    """
    if restored and problems:
        with reinforce.contest(restored, problems) as parts:
            yield measured(f"{restored.config.name}: the parts of a step of RL", parts, repeats)
    streams = _streams(config)
    packed = _some_rows(pack_streams([streams], LENGTH))
    torch = installed(["transformers"])
    for shape, model in SHAPES.items():
        params = init_params(model, VOCAB, jax.random.key(0))
        with opened(torch, params, model) as peers:
            for name, rows in (("dense", dense(ROWS, LENGTH)), ("demonstrations", packed)):
                contestants = [
                    ours(model, params, rows),
                    without_attention(model, params, rows),
                    *_torch_steps(peers, rows),
                    products(model, rows),
                ]
                yield measured(f"{shape}, {name}: {ROWS} x {LENGTH:,}", contestants, repeats)
        few = streams[: len(streams) // 8]  # Padded, they take many times as long.
        yield measured(
            f"{shape}: packing", [_packed(model, params, few), _padded(model, params, few)], repeats
        )
        yield measured(f"{shape}: cost against work", growth(model, params), repeats)


def ours(model: ModelConfig, params: Params, *batches: Rows, name: str = "apr_jax") -> Contestant:
    """Our step, on each batch once."""
    mesh = make_mesh()
    optimizer = make_optimizer(_OPTIMIZER, 1_000)
    step = make_sft_step(model, optimizer, mesh)
    state: Any = init_state(params, optimizer, mesh)
    tokens = float(sum(np.sum(rows.segment > 0) for rows in batches))

    def run() -> float:
        nonlocal state
        for rows in batches:
            state, _ = step(state, place_rows(rows, mesh))
        jax.block_until_ready(state)
        return tokens

    return Contestant(name, run, "tokens")


def without_attention(model: ModelConfig, params: Params, rows: Rows) -> Contestant:
    """Our step whose queries find themselves and nothing else: what attention that takes no time at
    all would come to.
    """

    def itself(q: Array, k: Array, v: Array, *_: Any) -> Array:
        # Of all three, so that all their matrices have gradients to work out.
        return q + jnp.repeat((k + v).transpose(0, 2, 1, 3), q.shape[2] // k.shape[1], axis=2)

    step = ours(model, params, rows, name="apr_jax without attention")
    with mock.patch.object(transformer, "attend_packed", itself):
        step.run()  # Traced here, and never again.
    return step


def products(model: ModelConfig, rows: Rows) -> Contestant:
    """The machine's own limit: the matrix products of the same step alone, forward and backward,
    attention left out.
    """
    devices = jax.devices()
    random = np.random.default_rng(0)
    inner, shared = model.heads * model.head_size, 2 * model.kv_heads * model.head_size
    sizes = [
        (model.width, inner + shared),
        (inner, model.width),
        (model.width, 2 * model.mlp),
        (model.mlp, model.width),
    ]
    count = rows.tokens.size // len(devices)

    @jax.jit
    def multiply(inputs: list[tuple[Array, Array, Array]]) -> list[Any]:
        return [(x @ w, y @ w.T, x.T @ y) for x, w, y in inputs]

    inputs = [
        tuple(
            random.normal(size=size).astype(np.float32) for size in ((count, m), (m, n), (count, n))
        )
        for m, n in sizes
    ]
    copies = [jax.device_put(inputs, device) for device in devices]

    def run() -> float:
        for _ in range(model.layers):
            jax.block_until_ready([multiply(copy) for copy in copies])
        return float(np.sum(rows.segment > 0))

    return Contestant("matrix products alone", run, "tokens")


def growth(model: ModelConfig, params: Params) -> list[Contestant]:
    """Steps a second of twice the trees, twice the threads a tree, and threads twice as long, all
    in rows of one length.
    """

    def contestant(name: str, trees: int, threads: int, length: int) -> Contestant:
        made = [[_stream(length) for _ in range(threads)] for _ in range(trees)]
        step = ours(model, params, pack_streams(made, LENGTH))

        def run() -> float:
            step.run()
            return 1.0

        return Contestant(name, run, "steps")

    return [
        contestant("16 trees of 8 threads of 64 tokens", 16, 8, 64),
        contestant("twice the trees", 32, 8, 64),
        contestant("twice the threads", 16, 16, 64),
        contestant("twice the length", 16, 8, 128),
    ]


def dense(rows: int, length: int) -> Rows:
    """One thread a row, full."""
    return pack_streams([[_stream(length)] for _ in range(rows)], length)


def _stream(length: int) -> Stream:
    tokens = np.random.default_rng(length).integers(10, VOCAB, length).astype(np.int32)
    place, nothing = np.arange(length, dtype=np.int32), np.zeros(length, np.int32)
    return Stream(tokens, place, nothing, place > 0, parent=NO_PARENT, round=0, depth=0, child=0)


def _streams(config: Experiment) -> list[Stream]:
    """Threads of demonstrations, those that fit a row."""
    recipe, problems = make_recipe(config, _TREES)
    with Workers(1) as one:
        trees = [
            unflatten(tree)
            for chunk, _ in demonstrations(recipe, problems, _TREES, one)
            for tree in chunk
        ]
    return [stream for tree in trees for stream in tree if len(stream.tokens) <= LENGTH]


def _some_rows(rows: Rows) -> Rows:
    """Of all rows evenly: the first ones hold the longest threads."""
    if len(rows.tokens) < ROWS:
        raise RuntimeError(
            f"bench train: {_TREES} demonstrations fill {len(rows.tokens)} rows, {ROWS} are needed"
        )
    chosen = np.arange(ROWS) * len(rows.tokens) // ROWS
    return jax.tree.map(lambda x: x[chosen], rows)


def _packed(model: ModelConfig, params: Params, streams: list[Stream]) -> Contestant:
    rows = pack_streams([streams], LENGTH)
    return ours(model, params, *_batches(rows), name=f"packed rows of {LENGTH:,}")


def _padded(model: ModelConfig, params: Params, streams: list[Stream]) -> Contestant:
    """What a sample a call costs: every thread in a row of its own, as long as the longest; as many
    columns a step.
    """
    longest = max(len(stream.tokens) for stream in streams)
    rows = [pack_streams([[stream]], longest, rows=1) for stream in streams]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    return ours(model, params, *_batches(joined), name=f"one thread a row of {longest:,}")


def _batches(rows: Rows) -> list[Rows]:
    """Batches of about ROWS x LENGTH columns; the last one is filled up with blank rows."""
    size = max(ROWS, ROWS * LENGTH // rows.tokens.shape[1] // ROWS * ROWS)
    missing = -len(rows.tokens) % size
    blank = jax.tree.map(lambda x: np.zeros((missing, *x.shape[1:]), x.dtype), rows)
    full = jax.tree.map(lambda x, more: np.concatenate([x, more]), rows, blank)
    return [
        jax.tree.map(lambda x, at=at: x[at : at + size], full)
        for at in range(0, len(full.tokens), size)
    ]


def _torch_steps(peers: Sequence[Peer], rows: Rows) -> list[Contestant]:
    tokens, counted = rows.tokens.tolist(), float(np.sum(rows.segment > 0))

    def contestant(peer: Peer, name: str, compiled: bool) -> Contestant:
        def run() -> float:
            peer.train(tokens, compiled)
            return counted

        return Contestant(name, run, "tokens")

    names = (("torch, eager", False), ("torch.compile", True))
    return [contestant(peer, name, compiled) for peer in peers for name, compiled in names]
