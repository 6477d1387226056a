"""Policies so small that every thread tree they can make is listed, with its probability.

A policy is a table of logits; the row is chosen by what a thread sees: the token after `<bos>` (it
tells root, child and grandchild apart), the last token, how many messages there are, and whether it
is answering. Threads that see alike share a row, as threads share weights. A toy says which tokens
may follow; all others have logits that underflow to probability 0.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.data.packing import Rows, pack_forest
from apr_jax.threads import Limits, ThreadForest, interpret, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.train.config import ObjectiveConfig
from apr_jax.train.rl.advantages import ADVANTAGES
from apr_jax.train.rl.objective import policy_loss, token_weights, tree_kl
from apr_jax.train.rl.rescoring import sampled_logprobs

# The text tokens.
ROOT_KIND, CHILD, OTHER = range(len(p.CONTROL_PIECES), len(p.CONTROL_PIECES) + 3)
VOCAB = OTHER + 1
STATES = 3 * VOCAB * 3 * 2
PROMPT = [p.BOS, ROOT_KIND]
PURE = ObjectiveConfig(advantage="none", kl=0.0)  # REINFORCE and nothing else.
_FORBIDDEN = -1e3


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
    """Attributes:
    follows: (second token, last token) or (second, last, messages) -> tokens that may follow.
    """

    name: str
    limits: Limits
    follows: dict[tuple[int, ...], tuple[int, ...]]

    def options(self, seen):
        kind, last, messages, answering = _view(seen)
        if answering and last != p.JOIN:
            return (p.EOS,)
        return self.follows.get((kind, last, messages)) or self.follows[kind, last]


def _view(seen):
    return seen[1], seen[-1], min(2, list(seen).count(p.MSG)), p.JOIN in seen


def state_index(kind, last, messages, answering):
    """Row of the table; for numpy and JAX alike."""
    return (((kind - ROOT_KIND) * VOCAB + last) * 3 + messages) * 2 + answering


def _state(seen):
    return state_index(*_view(seen)) if len(seen) > 1 else 0


def _ends(kind):
    return {(kind, p.JOIN): (p.EOS,), (kind, p.END_JOINED): (p.JOIN,)}


_SPAWNS_ONE_OR_TWO = {
    (ROOT_KIND, ROOT_KIND): (p.SPAWN, p.JOIN),
    (ROOT_KIND, p.SPAWN): (p.MSG,),
    (ROOT_KIND, p.MSG): (CHILD,),
    (ROOT_KIND, CHILD, 1): (p.MSG, p.END_SPAWN),
    (ROOT_KIND, CHILD, 2): (p.END_SPAWN,),
}
_ENDS_AT_ONCE = {(CHILD, CHILD): (p.JOIN,), (CHILD, p.JOIN): (p.EOS,)}

PARENT_ONLY = Toy(
    "parent only",
    Limits(window=9, max_thread_tokens=16, max_threads=3, children=2, max_depth=1),
    _SPAWNS_ONE_OR_TWO
    | _ENDS_AT_ONCE
    | {
        (ROOT_KIND, p.END_JOINED): (OTHER, p.JOIN, p.EOS),
        (ROOT_KIND, OTHER): (OTHER, p.JOIN),  # Thinks, until the window is full.
        (ROOT_KIND, p.JOIN): (OTHER, p.EOS),
    },
)
CHILD_ONLY = Toy(
    "child only",
    Limits(window=9, max_thread_tokens=16, max_threads=3, children=2, max_depth=1),
    _SPAWNS_ONE_OR_TWO
    | _ends(ROOT_KIND)
    | {
        (ROOT_KIND, ROOT_KIND): (p.SPAWN,),
        (ROOT_KIND, CHILD, 1): (p.MSG,),
        (CHILD, CHILD): (OTHER, p.JOIN, p.EOS),
        (CHILD, OTHER): (p.JOIN, p.EOS),
        (CHILD, p.JOIN): (OTHER, p.EOS),
    },
)
BOTH = Toy(
    "both",
    Limits(window=9, max_thread_tokens=16, max_threads=3, children=2, max_depth=1),
    _SPAWNS_ONE_OR_TWO
    | {
        # What it tells the child decides what the child can do.
        (ROOT_KIND, p.MSG): (
            CHILD,
            OTHER,
        ),
        (ROOT_KIND, OTHER, 1): (p.MSG, p.END_SPAWN),
        (ROOT_KIND, OTHER, 2): (p.END_SPAWN,),
        (ROOT_KIND, p.END_JOINED): (p.JOIN, p.EOS),
        (ROOT_KIND, p.JOIN): (p.EOS,),
        (CHILD, CHILD): (OTHER, p.JOIN),
        (CHILD, OTHER): (p.JOIN,),
        (CHILD, p.JOIN): (OTHER, p.EOS),
        (OTHER, OTHER): (p.JOIN, p.EOS),
        (OTHER, p.JOIN): (p.EOS,),
    },
)
NESTED = Toy(
    "nested",
    Limits(window=8, max_thread_tokens=16, max_threads=7, children=2, max_depth=2),
    _SPAWNS_ONE_OR_TWO
    | _ends(ROOT_KIND)
    | {
        (CHILD, CHILD): (p.SPAWN, p.JOIN),
        (CHILD, p.SPAWN): (p.MSG,),
        (CHILD, p.MSG): (OTHER,),
        (CHILD, OTHER): (p.END_SPAWN,),
        (CHILD, p.END_JOINED): (p.JOIN, p.EOS),
        (CHILD, p.JOIN): (p.EOS,),
        (OTHER, OTHER): (CHILD, p.JOIN),
        (OTHER, CHILD): (p.JOIN, p.EOS),
        (OTHER, p.JOIN): (p.EOS,),
    },
)
TOYS = (PARENT_ONLY, CHILD_ONLY, BOTH, NESTED)


class _Script:
    """Makes the interpreter take given choices; beyond them the first one, noting how many there
    were.
    """

    def __init__(self, toy, choices):
        self.toy = toy
        self.choices = choices
        self.made = []
        self.widths = []

    def __call__(self, seen):
        options = self.toy.options(seen)
        choice = self.choices[len(self.widths)] if len(self.widths) < len(self.choices) else 0
        self.made.append((_state(seen), options[choice]))
        self.widths.append((choice, len(options)))
        logits = np.full(VOCAB, -100.0, np.float32)
        logits[options[choice]] = 0.0
        return logits


@dataclasses.dataclass(frozen=True, eq=False)
class Trees:
    """All n trees of a toy.

    Attributes:
      forest: with the batch axis, n.
      made: of each tree, the (state, token) pairs of its choices, in any order.
      allowed: [STATES, VOCAB] what may follow; nothing in states that no choice is made in.
    """

    toy: Toy
    forest: ThreadForest
    made: list[np.ndarray]
    allowed: np.ndarray

    def __len__(self):
        return len(self.made)

    def logits(self, table):
        """Where no choice is ever made, all tokens are as likely as the table says."""
        chooses = self.allowed.any(axis=1, keepdims=True)
        return jnp.where(self.allowed | ~chooses, table, _FORBIDDEN)

    def logprobs(self, table):
        return jax.nn.log_softmax(self.logits(table), axis=-1)

    def total(self, values):
        """[n]: values [STATES, VOCAB] summed over the choices of each tree."""
        return jnp.stack([jnp.sum(values[state, token]) for state, token in self.made])

    def visited(self, values):
        """[n]: values [STATES] summed over the states in which each tree's choices were made."""
        return jnp.stack([jnp.sum(values[state]) for state, _ in self.made])

    def probabilities(self, table):
        return jnp.exp(self.total(self.logprobs(table)))


