"""The two training steps, jitted whole, with the state donated: supervised, and one update on a
recorded forest.

    state, metrics = step(state, batch)

Layout: state and batch arrive laid out (`init_state`, `place_rows`); the new state keeps the old
one's layout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import Experiment
from apr_jax.data.packing import Rows
from apr_jax.errors import UsageError
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import BATCH_AXES, batch_sharding, shardings
from apr_jax.train.distributed import place
from apr_jax.train.metrics.flops import training_flops
from apr_jax.train.rl.objective import Metrics, Parts, cross_entropy, policy_loss, tree_kl
from apr_jax.train.rl.rescoring import token_logprobs
from apr_jax.train.state import TrainState, apply_gradients

SftStep = Callable[[TrainState, Rows], tuple[TrainState, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForestBatch:
    """A recorded forest, ready for updates.

    Attributes:
      chunks: Rows with fields [chunks, R, L]; those from `used` on hold padding alone.
      weights: [chunks, R, L] of the tokens, see `token_weights`.
      used: int32, chunks that hold tokens.
      reference: [chunks, R, L] log-probs of the reference policy, the same in all PPO epochs; None
        without a KL term in the loss.
      behaviour: [chunks, R, L] log-probs of the sampling policy by the training pass, or `UNKNOWN`
        before the first PPO epoch; None where the recorded ones are taken.
    """

    chunks: Rows
    weights: jax.Array
    used: jax.Array
    reference: jax.Array | None = None
    behaviour: jax.Array | None = None


UNKNOWN = 1.0  # No log-prob is above 0.
RlStep = Callable[
    [TrainState, ForestBatch, jax.Array], tuple[TrainState, Metrics, jax.Array | None]
]
Rescore = Callable[[Any, ForestBatch], jax.Array]
TreeKl = Callable[[jax.Array, ForestBatch], jax.Array]


def make_sft_step(
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> SftStep:
    """Supervised: one update on packed demonstrations [R, L]."""

    def loss_of(params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
        logprobs, entropy = token_logprobs(params, model, rows, mesh=mesh)
        return cross_entropy(logprobs, rows), jnp.sum(entropy) / jnp.maximum(
            jnp.sum(rows.sampled), 1
        )

    def step(state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
        (loss, entropy), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, rows)
        state, metrics = apply_gradients(state, loss, grads, optimizer)
        state = _keep_layout(dataclasses.replace(state, step=state.step + 1), mesh)
        counts = {
            "tokens": jnp.sum(rows.segment > 0),
            "flops": training_flops(model, state.params["embed"].shape[0], rows),
        }
        return state, metrics | {"loss": loss, "entropy": entropy} | counts

    return jax.jit(step, donate_argnums=0)


def make_rl_step(config: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh) -> RlStep:
    """`step(state, batch, advantages [B])`: rescoring and one update on all trees of a forest.

    The chunks are rescored one after the other and their gradients added up, so memory does not
    grow with the forest.

    The third result is `ForestBatch.behaviour` for the next PPO epoch. Where it is recomputed, the
    first PPO epoch takes the log-probs of its own pass: a pass of another program may round
    otherwise, and ratios are to begin at 1."""
    temperature, objective = config.train.rl.temperature, config.train.rl.objective

    def loss_of(params: Any, chunk: ForestBatch, advantages: jax.Array) -> tuple[jax.Array, Any]:
        logprobs, entropy = token_logprobs(params, config.model, chunk.chunks, temperature, mesh)
        own = jax.lax.stop_gradient(logprobs)
        reference = own if chunk.reference is None else chunk.reference
        behaviour = chunk.behaviour
        if behaviour is not None:
            behaviour = jnp.where(behaviour == UNKNOWN, own, behaviour)
        loss, parts = policy_loss(
            logprobs,
            entropy,
            reference,
            chunk.chunks,
            chunk.weights,
            advantages,
            objective,
            behaviour,
        )
        return loss, (parts, behaviour)

    def step(
        state: TrainState, batch: ForestBatch, advantages: jax.Array
    ) -> tuple[TrainState, Metrics, jax.Array | None]:
        def add_chunk(index: jax.Array, carry: Any) -> Any:
            loss, parts, grads, behaviours = carry
            gradient = jax.value_and_grad(loss_of, has_aux=True)
            (more, (of_chunk, behaviour)), slope = gradient(
                state.params, _chunk(batch, index), advantages
            )
            if behaviour is not None:
                behaviours = jax.lax.dynamic_update_index_in_dim(
                    behaviours, behaviour, index, axis=0
                )
            return loss + more, parts + of_chunk, jax.tree.map(jnp.add, grads, slope), behaviours

        blank = (
            jnp.zeros(()),
            Parts.zero(),
            jax.tree.map(jnp.zeros_like, state.params),
            batch.behaviour,
        )
        loss, parts, grads, behaviours = jax.lax.fori_loop(0, batch.used, add_chunk, blank)
        state, metrics = apply_gradients(state, loss, grads, optimizer)
        state = _keep_layout(state, mesh)
        means = parts.metrics(advantages.shape[0])
        if not objective.kl:
            del means["kl"]  # Without the reference it is unknown, not 0.
        if behaviours is not None:
            behaviours = jax.lax.with_sharding_constraint(behaviours, _chunk_sharding(mesh))
        return state, metrics | {"loss": loss} | means, behaviours

    return jax.jit(step, donate_argnums=0)


def make_rescore(config: Experiment, mesh: Mesh) -> Rescore:
    """`rescore(params, batch)`: log-probs of a recorded forest under other parameters, [chunks, R,
    L].

    The reference is asked so: once a forest, before its first update, and whatever the number of
    PPO epochs."""

    def rescore(params: Any, batch: ForestBatch) -> jax.Array:
        def fill_chunk(index: jax.Array, filled: jax.Array) -> jax.Array:
            rows = _chunk(batch, index).chunks
            logprobs, _ = token_logprobs(
                params, config.model, rows, config.train.rl.temperature, mesh
            )
            return jax.lax.dynamic_update_index_in_dim(filled, logprobs, index, axis=0)

        return jax.lax.fori_loop(0, batch.used, fill_chunk, jnp.zeros_like(batch.weights))

    return jax.jit(rescore, out_shardings=_chunk_sharding(mesh))


def make_tree_kl(trees: int, mesh: Mesh) -> TreeKl:
    """`total(reference log-probs [chunks, R, L], batch)`: `objective.tree_kl` of a recorded forest,
    [B].
    """

    def total(reference: jax.Array, batch: ForestBatch) -> jax.Array:
        return jnp.sum(
            jax.vmap(lambda logprobs, rows: tree_kl(logprobs, rows, trees))(
                reference, batch.chunks
            ),
            axis=0,
        )

    return jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _chunk(batch: ForestBatch, index: jax.Array) -> ForestBatch:
    """One chunk, without the axis of chunks."""
    whole = dataclasses.replace(batch, used=None)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), whole)


def _chunk_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [chunks, R, L]: every chunk is split over all devices of the batch."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def place_rows(rows: Rows, mesh: Mesh) -> Rows:
    """Moves this process's rows onto the mesh, split over its batch axes."""
    split = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(split, np.asarray(x)), rows
    )


