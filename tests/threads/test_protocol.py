"""Streams written by hand: what each well-formed and malformed stream becomes, in both implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.threads import Limits, Prompts, Schedule, Status, interpret, tree_rollout
from apr_jax.threads import protocol as p

A, B = 10, 11
VOCAB = 12
LIMITS = Limits(window=20, stream=32, slots=4, children=2, max_depth=1)


def follow(script: dict[tuple[int, ...], int]):
    """A policy that writes what the script says after exactly this context, and `<eos>` elsewhere.

    Its device form finds the context by comparing the whole cache, which holds the tokens themselves.
    """
    width = max(len(seen) for seen in script)
    contexts = np.full((len(script), width), -1, np.int32)
    for row, seen in enumerate(script):
        contexts[row, : len(seen)] = seen
    answers = np.asarray([*script.values(), p.EOS], np.int32)

    def init_cache(lanes, window):
        return jnp.zeros((lanes, window), jnp.int32)

    def decode(params, tokens, cache, positions):
        lane = jnp.arange(tokens.shape[0])[:, None]
        cache = cache.at[lane, positions].set(tokens, mode="drop")
        seen = jnp.where(jnp.arange(cache.shape[1]) <= positions[..., None], cache[:, None, :], -1)[..., :width]
        longer = positions >= width
        match = jnp.all(seen[..., None, :] == contexts, axis=-1) & ~longer[..., None]
        which = jnp.where(match.any(-1), match.argmax(-1), len(script))
        return jax.nn.one_hot(jnp.asarray(answers)[which], VOCAB) * 50.0, cache

    def logits_of(seen):
        return np.eye(VOCAB, dtype=np.float32)[script.get(tuple(seen), p.EOS)] * 50.0

    return decode, init_cache, logits_of


def run(streams: list[tuple[tuple[int, ...], tuple[int, ...]]], limits: Limits = LIMITS):
    """Runs (context, tokens sampled from there on) pairs in both implementations; returns the tree, slots x fields."""
    script = {}
    for context, sampled in streams:
        for token in sampled:
            script[context] = token
            context = (*context, token)
    decode, init_cache, logits_of = follow(script)
    prompt = streams[0][0]
    batch = Prompts(
        jnp.asarray([prompt], jnp.int32), jnp.asarray([len(prompt)]), jnp.asarray([0]), jnp.asarray([0.0], jnp.float32)
    )
    key = jax.random.key(0)
    engine = jax.jit(functools.partial(tree_rollout, decode, init_cache, limits=limits, schedule=Schedule(2, 1, 3)))
    forest = jax.tree.map(lambda x: np.asarray(x[0]), engine(None, batch, key)[0])
    expected = interpret(logits_of, prompt, 0, 0.0, key, limits)
    for a, b in zip(jax.tree.leaves(forest), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    return forest


ROOT = (p.BOS, A)


def test_a_family_by_hand():
    """The worked example of DESIGN.md 3: islands, rewound positions, clocks and statistics, number by number."""
    forest = run(
        [
            (ROOT, (B, p.SPAWN, p.MSG, A, p.MSG, B, B, p.END_SPAWN)),
            ((p.BOS, A), (B,)),  # The child with message A has the root's context: it writes B, then <spawn>: too deep.
            ((p.BOS, B, B), (p.JOIN, A, p.EOS)),
            ((*ROOT, B, p.JOINED, p.MSG, p.MSG, A, p.END_JOINED), (p.JOIN, B, p.EOS)),
            ((*ROOT, B, p.JOINED, p.END_JOINED), (p.JOIN, p.EOS)),
        ]
    )
    # Root, first child (same context as the root, so it spawns too, is refused, and joins nothing), second child.
    np.testing.assert_array_equal(forest.status, [Status.DONE, Status.DONE, Status.DONE, Status.FREE])
    root = [
        *ROOT,
        B,
        p.SPAWN,
        p.MSG,
        A,
        p.MSG,
        B,
        B,
        p.END_SPAWN,
        p.JOINED,
        p.MSG,
        p.MSG,
        A,
        p.END_JOINED,
        p.JOIN,
        B,
        p.EOS,
    ]
    np.testing.assert_array_equal(forest.tokens[0, : len(root)], root)
    np.testing.assert_array_equal(forest.position[0, : len(root)], [*range(10), *range(3, 11)])
    np.testing.assert_array_equal(forest.island[0, : len(root)], [0] * 3 + [1] * 7 + [0] * 8)
    np.testing.assert_array_equal(forest.sampled[0, : len(root)], [False] * 2 + [True] * 8 + [False] * 5 + [True] * 3)
    np.testing.assert_array_equal(forest.length, [18, 14, 6, 0])
    np.testing.assert_array_equal(forest.parent, [-1, 0, 0, -1])
    np.testing.assert_array_equal(forest.child, [0, 0, 1, 0])
    np.testing.assert_array_equal(forest.start, [0, 8, 8, 0])
    np.testing.assert_array_equal(forest.end, [8 + 10 + 3, 18, 11, 0])
    np.testing.assert_array_equal(forest.peak, [11, 10, 6, 0])
    assert (forest.total_tokens, forest.sequential_tokens) == (11 + 10 + 3, 21)
    assert (forest.children, forest.refusals, forest.truncations) == (2, 2, 0)


@pytest.mark.parametrize(
    ("sampled", "status"),
    [
        ((p.EOS,), Status.NO_ANSWER),
        ((A, p.JOIN, p.EOS), Status.DONE),
        ((p.JOIN, A, p.JOIN), Status.MALFORMED),
        ((p.JOIN, A, p.SPAWN), Status.MALFORMED),
        ((p.END_SPAWN,), Status.MALFORMED),
        ((p.MSG,), Status.MALFORMED),
        ((p.JOINED,), Status.MALFORMED),
        ((p.END_JOINED,), Status.MALFORMED),
        ((p.PAD,), Status.MALFORMED),
        ((p.BOS,), Status.MALFORMED),
        ((p.UNK,), Status.MALFORMED),
        ((p.SPAWN, A), Status.MALFORMED),
        ((p.SPAWN, p.SPAWN), Status.MALFORMED),
        ((p.SPAWN, p.MSG, A, p.SPAWN), Status.MALFORMED),
        ((p.SPAWN, p.MSG, A, p.EOS), Status.MALFORMED),
        ((p.SPAWN, p.MSG, A, p.JOIN), Status.MALFORMED),
        ((A,) * 18, Status.OUT_OF_WINDOW),
        ((p.JOIN, *(A,) * 17), Status.OUT_OF_WINDOW),
        ((p.SPAWN, *(p.MSG,) * 17), Status.OUT_OF_WINDOW),
        ((p.JOIN, *(A,) * 16, p.EOS), Status.DONE),
    ],
)
def test_how_a_lone_thread_ends(sampled, status):
    forest = run([(ROOT, sampled)])
    assert Status(int(forest.status[0])) == status
    assert forest.length[0] == len(ROOT) + len(sampled)
    assert forest.children == 0
    assert forest.truncations == (status == Status.OUT_OF_WINDOW)


def test_refused_messages_get_no_answer():
    """More than C messages, and a spawn without one: the parent reads only the answers of children that were started."""
    forest = run(
        [
            (ROOT, (p.SPAWN, p.MSG, B, p.MSG, B, A, p.MSG, B, B, p.END_SPAWN)),
            ((*ROOT, p.JOINED, p.MSG, p.MSG, p.END_JOINED), (p.SPAWN, p.END_SPAWN)),
            ((*ROOT, p.JOINED, p.MSG, p.MSG, p.END_JOINED, p.JOINED, p.END_JOINED), (p.JOIN, B, p.EOS)),
        ]
    )
    np.testing.assert_array_equal(forest.status[:3], [Status.DONE, Status.NO_ANSWER, Status.NO_ANSWER])
    assert (forest.children, forest.refusals) == (2, 2)


def test_slots_run_out():
    limits = Limits(window=30, stream=60, slots=3, children=2, max_depth=1)
    joined = (p.JOINED, p.MSG, p.END_JOINED)
    forest = run(
        [
            (ROOT, (p.SPAWN, p.MSG, B, p.END_SPAWN)),
            ((*ROOT, *joined), (p.SPAWN, p.MSG, B, p.MSG, B, A, p.END_SPAWN)),
            ((*ROOT, *joined, *joined), (p.JOIN, p.EOS)),
        ],
        limits,
    )
    assert (forest.children, forest.refusals, Status(int(forest.status[0]))) == (2, 1, Status.DONE)
    np.testing.assert_array_equal(forest.round, [0, 0, 1])


def test_message_longer_than_the_window_ends_its_writer():
    forest = run(
        [((p.BOS,), (p.SPAWN, p.MSG, *(B,) * 9))], Limits(window=12, stream=40, slots=4, children=3, max_depth=2)
    )
    assert (Status(int(forest.status[0])), int(forest.children)) == (Status.OUT_OF_WINDOW, 0)


def test_joined_block_without_room_ends_the_parent():
    limits = Limits(window=8, stream=40, slots=4, children=2, max_depth=1)
    forest = run(
        [((p.BOS, A), (B, p.SPAWN, p.MSG, B, p.END_SPAWN)), ((p.BOS, B), (p.JOIN, A, A, A, p.EOS))],
        limits,
    )
    assert Status(int(forest.status[0])) == Status.OUT_OF_WINDOW
    assert forest.length[0] == 7
    np.testing.assert_array_equal(forest.end[:2], [5 + 5, 10])


def test_budgets_end_threads():
    tokens = Limits(window=20, stream=32, slots=4, children=2, max_tokens=7)
    forest = run([(ROOT, (A,) * 9)], tokens)
    assert (Status(int(forest.status[0])), int(forest.total_tokens)) == (Status.OUT_OF_BUDGET, 7)
    chain = Limits(window=20, stream=32, slots=4, children=2, max_sequential=6)
    forest = run([(ROOT, (p.SPAWN, p.MSG, B, p.END_SPAWN)), ((p.BOS, B), (A,) * 9)], chain)
    assert [Status(int(s)) for s in forest.status[:2]] == [Status.OUT_OF_BUDGET] * 2
    assert forest.sequential_tokens == 6
