"""The tokenizer: exact round trips, control pieces out of reach of any text, determinism, readable
errors.
"""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.errors import UsageError
from apr_jax.text import tokenizer as module
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import CONTROL_PIECES
from apr_jax.threads import protocol

ALPHABET = string.digits + string.ascii_letters + "<>/,:;=+-*# \n\t'[]"
PHRASES = ("Moving to Node #", "Moving ", "\nCurrent State: ", " == ", "<spawn", "/joined>")
TOKENIZER = SentencePieceTokenizer.train([ALPHABET], PHRASES)


def test_control_pieces_are_those_of_the_protocol():
    assert module.CONTROL_PIECES == protocol.CONTROL_PIECES
    assert TOKENIZER.pieces[: len(CONTROL_PIECES)] == CONTROL_PIECES
    for name in (
        "PAD",
        "BOS",
        "EOS",
        "UNK",
        "SPAWN",
        "MSG",
        "END_SPAWN",
        "JOINED",
        "END_JOINED",
        "JOIN",
    ):
        assert getattr(module, name) == getattr(protocol, name), name


@given(
    st.lists(st.one_of(st.sampled_from(CONTROL_PIECES + PHRASES), st.text(ALPHABET)), max_size=12)
)
def test_round_trip_is_exact_without_control_ids(parts):
    text = "".join(parts)
    ids = TOKENIZER.encode(text)
    assert all(len(CONTROL_PIECES) <= token < TOKENIZER.vocab_size for token in ids)
    assert TOKENIZER.decode(ids) == text
    assert tokenizer_from_bytes(TOKENIZER.to_bytes()).encode(text) == ids


@pytest.mark.parametrize("text", [" ", "  a", "a  ", "\n\n", " \n ", "", "12", "\t"])
def test_white_space_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_digits_are_single_and_the_longest_phrase_wins():
    assert len(TOKENIZER.encode("1234567890")) == 10
    ids = TOKENIZER.encode("Moving to Node #7")
    assert len(ids) == 2
    assert TOKENIZER.decode(ids[:1]) == "Moving to Node #"


def test_character_found_only_in_phrases_is_known():
    """It is a token by itself, too."""
    tokenizer = SentencePieceTokenizer.train(["1234"], ("12", "34", "123"))
    assert [tokenizer.pieces[token] for token in tokenizer.encode("412341")] == [
        "4",
        "123",
        "4",
        "1",
    ]


def test_control_ids_are_dropped_when_decoding():
    one, two = TOKENIZER.encode("12")
    assert (
        TOKENIZER.decode([*range(len(CONTROL_PIECES)), one, module.JOIN, two, module.EOS]) == "12"
    )


@pytest.mark.parametrize(
    ("text", "named"), [("22 é 3", "'é'"), ("1\u25812", r"'\u2581'"), ("x\ud800", r"'\\ud800'")]
)
def test_an_unknown_character_is_named(text, named):
    with pytest.raises(UsageError, match=f"(?s)character {named}"):
        TOKENIZER.encode(text)


def test_training_is_deterministic_and_silent(capfd):
    texts = ["3+4=7", "12-5=7\n", "a b"]
    assert (
        SentencePieceTokenizer.train(texts).to_bytes()
        == SentencePieceTokenizer.train(iter(texts)).to_bytes()
    )
    assert capfd.readouterr() == ("", "")
    assert SentencePieceTokenizer.train(texts).vocab_size == len(CONTROL_PIECES) + len(
        set("".join(texts))
    )


def test_a_text_of_any_length_is_learnt_from():
    assert SentencePieceTokenizer.train(["1" * 100_000 + "é"]).encode("é")


def test_bad_models_and_texts_are_refused():
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"rubbish")
    with pytest.raises(ValueError, match="no text"):
        SentencePieceTokenizer.train(["", ""])
    with pytest.raises(ValueError, match="stands for a space"):
        SentencePieceTokenizer.train(["a\u2581"])
    with pytest.raises(ValueError, match="are control pieces"):
        SentencePieceTokenizer.train(["a"], ["<join>"])
