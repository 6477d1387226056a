"""`draw` by itself, because engine and interpreter share it: its log-probs, its cuts, its masks,
its noise.
"""

import jax
import numpy as np
import pytest
from scipy import stats

from apr_jax.threads import keys, sampling
from apr_jax.threads import protocol as p
from apr_jax.threads.sampling import _kept, draw, gumbel_noise, gumbel_of_words, token_classes

V = 16
NAN = float("nan")
_draw = jax.jit(draw)


def run(logits, *, index=None, key=None, temperature=1.0, top_k=0, top_p=1.0, allowed=p.ALLOW_ALL):
    """`draw` on [W, V] logits; all else is one value for all rows, or one a row.

    By default rows differ in their index.
    """
    rows = len(logits)

    def each(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), rows)

    key = np.asarray([7, 9], np.uint32) if key is None else key
    token, logprob = _draw(
        np.asarray(logits, np.float32),
        np.broadcast_to(np.asarray(key, np.uint32), (rows, 2)),
        each(np.arange(rows) if index is None else index, np.int32),
        each(temperature, np.float32),
        each(top_k, np.int32),
        each(top_p, np.float32),
        each(allowed, np.uint8),
    )
    return np.asarray(token), np.asarray(logprob)


def twin(logits, temperature, top_k, top_p, allowed) -> np.ndarray:
    """[V] log-probs, -inf where a token is not drawn: step by step as docs/protocol.md has it, in
    float64.
    """
    classes = [
        p.ALLOW_OTHER,
        p.ALLOW_OTHER,
        p.ALLOW_EOS,
        p.ALLOW_OTHER,
        p.ALLOW_SPAWN,
        p.ALLOW_MSG,
        p.ALLOW_END_SPAWN,
    ]
    classes += [p.ALLOW_OTHER, p.ALLOW_OTHER, p.ALLOW_JOIN] + [p.ALLOW_TEXT] * (V - 10)
    left = [token for token in range(V) if classes[token] & allowed]
    weights = np.asarray(logits, np.float64) / (temperature or 1.0)
    if temperature:
        left = sorted(left, key=lambda token: (-weights[token], token))[: top_k or V]
        total = sum(np.exp(weights[left]))
        kept = []
        reached = 0.0
        for token in left:
            if not kept or reached < top_p or top_p == 1:
                kept.append(token)
                reached += np.exp(weights[token]) / total
        left = kept
    logprobs = np.full(V, -np.inf)
    logprobs[left] = weights[left] - np.log(np.sum(np.exp(weights[left])))
    return logprobs


def blocks(thread_key, place):
    return jax.random.key_data(jax.random.split(keys.token_key(thread_key, place), V // 2))


def noise_twin(high, low) -> np.ndarray:
    """-log(-log(u)) in extended precision, 1 - u = (the 64-bit number high, low + 1/2) / 2^64."""
    number = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    whole = np.longdouble(2) ** 64
    # Near either end of (0, 1) one of the two has lost what the other still holds.
    from_one, from_zero = (n.astype(np.longdouble) / whole + 0.5 / whole for n in (number, ~number))
    logs = np.where(from_one < 0.5, np.log1p(-np.minimum(from_one, 0.5)), np.log(from_zero))
    return np.asarray(-np.log(-logs), np.float64)


def test_every_row_draws_by_its_own_settings():
    """Thousands of rows with mixed settings in one batch: the log-probs are the twin's, and so is
    the token given the noise.
    """
    rng = np.random.default_rng(0)
    rows = 4000
    logits = np.where(
        rng.random((rows, 1)) < 0.5, rng.normal(size=(rows, V)) * 2, rng.integers(0, 3, (rows, V))
    )
    logits = logits.astype(np.float32)
    temperature = rng.choice([0.0, 0.5, 1.0, 2.0], rows)
    top_k = rng.choice([0, 1, 2, 5, V, 100], rows)
    top_p = rng.choice([1.0, 0.9, 0.37, 1e-6], rows)
    allowed = np.where(rng.random(rows) < 0.5, p.ALLOW_ALL, rng.integers(1, 128, rows))
    noise_keys = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    index = rng.integers(0, 1000, rows)
    tokens, logprobs = run(
        logits,
        key=noise_keys,
        index=index,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        allowed=allowed,
    )

    # [rows, V / 2, 2]: a block holds the two words of two tokens.
    words = np.asarray(jax.jit(jax.vmap(blocks))(noise_keys, index.astype(np.int32)))
    high = np.concatenate([words[..., 0], words[..., 1]], axis=1)
    low = np.concatenate([words[..., 1], words[..., 0]], axis=1)
    noises = noise_twin(high, low)
    for row in range(rows):
        expected = twin(logits[row], temperature[row], top_k[row], top_p[row], allowed[row])
        noisy = expected + (noises[row] if temperature[row] else 0.0)
        assert tokens[row] == np.argmax(noisy), row
        assert abs(logprobs[row] - expected[tokens[row]]) < 1e-5, row


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {10, 11}),
        ({"top_k": 3}, {10, 11, 12}),
        ({"top_p": 0.61}, {10, 11, 12}),  # Two of the three equal ones have 0.596.
        ({"top_p": 0.58}, {10, 11}),
        ({"top_p": 0.2}, {10}),
        ({"top_k": 2, "top_p": 0.6}, {10, 11}),  # Each has a half of what top-k left.
        ({"top_k": 2, "top_p": 0.5}, {10}),
        ({"top_k": 4, "allowed": p.ALLOW_TEXT + p.ALLOW_EOS}, {10, 11, 12, p.EOS}),
        ({"allowed": p.ALLOW_JOIN}, {p.JOIN}),
        ({"allowed": p.ALLOW_MSG + p.ALLOW_SPAWN}, {p.MSG, p.SPAWN}),
    ],
)
def test_what_is_left_by_hand(settings, kept):
    """Tokens 10, 11 and 12 are equally likely, <eos> less, all others still less.

    Of equal ones lower ids stay.
    """
    logits = np.full(V, -2.0)
    logits[[10, 11, 12]], logits[p.EOS] = 2.0, 0.0
    tokens, logprobs = run(np.tile(logits, (4000, 1)), **settings)
    assert set(tokens.tolist()) == kept
    share = np.exp(logits[sorted(kept)])
    expected = dict(zip(sorted(kept), np.log(share / share.sum()), strict=True))
    np.testing.assert_allclose(logprobs, [expected[token] for token in tokens.tolist()], atol=1e-5)


