"""Threads written by hand: what each well-formed and malformed one becomes, in both programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.harness import assert_same
from helpers.outcomes import outcomes

from apr_jax.threads import (
    NOT_FORCED,
    Limits,
    Refusal,
    Schedule,
    Status,
    ThreadForest,
    interpret,
    make_prompts,
    tree_rollout,
)
from apr_jax.threads import protocol as p

A = 10
B = 11
VOCAB = 12
LIMITS = Limits(window=20, max_thread_tokens=32, max_threads=4, children=2, max_depth=1)


# Room for the scripts below, so that one compiled program serves them all.
_ENTRIES = 48
_WIDTH = 24


def init_cache(slots, cache_length):
    return jnp.zeros((slots, cache_length), jnp.int32)


def decode(script, tokens, cache, positions, cache_length):
    """Gives the token that the script writes after exactly this context.

    The cache holds the tokens themselves.
    """
    contexts, next_tokens = script  # [_ENTRIES, _WIDTH], [_ENTRIES + 1]
    slot = jnp.arange(tokens.shape[0])[:, None]  # [W, 1]
    cache = cache.at[slot, positions].set(tokens, mode="drop")  # [W, cache_length]

    # The context of each query, padded with -1 like those of the script. [W, S, _WIDTH]
    is_seen = jnp.arange(cache_length) <= positions[..., None]
    seen = jnp.where(is_seen, cache[:, None, :], -1)[..., :_WIDTH]
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, _WIDTH - seen.shape[-1])), constant_values=-1)

    # The last entry, `<eos>`, follows any context that is not in the script.
    match = jnp.all(seen[..., None, :] == contexts, axis=-1)  # [W, S, _ENTRIES]
    match &= (positions < _WIDTH)[..., None]
    which = jnp.where(match.any(-1), match.argmax(-1), _ENTRIES)  # [W, S]
    return jax.nn.one_hot(next_tokens[which], VOCAB) * 50.0, cache


@functools.cache
def engine(limits: Limits):
    return jax.jit(
        functools.partial(
            tree_rollout, decode, init_cache, limits=limits, schedule=Schedule(2, 1, 3)
        )
    )


def run(
    written: list[tuple[tuple[int, ...], tuple[int, ...]]],
    limits: Limits = LIMITS,
    children: int = NOT_FORCED,
) -> ThreadForest:
    """Runs a scripted policy in the engine and in the reference interpreter, and compares them.

    Args:
      written: pairs of a context and the tokens that are sampled from there on. After any other
        context `<eos>` is written.
      limits: what a tree may do.
      children: how many children the root is forced to make.

    Returns:
      the tree, in whose fields the first axis is made of threads.
    """
    script = {}
    for context, sampled in written:
        for token in sampled:
            script[context] = token
            context = (*context, token)
    contexts = np.full((_ENTRIES, _WIDTH), -1, np.int32)
    next_tokens = np.full(_ENTRIES + 1, p.EOS, np.int32)
    for row, (seen, token) in enumerate(script.items()):
        contexts[row, : len(seen)] = seen
        next_tokens[row] = token

    def logits_of(seen):
        return np.eye(VOCAB, dtype=np.float32)[script.get(tuple(seen), p.EOS)] * 50.0

    batch = make_prompts([written[0][0]], 2, children=children)
    key = jax.random.key(0)
    forest = jax.tree.map(
        lambda x: np.asarray(x[0]), engine(limits)((contexts, next_tokens), batch, key)[0]
    )
    assert_same(forest, interpret(logits_of, batch, 0, key, limits))
    outcomes(forest, limits, children)
    return forest


def refused(forest: ThreadForest, **causes: int) -> bool:
    """Whether these are all refusals of the tree."""
    return forest.refusals.tolist() == [causes.get(cause.name, 0) for cause in Refusal]


ROOT = (p.BOS, A)


def test_a_family_by_hand():
    """A root with two children, number by number: hidden block, positions, clocks, statistics."""
    forest = run(
        [
            (ROOT, (B, p.SPAWN, p.MSG, A, p.MSG, B, B, p.END_SPAWN)),
            # The child with message A has the root's context: it writes B, then <spawn>: too deep.
            ((p.BOS, A), (B,)),
            ((p.BOS, B, B), (p.JOIN, A, p.EOS)),
            ((*ROOT, B, p.JOINED, p.MSG, p.MSG, A, p.END_JOINED), (p.JOIN, B, p.EOS)),
            ((*ROOT, B, p.JOINED, p.END_JOINED), (p.JOIN, p.EOS)),
        ]
    )
    # Root, first child (same context as the root, so it spawns too, is refused, and joins nothing),
    # second child.
    np.testing.assert_array_equal(
        forest.status, [Status.DONE, Status.DONE, Status.DONE, Status.FREE]
    )
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
    np.testing.assert_array_equal(forest.hidden_block[0, : len(root)], [0] * 3 + [1] * 7 + [0] * 8)
    np.testing.assert_array_equal(
        forest.sampled[0, : len(root)], [False] * 2 + [True] * 8 + [False] * 5 + [True] * 3
    )
    np.testing.assert_array_equal(forest.length, [18, 14, 6, 0])
    np.testing.assert_array_equal(forest.parent, [-1, 0, 0, -1])
    np.testing.assert_array_equal(forest.child, [0, 0, 1, 0])
    np.testing.assert_array_equal(forest.start, [0, 8, 8, 0])
    np.testing.assert_array_equal(forest.end, [8 + 10 + 3, 18, 11, 0])
    np.testing.assert_array_equal(forest.peak, [11, 10, 6, 0])
    assert (forest.total_tokens, forest.sequential_tokens) == (11 + 10 + 3, 21)
    assert (forest.children, forest.truncations) == (2, 0)
    assert refused(forest, TOO_DEEP=2)


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
    """More than C messages, and a spawn without one: the parent reads only the answers of children
    that were started.
    """
    forest = run(
        [
            (ROOT, (p.SPAWN, p.MSG, B, p.MSG, B, A, p.MSG, B, B, p.END_SPAWN)),
            ((*ROOT, p.JOINED, p.MSG, p.MSG, p.END_JOINED), (p.SPAWN, p.END_SPAWN)),
            (
                (*ROOT, p.JOINED, p.MSG, p.MSG, p.END_JOINED, p.JOINED, p.END_JOINED),
                (p.JOIN, B, p.EOS),
            ),
        ]
    )
    np.testing.assert_array_equal(
        forest.status[:3], [Status.DONE, Status.NO_ANSWER, Status.NO_ANSWER]
    )
    assert forest.children == 2
    assert refused(forest, NO_MESSAGE=1, TOO_MANY=1)


def test_thread_indices_run_out():
    limits = Limits(window=30, max_thread_tokens=60, max_threads=3, children=2, max_depth=1)
    joined = (p.JOINED, p.MSG, p.END_JOINED)
    forest = run(
        [
            (ROOT, (p.SPAWN, p.MSG, B, p.END_SPAWN)),
            ((*ROOT, *joined), (p.SPAWN, p.MSG, B, p.MSG, B, A, p.END_SPAWN)),
            ((*ROOT, *joined, *joined), (p.JOIN, p.EOS)),
        ],
        limits,
    )
    assert (forest.children, Status(int(forest.status[0]))) == (2, Status.DONE)
    assert refused(forest, NO_THREAD_INDEX=1)
    np.testing.assert_array_equal(forest.round, [0, 0, 1])


def test_message_longer_than_the_window_ends_its_writer():
    forest = run(
        [((p.BOS,), (p.SPAWN, p.MSG, *(B,) * 9))],
        Limits(window=12, max_thread_tokens=40, max_threads=4, children=3, max_depth=2),
    )
    assert (Status(int(forest.status[0])), int(forest.children)) == (Status.OUT_OF_WINDOW, 0)


def test_joined_block_without_room_ends_the_parent():
    limits = Limits(window=8, max_thread_tokens=40, max_threads=4, children=2, max_depth=1)
    forest = run(
        [((p.BOS, A), (B, p.SPAWN, p.MSG, B, p.END_SPAWN)), ((p.BOS, B), (p.JOIN, A, A, A, p.EOS))],
        limits,
    )
    assert Status(int(forest.status[0])) == Status.OUT_OF_WINDOW
    assert forest.length[0] == 7
    np.testing.assert_array_equal(forest.end[:2], [5 + 5, 10])


def test_budgets_end_threads():
    tokens = Limits(window=20, max_thread_tokens=32, max_threads=4, children=2, max_tokens=7)
    forest = run([(ROOT, (A,) * 9)], tokens)
    assert (Status(int(forest.status[0])), int(forest.total_tokens)) == (Status.OUT_OF_BUDGET, 7)
    chain = Limits(window=20, max_thread_tokens=32, max_threads=4, children=2, max_sequential=6)
    forest = run([(ROOT, (p.SPAWN, p.MSG, B, p.END_SPAWN)), ((p.BOS, B), (A,) * 9)], chain)
    assert [Status(int(s)) for s in forest.status[:2]] == [Status.OUT_OF_BUDGET] * 2
    assert forest.sequential_tokens == 6


SPAWN_ONE = (p.SPAWN, p.MSG, B, p.END_SPAWN)
ANSWER = (p.JOIN, p.EOS)
JOINED_ONE = (p.JOINED, p.MSG, p.END_JOINED)


def test_forced_children_by_hand():
    """Three children in two spawns of at most two: whatever the root would rather write is not
    among what it may write.
    """
    written = [
        (ROOT, (p.SPAWN, p.MSG, B, p.MSG, B, B, p.MSG)),  # A third message: C = 2 forbids it.
        ((*ROOT, p.SPAWN, p.MSG, B, p.MSG, B, B), (p.MSG,)),
    ]
    limits = Limits(window=20, max_thread_tokens=40, max_threads=4, children=2, max_depth=1)
    # Where the wanted token is forbidden all that is left is equally likely, and greedy takes the
    # lowest id: <pad>.
    forest = run(written, limits, children=3)
    assert (Status(int(forest.status[0])), int(forest.children)) == (Status.MALFORMED, 0)
    joined = (p.JOINED, p.MSG, p.MSG, p.END_JOINED)
    written = [
        (ROOT, (p.SPAWN, p.MSG, B, p.MSG, B, B, p.END_SPAWN)),
        ((*ROOT, *joined), SPAWN_ONE),
        ((*ROOT, *joined, *JOINED_ONE), (A, *ANSWER)),
    ]
    forest = run(written, limits, children=3)
    assert (Status(int(forest.status[0])), int(forest.children)) == (Status.DONE, 3)
    np.testing.assert_array_equal(forest.round, [0, 0, 0, 1])
    asked = forest.allowed[0]
    # Children are missing.
    assert all(asked[at] & (p.ALLOW_JOIN + p.ALLOW_EOS) == 0 for at in (2, 13))
    assert asked[3] & p.ALLOW_END_SPAWN == 0  # No message yet.
    assert asked[5] & p.ALLOW_MSG and not asked[7] & p.ALLOW_MSG  # One message of two; two of two.
    assert not asked[16] & p.ALLOW_MSG  # One of the one that is missing.
    assert not asked[20] & p.ALLOW_SPAWN and asked[20] & p.ALLOW_JOIN  # All are made.
    assert (forest.allowed[forest.sampled] > 0).all() and (
        forest.allowed[~forest.sampled] == 0
    ).all()
    assert (forest.allowed[1:][forest.sampled[1:]] == p.ALLOW_ALL).all()  # Children are free.


@pytest.mark.thorough
def test_forced_to_none_and_kept_from_the_end():
    limits = Limits(window=8, max_thread_tokens=20, max_threads=4, children=2, max_depth=1)
    # It wants <spawn>, may not, and takes <pad>, the first of the equally unlikely others.
    forest = run([(ROOT, SPAWN_ONE)], limits, children=0)
    assert (int(forest.children), int(forest.tokens[0, 2])) == (0, p.PAD)
    # It wants to answer at once, and of what it may write instead <spawn> has the lowest id, then
    # </spawn>.
    constrained = dataclasses.replace(limits, constrain=True)
    forest = run([(ROOT, ANSWER)], constrained, children=1)
    assert (Status(int(forest.status[0])), int(forest.children)) == (Status.DONE, 1)
    assert forest.tokens[0, :8].tolist() == [*ROOT, p.SPAWN, p.MSG, p.END_SPAWN, *JOINED_ONE]
    # It would rather write text: nothing makes it spawn, and it comes to the end of the window
    # without its child.
    forest = run([(ROOT, (A,) * 6)], constrained, children=1)
    assert (Status(int(forest.status[0])), int(forest.children)) == (Status.OUT_OF_WINDOW, 0)


def test_thread_indices_are_kept_for_forced_children():
    """All three free threads are for the root's own children, so that the first of them gets none
    to spawn with.
    """
    limits = Limits(window=30, max_thread_tokens=60, max_threads=4, children=2, max_depth=2)
    joined = (*ROOT, *JOINED_ONE)
    written = [
        (ROOT, SPAWN_ONE),
        ((p.BOS, B), SPAWN_ONE),
        ((p.BOS, B, p.JOINED, p.END_JOINED), ANSWER),
        (joined, (p.SPAWN, p.MSG, B, p.MSG, B, p.END_SPAWN)),
        ((*joined, p.JOINED, p.MSG, p.MSG, p.END_JOINED), ANSWER),
    ]
    forest = run(written, limits, children=3)
    assert (Status(int(forest.status[0])), int(forest.children)) == (Status.DONE, 3)
    assert refused(forest, NO_THREAD_INDEX=3)
    # A free root gives the first child one of the two threads that are left, and comes one short at
    # its second spawn.
    forest = run(written, limits)
    assert forest.depth.tolist() == [0, 1, 2, 1]


def test_constrain_by_hand():
    """`forest.allowed` is the table of docs/protocol.md, number by number."""
    limits = Limits(
        window=20,
        max_thread_tokens=40,
        max_threads=4,
        children=3,
        max_depth=1,
        max_tokens=8,
        constrain=True,
    )
    forest = run([(ROOT, (p.SPAWN, p.MSG, B, p.MSG, B, B, p.MSG))], limits)
    text = p.ALLOW_TEXT
    thinks = p.ALLOW_TEXT + p.ALLOW_JOIN
    ends = p.ALLOW_END_SPAWN
    more = p.ALLOW_MSG
    # Tokens left: 8, 7, 6 and so on. The second message takes the last tokens that children could
    # live on.
    expected = [thinks + p.ALLOW_SPAWN, more, ends + text + more, ends + text + more, ends]
    assert forest.allowed[0, 2:7].tolist() == expected
    assert forest.tokens[0, 2:7].tolist() == [p.SPAWN, p.MSG, B, p.MSG, p.END_SPAWN]
    assert forest.status.tolist()[:3] == [Status.OUT_OF_BUDGET] * 3
    assert (int(forest.children), int(forest.refusals.sum()), int(forest.total_tokens)) == (2, 0, 8)
    # Too deep, without a thread index, or with four tokens left: no <spawn>.
    for changed in (
        {"max_depth": 0},
        {"max_threads": 1, "max_depth": 0, "children": 1},
        {"max_tokens": 4},
    ):
        forest = run([(ROOT, SPAWN_ONE)], dataclasses.replace(limits, **changed))
        assert (int(forest.allowed[0, 2]), int(forest.children)) == (thinks, 0)


def test_constrain_masks_the_log_probs():
    """One of two classes forbidden: the probability is that among the tokens that are left."""
    limits = Limits(
        window=20, max_thread_tokens=40, max_threads=1, children=1, max_depth=0, constrain=True
    )
    forest = run([(ROOT, (p.SPAWN, *ANSWER))], limits)
    # <spawn> is forbidden; <join>, A and B are equally likely and <join> has the lowest id.
    assert forest.tokens[0, 2:4].tolist() == [p.JOIN, p.EOS]
    np.testing.assert_allclose(forest.logprob[0, 2:4], [-np.log(3), 0.0], atol=1e-5)
