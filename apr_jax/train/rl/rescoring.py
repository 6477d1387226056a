"""Replay: the log-probs of recorded tokens, computed by the training forward pass.

The life of a recorded token:
1. The rollout drew it and recorded its log-prob, or a demonstration states it.
2. `data/packing` put its thread into a row.
3. Here the model reads the whole row at once. The logits at column j - 1 are those that the token
   at column j was drawn from, because the rollout and this pass are the same network with the same
   visibility.
4. The objective weighs the log-prob; the supervised loss is its negative mean.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from apr_jax.data.packing import Rows
from apr_jax.model.config import ModelConfig
from apr_jax.model.transformer import Params, forward
from apr_jax.threads.sampling import token_classes


def token_logprobs(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
    """Log-prob under softmax(logits / temperature) of each sampled token, and the entropy of what
    it was drawn from.

    Where the rollout forbade tokens (`Rows.allowed`), both are of the distribution over those that
    were left.

    Args:
      rows: packed threads; the token at j is predicted at j - 1 of the same thread.
      temperature: that of the sampling, positive.
      mesh: over which the rows are split.

    Returns:
      log-probs and entropies in nats, float32 [R, L]; both 0 at tokens that were not sampled.
    """
    tokens, position, segment, hidden_block = map(
        jnp.asarray, (rows.tokens, rows.position, rows.segment, rows.hidden_block)
    )
    logits = forward(params, config, tokens, position, segment, hidden_block, mesh)
    return sampled_logprobs(logits, rows, temperature)


def sampled_logprobs(
    logits: Float[Array, "R L V"], rows: Rows, temperature: float = 1.0
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
    """`token_logprobs` from given logits."""
    allowed = jnp.asarray(rows.allowed)[:, 1:, None]
    forbidden = (allowed > 0) & (allowed & token_classes(logits.shape[-1]) == 0)
    scaled = jnp.where(forbidden, jnp.finfo(jnp.float32).min, logits[:, :-1] / temperature)
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    chosen = jnp.take_along_axis(logprobs, rows.tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)

    def align(values: Array) -> Array:
        return jnp.where(rows.sampled, jnp.pad(values, ((0, 0), (1, 0))), 0.0)

    return align(chosen), align(entropy)