def test_a_top_p_of_one_cuts_nothing():
    """In float32 the likeliest token alone reaches 1; those behind it are drawn all the same,
    however seldom.
    """
    logits = np.zeros((2, V), np.float32)
    logits[:, 10] = 40.0
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    kept = np.asarray(_kept(logprobs, np.asarray([0, 3], np.int32), np.ones(2, np.float32)))
    assert kept[0].all()
    assert np.flatnonzero(kept[1]).tolist() == [0, 1, 10]
    less = np.asarray(_kept(logprobs, np.zeros(2, np.int32), np.full(2, 0.999, np.float32)))
    assert less.sum(axis=1).tolist() == [1, 1]


def test_greedy_takes_the_most_likely_and_records_temperature_one():
    logits = np.zeros((1, V))
    logits[0, [11, 13, p.SPAWN]] = 1.0, 1.0, 3.0
    token, logprob = run(logits, temperature=0.0, top_k=1, top_p=0.1)
    assert token == [p.SPAWN]
    np.testing.assert_allclose(logprob, 3 - np.log(np.exp(3) + 2 * np.e + 13), atol=1e-5)
    token, logprob = run(logits, temperature=0.0, allowed=p.ALLOW_TEXT)
    assert token == [11]  # Of the two equal ones the lower.
    np.testing.assert_allclose(logprob, 1 - np.log(2 * np.e + 4), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_k": 8, "top_p": 0.8, "temperature": 1.5},
        {"allowed": p.ALLOW_TEXT + p.ALLOW_JOIN, "temperature": 0.8},
    ],
)
def test_draws_follow_the_probabilities(settings):
    """200,000 draws, chi-square at one in 10^5; what has no probability is never drawn."""
    logits = np.random.default_rng(5).normal(size=V)
    draws = 200_000
    tokens, _ = run(np.tile(logits, (draws, 1)), **settings)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "allowed": p.ALLOW_ALL} | settings
    probs = np.exp(twin(logits, **full))
    counts = np.bincount(tokens, minlength=V)
    assert (counts[probs == 0] == 0).all()
    assert fits(counts[probs > 0], draws * probs[probs > 0])


def fits(counts: np.ndarray, expected: np.ndarray) -> bool:
    return bool(
        ((counts - expected) ** 2 / expected).sum() < stats.chi2.ppf(1 - 1e-5, counts.size - 1)
    )


