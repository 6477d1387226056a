"""Streams: a tree worked out by hand, exact inverses, and the same record as the rollout's
reference makes.
"""

import dataclasses

import jax
import numpy as np
import pytest

from apr_jax.data import dataset
from apr_jax.data.demonstrate import (
    Bounds,
    Recipe,
    broken_bound,
    flatten,
    sequential_tokens,
    stored_types,
    texts,
    unflatten,
)
from apr_jax.data.encode import NO_PARENT, ThreadTokens, read_thread, tokenize_tree
from apr_jax.tasks import Problem, Spawn, TaskConfig, Thread
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.tasks.countdown.solvers import METHODS, PARALLEL
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import (
    BOS,
    END_JOINED,
    END_SPAWN,
    EOS,
    JOIN,
    JOINED,
    MSG,
    SPAWN,
    Tokenizer,
)
from apr_jax.threads.forest import ThreadForest
from apr_jax.threads.limits import Limits
from apr_jax.threads.prompts import make_prompts
from apr_jax.threads.reference import interpret

LETTERS = SentencePieceTokenizer.train(["abcdefgh0123456789+-*/=,;:#>"])


def leaf(prompt: str, body: str = "", answer: str = "") -> Thread:
    return Thread(prompt, (body,) if body else (), answer)


TWO_SPAWNS = Thread(
    "ab", ("c", Spawn((leaf("d", "e", "f"), leaf("g"))), Spawn((leaf("h", answer="a"),)), "b"), "cd"
)


def test_a_tree_with_two_spawns_worked_out_by_hand():
    a, b, c, d, e, f, g, h = LETTERS.encode("abcdefgh")
    root, first, second, third = tokenize_tree(TWO_SPAWNS, LETTERS)
    # fmt: off
    expected = [  # token, position, hidden block, sampled
        (BOS, 0, 0, 0), (a, 1, 0, 0), (b, 2, 0, 0),
        (c, 3, 0, 1),
        (SPAWN, 4, 1, 1), (MSG, 5, 1, 1), (d, 6, 1, 1), (MSG, 7, 1, 1), (g, 8, 1, 1),
        (END_SPAWN, 9, 1, 1),
        (JOINED, 4, 0, 0), (MSG, 5, 0, 0), (f, 6, 0, 0), (MSG, 7, 0, 0), (END_JOINED, 8, 0, 0),
        (SPAWN, 9, 2, 1), (MSG, 10, 2, 1), (h, 11, 2, 1), (END_SPAWN, 12, 2, 1),
        (JOINED, 9, 0, 0), (MSG, 10, 0, 0), (a, 11, 0, 0), (END_JOINED, 12, 0, 0),
        (b, 13, 0, 1), (JOIN, 14, 0, 1), (c, 15, 0, 1), (d, 16, 0, 1), (EOS, 17, 0, 1),
    ]
    # fmt: on
    fields = zip(root.tokens, root.position, root.hidden_block, root.sampled, strict=True)
    assert [tuple(map(int, column)) for column in fields] == expected
    assert first.tokens.tolist() == [BOS, d, e, JOIN, f, EOS]
    assert first.sampled.tolist() == [False, False, True, True, True, True]
    assert first.position.tolist() == list(range(6))
    assert second.tokens.tolist() == [BOS, g, JOIN, EOS]
    assert third.tokens.tolist() == [BOS, h, JOIN, a, EOS]
    places = [(s.parent, s.round, s.depth, s.child) for s in (root, first, second, third)]
    assert places == [(NO_PARENT, 0, 0, 0), (0, 0, 1, 0), (0, 0, 1, 1), (0, 1, 1, 0)]
    assert root.tokens.dtype == root.position.dtype == root.hidden_block.dtype == np.int32
    assert root.sampled.dtype == bool
    # The root samples 16 tokens; the longest child of the first spawn 4, the one of the second 3.
    assert sequential_tokens([root, first, second, third]) == 16 + 4 + 3


