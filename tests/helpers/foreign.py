"""Small tokenizers of Hugging Face, made on the spot."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = [
    "The answer is the sum of the numbers, and 12 + 3 = 15.",
    "Split the work, wait for the others and join what they find: 4*5=20, 20-3=17.",
    "Two threads are faster than one thread if the numbers are large.",
]


def byte_level(special=SPECIAL, sentences=SENTENCES, vocab_size=320, normalizer=None):
    """Byte pair encoding on bytes, as Llama 3, Qwen and SmolLM have it; special pieces first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def characters(alphabet, unknown="<unk>"):
    """One piece a character, and a piece for all others that is spelled like a control piece."""
    pieces = [unknown, *alphabet]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unknown))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def composed():
    """A byte-level tokenizer that composes characters first (NFC), as Qwen's does."""
    return byte_level(normalizer=normalizers.NFC())


def description(tokenizer):
    """The content of its tokenizer.json."""
    return json.loads(tokenizer.to_str())
