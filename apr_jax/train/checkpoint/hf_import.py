"""Import of a Hugging Face folder: network, weights and tokenizer, with rows for control pieces.

    FOLDER/config.json, model.safetensors      the network, see `model/hf.py`
           tokenizer.json                      the tokenizer
           tokenizer_config.json               names its own tokens for begin, end and padding

Id h of the folder's tokenizer becomes 10 + h, so embedding and output projection get ten rows in
front. A model that knows nothing of threads begins with rows that mean something near:

    <bos>, <eos>, <pad>   copies of the model's own
    <spawn>, <join> ...   means of the rows of words that say something like it
    <unk>                 the mean of all rows; it never occurs
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apr_jax.errors import UsageError, UserError
from apr_jax.model.hf import CONFIG, load_hf, read_config
from apr_jax.model.transformer import Params
from apr_jax.text.hugging_face import HuggingFaceTokenizer
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
)
from apr_jax.train.checkpoint.hf_folder import EXPORT_LIST, tokenizer_files
from apr_jax.train.checkpoint.restored import Pretrained

_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
# Files of tokenizers that only `transformers` reads.
_SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
# Control piece -> words, or parts of a sentence, that stand near to what it does.
_WORDS = {
    SPAWN: (" split", " parallel", " tasks"),
    MSG: (" task", " part"),
    END_SPAWN: (" wait", " then"),
    JOINED: (" results", " answers"),
    END_JOINED: (" so", " continue"),
    JOIN: (" answer", " result"),
}


def import_folder(folder: Path) -> Pretrained:
    """Reads a model of one of the families of `model/hf.py` with its tokenizer.

    Raises:
      UsageError: the network is of another kind, the tokenizer is missing, cannot be read or has no
        end token, or the folder is an export of this library.
      UserError: a file cannot be read.
    """
    if (folder / EXPORT_LIST).is_file():
        raise UsageError(
            f"{folder}: is an export of apr_jax, whose model has rows for control pieces already;"
            " give the run or file that it was exported from as --init or --checkpoint"
        )
    _, embeddings = read_config(folder / CONFIG)
    tokenizer = _read_tokenizer(folder, embeddings)
    own = _own_tokens(folder, tokenizer)
    params, model = load_hf(folder)
    return Pretrained(_with_control_rows(params, tokenizer, own), model, tokenizer, str(folder))


def _read_tokenizer(folder: Path, embeddings: int) -> HuggingFaceTokenizer:
    """Reads tokenizer.json."""
    path = folder / _TOKENIZER
    if not path.is_file():
        slow = [name for name in _SLOW if (folder / name).is_file()]
        if slow:
            raise UsageError(
                f"{folder}: has a slow tokenizer alone ({slow[0]}), and no {_TOKENIZER}; save"
                " transformers' AutoTokenizer of it by `save_pretrained`, which writes that file"
            )
        raise UsageError(
            f"{folder}: has no {_TOKENIZER}, the tokenizer of the model; save its AutoTokenizer by"
            " `save_pretrained` of transformers, which writes that file"
        )
    try:
        tokenizer = HuggingFaceTokenizer.make(_read_json(path), embeddings)
        tokenizer_files(tokenizer)  # What could not be exported again must not be trained on.
    except (ValueError, UserError) as error:
        raise UsageError(f"{path}: {error}") from None
    return tokenizer


def _own_tokens(folder: Path, tokenizer: HuggingFaceTokenizer) -> dict[int, int]:
    """Returns which of the model's own tokens <bos>, <eos> and <pad> are copied from.

    A model without a begin or padding token of its own has its end token there.

    Raises:
      UsageError: the model has no end token.
    """
    settings = _read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    config = _read_json(folder / CONFIG)
    end = _own_token(folder, tokenizer, settings, config, "eos")
    if end is None:
        raise UsageError(
            f"{folder}: has no end token: {_SETTINGS} has no eos_token, and {CONFIG} no"
            " eos_token_id; set one of them to the token that ends a text"
        )
    begin = _own_token(folder, tokenizer, settings, config, "bos")
    padding = _own_token(folder, tokenizer, settings, config, "pad")
    return {
        BOS: end if begin is None else begin,
        EOS: end,
        PAD: end if padding is None else padding,
    }


def _own_token(
    folder: Path,
    tokenizer: HuggingFaceTokenizer,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    kind: str,
) -> int | None:
    """Returns the id of the model's own token of a kind; None if it has none.

    Args:
      folder: the model's folder, for messages.
      tokenizer: its tokenizer.
      settings: content of tokenizer_config.json, which is asked first.
      config: content of config.json.
      kind: "bos", "eos" or "pad".
    """
    piece = settings.get(f"{kind}_token")
    if isinstance(piece, dict):
        piece = piece.get("content")
    if piece is not None:
        token = tokenizer.token_id(piece) if isinstance(piece, str) else None
        if token is None:
            raise UsageError(
                f"{folder / _SETTINGS}: {kind}_token={piece!r:.60} is no piece of {_TOKENIZER}"
            )
        return token

    foreign = config.get(f"{kind}_token_id")
    if isinstance(foreign, list):  # Several tokens end a text; the first is the usual one.
        foreign = foreign[0] if foreign else None
    if foreign is None:
        return None
    embeddings = tokenizer.vocab_size - len(CONTROL_PIECES)
    if type(foreign) is not int or not 0 <= foreign < embeddings:
        raise UsageError(
            f"{folder / CONFIG}: {kind}_token_id={foreign!r:.60} must be from 0 to {embeddings - 1}"
        )
    return len(CONTROL_PIECES) + foreign


def _with_control_rows(
    params: Params, tokenizer: HuggingFaceTokenizer, own: Mapping[int, int]
) -> Params:
    """Puts ten rows in front of the embedding, and ten columns of the output projection."""
    params = params | {"embed": _with_control_row_values(params["embed"], tokenizer, own)}
    if "unembed" in params:
        params["unembed"] = _with_control_row_values(params["unembed"].T, tokenizer, own).T.copy()
    return params


def _with_control_row_values(
    rows: np.ndarray, tokenizer: HuggingFaceTokenizer, own: Mapping[int, int]
) -> np.ndarray:
    """Returns rows [V, D] with ten more in front, [10 + V, D]."""
    first = len(CONTROL_PIECES)
    control = np.empty((first, rows.shape[1]), rows.dtype)
    everything = rows.mean(axis=0, dtype=np.float64)
    for token in range(first):
        if token in own:
            control[token] = rows[own[token] - first]
            continue
        tokens = _tokens_of(_WORDS.get(token, ()), tokenizer)
        control[token] = rows[tokens].mean(axis=0, dtype=np.float64) if tokens else everything
    return np.concatenate([control, rows])


def _tokens_of(words: Sequence[str], tokenizer: HuggingFaceTokenizer) -> list[int]:
    """Returns the foreign ids of the words' tokens."""
    return [token - len(CONTROL_PIECES) for word in words for token in tokenizer.encode(word)]


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UsageError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must be a JSON object")
    return content