def test_slots_of_nested_spawns():
    inner = Thread("e", (Spawn((leaf("c"), leaf("d"))),), "")
    tree = Thread("a", (Spawn((leaf("b"), inner)), Spawn((leaf("f"),))), "")
    streams = tokenize_tree(tree, LETTERS)
    assert [LETTERS.decode(s.tokens[:2]) for s in streams] == list("abecdf")
    assert [s.parent for s in streams] == [NO_PARENT, 0, 0, 2, 2, 0]
    assert [s.round for s in streams] == [0, 0, 0, 0, 0, 1]
    assert [s.depth for s in streams] == [0, 1, 1, 2, 2, 1]
    assert [s.child for s in streams] == [0, 0, 1, 0, 1, 0]
    assert read_thread(streams, LETTERS) == tree


def demonstrations(
    method: str, render: str, count: int
) -> tuple[list[Thread], Tokenizer, list[Problem]]:
    """Demonstrations of the paper's own problems, and a tokenizer for them."""
    solver = SolverConfig(render=render, window_bin=64)
    if method == "apr-nested":
        solver = dataclasses.replace(solver, parent_beam=4, max_children=60)
    recipe = Recipe(TaskConfig("countdown", solver=solver), method, 0, b"", Bounds())
    task = recipe.make_task()
    problems = [task.draw(seed) for seed in range(count)]
    found = [text for problem in problems for text in texts(recipe, problem)]
    tokenizer = SentencePieceTokenizer.train(found, task.phrases, task.alphabet)
    threads = [task.demonstrate(problem, method, 0) for problem in problems]
    return threads, tokenizer, problems


@pytest.mark.parametrize("render", ["compact", "sos"])
@pytest.mark.parametrize("method", METHODS)
def test_every_demonstration_comes_back_from_its_streams(method, render):
    threads, tokenizer, _ = demonstrations(method, render, 40)
    spawned = 0
    for thread in threads:
        streams = tokenize_tree(thread, tokenizer)
        spawned += len(streams) - 1
        assert read_thread(streams, tokenizer) == thread
        types = stored_types(tokenizer.vocab_size, Bounds(4096, 4096, 100, 100, 8))
        stored = unflatten(flatten(streams, types))
        assert read_thread(stored, tokenizer) == thread
        for one, other in zip(streams, stored, strict=True):
            assert_same(one, other)
    assert (spawned > 20) == (method in PARALLEL)


def assert_same(one: ThreadTokens, other: ThreadTokens) -> None:
    for field in dataclasses.fields(ThreadTokens):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        np.testing.assert_array_equal(mine, theirs)
        assert np.asarray(mine).dtype == np.asarray(theirs).dtype, field.name


def test_small_trees_are_stored_in_small_integers():
    """And no larger ones than the vocabulary and the limits ask for."""
    small = stored_types(
        65_536,
        Bounds(
            window=65_535,
            max_thread_tokens=65_535,
            max_threads=32_768,
            children=65_536,
            max_depth=255,
        ),
    )
    assert {name: dtype.itemsize for name, dtype in small.items()} == {
        **dict.fromkeys(
            ("tokens", "position", "hidden_block", "length", "parent", "round", "child"), 2
        ),
        **dict.fromkeys(("sampled", "depth"), 1),
    }
    large = stored_types(
        65_537,
        Bounds(
            window=65_536,
            max_thread_tokens=65_536,
            max_threads=32_769,
            children=65_537,
            max_depth=256,
        ),
    )
    wider = {name for name, dtype in large.items() if dtype.itemsize == 2 * small[name].itemsize}
    assert wider == {*small} - {"sampled"}
    with pytest.raises(ValueError, match="4294967296 does not fit into 32 bits"):
        stored_types(2**32 + 1, Bounds(1, 1, 1, 1, 1))


LARGE = np.array([BOS, 65_535, 65_536, 128_000, 199_999], np.int32)


