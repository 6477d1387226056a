"""A foreign tokenizer: its ids behind the control pieces, exact round trips, and no text that
encodes to a control piece or to one of its own special pieces.
"""

import json
import unicodedata

import pytest
import tokenizers
from helpers import foreign
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from apr_jax.errors import UsageError
from apr_jax.text.hugging_face import HuggingFaceTokenizer
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import BOS, CONTROL_PIECES, EOS, JOIN, MSG, SPAWN

THEIRS = foreign.byte_level()
EMBEDDINGS = THEIRS.get_vocab_size() + 7  # Some have no piece, as in Qwen.
TOKENIZER = HuggingFaceTokenizer.make(foreign.description(THEIRS), EMBEDDINGS)
FIRST = len(CONTROL_PIECES)
SPECIAL_IDS = {FIRST + THEIRS.token_to_id(piece) for piece in foreign.SPECIAL}
SPELLINGS = [*CONTROL_PIECES, *foreign.SPECIAL, "<|im_", "end|>", " ", "the answer", "\x1b[2J"]


def test_ids_are_theirs_behind_the_control_pieces():
    text = "The answer is 12 + 3 = 15, é\n"
    assert TOKENIZER.encode(text) == [FIRST + token for token in THEIRS.encode(text).ids]
    assert TOKENIZER.vocab_size == FIRST + EMBEDDINGS
    assert len(TOKENIZER.encode("The answer is")) < len("The answer is")
    assert TOKENIZER.token_id("<|im_end|>") == FIRST + THEIRS.token_to_id("<|im_end|>")
    assert TOKENIZER.token_id("no such piece") is None


@given(st.lists(st.one_of(st.sampled_from(SPELLINGS), st.text(max_size=8)), max_size=12))
def test_round_trip_is_exact_without_control_and_special_ids(parts):
    text = "".join(parts)
    ids = TOKENIZER.encode(text)
    assert all(FIRST <= token < FIRST + THEIRS.get_vocab_size() for token in ids)
    assert SPECIAL_IDS.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == text
    again = tokenizer_from_bytes(TOKENIZER.to_bytes())
    assert again.encode(text) == ids
    assert again.to_bytes() == TOKENIZER.to_bytes()


@pytest.mark.parametrize("piece", [*CONTROL_PIECES, *foreign.SPECIAL])
def test_a_spelled_piece_is_only_characters(piece):
    assert len(TOKENIZER.encode(piece)) > 1
    # Their own default would take a special piece of theirs for an act.
    if piece in foreign.SPECIAL:
        assert len(THEIRS.encode(piece).ids) == 1


def test_control_and_special_ids_are_dropped_when_decoding():
    (end,) = SPECIAL_IDS - {TOKENIZER.token_id(piece) for piece in foreign.SPECIAL[:2]}
    one, two = TOKENIZER.encode("1") + TOKENIZER.encode("2")
    without_piece = TOKENIZER.vocab_size - 1
    assert TOKENIZER.decode([BOS, SPAWN, one, end, JOIN, without_piece, two, EOS]) == "12"
    # A reader sees what the model wrote.
    assert TOKENIZER.show([BOS, one, end, SPAWN, MSG, two]) == "1<|im_end|><spawn><msg>2"


def test_texts_are_neither_cut_nor_padded_nor_encoded_at_random():
    theirs = foreign.byte_level()
    theirs.enable_truncation(3)
    theirs.enable_padding(length=50)
    theirs.model.dropout = 0.9
    tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), EMBEDDINGS)
    text = "Two threads are faster than one thread"
    assert tokenizer.encode(text) == TOKENIZER.encode(text)
    assert tokenizer.encode("1") == TOKENIZER.encode("1")


def test_pieces_that_the_tokenizer_puts_around_a_text_stay_away():
    theirs = foreign.byte_level()
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert theirs.encode("1").ids[0] == 1
    tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), EMBEDDINGS)
    assert tokenizer.encode("1") == TOKENIZER.encode("1")