def enumerate_trees(toy):
    """Depth-first over the choices; the reference interpreter does the rest."""
    forests = []
    made = []
    choices = []
    allowed = np.zeros((STATES, VOCAB), bool)
    while choices is not None:
        script = _Script(toy, choices)
        with jax.enable_x64(False):  # As in a run.
            forests.append(
                interpret(script, make_prompts([PROMPT], 2), 0, jax.random.key(0), toy.limits)
            )
        made.append(np.array(script.made).T)
        allowed[tuple(made[-1])] = True
        widths = script.widths
        while widths and widths[-1][0] == widths[-1][1] - 1:
            widths.pop()
        choices = [choice for choice, _ in widths[:-1]] + [widths[-1][0] + 1] if widths else None
    batch = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *forests)
    return Trees(toy, batch, made, allowed)


def states_of(rows):
    """[R, L]: the table's row for the token after each column, from what is visible there."""
    states = np.zeros(rows.tokens.shape, np.int64)
    for row, column in np.argwhere(rows.segment > 0):
        same = rows.segment[row, : column + 1] == rows.segment[row, column]
        hidden_block = rows.hidden_block[row, : column + 1]
        states[row, column] = _state(
            rows.tokens[row, : column + 1][
                same & ((hidden_block == 0) | (hidden_block == hidden_block[-1]))
            ]
        )
    return states


def _blocks(trees, sampled):
    """Rows with fields [n, R, L]: each tree packed by itself, all into as many rows."""
    forest = dataclasses.replace(
        trees.forest, sampled=trees.forest.sampled if sampled is None else sampled
    )
    single = [jax.tree.map(lambda x, at=at: x[at : at + 1], forest) for at in range(len(trees))]
    count = max(
        len(pack_forest(tree, 1, trees.toy.limits.max_thread_tokens).tokens) for tree in single
    )
    packed = [pack_forest(tree, count, trees.toy.limits.max_thread_tokens) for tree in single]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)


