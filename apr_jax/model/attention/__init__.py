"""Attention over packed rows, in which each token sees its own thread's visible tokens alone.

`attend_packed` is the function that the transformer calls, and `visible` is the rule that it
follows. On TPU it runs the kernels of `packed_tpu`, elsewhere the loops of `packed`.
"""

from apr_jax.model.attention.packed import attend_packed, visible

__all__ = ["attend_packed", "visible"]
