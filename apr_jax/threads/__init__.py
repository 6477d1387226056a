"""Thread trees: the protocol, the forest that records them, the rollout on the device, and its definition in plain Python.

This package knows no network and no task: bring `decode(params, tokens, cache, positions) -> (logits, cache)` and
`init_cache(lanes, window)`.
"""

from apr_jax.threads.forest import NO_PARENT, ROOT, Status, ThreadForest
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.reference import interpret
from apr_jax.threads.rollout import Work, tree_rollout
from apr_jax.threads.sharded import make_rollout
from apr_jax.threads.state import Prompts

__all__ = [
    "NO_PARENT",
    "ROOT",
    "Limits",
    "Prompts",
    "Schedule",
    "Status",
    "ThreadForest",
    "Work",
    "interpret",
    "make_rollout",
    "tree_rollout",
]
