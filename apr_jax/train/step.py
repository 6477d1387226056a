"""The two training steps: supervised, and one update on a recorded forest.

    state, metrics = step(state, batch)

Each is jitted whole, and the state is donated. State and batch arrive laid out on the mesh
(`init_state`, `place_rows`, `place_forest`), and the new state keeps the layout of the old one.

Both take one argument more, `base`: what adapters are added to, if the state has any
(`train/lora.py`). A trainer gives it once, so that a step has the form above.
"""

import dataclasses
import math
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
from apr_jax.model.sharding import BATCH_AXES, batch_sharding, batch_shards, shardings
from apr_jax.train.config import LoraConfig
from apr_jax.train.distributed import HeldRows, place_on_mesh
from apr_jax.train.lora import gradient_of_trained, make_merge
from apr_jax.train.metrics.flops import training_flops
from apr_jax.train.rl.objective import Metrics, Parts, cross_entropy, policy_loss, tree_kl
from apr_jax.train.rl.rescoring import token_logprobs
from apr_jax.train.state import TrainState, apply_gradients

SftStep = Callable[[TrainState, Rows], tuple[TrainState, Metrics]]
_NO_ADAPTERS = LoraConfig()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForestBatch:
    """A recorded forest, ready for updates.

    Attributes:
      chunks: Rows with fields [chunks, R, L]; chunks from number `used` on hold only padding.
      weights: [chunks, R, L] what each token weighs, see `token_weights`.
      used: int32, number of chunks that hold tokens.
      reference: [chunks, R, L] log-probs under the reference policy, the same in all PPO epochs;
        None without a KL term in the loss.
      behaviour: [chunks, R, L] log-probs under the policy of this step before its first update, by
        the training pass; `UNKNOWN` before the first PPO epoch. None if the recorded ones are
        taken.
      older: [chunks, R, L] whether the policy of an earlier step drew the token; None if no tree is
        carried over from step to step.
    """

    chunks: Rows
    weights: jax.Array
    used: jax.Array
    reference: jax.Array | None = None
    behaviour: jax.Array | None = None
    older: jax.Array | None = None


UNKNOWN = 1.0  # Not a log-prob, since these are at most 0.

# (state, batch, advantages [B]) -> new state, metrics, `ForestBatch.behaviour` of the next epoch.
RlStep = Callable[
    [TrainState, ForestBatch, jax.Array], tuple[TrainState, Metrics, jax.Array | None]
]
# (parameters, batch) -> log-probs [chunks, R, L].
Rescore = Callable[[Any, ForestBatch], jax.Array]
# (reference log-probs [chunks, R, L], batch) -> KL of each tree [B].
TreeKl = Callable[[jax.Array, ForestBatch], jax.Array]


def make_sft_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    lora: LoraConfig = _NO_ADAPTERS,
) -> SftStep:
    """Makes the supervised step: one update on packed demonstrations [R, L]."""

    def loss_of(params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
        logprobs, entropy = token_logprobs(params, model, rows, mesh=mesh)  # [R, L]
        loss = cross_entropy(logprobs, rows)
        mean_entropy = jnp.sum(entropy) / jnp.maximum(jnp.sum(rows.sampled), 1)
        return loss, mean_entropy

    def step(state: TrainState, rows: Rows, base: Any = None) -> tuple[TrainState, Metrics]:
        merged = make_merge(state, base, lora)
        (loss, entropy), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, rows)
        grads = gradient_of_trained(grads, state, merged)
        state, metrics = apply_gradients(state, loss, grads, optimizer, merged)
        state = _keep_layout(dataclasses.replace(state, step=state.step + 1), mesh)
        counts = {
            "tokens": jnp.sum(rows.segment > 0),
            "flops": training_flops(model, state.params["embed"].shape[0], rows),
        }
        return state, metrics | {"loss": loss, "entropy": entropy} | counts

    return jax.jit(step, donate_argnums=0)


