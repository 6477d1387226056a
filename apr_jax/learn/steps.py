"""The two training steps, jitted whole, with the state donated: supervised, and one update on a recorded forest.

    state, metrics = step(state, batch)

Layout: state and batch arrive laid out (`init_state`, `place_rows`); the new state keeps the old one's layout.
"""

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
from apr_jax.learn.ceiling import training_flops
from apr_jax.learn.objective import Metrics, Parts, cross_entropy, policy_loss, tree_kl
from apr_jax.learn.processes import place
from apr_jax.learn.replay import token_logprobs
from apr_jax.learn.state import TrainState, apply_gradients
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import BATCH_AXES, batch_sharding, shardings

SftStep = Callable[[TrainState, Rows], tuple[TrainState, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForestBatch:
    """A recorded forest, ready for updates.

    Attributes:
      chunks: Rows with fields [chunks, R, L]; those from `used` on hold padding alone.
      weights: [chunks, R, L] of the tokens, see `token_weights`.
      used: int32, chunks that hold tokens.
    """

    chunks: Rows
    weights: jax.Array
    used: jax.Array


RlStep = Callable[[TrainState, Any, ForestBatch, jax.Array], tuple[TrainState, Metrics]]
TreeKl = Callable[[Any, ForestBatch], jax.Array]


def make_sft_step(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> SftStep:
    """Supervised: one update on packed demonstrations [R, L]."""

    def loss_of(params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
        logprobs, entropy = token_logprobs(params, model, rows, mesh=mesh)
        return cross_entropy(logprobs, rows), jnp.sum(entropy) / jnp.maximum(jnp.sum(rows.sampled), 1)

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
    """`step(state, reference params, batch, advantages [B])`: replay and one update on all trees of a forest.

    The chunks are replayed one after the other and their gradients added up, so memory does not grow with the forest.
    The learner's and the reference's log-probs come from the same pass over a chunk. Without a KL term in the loss the
    reference is never run.
    """
    temperature, objective = config.learn.rl.temperature, config.learn.rl.objective

    def loss_of(
        params: Any, reference: Any, rows: Rows, weights: jax.Array, advantages: jax.Array
    ) -> tuple[jax.Array, Parts]:
        logprobs, entropy = token_logprobs(params, config.model, rows, temperature, mesh)
        anchor = jax.lax.stop_gradient(logprobs)
        if objective.kl_in_loss:
            anchor, _ = token_logprobs(reference, config.model, rows, temperature, mesh)
        return policy_loss(logprobs, entropy, anchor, rows, weights, advantages, objective)

    def step(
        state: TrainState, reference: Any, batch: ForestBatch, advantages: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def add_chunk(index: jax.Array, carry: Any) -> Any:
            gradient = jax.value_and_grad(loss_of, has_aux=True)
            (loss, parts), grads = gradient(state.params, reference, *_chunk(batch, index), advantages)
            return carry[0] + loss, carry[1] + parts, jax.tree.map(jnp.add, carry[2], grads)

        blank = (jnp.zeros(()), Parts.zero(), jax.tree.map(jnp.zeros_like, state.params))
        loss, parts, grads = jax.lax.fori_loop(0, batch.used, add_chunk, blank)
        state, metrics = apply_gradients(state, loss, grads, optimizer)
        state = _keep_layout(state, mesh)
        means = parts.metrics(advantages.shape[0])
        if not objective.kl:
            del means["kl"]  # Without the reference it is unknown, not 0.
        return state, metrics | {"loss": loss} | means

    return jax.jit(step, donate_argnums=0)


def make_tree_kl(config: Experiment, mesh: Mesh) -> TreeKl:
    """`tree_kl(reference params, batch)`: `objective.tree_kl` of all trees of a recorded forest, [B]."""
    rl = config.learn.rl
    trees = rl.problems * rl.group

    def total(reference: Any, batch: ForestBatch) -> jax.Array:
        def add_chunk(index: jax.Array, so_far: jax.Array) -> jax.Array:
            rows, _ = _chunk(batch, index)
            logprobs, _ = token_logprobs(reference, config.model, rows, rl.temperature, mesh)
            return so_far + tree_kl(logprobs, rows, trees)

        return jax.lax.fori_loop(0, batch.used, add_chunk, jnp.zeros(trees))

    return jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _chunk(batch: ForestBatch, index: jax.Array) -> tuple[Rows, jax.Array]:
    pair = (batch.chunks, batch.weights)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), pair)


def place_rows(rows: Rows, mesh: Mesh) -> Rows:
    """Moves this process's rows onto the mesh, split over its batch axes."""
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, np.asarray(x)), rows)


def place_forest(rows: Rows, weights: np.ndarray, size: int, mesh: Mesh) -> ForestBatch:
    """Cuts packed rows (a multiple of `size`), which every process has whole, and their weights into chunks on the mesh."""
    used = len(replayed_rows(rows, size).tokens) // size
    chunks, weights = jax.tree.map(lambda x: x.reshape(-1, size, x.shape[1]), (rows, weights.astype(np.float32)))
    split = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    return ForestBatch(
        chunks=jax.tree.map(lambda x: place(x, split), chunks),
        weights=place(weights, split),
        used=place_everywhere(np.int32(used), mesh),
    )


def replayed_rows(rows: Rows, size: int) -> Rows:
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
        raise UsageError(f"config {field}={count}: must be a multiple of the {shards} shards of mesh.data x mesh.fsdp")


def _keep_layout(state: TrainState, mesh: Mesh) -> TrainState:
    return jax.lax.with_sharding_constraint(state, shardings(state, mesh))