def large_tree() -> list[ThreadTokens]:
    zeros = np.zeros(LARGE.size, np.int32)
    place = np.arange(LARGE.size, dtype=np.int32)
    return [ThreadTokens(LARGE, place, zeros, zeros > 0, NO_PARENT, 0, 0, 0)]


def test_tokens_of_a_large_vocabulary_keep_their_ids():
    """In 16 bits 128,000 would be 62,464, and 65,536 `<pad>`."""
    streams = large_tree()
    stored = flatten(streams, stored_types(200_000, Bounds(8, 8, 1, 1, 0)))
    assert unflatten(stored)[0].tokens.tolist() == LARGE.tolist()
    with pytest.raises(
        ValueError, match="demonstration: tokens 65536 does not fit into uint16: 0 to 65535"
    ):
        flatten(streams, stored_types(32, Bounds(8, 8, 1, 1, 0)))


@pytest.mark.parametrize(
    ("feature", "broken"),
    [
        ("position", {"position": np.full(LARGE.size, 70_000)}),
        ("hidden_block", {"hidden_block": np.full(LARGE.size, -1)}),
        ("parent", {"parent": 40_000}),
        ("round", {"round": 65_536}),
        ("depth", {"depth": 256}),
        ("child", {"child": 65_536}),
    ],
)
def test_what_does_not_fit_is_refused_and_never_wraps(feature, broken):
    (stream,) = large_tree()
    with pytest.raises(ValueError, match=f"demonstration: {feature} .* does not fit into"):
        flatten(
            [dataclasses.replace(stream, **broken)], stored_types(200_000, Bounds(8, 8, 1, 1, 0))
        )


def test_large_vocabulary_data_come_back_from_disk(tmp_path):
    streams = large_tree()
    types = stored_types(200_000, Bounds(8, 8, 1, 1, 0))
    dataset.write(tmp_path, "sos", {"train": lambda: iter([flatten(streams, types)])}, types)
    (example,) = (dataset.read(tmp_path, "sos", "train")[k] for k in range(1))
    assert unflatten(example)[0].tokens.tolist() == LARGE.tolist()
    assert example["tokens"].dtype == np.uint32
    assert example["position"].dtype == np.uint16


def test_a_lie_in_a_stream_is_found():
    streams = tokenize_tree(TWO_SPAWNS, LETTERS)
    for place, what in ((6, "messages of spawn 0"), (12, "spawn 0 joins"), (21, "spawn 1 joins")):
        tokens = streams[0].tokens.copy()
        tokens[place] = LETTERS.encode("b")[0]
        with pytest.raises(ValueError, match=what):
            read_thread([dataclasses.replace(streams[0], tokens=tokens), *streams[1:]], LETTERS)


def bounds_of(limits: Limits) -> Bounds:
    return Bounds(
        **{field.name: getattr(limits, field.name) for field in dataclasses.fields(Bounds)}
    )


def script(streams: list[ThreadTokens]) -> dict[tuple[int, ...], int]:
    """What the demonstrator writes next in every context that he sees."""
    table: dict[tuple[int, ...], int] = {}
    for stream in streams:
        seen: list[int] = []
        for token, position, sampled in zip(
            stream.tokens, stream.position, stream.sampled, strict=True
        ):
            del seen[int(position) :]
            if sampled:
                assert table.setdefault(tuple(seen), int(token)) == token
            seen.append(int(token))
    return table


def replayed(streams: list[ThreadTokens], limits: Limits) -> ThreadForest:
    """What the reference rollout records when the policy is the demonstrator."""
    table = script(streams)

    def logits(seen: list[int]) -> np.ndarray:
        return np.eye(64, dtype=np.float32)[table[tuple(seen)]] * 50

    prompt = streams[0].tokens[: int(np.argmax(streams[0].sampled))].tolist()
    return interpret(logits, make_prompts([prompt], len(prompt)), 0, jax.random.key(0), limits)


