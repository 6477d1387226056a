"""Measures training steps: `apr bench train`.

The supervised step is measured against transformers in torch, against the limit of the machine, and
against variants of itself. A step of RL is measured by its parts (`reinforce.py`).

Every contestant takes one AdamW step on the same 8 rows of 1,024 columns, which are dense or hold
packed demonstrations. Torch attends to whole rows even where they hold many threads; that is the
price of packing without attention by blocks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from apr_jax.data.encode import NO_PARENT, ThreadTokens
from apr_jax.data.packing import Rows, pack_trees
from apr_jax.model import transformer
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import Params, init_params
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.config import OptimizerConfig
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import init_state
from apr_jax.train.step import make_sft_step, place_rows

ROWS = 8
LENGTH = 1_024
VOCAB = 64
_TREES = 64  # Demonstrations that are packed.
_OPTIMIZER = OptimizerConfig(lr=1e-4, warmup=0)


def bench_train(
    config: Experiment, restored: Restored | None, problems: Path | None, repeats: int
) -> Iterator[Result]:
    """Measures and prints part after part.

    Args:
      config: the experiment whose demonstrations are packed.
      restored: a model, on which the parts of a step of RL are measured; None leaves them out.
      problems: the file of problems for that step; None leaves it out.
      repeats: measured repeats of each part.
    """
    if restored and problems:
        with reinforce.contest(restored, problems) as parts:
            yield measured(f"{restored.config.name}: the parts of a step of RL", parts, repeats)

    threads = _demonstrated_threads(config)
    packed = _some_rows(pack_trees([threads], LENGTH))
    torch = installed(["transformers"])
    for shape, model in SHAPES.items():
        params = init_params(model, VOCAB, jax.random.key(0))

        # Dense rows and packed demonstrations, against torch and the machine.
        with opened(torch, params, model) as peers:
            for name, rows in (("dense", dense(ROWS, LENGTH)), ("demonstrations", packed)):
                contestants = [
                    ours(model, params, rows),
                    without_attention(model, params, rows),
                    *_torch_steps(peers, rows),
                    products(model, rows),
                ]
                yield measured(f"{shape}, {name}: {ROWS} x {LENGTH:,}", contestants, repeats)

        # Packing against padding, on fewer threads, because padding takes many times as long.
        fewer = threads[: len(threads) // 8]
        contestants = [_packed(model, params, fewer), _padded(model, params, fewer)]
        yield measured(f"{shape}: packing", contestants, repeats)

        # Cost against the amount of work.
        yield measured(f"{shape}: cost against work", growth(model, params), repeats)


def ours(model: ModelConfig, params: Params, *batches: Rows, name: str = "apr_jax") -> Contestant:
    """Makes the contestant of our supervised step, which is taken once on each batch."""
    mesh = make_mesh()
    optimizer = make_optimizer(_OPTIMIZER, 1_000)
    step = make_sft_step(model, optimizer, mesh)
    state: Any = init_state(params, optimizer, mesh)
    tokens = float(sum(np.sum(rows.segment > 0) for rows in batches))

    def run() -> float:
        nonlocal state
        for rows in batches:
            state, _ = step(state, place_rows(rows, len(rows.tokens), mesh))
        jax.block_until_ready(state)
        return tokens

    return Contestant(name, run, "tokens")


def without_attention(model: ModelConfig, params: Params, rows: Rows) -> Contestant:
    """Makes the contestant of our step in which each token attends to itself alone.

    It takes the time that the step would take if attention cost nothing.
    """

    def attend_to_itself(q: Array, k: Array, v: Array, *_: Any) -> Array:
        # Depends on all three, so that the gradients of all projections are computed.
        # k and v are [R, G, L, K]; q and the result are [R, L, H, K].
        return q + jnp.repeat((k + v).transpose(0, 2, 1, 3), q.shape[2] // k.shape[1], axis=2)

    step = ours(model, params, rows, name="apr_jax without attention")
    attend_packed = transformer.attend_packed
    transformer.attend_packed = attend_to_itself  # type: ignore[assignment]  # For one trace.
    try:
        step.run()  # The step is traced now, and keeps the replacement.
    finally:
        transformer.attend_packed = attend_packed
    return step


def products(model: ModelConfig, rows: Rows) -> Contestant:
    """Makes a contestant that shows the limit of the machine: the step's matrix products alone.

    Each product is computed forward, and backward for its input and for its weights. Attention is
    left out.
    """
    devices = jax.devices()
    random = np.random.default_rng(0)
    inner = model.heads * model.head_size
    shared = 2 * model.kv_heads * model.head_size
    sizes = [
        (model.width, inner + shared),  # Queries, keys and values.
        (inner, model.width),  # Output of attention.
        (model.width, 2 * model.mlp),  # Gate and up.
        (model.mlp, model.width),  # Down.
    ]
    count = rows.tokens.size // len(devices)  # Tokens of a device.

    @jax.jit
    def multiply(inputs: list[tuple[Array, Array, Array]]) -> list[Any]:
        return [(x @ w, y @ w.T, x.T @ y) for x, w, y in inputs]

    def matrix(*size: int) -> np.ndarray:
        return random.normal(size=size).astype(np.float32)

    inputs = [(matrix(count, m), matrix(m, n), matrix(count, n)) for m, n in sizes]
    copies = [jax.device_put(inputs, device) for device in devices]

    def run() -> float:
        for _ in range(model.layers):
            jax.block_until_ready([multiply(copy) for copy in copies])
        return float(np.sum(rows.segment > 0))

    return Contestant("matrix products alone", run, "tokens")


def growth(model: ModelConfig, params: Params) -> list[Contestant]:
    """Makes contestants of our step on 16 trees and on twice the work.

    There are twice the trees, twice the threads, and threads of twice the length. All are packed
    into rows of one length.
    """

    def contestant(name: str, trees: int, threads: int, length: int) -> Contestant:
        forest = [[_random_thread(length) for _ in range(threads)] for _ in range(trees)]
        step = ours(model, params, pack_trees(forest, LENGTH))

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
    """Makes rows that are each filled by one thread."""
    return pack_trees([[_random_thread(length)] for _ in range(rows)], length)


def _random_thread(length: int) -> ThreadTokens:
    """Makes a thread of random tokens, of which all but the first are sampled."""
    tokens = np.random.default_rng(length).integers(10, VOCAB, length).astype(np.int32)
    position = np.arange(length, dtype=np.int32)
    hidden_block = np.zeros(length, np.int32)
    return ThreadTokens(
        tokens, position, hidden_block, position > 0, parent=NO_PARENT, round=0, depth=0, child=0
    )


def _demonstrated_threads(config: Experiment) -> list[ThreadTokens]:
    """Makes demonstrations, and returns those of their threads that fit into a row."""
    recipe, problems = make_recipe(config, _TREES)
    with Workers(1) as one_core:
        trees = [
            unflatten(tree)
            for chunk, _ in demonstrations(recipe, problems, _TREES, one_core)
            for tree in chunk
        ]
    return [thread for tree in trees for thread in tree if len(thread.tokens) <= LENGTH]


def _some_rows(rows: Rows) -> Rows:
    """Picks ROWS rows, evenly from all, because the first rows hold the longest threads."""
    if len(rows.tokens) < ROWS:
        raise RuntimeError(
            f"bench train: {_TREES} demonstrations fill {len(rows.tokens)} rows, {ROWS} are needed"
        )
    chosen = np.arange(ROWS) * len(rows.tokens) // ROWS
    return jax.tree.map(lambda x: x[chosen], rows)


def _packed(model: ModelConfig, params: Params, threads: list[ThreadTokens]) -> Contestant:
    """Makes the contestant of our step on packed rows."""
    rows = pack_trees([threads], LENGTH)
    return ours(model, params, *_batches(rows), name=f"packed rows of {LENGTH:,}")


def _padded(model: ModelConfig, params: Params, threads: list[ThreadTokens]) -> Contestant:
    """Makes the contestant of our step on padded rows: one thread each, as long as the longest.

    A step has as many columns as one on packed rows.
    """
    longest = max(len(thread.tokens) for thread in threads)
    rows = [pack_trees([[thread]], longest, rows=1) for thread in threads]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    return ours(model, params, *_batches(joined), name=f"one thread a row of {longest:,}")


def _batches(rows: Rows) -> list[Rows]:
    """Divides rows into batches of about ROWS x LENGTH columns.

    The last batch is filled up with blank rows.
    """
    size = max(ROWS, ROWS * LENGTH // rows.tokens.shape[1] // ROWS * ROWS)  # Rows of a batch.
    missing = -len(rows.tokens) % size
    blank = jax.tree.map(lambda x: np.zeros((missing, *x.shape[1:]), x.dtype), rows)
    full = jax.tree.map(lambda x, more: np.concatenate([x, more]), rows, blank)
    return [
        jax.tree.map(lambda x, start=start: x[start : start + size], full)
        for start in range(0, len(full.tokens), size)
    ]


def _torch_steps(peers: Sequence[Peer], rows: Rows) -> list[Contestant]:
    """Makes the contestants of the same step in torch, eager and compiled."""
    tokens = rows.tokens.tolist()
    counted = float(np.sum(rows.segment > 0))  # Tokens without padding.

    def contestant(peer: Peer, name: str, compiled: bool) -> Contestant:
        def run() -> float:
            peer.train(tokens, compiled)
            return counted

        return Contestant(name, run, "tokens")

    names = (("torch, eager", False), ("torch.compile", True))
    return [contestant(peer, name, compiled) for peer in peers for name, compiled in names]
