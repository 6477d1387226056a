"""Rescoring: the log-probs of recorded tokens, computed again by the training forward pass.

The life of a recorded token:
1. The rollout drew it and recorded its log-prob, or a demonstration states it.
2. `data/packing` put its thread into a row.
3. Here the model reads the whole row at once. The logits at column j - 1 are those from which the
   token at column j was drawn, because rollout and training use the same network, in which the same
   tokens see each other.
4. The objective weighs the log-prob; the supervised loss is its negative mean.

Logits of a large vocabulary are many times larger than all else that the pass holds. So they are
computed in blocks of columns of the rows, and once more for each block in the backward pass
(docs/training.md has the figures, also of blocks of the vocabulary).
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from apr_jax.data.packing import Rows
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import BATCH_AXES, batch_shards
from apr_jax.model.transformer import Params, head, head_params, hidden_states
from apr_jax.threads.sampling import token_classes

BLOCK_BYTES = 64 * 2**20  # Logits that one device computes at once.
# Logit of a forbidden token: of probability 0, and far enough from the largest float32 that the
# gradient of the entropy, in which it is multiplied, does not overflow.
_FORBIDDEN = -1e30


def token_logprobs(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
    """Computes the log-prob and the entropy of each sampled token.

    The log-prob is that under softmax(logits / temperature); the entropy is that of this
    distribution. Where the rollout forbade tokens (`Rows.allowed`), the distribution is over the
    tokens that were allowed.

    Args:
      params: parameters of the model.
      config: its shape.
      rows: packed threads; the token at column j is predicted at column j - 1 of the same thread.
      temperature: temperature of the sampling, positive.
      mesh: mesh over which the rows are split.

    Returns:
      log-probs and entropies in nats, float32 [R, L]; both 0 at tokens that were not sampled.
    """
    tokens = jnp.asarray(rows.tokens)
    position = jnp.asarray(rows.position)
    segment = jnp.asarray(rows.segment)
    hidden_block = jnp.asarray(rows.hidden_block)
    h = hidden_states(params, config, tokens, position, segment, hidden_block, mesh)  # [R, L, D]

    weights = head_params(params, config)
    vocab = params["embed"].shape[0]
    shards = 1 if mesh is None else batch_shards(mesh)
    local_rows = max(1, len(tokens) // shards)
    block = max(1, BLOCK_BYTES // (4 * vocab * local_rows))  # S, columns of the rows.
    if block >= tokens.shape[1]:
        return sampled_logprobs(head(weights, config, h), rows, temperature)

    # The gradients of all blocks are added up in the type of these weights.
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)

    def predict(weights: Params, h: Array, tokens: Array, allowed: Array) -> tuple[Array, Array]:
        return _predict_in_blocks(weights, config, h, tokens, allowed, temperature, block)

    if shards > 1:
        # Each device adds up the gradients of its own blocks, and the devices' sums are added once.
        # XLA alone would add them over all devices after every block.
        split = PartitionSpec(BATCH_AXES)
        predict = jax.shard_map(
            predict,
            mesh=mesh,
            in_specs=(PartitionSpec(), split, split, split),
            out_specs=split,
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
    allowed = jnp.asarray(rows.allowed)
    chosen, entropy = predict(weights, h[:, :-1], tokens[:, 1:], allowed[:, 1:])  # [R, L - 1]
    return _align(chosen, rows), _align(entropy, rows)


def sampled_logprobs(
    logits: Float[Array, "R L V"], rows: Rows, temperature: float = 1.0
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
    """Computes what `token_logprobs` does, from the logits of the rows."""
    tokens = jnp.asarray(rows.tokens)[:, 1:]
    allowed = jnp.asarray(rows.allowed)[:, 1:]
    chosen, entropy = _predict(logits[:, :-1], tokens, allowed, temperature)  # [R, L - 1]
    return _align(chosen, rows), _align(entropy, rows)


def _predict(
    logits: Float[Array, "R S V"],
    tokens: Int[Array, "R S"],
    allowed: Int[Array, "R S"],
    temperature: float,
) -> tuple[Float[Array, "R S"], Float[Array, "R S"]]:
    """Computes the log-prob of each token, and the entropy of what it was drawn from.

    Args:
      logits: those from which the tokens were drawn.
      tokens: the tokens.
      allowed: classes of tokens that were allowed, one bit each; 0 if nothing was forbidden.
      temperature: temperature of the sampling.
    """
    allowed = allowed[..., None]  # [R, S, 1]
    forbidden = (allowed > 0) & (allowed & token_classes(logits.shape[-1]) == 0)  # [R, S, V]
    scaled = jnp.where(forbidden, _FORBIDDEN, logits / temperature)

    logprobs = jax.nn.log_softmax(scaled, axis=-1)  # [R, S, V]
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]  # [R, S]
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)  # [R, S]
    return chosen, entropy


def _predict_in_blocks(
    weights: Params,
    config: ModelConfig,
    h: Float[Array, "R P D"],
    tokens: Int[Array, "R P"],
    allowed: Int[Array, "R P"],
    temperature: float,
    block: int,
) -> tuple[Float[Array, "R P"], Float[Array, "R P"]]:
    """Computes `_predict` for P columns, at most `block` of them at a time.

    The backward pass computes the logits of each block again.
    """
    columns = h.shape[1]
    blocks = math.ceil(columns / block)
    size = math.ceil(columns / blocks)  # S, so that all blocks are about equally full.

    def cut(x: Array) -> Array:
        """Pads the columns and makes the blocks the leading axis: [R, P, ...] -> [n, R, S, ...]."""
        missing = blocks * size - columns
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        """Undoes `cut`: [n, R, S] -> [R, P]."""
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :columns]

    @jax.checkpoint
    def one_block(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        h, tokens, allowed = inputs
        return _predict(head(weights, config, h), tokens, allowed, temperature)

    chosen, entropy = jax.lax.map(one_block, (cut(h), cut(tokens), cut(allowed)))
    return join(chosen), join(entropy)


def _align(values: Float[Array, "R P"], rows: Rows) -> Float[Array, "R L"]:
    """Moves values from the predicting column to that of the token; 0 where none was sampled."""
    return jnp.where(rows.sampled, jnp.pad(values, ((0, 0), (1, 0))), 0.0)
