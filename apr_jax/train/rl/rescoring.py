"""Rescoring: the log-probs of recorded tokens, computed again by the training forward pass.

The life of a recorded token:
1. The rollout drew it and recorded its log-prob, or a demonstration states it.
2. `data/packing` put its thread into a row.
3. Here the model reads the whole row at once. The logits at column j - 1 are those from which the
   token at column j was drawn, because rollout and training use the same network, in which the same
   tokens see each other.
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
    logits = forward(params, config, tokens, position, segment, hidden_block, mesh)  # [R, L, V]
    return sampled_logprobs(logits, rows, temperature)


def sampled_logprobs(
    logits: Float[Array, "R L V"], rows: Rows, temperature: float = 1.0
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
    """Computes what `token_logprobs` does, from the logits of the rows."""
    # 0 means that nothing was forbidden; else each bit is a class of tokens that was allowed.
    allowed = jnp.asarray(rows.allowed)[:, 1:, None]  # [R, L - 1, 1]
    forbidden = (allowed > 0) & (allowed & token_classes(logits.shape[-1]) == 0)  # [R, L - 1, V]
    scaled = jnp.where(forbidden, jnp.finfo(jnp.float32).min, logits[:, :-1] / temperature)

    logprobs = jax.nn.log_softmax(scaled, axis=-1)  # [R, L - 1, V]
    chosen = jnp.take_along_axis(logprobs, rows.tokens[:, 1:, None], axis=-1)[..., 0]  # [R, L - 1]
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)  # [R, L - 1]

    def align(values: Array) -> Array:
        """Moves the values from the predicting column to that of the token: [R, L]."""
        return jnp.where(rows.sampled, jnp.pad(values, ((0, 0), (1, 0))), 0.0)

    return align(chosen), align(entropy)
