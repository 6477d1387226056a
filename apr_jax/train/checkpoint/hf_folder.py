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

A model that was imported from such a folder gets its own ids back: all of its tokens have the ids
that they had there, and the control pieces follow behind the last one. Embeddings without a token
come after these. (It has no tokenizer.model.)
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from apr_jax.errors import UsageError, UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.json_files import write_json
from apr_jax.model.hf import CONFIG, WEIGHTS, save_hf
from apr_jax.model.transformer import Params
from apr_jax.text.hugging_face import HuggingFaceTokenizer
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import BOS, CONTROL_PIECES, END_SPAWN, EOS, PAD, UNK, Tokenizer
from apr_jax.train.checkpoint.restored import Pretrained

EXPORT_LIST = "apr_export.json"
_SENTENCE_PIECE = "tokenizer.model"
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# How the tokenizers of Qwen2 cut a text into words.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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


def export_folder(pretrained: Pretrained, folder: Path) -> None:
    """Writes the model as a folder, and replaces an earlier export in it.

    The folder is made if it is not there.

    Raises:
      UsageError: the folder holds a file that no export wrote.
      UserError: the folder cannot be written.
    """
    check_folder(folder)
    tokenizer = pretrained.tokenizer
    params = pretrained.params
    files = tokenizer_files(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        params = _with_foreign_ids(params, tokenizer)
    else:
        files = {_SENTENCE_PIECE: tokenizer.to_bytes(), **files}
    with disk_errors(folder):
        replace_files(folder, files, further=(CONFIG, WEIGHTS))
        save_hf(params, pretrained.model, folder, pretrained.window)


def tokenizer_warning(pretrained: Pretrained) -> str:
    """Says how transformers must load an exported tokenizer that `AutoTokenizer` misreads, or "".

    In a folder of Qwen2 `AutoTokenizer` cuts texts into words as Qwen does, whatever tokenizer.json
    says.
    """
    is_qwen2 = pretrained.model.qkv_bias and not pretrained.model.qk_norm
    if not is_qwen2:
        return ""
    tokenizer = pretrained.tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer):
        steps = (tokenizer.description.get("pre_tokenizer") or {}).get("pretokenizers", [])
        if any(step.get("pattern") == {"Regex": _QWEN_WORDS} for step in steps):
            return ""
    return (
        "AutoTokenizer of transformers cuts texts into words as Qwen does where the network is a"
        " Qwen2, and this tokenizer does not; load it by PreTrainedTokenizerFast.from_pretrained"
    )


def replace_files(folder: Path, files: Mapping[str, Any], further: Sequence[str]) -> None:
    """Writes files of an export, and deletes those of an earlier export.

    Args:
      folder: is made if it is not there.
      files: name -> bytes, or what a JSON file holds.
      further: names of files that the caller writes after these.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = _listed(folder)
        # The list comes first, so that an interrupted export can be recognised as an export.
        write_json(folder / EXPORT_LIST, {"files": [*further, *files]})
        for name in old - {EXPORT_LIST}:
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                write_json(folder / name, content)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error


def _listed(folder: Path) -> set[str]:
    """Returns the names of the files of an export, its list included; none if it is no export."""
    try:
        return {
            EXPORT_LIST,
            *json.loads((folder / EXPORT_LIST).read_text(encoding="utf-8"))["files"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns name -> JSON of the files that make up a tokenizer of Hugging Face."""
    first = first_control_id(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spelled: Sequence[str] = _spelled(tokenizer)
        description = _with_control_pieces(tokenizer, spelled)
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        spelled = CONTROL_PIECES
        description = _tokenizer_json(tokenizer)

    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    named = {name: spelled[token] for name, token in special.items()}
    further = [piece for token, piece in enumerate(spelled) if token not in special.values()]
    return {
        "tokenizer.json": description,
        "special_tokens_map.json": named | {"additional_special_tokens": further},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "additional_special_tokens": further,
            # A text that spells "<spawn>" is encoded as seven characters, as by our tokenizer.
            "split_special_tokens": True,
            # The networks take no others; `generate` would refuse "token_type_ids".
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {
            "bos_token_id": first + BOS,
            "eos_token_id": [first + EOS, first + END_SPAWN],
            "pad_token_id": first + PAD,
        },
    }


def _spelled(tokenizer: HuggingFaceTokenizer) -> list[str]:
    """Returns the control pieces as the folder spells them.

    Where the foreign tokenizer has a piece of that name, as Llama 2 has "<unk>", it is another one.
    """
    return [
        piece if tokenizer.token_id(piece) is None else f"<apr:{piece.strip('<>')}>"
        for piece in CONTROL_PIECES
    ]


def _with_control_pieces(tokenizer: HuggingFaceTokenizer, spelled: Sequence[str]) -> dict[str, Any]:
    """Returns tokenizer.json of a foreign tokenizer, with the control pieces behind all others.

    Raises:
      UserError: the library `tokenizers` would give the pieces other ids.
    """
    first = tokenizer.piece_count
    ids = {piece: first + token for token, piece in enumerate(spelled)}
    description = tokenizer.description
    description["added_tokens"] = [
        *description.get("added_tokens", []),
        *({"id": ids[piece], "content": piece, **_PLAIN, "special": True} for piece in spelled),
    ]
    description["post_processor"] = _begin_with(spelled[BOS], ids[spelled[BOS]])
    description |= {"truncation": None, "padding": None}

    read = tokenizers.Tokenizer.from_str(json.dumps(description))
    for piece, token in ids.items():
        if read.token_to_id(piece) != token:
            raise UserError(
                f"tokenizer: would read {piece!r} as id {read.token_to_id(piece)}, not {token}: its"
                " ids have gaps, so that no further piece can be put behind them; put a piece for"
                " each missing id into model.vocab of tokenizer.json"
            )
    return description


def first_control_id(tokenizer: Tokenizer) -> int:
    """Returns the id that the first control piece has in an exported folder."""
    return tokenizer.piece_count if isinstance(tokenizer, HuggingFaceTokenizer) else 0


def _with_foreign_ids(params: Params, tokenizer: HuggingFaceTokenizer) -> Params:
    """Orders embedding and output projection by the ids of the folder."""
    control = len(CONTROL_PIECES)
    with_piece = control + tokenizer.piece_count
    order = np.array(
        [*range(control, with_piece), *range(control), *range(with_piece, tokenizer.vocab_size)]
    )
    params = params | {"embed": params["embed"][order]}
    if "unembed" in params:
        params["unembed"] = params["unembed"][:, order]
    return params


def _tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Returns the tokenizer in the format of the library `tokenizers`.

    A text becomes pieces of one character, except for phrases of the vocabulary, of which the
    longest is taken first.
    """
    texts = [piece.replace(_SPACE, " ") for piece in tokenizer.pieces]
    phrases = [
        token for token, text in enumerate(texts) if token >= len(CONTROL_PIECES) and len(text) > 1
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": texts[token], **_PLAIN, "special": token < len(CONTROL_PIECES)}
            for token in [*range(len(CONTROL_PIECES)), *phrases]
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _begin_with(CONTROL_PIECES[BOS], BOS),
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


def _begin_with(piece: str, token: int) -> dict[str, Any]:
    """Returns the post-processor by which every text begins with <bos>, as threads do.

    Args:
      piece: how <bos> is spelled.
      token: its id.
    """
    begin = {"SpecialToken": {"id": piece, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            begin,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {piece: {"id": piece, "ids": [token], "tokens": [piece]}},
    }