@pytest.mark.parametrize("render", ["compact", "sos"])
@pytest.mark.parametrize(("method", "depth"), [("apr", 1), ("apr-nested", 2)])
def test_streams_are_what_a_rollout_of_the_demonstrator_records(method, depth, render):
    limits = Limits(window=600, max_thread_tokens=800, max_threads=61, children=15, max_depth=depth)
    threads, tokenizer, _ = demonstrations(method, render, 40)
    trees = [tokenize_tree(thread, tokenizer) for thread in threads]
    trees = [streams for streams in trees if not broken_bound(streams, bounds_of(limits))]
    trees = sorted(
        trees,
        key=lambda streams: (-streams[-1].depth, sum(len(stream.tokens) for stream in streams)),
    )[:5]
    assert max(stream.depth for streams in trees for stream in streams) == depth
    trees.append(tokenize_tree(TWO_SPAWNS, LETTERS))
    for streams in trees:
        forest = replayed(streams, limits)
        assert int(forest.children) == len(streams) - 1
        assert int(forest.sequential_tokens) == sequential_tokens(streams)
        # A nested spawn leaves its children threads that they don't use; a data set does without
        # the gaps.
        used = np.flatnonzero(forest.length)
        place_of = {
            NO_PARENT: NO_PARENT,
            **{int(thread_index): place for place, thread_index in enumerate(used)},
        }
        for thread_index, stream in zip(used, streams, strict=True):
            length = int(forest.length[thread_index])
            recorded = {
                name: getattr(forest, name)[thread_index]
                for name in ("tokens", "position", "hidden_block", "sampled")
            }
            places = {
                name: int(getattr(forest, name)[thread_index])
                for name in ("parent", "round", "depth", "child")
            }
            places["parent"] = place_of[places["parent"]]
            assert_same(
                stream,
                ThreadTokens(
                    **{name: field[:length] for name, field in recorded.items()}, **places
                ),
            )


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        (Limits(window=18, max_thread_tokens=28, max_threads=4, children=2), ""),
        (Limits(window=17, max_thread_tokens=28, max_threads=4, children=2), "dropped_window"),
        (
            Limits(window=18, max_thread_tokens=27, max_threads=4, children=2),
            "dropped_max_thread_tokens",
        ),
        (Limits(window=18, max_thread_tokens=28, max_threads=3, children=2), "dropped_threads"),
        (Limits(window=18, max_thread_tokens=28, max_threads=4, children=1), "dropped_threads"),
        (
            Limits(window=18, max_thread_tokens=28, max_threads=4, children=2, max_depth=0),
            "dropped_threads",
        ),
    ],
)
def test_demonstration_is_dropped_exactly_when_rollout_truncates_it(limits, broken):
    streams = tokenize_tree(TWO_SPAWNS, LETTERS)
    assert broken_bound(streams, bounds_of(limits)) == broken
    # Fewer children answer differently, and the script knows no such context.
    if broken != "dropped_threads":
        assert bool(replayed(streams, limits).truncations) == bool(broken)


@pytest.mark.parametrize(("max_threads", "room"), [(11, False), (12, True)])
def test_nested_spawns_need_the_slots_that_their_thread_gets(max_threads, room):
    """Of 11 threads below the root two go to its children; the nine that are left make three shares
    of three.
    """
    inner = Thread("e", (Spawn((leaf("c"), leaf("d"), leaf("f"))),), "")
    streams = tokenize_tree(Thread("a", (Spawn((leaf("b"), inner)),), ""), LETTERS)
    limits = Limits(
        window=40, max_thread_tokens=40, max_threads=max_threads, children=3, max_depth=2
    )
    assert broken_bound(streams, bounds_of(limits)) == ("" if room else "dropped_threads")
    if room:
        assert not replayed(streams, limits).refusals.any()
    else:
        # A child is refused, and the script knows no thread that is joined two answers.
        with pytest.raises(KeyError):
            replayed(streams, limits)
