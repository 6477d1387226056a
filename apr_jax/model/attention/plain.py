"""The naive twin of `attend_packed`: all scores at once, and JAX's own derivative.

It takes memory for L x L scores of each head and row, so it serves comparisons alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apr_jax.model.attention.packed import visible


def attend_plainly(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R G L K"],
    v: Float[Array, "R G L K"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    mesh: None = None,
) -> Float[Array, "R L H K"]:
    """Computes softmax(q k' / sqrt(K)) v over the keys that `visible` allows, see `attend_packed`.

    Each key/value head is repeated for the query heads that share it. There is no mesh: one device
    computes it all.
    """
    del mesh
    column = jnp.arange(q.shape[1])
    mask = jax.vmap(lambda s, b: visible(s, b, column, s, b, column))(segment, hidden_block)
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))  # [R, H, L, K]
    scores = jnp.einsum("rshk,rhmk->rhsm", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)  # [R, H, L, L]
    return jnp.einsum("rhsm,rhmk->rshk", weights, v)