def test_a_text_comes_back_as_the_tokenizer_normalizes_it():
    tokenizer = HuggingFaceTokenizer.make(
        foreign.description(foreign.byte_level(qwen=True)), EMBEDDINGS
    )
    apart = unicodedata.normalize("NFD", "né")
    assert len(apart) == 3
    assert tokenizer.decode(tokenizer.encode(apart)) == "né"


def test_a_normalization_that_changes_the_meaning_is_refused():
    theirs = foreign.byte_level(qwen=True)
    theirs.normalizer = normalizers.NFKC()
    tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), EMBEDDINGS)
    with pytest.raises(UsageError, match="cannot write '²' as text"):  # It would become 102.
        tokenizer.encode("10²")


@pytest.mark.parametrize("text", ["1~é", "1~\u2581", "1~\ud800"])
def test_a_character_without_a_piece_is_named(text):
    alphabet = [chr(code) for code in (10, *range(0x20, 0x7F))]
    theirs = foreign.characters(alphabet)
    tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), len(alphabet) + 1)
    assert tokenizer.decode(tokenizer.encode("1~<unk>")) == "1~<unk>"
    with pytest.raises(UsageError) as error:
        tokenizer.encode(text)
    assert f"the tokenizer cannot write {text[-1]!r} as text" in str(error.value)


def test_the_piece_of_unknown_characters_is_not_reached_by_its_spelling():
    alphabet = [chr(code) for code in (10, *range(0x20, 0x7F))]
    theirs = foreign.characters(alphabet, whole_words=True)
    assert theirs.encode("<unk>").ids == [0]
    tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), len(alphabet) + 1)
    with pytest.raises(UsageError, match="the tokenizer cannot write '<unk>' as text"):
        tokenizer.encode("<unk>")


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(UsageError, match=r"the tokenizer cannot write '\\ud800' as text"):
        TOKENIZER.encode("x\ud800")


def test_a_special_piece_that_text_can_reach_is_refused():
    """The model of this tokenizer finds "<s>" in text by itself."""
    alphabet = [chr(code) for code in (10, *range(0x20, 0x7F))]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((character, -9.0) for character in alphabet)]
    theirs = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    theirs.add_special_tokens(["<s>"])
    theirs.decoder = decoders.Fuse()
    theirs.encode_special_tokens = True
    assert 1 in theirs.encode("a<s>b").ids
    tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), len(pieces))
    assert tokenizer.decode(tokenizer.encode("a<b")) == "a<b"
    with pytest.raises(UsageError, match=r"cannot write 'a<s>b' as text; leave it out"):
        tokenizer.encode("a<s>b")


def test_a_tokenizer_that_changes_texts_is_refused():
    theirs = foreign.byte_level()
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="tokenizer: text .* the tokenizer cannot write "):
        HuggingFaceTokenizer.make(foreign.description(theirs), EMBEDDINGS)


def test_more_pieces_than_embeddings_are_refused():
    count = THEIRS.get_vocab_size()
    with pytest.raises(
        ValueError, match=f"has a piece of id {count - 1}, but the model has only {count - 1}"
    ):
        HuggingFaceTokenizer.make(foreign.description(THEIRS), count - 1)


@pytest.mark.parametrize(
    "stored",
    [
        "{",
        "{}",
        json.dumps({"embeddings": 3, "tokenizer": {"model": {"type": "\x1b[2J"}}}),
        json.dumps({"embeddings": 3, "tokenizer": []}),
        json.dumps({"embeddings": None, "tokenizer": foreign.description(THEIRS)}),
    ],
)
def test_bytes_of_no_tokenizer_are_refused_in_one_harmless_line(stored):
    with pytest.raises(ValueError, match="tokenizer: is no tokenizer.json") as error:
        tokenizer_from_bytes(stored.encode())
    assert str(error.value).isprintable()


def test_escape_sequences_of_a_special_piece_are_pictures_in_the_terminal(capsys):
    from apr_jax.io.terminal import Terminal

    theirs = foreign.byte_level(special=["<|endoftext|>", "\x1b[2Jgone"])
    tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), EMBEDDINGS)
    shown = tokenizer.show([tokenizer.token_id("\x1b[2Jgone")])
    assert shown == "\x1b[2Jgone"
    Terminal().print(shown)
    assert capsys.readouterr().out == "␛[2Jgone\n"