@functools.lru_cache
def _recorded_batches(trees, size):
    return batches_of(trees, size, None)


def batches_of(trees, size, sampled):
    """All n^size batches: which trees [n^size, size], their Rows [n^size, R, L], the states."""
    blocks = _blocks(trees, sampled)
    states = np.stack(
        [states_of(jax.tree.map(lambda x, at=at: x[at], blocks)) for at in range(len(trees))]
    )
    chosen = np.array(list(itertools.product(range(len(trees)), repeat=size)))

    def join(blocks, shift=0):
        return np.concatenate([blocks[chosen[:, at]] + shift * at for at in range(size)], axis=1)

    fields = {
        field.name: join(getattr(blocks, field.name))
        for field in dataclasses.fields(Rows)
        if field.name != "tree"
    }
    fields["sampled"] = fields["sampled"].astype(bool)
    # -1 or less is padding, wherever the tree stands in the batch.
    tree = np.where(blocks.segment > 0, 0, -size)
    return chosen, Rows(**fields, tree=join(tree, 1)), join(states)


def expected_estimate(
    trees,
    table,
    rewards,
    size=1,
    config=PURE,
    counted=None,
    sampled=None,
    reference=None,
    behaviour=None,
    tokens_per_tree=1.0,
):
    """Computes the exact mean of -gradient of the objective over all batches of `size` trees.

    Args:
      trees: the n trees that the policy can make.
      table: table of the policy that learns.
      rewards: [n] of the trees, or [P, n] where the batch holds P problems, `size` / P trees of
        each.
      size: number of trees in a batch.
      config: the objective.
      counted: bool [n], trees that are not masked.
      sampled: [n, T, L], a wrong mask in place of the recorded one.
      reference: table of the reference policy.
      behaviour: table of the policy that sampled, if it is not the one that learns.
      tokens_per_tree: what the loss is divided by.
    """
    chosen, rows, states = (
        _recorded_batches(trees, size) if sampled is None else batches_of(trees, size, sampled)
    )
    tables = np.atleast_2d(rewards)
    problems = len(tables)
    group = size // len(tables)
    paid = tables[np.repeat(np.arange(problems), group), chosen]
    counted = (np.ones(len(trees), bool) if counted is None else counted)[chosen]
    each = [jax.tree.map(lambda x, at=at: x[at], rows) for at in range(len(chosen))]
    weights = np.stack(
        [
            token_weights(*pair, config.loss_aggregation, tokens_per_tree)
            for pair in zip(each, counted, strict=True)
        ]
    )
    behaviour = jax.lax.stop_gradient(table if behaviour is None else behaviour)
    reference = behaviour if reference is None else reference
    probability = jnp.prod(trees.probabilities(behaviour)[chosen], axis=1)

    def loss_of(table, rows, states, weights, counted, rewards):
        recorded, _ = sampled_logprobs(trees.logits(behaviour)[states], rows)
        rows = dataclasses.replace(rows, logprob=recorded)
        anchor, _ = sampled_logprobs(trees.logits(reference)[states], rows)
        if config.kl_estimator == "reward":
            rewards = rewards - config.kl * tree_kl(anchor, rows, size)
        grouped = (x.reshape(problems, group) for x in (rewards, counted))
        advantages = ADVANTAGES[config.advantage](*grouped).reshape(-1)
        logprobs, entropy = sampled_logprobs(trees.logits(table)[states], rows)
        return policy_loss(logprobs, entropy, anchor, rows, weights, advantages, config)[0]

    def loss(table):
        batch = (rows, states, weights, counted, paid)
        batch = jax.tree.map(jnp.asarray, batch)
        return jnp.sum(
            probability * jax.vmap(loss_of, in_axes=(None, 0, 0, 0, 0, 0))(table, *batch)
        )

    return -jax.grad(loss)(table)


def init_cache(slots, cache_length):
    """The policy's cache for the device engine: the tokens that a thread sees."""
    return jnp.zeros((slots, cache_length), jnp.int32)


def decode(logits, tokens, cache, positions, cache_length):
    """The same policy for the device engine; `logits` is `Trees.logits` of a table."""
    slot = jnp.arange(len(tokens))
    out = []
    for step in range(tokens.shape[1]):
        token = tokens[:, step]
        at = positions[:, step]
        cache = cache.at[slot, jnp.where(at < cache_length, at, cache.shape[1])].set(
            token, mode="drop"
        )
        seen = jnp.where(jnp.arange(cache.shape[1]) <= at[:, None], cache, p.PAD)
        messages = jnp.minimum(2, jnp.sum(seen == p.MSG, axis=1))
        out.append(
            logits[state_index(cache[:, 1], token, messages, jnp.any(seen == p.JOIN, axis=1))]
        )
    return jnp.stack(out, axis=1), cache