def make_rl_step(config: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh) -> RlStep:
    """Makes `step(state, batch, advantages [B])`: rescoring of and one update on a whole forest.

    The chunks are rescored one after the other and their gradients are added, so that the memory
    does not grow with the forest.

    The third result is `ForestBatch.behaviour` for the next PPO epoch. If the behaviour log-probs
    are recomputed (`importance_cap`), the first epoch uses the log-probs of its own forward pass.
    A separate program might round differently, and the ratios would not begin at exactly 1.
    """
    temperature = config.train.rl.temperature
    objective = config.train.rl.objective

    def loss_of(params: Any, chunk: ForestBatch, advantages: jax.Array) -> tuple[jax.Array, Any]:
        logprobs, entropy = token_logprobs(params, config.model, chunk.chunks, temperature, mesh)
        own = jax.lax.stop_gradient(logprobs)  # [R, L]
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
            chunk.older,
        )
        return loss, (parts, behaviour)

    def step(
        state: TrainState, batch: ForestBatch, advantages: jax.Array, base: Any = None
    ) -> tuple[TrainState, Metrics, jax.Array | None]:
        merged = make_merge(state, base, config.train.rl.lora)

        def add_chunk(index: jax.Array, carry: Any) -> Any:
            loss, parts, grads, behaviours = carry
            value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
            (chunk_loss, (chunk_parts, behaviour)), chunk_grads = value_and_grad(
                state.params, _chunk(batch, index), advantages
            )
            if behaviour is not None:
                behaviours = jax.lax.dynamic_update_index_in_dim(
                    behaviours, behaviour, index, axis=0
                )
            loss = loss + chunk_loss
            parts = parts + chunk_parts
            trained_grads = gradient_of_trained(chunk_grads, state, merged)
            grads = jax.tree.map(jnp.add, grads, trained_grads)
            return loss, parts, grads, behaviours

        zeros = (
            jnp.zeros(()),
            Parts.zero(),
            # Sums of many chunks are float32, whatever the type of the parameters.
            jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trained),
            batch.behaviour,
        )
        loss, parts, grads, behaviours = jax.lax.fori_loop(0, batch.used, add_chunk, zeros)

        state, metrics = apply_gradients(state, loss, grads, optimizer, merged)
        state = _keep_layout(state, mesh)

        means = parts.metrics(advantages.shape[0])
        if not objective.kl:
            del means["kl"]  # Without the reference it is unknown, not 0.
        if behaviours is not None:
            behaviours = jax.lax.with_sharding_constraint(behaviours, _chunk_sharding(mesh))
        return state, metrics | {"loss": loss} | means, behaviours

    return jax.jit(step, donate_argnums=0)


def make_rescore(config: Experiment, mesh: Mesh) -> Rescore:
    """Makes `rescore(params, batch)` for the log-probs of a forest under other parameters.

    They are [chunks, R, L]. It asks the reference policy once for each forest, before the first
    update, whatever the number of PPO epochs.
    """

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
    """Makes `total(reference log-probs [chunks, R, L], batch)`: KL of each tree, [B].

    It is the `objective.tree_kl` of a recorded forest.
    """

    def total(reference: jax.Array, batch: ForestBatch) -> jax.Array:
        kl_in_chunk = jax.vmap(lambda logprobs, rows: tree_kl(logprobs, rows, trees))
        return jnp.sum(kl_in_chunk(reference, batch.chunks), axis=0)  # [B]

    return jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _chunk(batch: ForestBatch, index: jax.Array) -> ForestBatch:
    """Returns one chunk, without the axis of chunks."""
    whole = dataclasses.replace(batch, used=None)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), whole)


def _chunk_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of arrays [chunks, R, L]: each chunk is split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def place_rows(rows: Rows, size: int, mesh: Mesh) -> Rows:
    """Moves a batch onto the mesh, split over its batch axes.

    Args:
      rows: those of the batch that this process holds (`HeldRows`).
      size: rows of the whole batch.
      mesh: the mesh.
    """
    split = batch_sharding(mesh)
    # JAX cannot tell the shape from the rows alone where processes share some of theirs.
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            split, np.asarray(x), (size, *x.shape[1:])
        ),
        rows,
    )


