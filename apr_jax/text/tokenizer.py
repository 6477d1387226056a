"""Text to token ids and back: SentencePiece, a piece a character, plus whole phrases where a trace
repeats boilerplate.

The control pieces of the thread protocol are SentencePiece *control symbols*: they have ids, but no
text encodes to them, so a text that spells "<spawn>" is seven harmless characters. Needs no JAX.
"""

import io
import itertools
from collections.abc import Iterable, Sequence

import sentencepiece

from apr_jax.errors import UsageError

CONTROL_PIECES = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<spawn>",
    "<msg>",
    "</spawn>",
    "<joined>",
    "</joined>",
    "<join>",
)
PAD, BOS, EOS, UNK, SPAWN, MSG, END_SPAWN, JOINED, END_JOINED, JOIN = range(len(CONTROL_PIECES))

# What SentencePiece writes for a space in its pieces; as text it could not be told from one.
_SPACE = "\u2581"
_MOST_PIECES = 8_000
_LONGEST_TEXT = 1 << 24  # Bytes; SentencePiece would skip longer texts without a word.


class Tokenizer:
    """A trained tokenizer; immutable.

    Args:
      model: the serialized SentencePiece model.

    Raises:
      ValueError: `model` is no such thing, or its control pieces are not those of the thread
        protocol.
    """

    def __init__(self, model: bytes):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer: not a SentencePiece model ({len(model)} bytes): {error}"
            ) from None
        self.pieces: tuple[str, ...] = tuple(
            self._processor.id_to_piece(list(range(len(self._processor))))
        )
        if self.pieces[: len(CONTROL_PIECES)] != CONTROL_PIECES:
            raise ValueError(
                f"tokenizer: begins with {self.pieces[: len(CONTROL_PIECES)]}, not with"
                f" {CONTROL_PIECES}"
            )

    @classmethod
    def train(
        cls, texts: Iterable[str], phrases: Sequence[str] = (), alphabet: str = ""
    ) -> "Tokenizer":
        """Learns the characters of `texts`; a function of its arguments alone.

        Args:
          texts: at least one that is not empty.
          alphabet: characters that are learned whether or not a text holds them.
          phrases: strings that become one piece each; where several match at one place, the longest
            wins.

        Raises:
          ValueError: there is no text, or it holds the character that SentencePiece uses for a
            space; a phrase is a control piece.
        """
        texts = [text for text in texts if text]
        if not texts:
            raise ValueError("tokenizer: no text to train on")
        if any(_SPACE in text for text in (*texts, *phrases, alphabet)):
            raise ValueError(
                f"tokenizer: a text holds {_SPACE!r}, which stands for a space inside SentencePiece"
            )
        if taken := set(phrases) & set(CONTROL_PIECES):
            raise ValueError(f"tokenizer: phrases {sorted(taken)} are control pieces")
        # SentencePiece cuts the line end off a text before it counts; inside a text it is a
        # character like any other. And it counts no character that a phrase took: each stands alone
        # once, too.
        alphabet = "".join(sorted(set(alphabet).union(*texts)))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(texts, [alphabet[-1] + alphabet], alphabet),
            model_writer=model,
            model_type="char",
            vocab_size=_MOST_PIECES,
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

    @classmethod
    def from_bytes(cls, model: bytes) -> "Tokenizer":
        """The inverse of `to_bytes`; raises ValueError if they are damaged."""
        return cls(model)

    def to_bytes(self) -> bytes:
        """The serialized SentencePiece model: what `tokenizer.model` and checkpoints hold."""
        return self._model

    @property
    def vocab_size(self) -> int:
        """V, control pieces included."""
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of the text's pieces, never a control id; "" gives none.

        Raises:
          UsageError: names the first character that the tokenizer never saw.
        """
        try:
            ids: list[int] = self._processor.encode(text)
        except RuntimeError:  # Half of a surrogate pair: nothing that UTF-8 can hold.
            raise _unknown(
                next(character for character in text if "\ud800" <= character <= "\udfff"), text
            ) from None
        if UNK in ids:
            pieces = self._processor.encode(text, return_type="proto").pieces
            raise _unknown(next(piece.surface for piece in pieces if piece.id == UNK)[0], text)
        if _SPACE in text:
            raise _unknown(_SPACE, text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; control ids are dropped.

        `decode(encode(text)) == text`, byte for byte.
        """
        text: str = self._processor.decode(
            [int(token) for token in ids if token >= len(CONTROL_PIECES)]
        )
        return text

    def show(self, ids: Iterable[int]) -> str:
        """The text of the ids, control pieces included, but not `<pad>`, `<bos>`, `<eos>`,
        `<unk>`.
        """
        parts: list[str] = []
        plain: list[int] = []
        for token in map(int, ids):
            if SPAWN <= token <= JOIN:
                parts += [self.decode(plain), CONTROL_PIECES[token]]
                plain = []
            else:
                plain.append(token)
        return "".join([*parts, self.decode(plain)])


def _unknown(character: str, text: str) -> UsageError:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return UsageError(
        f"text {shown!r}: the character {character!r} is unknown to the tokenizer; "
        "use only characters that its training demonstrations hold"
    )
