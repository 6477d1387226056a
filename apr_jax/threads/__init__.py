"""Thread trees: what they are, how the device decodes them, and what they mean in plain Python.

A model writes text and ten control tokens, and with those it decides the shape of a tree:

    root:   <bos> problem ... <spawn> <msg> m1 <msg> m2 </spawn>       waits for its children
    child:  <bos> m1 ... <join> a1 <eos>                               sees its message alone
    root:   ... <joined> <msg> a1 <msg> a2 </joined> ... <join> answer <eos>

The life of a rollout:

1. `make_prompts` puts one prompt for each tree into arrays, with the settings of its sampling.
2. `tree_rollout` (`make_rollout` on a mesh) makes a root thread of each prompt.
3. A thread that is ready gets a decode slot, and its context is read into that slot's cache.
4. Each decode step samples one token on every running decode slot.
5. `</spawn>` suspends a thread. Its messages become child threads, which wait for decode slots.
6. When the last child has ended, its parent reads all answers in place of the spawn block, which
   no later token sees, and goes on.
7. When every thread has ended, all of it is in one `ThreadForest`: tokens, log-probs, statistics.

`carry_over_rollout` (`make_carry_over_rollout` on a mesh) does not wait for the last thread: it
returns when enough groups of trees are finished, and its next call goes on with the others.

The package knows no network and no task. A network is two functions (see `tree_rollout`); this one
is a table of logits that looks at the last token alone:

    import functools
    import jax, jax.numpy as jnp
    from apr_jax.threads import Limits, Schedule, make_prompts, tree_rollout
    from apr_jax.threads.protocol import BOS

    def init_cache(slots, cache_length):
        return jnp.zeros((slots, 0))

    def decode(params, tokens, cache, positions, cache_length):
        return params[tokens], cache

    limits = Limits(window=24, max_thread_tokens=48, max_threads=5, children=2, constrain=True)
    rollout = jax.jit(functools.partial(
        tree_rollout, decode, init_cache, limits=limits, schedule=Schedule(slots=8)))
    prompts = make_prompts([[BOS, 10, 11], [BOS, 12]], width=3, temperature=1.0)
    forest, work = rollout(jnp.zeros((16, 16)), prompts, jax.random.key(0))
    root_tokens = forest.tokens[0, 0, :forest.length[0, 0]]

Where to look for what: `Limits` are part of the result and `Schedule` never is. `protocol` says
what one token does to its thread. `interpret` is the definition of the whole in plain Python, which
the rollout must equal in every field. `draw_tree` shows a tree as lines of text. `keys` holds the
path of every random key. `carry_over` is the rollout that leaves unfinished trees to its next call.
The other modules are the rollout's insides: `engine` is the loop,
`scheduler` its state, `prefill`, `decode_step` and `spawn_join` its steps, `sampling` the draw of a
token, `positions` the layout of recorded tokens.
"""

from apr_jax.threads.carry_over import (
    CarriedTrees,
    CarryOver,
    GrownTrees,
    carry_over_rollout,
    new_trees,
)
from apr_jax.threads.draw import draw_tree, thread_names
from apr_jax.threads.engine import tree_rollout
from apr_jax.threads.forest import NO_PARENT, ROOT, Refusal, Status, ThreadForest, Work
from apr_jax.threads.keys import KEYS, LARGEST_SEED, Domain, run_key
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.threads.prefill import Decode, InitCache
from apr_jax.threads.prompts import NOT_FORCED, Prompts, check_prompts, make_prompts
from apr_jax.threads.reference import interpret
from apr_jax.threads.sampling import token_classes
from apr_jax.threads.sharded import (
    CarryOverRollout,
    make_carry_over_rollout,
    make_rollout,
    place_new_trees,
)

__all__ = [
    "KEYS",
    "LARGEST_SEED",
    "NOT_FORCED",
    "NO_PARENT",
    "ROOT",
    "CarriedTrees",
    "CarryOver",
    "CarryOverRollout",
    "Decode",
    "Domain",
    "GrownTrees",
    "InitCache",
    "Limits",
    "Prompts",
    "Refusal",
    "Schedule",
    "Status",
    "ThreadForest",
    "Work",
    "carry_over_rollout",
    "check_prompts",
    "draw_tree",
    "interpret",
    "make_carry_over_rollout",
    "make_prompts",
    "make_rollout",
    "new_trees",
    "place_new_trees",
    "run_key",
    "thread_names",
    "token_classes",
    "tree_rollout",
]