def test_noise_is_exact_at_both_ends():
    """Noise follows from 64 bits by a function that rises and falls with them: its values, from the
    rarest to the commonest.

    With 23 bits nothing above 15.9 is ever drawn, which is what a token of 1e-7 needs.
    """
    rng = np.random.default_rng(0)
    ends = np.asarray(
        [0, 1, 2, 1000, 2**31 - 1, 2**31, 2**32 - 1000, 2**32 - 2, 2**32 - 1], np.uint32
    )
    high = np.concatenate(
        [np.repeat(ends, ends.size), rng.integers(0, 2**32, 5000, dtype=np.uint32)]
    )
    low = np.concatenate([np.tile(ends, ends.size), rng.integers(0, 2**32, 5000, dtype=np.uint32)])
    found = np.asarray(jax.jit(gumbel_of_words)(high, low))
    assert found.dtype == np.float32
    assert found.max() > 45
    assert found.min() < -3.79
    np.testing.assert_allclose(found, noise_twin(high, low), rtol=3e-7, atol=3e-7)


def test_noise_is_bitwise_equal_however_computed():
    """Alone and in a batch, whole and over eight devices; an odd vocabulary, so that one word is
    left over.
    """
    vocab = 1001
    rows = 16
    key_data = np.random.default_rng(1).integers(0, 2**32, (rows, 2), dtype=np.uint32)

    def noise(data):
        return gumbel_noise(jax.random.wrap_key_data(data, impl=keys.KEYS), vocab)

    batch = np.asarray(jax.jit(jax.vmap(noise))(key_data))
    alone = jax.jit(noise)
    for row in range(rows):
        np.testing.assert_array_equal(batch[row], np.asarray(alone(key_data[row])))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    spread = jax.device_put(
        key_data, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    )
    np.testing.assert_array_equal(batch, np.asarray(jax.jit(jax.vmap(noise))(spread)))
    np.testing.assert_array_equal(batch[0], np.asarray(noise(key_data[0])))
    assert np.unique(batch).size > 0.999 * batch.size


def counted_draws(logits: np.ndarray, draws: int, chunk: int) -> np.ndarray:
    """How often each token is drawn from the same [V] logits, a few rows at a time: [draws, V]
    would fill the memory.
    """

    @jax.jit
    def drawn(chunks):
        def some(index):
            rows = jax.numpy.broadcast_to(logits, (chunk, logits.size))
            same = jax.numpy.zeros(chunk, np.int32)
            key = jax.numpy.tile(jax.numpy.asarray([[7, 9]], np.uint32), (chunk, 1))
            return draw(
                rows,
                key,
                index,
                same + 1.0,
                same,
                same + 1.0,
                (same + p.ALLOW_ALL).astype(np.uint8),
            )[0]

        return jax.lax.map(some, chunks)

    tokens = np.asarray(drawn(np.arange(draws, dtype=np.int32).reshape(-1, chunk)))
    return np.bincount(tokens.reshape(-1), minlength=logits.size)


def test_draws_from_a_large_vocabulary_follow_the_probabilities():
    """Tokens of very different likelihood at all places of an odd vocabulary, counted in 30
    groups.
    """
    vocab = 20_011
    draws = 600
    logits = (2 * np.random.default_rng(6).normal(size=vocab)).astype(np.float32)
    counts = counted_draws(logits, draws, 50)
    probs = np.exp(logits.astype(np.float64))
    group = np.random.default_rng(7).integers(0, 30, vocab)
    expected = draws * np.bincount(group, probs / probs.sum())
    assert fits(np.bincount(group, counts), expected)


@pytest.mark.slow  # 840 million numbers: what is as rare as one in ten million takes so many.
def test_the_tail_of_a_large_vocabulary_is_drawn():
    """One token of 99% and 131,072 that share 1%: with noise of 23 bits 24 draws of the tail, 64
    expected.
    """
    tail = 131_072
    draws = 6_400
    logits = np.full(1 + tail, np.log(0.01 / tail), np.float32)
    logits[0] = np.log(0.99)
    counts = counted_draws(logits, draws, 16)
    assert fits(np.asarray([counts[0], counts[1:].sum()]), draws * np.asarray([0.99, 0.01]))


def test_the_chi_square_can_fail():
    logits = np.random.default_rng(5).normal(size=V)
    draws = 200_000
    tokens, _ = run(np.tile(logits, (draws, 1)), temperature=1.02)
    assert not fits(
        np.bincount(tokens, minlength=V), draws * np.exp(twin(logits, 1.0, 0, 1.0, p.ALLOW_ALL))
    )


def child_keys(parent, rounds, children):
    return np.asarray(
        jax.jit(jax.vmap(keys.child_key, (None, 0, 0)))(
            parent, np.asarray(rounds, np.int32), np.asarray(children, np.int32)
        )
    )