def place_forest(
    rows: Rows, weights: np.ndarray, size: int, mesh: Mesh, recompute: bool = False
) -> ForestBatch:
    """Cuts packed rows (a multiple of `size`), which every process has whole, and their weights
    into chunks on the mesh.

    Args:
      recompute: the first PPO epoch is to recompute the behaviour log-probs.
    """
    used = len(rescored_rows(rows, size).tokens) // size
    chunks, weights = jax.tree.map(
        lambda x: x.reshape(-1, size, x.shape[1]), (rows, weights.astype(np.float32))
    )
    split = _chunk_sharding(mesh)
    unknown = np.full(weights.shape, UNKNOWN, np.float32)
    return ForestBatch(
        chunks=jax.tree.map(lambda x: place(x, split), chunks),
        weights=place(weights, split),
        used=place_everywhere(np.int32(used), mesh),
        behaviour=place(unknown, split) if recompute else None,
    )


def rescored_rows(rows: Rows, size: int) -> Rows:
    """The rows of the chunks of `size` that hold tokens; those behind them are not computed."""
    used = np.flatnonzero((rows.segment > 0).any(axis=1))
    count = -(-(used[-1] + 1) // size) * size if len(used) else 0
    return jax.tree.map(lambda x: x[:count], rows)


def place_everywhere(values: Any, mesh: Mesh) -> jax.Array:
    """An array that every device holds whole."""
    return place(values, NamedSharding(mesh, PartitionSpec()))


def place_whole(params: Any, mesh: Mesh) -> Any:
    """Parameters laid out on the mesh by the rules of `model/sharding`."""
    return jax.device_put(params, shardings(params, mesh))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def check_divides(field: str, count: int, mesh: Mesh) -> None:
    """Raises UsageError if `count` rows don't split evenly over the mesh's batch axes."""
    shards = batch_shards(mesh)
    if count % shards:
        raise UsageError(
            f"config {field}={count}: must be a multiple of the {shards} shards of mesh.data x"
            " mesh.fsdp"
        )


def _keep_layout(state: TrainState, mesh: Mesh) -> TrainState:
    return jax.lax.with_sharding_constraint(state, shardings(state, mesh))
