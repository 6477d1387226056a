"""Reads a tokenizer of either kind from the bytes that `Tokenizer.to_bytes` returned."""

from apr_jax.text.hugging_face import HuggingFaceTokenizer
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import Tokenizer


def tokenizer_from_bytes(model: bytes) -> Tokenizer:
    """Makes a tokenizer from its bytes, by which it is of one kind or the other.

    Raises:
      ValueError: the bytes are damaged.
    """
    # A serialized SentencePiece model is a protocol buffer, which never begins so.
    if model.startswith(b"{"):
        return HuggingFaceTokenizer(model)
    return SentencePieceTokenizer(model)