def test_noise_of_two_tokens_is_independent():
    """Neighbours in a stream, siblings, spawns of one thread, trees of one rollout, parent and
    child: pairs of draws from a uniform distribution fall evenly on all pairs of tokens.
    """
    draws = 100_000
    size = 4
    logits = np.full((draws, V), -np.inf, np.float32)
    logits[:, 10 : 10 + size] = 0.0
    key = np.asarray([7, 9], np.uint32)
    at = np.arange(draws)
    zero = np.zeros(draws)
    one = np.ones(draws)
    roots = np.asarray(
        jax.jit(keys.root_key)(jax.random.key(1), np.arange(2 * draws, dtype=np.int32))
    )
    pairs = {
        "places": [{"index": 2 * at}, {"index": 2 * at + 1}],
        "siblings": [{"key": child_keys(key, at, child), "index": 3} for child in (zero, one)],
        "spawns": [{"key": child_keys(key, spawn, at), "index": 3} for spawn in (zero, one)],
        "trees": [{"key": roots[::2], "index": 3}, {"key": roots[1::2], "index": 3}],
        "parent and child": [
            {"key": roots[:draws], "index": 3},
            {
                "key": jax.vmap(lambda parent: keys.child_key(parent, 0, 0))(roots[:draws]),
                "index": 3,
            },
        ],
    }
    for what, (left, right) in pairs.items():
        joint = (run(logits, **left)[0] - 10) * size + run(logits, **right)[0] - 10
        assert fits(
            np.bincount(joint, minlength=size * size), np.full(size * size, draws / size**2)
        ), what


def test_company_changes_no_bit_of_a_row():
    """Top-k, top-p or greedy on other rows of the batch: `draw` takes other branches, but each row
    keeps its own result.
    """
    rng = np.random.default_rng(2)
    rows = 64
    logits = rng.normal(size=(rows, V)).astype(np.float32) * 3
    plain = run(logits)
    for other in ({"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        values = {
            name: np.where(np.arange(rows) % 4 == 0, value, name != "top_k")
            for name, value in other.items()
        }
        token, logprob = run(logits, **values)
        alone = np.arange(rows) % 4 != 0
        np.testing.assert_array_equal(token[alone], plain[0][alone])
        np.testing.assert_array_equal(logprob[alone], plain[1][alone])


@pytest.mark.parametrize("block", [1, 2 * V, 5 * V])
def test_slots_served_some_at_a_time_draw_the_same_bits(block, monkeypatch):
    """One, two and four of twelve at a time, each with settings of its own."""
    rng = np.random.default_rng(4)
    rows = 12
    logits = rng.normal(size=(rows, V)).astype(np.float32) * 3
    settings = {
        "temperature": rng.choice([0.0, 0.7, 1.0], rows),
        "top_k": rng.choice([0, 3], rows),
        "top_p": rng.choice([0.6, 1.0], rows),
        "allowed": rng.choice([p.ALLOW_ALL, p.ALLOW_TEXT], rows),
    }
    expected = run(logits, **settings)
    monkeypatch.setattr(sampling, "_BLOCK", block)
    monkeypatch.setitem(globals(), "_draw", jax.jit(lambda *arguments: draw(*arguments)))
    assert sampling._slots_at_once(rows, V) == {1: 1, 2 * V: 2, 5 * V: 4}[block]
    for got, wanted in zip(run(logits, **settings), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("slots", [64, 512])
def test_memory_does_not_grow_with_the_slots_of_a_large_vocabulary(slots):
    """Qwen's, whose logits are 37 and 297 MiB; drawn from all at once it takes five times those."""
    vocab = 151_936

    def shaped(dtype, *shape):
        return jax.ShapeDtypeStruct((slots, *shape), dtype)

    settings = (np.int32, np.float32, np.int32, np.float32, np.uint8)
    lowered = jax.jit(draw).lower(
        shaped(np.float32, vocab), shaped(np.uint32, 2), *map(shaped, settings)
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 16 * 2**20


def test_classes_of_tokens():
    names = {p.EOS: "EOS", p.SPAWN: "SPAWN", p.MSG: "MSG", p.END_SPAWN: "END_SPAWN", p.JOIN: "JOIN"}
    expected = [
        getattr(p, f"ALLOW_{names.get(token, 'OTHER' if token < 10 else 'TEXT')}")
        for token in range(V)
    ]
    assert token_classes(V).tolist() == expected
    assert sum({*expected}) == p.ALLOW_ALL
