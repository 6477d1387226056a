"""The tokenizer of a Hugging Face model, as its file tokenizer.json describes it.

Its ids are laid behind the control pieces of the thread protocol: id h is 10 + h here. The library
`tokenizers` reads the file; it runs no code of the model's folder.

A foreign tokenizer has special pieces of its own, such as "<|im_end|>", which end a turn or stand
for a user. A text that spells one is encoded as the characters that it consists of, so a problem or
a message cannot act for them either. Added pieces that it does not call special, such as "<think>"
of Qwen3, are text like any other.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from apr_jax.errors import UsageError
from apr_jax.text.tokenizer import CONTROL_PIECES, Tokenizer, shortened

# Fields of the JSON by which the tokenizer is stored.
_EMBEDDINGS = "embeddings"
_DESCRIPTION = "tokenizer"
# A tokenizer that does not give these back would silently change the texts of a task.
_COMMON = ("".join(map(chr, range(0x20, 0x7F))), "a  b\n\nc", "1\n")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that the library `tokenizers` reads.

    Args:
      model: the serialized tokenizer, see `make`.

    Raises:
      ValueError: `model` is no such tokenizer.
    """

    def __init__(self, model: bytes):
        self._model = model
        try:
            stored = json.loads(model)
            description = stored[_DESCRIPTION]
            self._embeddings = int(stored[_EMBEDDINGS])
            self._tokenizer = _load(description)
            self._special = _special_ids(description, self._tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"tokenizer: is no tokenizer.json ({error!r:.100})") from None

        # A piece whose id has no row in the embedding could not be read by the model.
        last = max(self._tokenizer.get_vocab().values(), default=-1)
        if last >= self._embeddings:
            raise ValueError(
                f"tokenizer: has a piece of id {last}, but the model has only"
                f" {self._embeddings} embeddings"
            )

    @classmethod
    def make(cls, description: Mapping[str, Any], embeddings: int) -> "HuggingFaceTokenizer":
        """Makes the tokenizer of a model.

        Args:
          description: content of the file tokenizer.json.
          embeddings: number of ids that the model has embeddings for. It may be larger than the
            number of pieces: many models have some that no text uses.

        Raises:
          ValueError: the library cannot read it, the model has fewer embeddings than it has pieces,
            or it does not give common characters back.
        """
        stored = {_EMBEDDINGS: embeddings, _DESCRIPTION: description}
        tokenizer = cls(json.dumps(stored, ensure_ascii=False, separators=(",", ":")).encode())
        for text in _COMMON:
            try:
                tokenizer.encode(text)
            except UsageError as error:
                raise ValueError(f"tokenizer: {error}") from None
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """V, the number of the model's embeddings, with those of the control pieces."""
        return len(CONTROL_PIECES) + self._embeddings

    @property
    def piece_count(self) -> int:
        """Number of ids of the foreign tokenizer, of which the last ones may have no piece."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    @property
    def description(self) -> dict[str, Any]:
        """Content of the file tokenizer.json, a copy."""
        stored: dict[str, Any] = json.loads(self._model)[_DESCRIPTION]
        return stored

    def encode(self, text: str) -> list[int]:
        """Encodes a text to ids, never to a control id or a special piece's; "" gives no ids.

        Raises:
          UsageError: the ids would not give the text back. The tokenizer may write equivalent
            characters in their composed form (Unicode NFC). The message names the first character
            that is to blame.
        """
        ids = self._encode(text)
        if ids is None:
            culprits = (character for character in text if self._encode(character) is None)
            culprit = next(culprits, text)
            raise UsageError(
                f"text {shortened(text)!r}: the tokenizer cannot write {shortened(culprit)!r} as"
                " text; leave it out"
            )
        return ids

    def _encode(self, text: str) -> list[int] | None:
        """Encodes a text; returns None if the ids would not give it back."""
        try:
            found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # The text holds half a surrogate pair, which UTF-8 cannot encode.
            return None
        if not self._special.isdisjoint(found):
            return None

        ids = [len(CONTROL_PIECES) + token for token in found]
        decoded = self.decode(ids)
        return ids if decoded in (text, unicodedata.normalize("NFC", text)) else None

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to a text; control ids and the tokenizer's own special pieces are dropped."""
        return self._decode(ids, skip_special=True)

    def to_bytes(self) -> bytes:
        """Returns JSON of the file tokenizer.json and of the number of embeddings."""
        return self._model

    def token_id(self, piece: str) -> int | None:
        """Returns the id of a piece, also of a special one; None if there is no such piece."""
        foreign = self._tokenizer.token_to_id(piece)
        return None if foreign is None else len(CONTROL_PIECES) + foreign

    def _spell(self, ids: list[int]) -> str:
        """Decodes ids, special pieces among them, so that a reader sees that they were written."""
        return self._decode(ids, skip_special=False)

    def _decode(self, ids: Iterable[int], skip_special: bool) -> str:
        first = len(CONTROL_PIECES)
        foreign = [int(token) - first for token in ids if token >= first]
        return self._tokenizer.decode(foreign, skip_special_tokens=skip_special)


def _load(description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Has the library read a tokenizer; raises ValueError if it cannot.

    What the file may ask for beyond that is turned off: texts would be cut to a length, padded to
    one, or encoded at random.
    """
    plain = {**description, "truncation": None, "padding": None}
    plain["model"] = {**description["model"], "dropout": None}
    if "dropout" not in description["model"]:  # It is a setting of byte pair encoding alone.
        del plain["model"]["dropout"]
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    # The library raises `Exception` itself.
    except Exception as error:
        raise ValueError(str(error)) from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _special_ids(description: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """Returns the foreign ids that no text may be encoded to: special pieces, and the unknown."""
    added = tokenizer.get_added_tokens_decoder()
    special = {token for token, piece in added.items() if piece.special}
    model = description["model"]
    unknown = model.get("unk_id")
    if isinstance(model.get("unk_token"), str):
        unknown = tokenizer.token_to_id(model["unk_token"])
    if unknown is not None:
        special.add(unknown)
    return frozenset(special)
