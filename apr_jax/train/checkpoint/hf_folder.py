"""A model as a folder that Hugging Face's `AutoModelForCausalLM` and `AutoTokenizer` load.

    FOLDER/config.json, model.safetensors            the network, see `model/hf.py`
           tokenizer.json, tokenizer_config.json     the tokenizer: the same ids for every text
           special_tokens_map.json                   its control pieces
           tokenizer.model                           the tokenizer in the format of SentencePiece
           generation_config.json                    tokens that end a thread's text: <eos> and
                                                     </spawn>
           apr_export.json                           names of the files above

The last file marks the folder as an export, which a later export may replace. In a folder without
it nothing is replaced and nothing is added: another model's tokenizer that stands there would be
taken for the tokenizer of this model.
"""

import json
from pathlib import Path
from typing import Any

from apr_jax.errors import UsageError, UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.json_files import write_json
from apr_jax.model.hf import CONFIG, WEIGHTS, save_hf
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import BOS, CONTROL_PIECES, END_SPAWN, EOS, PAD, UNK, Tokenizer
from apr_jax.train.checkpoint.restored import Restored

_LIST = "apr_export.json"
_SPACE = "\u2581"  # SentencePiece writes a space so; the library `tokenizers` writes it as it is.


def check_folder(folder: Path) -> None:
    """Raises UsageError if the folder holds a file that no export wrote."""
    if folder.is_file():
        raise UsageError(
            f"{folder}: is a file; must be a new or empty folder, or one that `apr export` wrote"
        )
    if not folder.is_dir():
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _listed(folder))
    if foreign:
        raise UsageError(
            f"{folder}: holds {foreign[0]}, which `apr export` did not write; "
            "must be a new or empty folder, or one that it wrote"
        )


def export_folder(restored: Restored, folder: Path) -> None:
    """Writes the model as a folder, and replaces an earlier export in it.

    The folder is made if it is not there.

    Raises:
      UsageError: the folder holds a file that no export wrote.
      UserError: the folder cannot be written.
    """
    check_folder(folder)
    files = tokenizer_files(restored.tokenizer)
    names = [CONFIG, WEIGHTS, "tokenizer.model", *files]
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            old = _listed(folder)
            # The list comes first, so that an interrupted export can be recognised as an export.
            write_json(folder / _LIST, {"files": names})
            for name in old - {_LIST}:
                (folder / name).unlink(missing_ok=True)
            for name, values in files.items():
                write_json(folder / name, values)
            (folder / "tokenizer.model").write_bytes(restored.tokenizer.to_bytes())
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error}") from error
        save_hf(restored.params, restored.config.model, folder)


def _listed(folder: Path) -> set[str]:
    """Returns the names of the files of an export, its list included; none if it is no export."""
    try:
        return {_LIST, *json.loads((folder / _LIST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns name -> JSON of the files that make up a tokenizer of Hugging Face."""
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    named = {name: CONTROL_PIECES[token] for name, token in special.items()}
    further = [piece for token, piece in enumerate(CONTROL_PIECES) if token not in special.values()]
    return {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "special_tokens_map.json": named | {"additional_special_tokens": further},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "additional_special_tokens": further,
            # A text that spells "<spawn>" is encoded as seven characters, as by our tokenizer.
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": [EOS, END_SPAWN],
            "pad_token_id": PAD,
        },
    }


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokenizer in the format of the library `tokenizers`.

    A text becomes pieces of one character, except for phrases of the vocabulary, of which the
    longest is taken first.
    """
    assert isinstance(tokenizer, SentencePieceTokenizer)
    texts = [piece.replace(_SPACE, " ") for piece in tokenizer.pieces]
    phrases = [
        token for token, text in enumerate(texts) if token >= len(CONTROL_PIECES) and len(text) > 1
    ]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    begin = {"SpecialToken": {"id": CONTROL_PIECES[BOS], "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": texts[token], **plain, "special": token < len(CONTROL_PIECES)}
            for token in [*range(len(CONTROL_PIECES)), *phrases]
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                begin,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {
                CONTROL_PIECES[BOS]: {
                    "id": CONTROL_PIECES[BOS],
                    "ids": [BOS],
                    "tokens": [CONTROL_PIECES[BOS]],
                }
            },
        },
        "decoder": {"type": "Fuse"},
        # Byte pair encoding without any merge leaves single characters.
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": CONTROL_PIECES[UNK],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: token for token, text in enumerate(texts)},
            "merges": [],
        },
    }
