"""Small tokenizers and models of Hugging Face, made on the spot."""

import json

import jax
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from apr_jax.model.hf import save_hf
from apr_jax.model.transformer import init_params

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = [
    "The answer is the sum of the numbers, and 12 + 3 = 15.",
    "Split the work, wait for the others and join what they find: 4*5=20, 20-3=17.",
    "Two threads are faster than one thread if the numbers are large.",
]


# Where Qwen cuts a text into words, before bytes are paired within each of them.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(special=SPECIAL, vocab_size=320, qwen=False, sentences=SENTENCES):
    """Byte pair encoding on bytes, as SmolLM, Llama 3 and Qwen have it; special pieces first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated", invert=False)
        in_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def characters(alphabet, unknown="<unk>", whole_words=False):
    """One piece a character, and a piece for all others that is spelled like a control piece.

    With `whole_words` a text that is the spelling of a piece becomes that piece, as in Llama 3.
    """
    pieces = [unknown, *alphabet]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token=unknown, ignore_merges=whole_words)
    )
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def description(tokenizer):
    """The content of its tokenizer.json."""
    return json.loads(tokenizer.to_str())


def write_folder(folder, config, tokenizer=None, embeddings=None, seed=1):
    """Writes a folder of Hugging Face with random weights, no two of whose rows are alike.

    Args:
      folder: is made.
      config: the model's shape.
      tokenizer: by default `byte_level`.
      embeddings: rows of the embedding; by default 5 more than there are pieces.
      seed: of the weights.
    """
    tokenizer = tokenizer or byte_level()
    embeddings = embeddings or tokenizer.get_vocab_size() + 5
    shapes = jax.eval_shape(lambda: init_params(config, embeddings, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)
    save_hf(params, config, folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
