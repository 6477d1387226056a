"""Thread trees: the protocol, the forest that records them, the rollout on the device, and its
definition in plain Python.

This package knows no network and no task: bring `decode(params, tokens, cache, positions, bound) ->
(logits, cache)` and `init_cache(decode slots, bound)` (see `tree_rollout`; examples/own_model.py is
one)."""

from apr_jax.threads.engine import Work, tree_rollout
from apr_jax.threads.forest import NO_PARENT, ROOT, Refusal, Status, ThreadForest
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.prompts import NOT_FORCED, Prompts, check_prompts, make_prompts
from apr_jax.threads.reference import interpret
from apr_jax.threads.sharded import make_rollout

__all__ = [
    "NOT_FORCED",
    "NO_PARENT",
    "ROOT",
    "Limits",
    "Prompts",
    "Refusal",
    "Schedule",
    "Status",
    "ThreadForest",
    "Work",
    "check_prompts",
    "interpret",
    "make_prompts",
    "make_rollout",
    "tree_rollout",
]
