"""What every tokenizer does, and the control pieces of the thread protocol.

The control pieces have the ids below `len(CONTROL_PIECES)`, whatever the tokenizer. They stand for
the acts of a thread, and no text encodes to them: a text that spells "<spawn>" cannot spawn.
"""

import abc
from collections.abc import Iterable

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


class Tokenizer(abc.ABC):
    """Turns texts into ids and back; it never changes."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """V, the number of ids, those of the control pieces included."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encodes a text to ids, never to a control id; "" gives no ids.

        Raises:
          UsageError: the tokenizer cannot write a character of the text; the message names it.
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to a text; control ids are dropped."""

    @abc.abstractmethod
    def to_bytes(self) -> bytes:
        """Serializes the tokenizer; `tokenizer_from_bytes` makes it again.

        Data folders, checkpoints and exported models hold these bytes. Two tokenizers are the same
        if their bytes are.
        """

    def show(self, ids: Iterable[int]) -> str:
        """Decodes ids to a text in which the control pieces of spawns and joins are spelled out.

        `<pad>`, `<bos>`, `<eos>` and `<unk>` are dropped.
        """
        parts: list[str] = []
        text_ids: list[int] = []  # Those since the last control piece.
        for token in map(int, ids):
            if SPAWN <= token <= JOIN:
                parts += [self._spell(text_ids), CONTROL_PIECES[token]]
                text_ids = []
            else:
                text_ids.append(token)
        return "".join([*parts, self._spell(text_ids)])

    def _spell(self, ids: list[int]) -> str:
        """Decodes ids among which no control piece is spelled out."""
        return self.decode(ids)


def shortened(text: str) -> str:
    """Returns a text that is short enough for a message."""
    return text if len(text) <= 60 else text[:57] + "..."