def place_forest(
    rows: Rows,
    weights: np.ndarray,
    size: int,
    mesh: Mesh,
    chunks: int,
    recompute: bool = False,
    older: np.ndarray | None = None,
    used: int | None = None,
) -> ForestBatch:
    """Cuts packed rows and the weights of their tokens into chunks on the mesh.

    Each process gives the rows of its own devices: H of the R rows of a chunk, where one process
    alone has all.

    Args:
      rows: packed rows, a multiple of H: those of the first chunk, of the second one, and so on.
      weights: [rows, L], see `token_weights`.
      size: R, rows of a chunk.
      mesh: the mesh.
      chunks: number of chunks of the batch, at least as many as hold tokens (`most_chunks`).
      recompute: whether the first PPO epoch is to recompute the behaviour log-probs.
      older: [rows, L], see `ForestBatch`.
      used: number of chunks in which any process has tokens; by default, those in which this
        process has.
    """
    length = rows.tokens.shape[1]
    held = HeldRows.of(size, mesh).mine  # int [H], rows of a chunk that this process holds.
    index_in_held = {row: index for index, row in enumerate(held)}
    own_chunks = len(rescored_rows(rows, len(held)).tokens) // len(held)
    used = own_chunks if used is None else used
    split = _chunk_sharding(mesh)

    def lay_out(values: np.ndarray, blank: float) -> jax.Array:
        kept = values[: own_chunks * len(held)]
        in_chunks = kept.reshape(own_chunks, len(held), length)  # [own_chunks, H, L]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            """Returns the rows of one device, which follow each other in `held` too."""
            first, end, _ = index[1].indices(size)
            begin = index_in_held[first]
            rows_of_device = in_chunks[:, begin : begin + end - first]
            # Chunks without tokens are added for each device alone: no process has them all.
            missing = ((0, chunks - own_chunks), (0, 0), (0, 0))
            return np.pad(rows_of_device, missing, constant_values=blank)

        return jax.make_array_from_callback((chunks, size, length), split, part)

    blanks = {"tree": -1}
    placed = {name: lay_out(values, blanks.get(name, 0)) for name, values in vars(rows).items()}
    unknown = np.full(rows.tokens.shape, UNKNOWN, np.float32)
    return ForestBatch(
        chunks=Rows(**placed),
        weights=lay_out(weights.astype(np.float32), 0.0),
        used=place_everywhere(np.int32(used), mesh),
        behaviour=lay_out(unknown, UNKNOWN) if recompute else None,
        older=None if older is None else lay_out(older, 0),
    )


def most_chunks(config: Experiment, mesh: Mesh) -> int:
    """Returns the number of chunks that hold the largest forest of a step, a row for each thread.

    The batch of every step has so many, so that one program serves forests of all sizes. A process
    packs the trees of its own shards, and no shard has more than an equal part, rounded up.
    """
    rl = config.train.rl
    shards = batch_shards(mesh)
    trees_of_shard = math.ceil(rl.problems * rl.group / shards)
    rows_of_shard = rl.micro_batch_rows // shards
    return math.ceil(trees_of_shard * config.limits.max_threads / rows_of_shard)


def rescored_rows(rows: Rows, size: int) -> Rows:
    """Returns the rows of those chunks of `size` rows that hold tokens.

    The chunks behind them are not computed.
    """
    used = np.flatnonzero((rows.segment > 0).any(axis=1))
    if len(used) == 0:
        count = 0
    else:
        chunks = math.ceil((used[-1] + 1) / size)
        count = chunks * size
    return jax.tree.map(lambda x: x[:count], rows)


def place_everywhere(values: Any, mesh: Mesh) -> jax.Array:
    """Makes an array that every device holds whole."""
    return place_on_mesh(values, NamedSharding(mesh, PartitionSpec()))


def place_whole(params: Any, mesh: Mesh) -> Any:
    """Lays out parameters, which every process holds whole, by the rules of `model/sharding`."""
    return jax.tree.map(place_on_mesh, params, shardings(params, mesh))


def check_divides(field: str, count: int, mesh: Mesh) -> None:
    """Raises UsageError if `count` rows do not split evenly over the mesh's batch axes.

    Args:
      field: the setting that holds the count, for the message.
      count: number of rows.
      mesh: the devices.
    """
    shards = batch_shards(mesh)
    if count % shards:
        raise UsageError(
            f"config {field}={count}: must be a multiple of the {shards} shards of mesh.data x"
            " mesh.fsdp"
        )


def _keep_layout(state: TrainState, mesh: Mesh) -> TrainState:
    """Gives a new state the layout that `init_state` gave to the first one."""
    return jax.lax.with_sharding_constraint(state, shardings(state, mesh))
