"""A SentencePiece tokenizer whose pieces are characters, and whole phrases where texts repeat them.

The control pieces of the thread protocol are SentencePiece *control symbols*: they have ids, but no
text encodes to them. A text that spells "<spawn>" is seven harmless characters.
"""

import io
import itertools
from collections.abc import Iterable, Sequence

import sentencepiece

from apr_jax.errors import UsageError
from apr_jax.text.tokenizer import (
    BOS,
    CONTROL_PIECES,
    EOS,
    PAD,
    SPAWN,
    UNK,
    Tokenizer,
    shortened,
)

# SentencePiece writes this character for a space, so a text that holds it would come back changed.
_SPACE = "\u2581"
_MAX_PIECES = 8_000
_LONGEST_TEXT = 1 << 24  # In bytes; SentencePiece would skip longer texts without a word.


class SentencePieceTokenizer(Tokenizer):
    """A trained tokenizer, which never changes.

    Args:
      model: the serialized SentencePiece model.

    Raises:
      ValueError: `model` is not a SentencePiece model, or its control pieces are not those of the
        thread protocol.
    """

    def __init__(self, model: bytes):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer: not a SentencePiece model ({len(model)} bytes): {error}"
            ) from None
        all_ids = list(range(len(self._processor)))
        self.pieces: tuple[str, ...] = tuple(self._processor.id_to_piece(all_ids))
        first_pieces = self.pieces[: len(CONTROL_PIECES)]
        if first_pieces != CONTROL_PIECES:
            raise ValueError(f"tokenizer: begins with {first_pieces}, not with {CONTROL_PIECES}")

    @classmethod
    def train(
        cls, texts: Iterable[str], phrases: Sequence[str] = (), alphabet: str = ""
    ) -> "SentencePieceTokenizer":
        """Trains a tokenizer on the characters of `texts`.

        The result depends on the arguments alone.

        Args:
          texts: texts to learn from, at least one of which is not empty.
          phrases: strings that become one piece each. Where several match at one place, the longest
            wins.
          alphabet: characters that are learned whether or not a text holds them.

        Raises:
          ValueError: there is no text, a text holds the character that SentencePiece uses for a
            space, or a phrase is a control piece.
        """
        texts = [text for text in texts if text]
        if not texts:
            raise ValueError("tokenizer: no text to train on")
        if any(_SPACE in text for text in (*texts, *phrases, alphabet)):
            raise ValueError(
                f"tokenizer: a text holds {_SPACE!r}, which stands for a space inside SentencePiece"
            )
        taken = set(phrases) & set(CONTROL_PIECES)
        if taken:
            raise ValueError(f"tokenizer: phrases {sorted(taken)} are control pieces")

        # SentencePiece does not count a line end at the end of a text, nor a character that is part
        # of a phrase. So there is one more text in which every character stands before the end, and
        # each character is a text of its own.
        alphabet = "".join(sorted(set(alphabet).union(*texts)))
        every_character = alphabet[-1] + alphabet
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(texts, [every_character], alphabet),
            model_writer=model,
            model_type="char",
            vocab_size=_MAX_PIECES,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=_LONGEST_TEXT,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            pad_piece=CONTROL_PIECES[PAD],
            bos_piece=CONTROL_PIECES[BOS],
            eos_piece=CONTROL_PIECES[EOS],
            unk_piece=CONTROL_PIECES[UNK],
            control_symbols=list(CONTROL_PIECES[SPAWN:]),
            user_defined_symbols=[phrase.replace(" ", _SPACE) for phrase in phrases],
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def to_bytes(self) -> bytes:
        """Returns the serialized SentencePiece model."""
        return self._model

    @property
    def vocab_size(self) -> int:
        """V, the number of pieces, control pieces included."""
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Encodes a text to the ids of its pieces, never to a control id; "" gives no ids.

        Raises:
          UsageError: the text holds a character that the tokenizer does not know; the message names
            the first one.
        """
        try:
            ids: list[int] = self._processor.encode(text)
        except RuntimeError:  # The text holds half a surrogate pair, which UTF-8 cannot encode.
            surrogates = (character for character in text if "\ud800" <= character <= "\udfff")
            raise _unknown(next(surrogates), text) from None
        if UNK in ids:
            pieces = self._processor.encode(text, return_type="proto").pieces
            unknown = next(piece.surface for piece in pieces if piece.id == UNK)
            raise _unknown(unknown[0], text)
        if _SPACE in text:
            raise _unknown(_SPACE, text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to a text; control ids are dropped.

        `decode(encode(text)) == text`, byte for byte.
        """
        text_ids = [int(token) for token in ids if token >= len(CONTROL_PIECES)]
        text: str = self._processor.decode(text_ids)
        return text


def _unknown(character: str, text: str) -> UsageError:
    """Returns the error for a character that a tokenizer does not know."""
    return UsageError(
        f"text {shortened(text)!r}: the character {character!r} is unknown to the tokenizer; "
        "use only characters that its training demonstrations hold"
    )
