"""Tokenizers: text to token ids and back.

    from apr_jax.text import CONTROL_PIECES, SentencePieceTokenizer, tokenizer_from_bytes

    tokenizer = SentencePieceTokenizer.train(["22+26=48"], phrases=["Moving to Node #"])
    ids = tokenizer.encode("48-26=22")
    tokenizer.decode(ids)                    # "48-26=22", byte for byte
    tokenizer_from_bytes(tokenizer.to_bytes())

There are two kinds of `Tokenizer`. A token of `SentencePieceTokenizer` is one character, or one of
the phrases that it was trained with. `HuggingFaceTokenizer` is that of a pretrained model.

The ids below `len(CONTROL_PIECES)` are the control pieces of the thread protocol (`SPAWN`, `JOIN`
and so on). No text encodes to a control piece, so a text that spells "<spawn>" cannot spawn
anything.

The package needs no JAX.
"""

from apr_jax.text.hugging_face import HuggingFaceTokenizer
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import (
    BOS,
    CONTROL_PIECES,
    END_JOINED,
    END_SPAWN,
    EOS,
    JOIN,
    JOINED,
    MSG,
    PAD,
    SPAWN,
    UNK,
    Tokenizer,
)

__all__ = [
    "BOS",
    "CONTROL_PIECES",
    "END_JOINED",
    "END_SPAWN",
    "EOS",
    "JOIN",
    "JOINED",
    "MSG",
    "PAD",
    "SPAWN",
    "UNK",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "tokenizer_from_bytes",
]
