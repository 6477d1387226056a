"""An exported folder: its tokenizer gives others the same ids, and no other model's files stay or
are touched.
"""

import json
import random

import jax
import pytest

from apr_jax.cli import main
from apr_jax.errors import UsageError
from apr_jax.model.hf import load_hf
from apr_jax.model.transformer import init_params
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import BOS, CONTROL_PIECES, EOS, SPAWN
from apr_jax.train.checkpoint.hf_folder import check_folder, export_folder
from apr_jax.train.checkpoint.restored import Restored

ALPHABET = "0123456789+-*/=,:#~ \n<>spawnjoi|\u00e9"
PHRASES = ("No solution", "No solution here", "  ", "Move", "12")


@pytest.fixture(scope="module")
def restored(config):
    tokenizer = SentencePieceTokenizer.train([ALPHABET, *PHRASES], PHRASES)
    params = jax.device_get(init_params(config.model, tokenizer.vocab_size, jax.random.key(0)))
    return Restored(params, config, "apr", "rl", tokenizer, 7, "somewhere")


@pytest.fixture(scope="module")
def folder(restored, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "llama"
    export_folder(restored, path)
    return path


def texts():
    """Mixtures of characters and phrases, and what spells a control piece."""
    rng = random.Random(0)
    parts = [*ALPHABET, *PHRASES, "No solution her", "<spawn>", "</spawn>", "<eos>"]
    parts = [part for part in parts if set(part) <= set(ALPHABET + "".join(PHRASES))]
    return [
        "",
        *CONTROL_PIECES[SPAWN : SPAWN + 1],
        *("".join(rng.choices(parts, k=rng.randint(1, 30))) for _ in range(500)),
    ]


def test_tokenizers_gives_the_same_ids(restored, folder):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert theirs.get_vocab_size() == restored.tokenizer.vocab_size
    for text in texts():
        ids = restored.tokenizer.encode(text)
        assert theirs.encode(text).ids == [BOS, *ids], text
        assert theirs.decode([BOS, *ids, EOS]) == text


def test_transformers_loads_the_tokenizer(restored, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (
        BOS,
        EOS,
        restored.tokenizer.vocab_size,
    )
    assert theirs.convert_tokens_to_ids(list(CONTROL_PIECES)) == list(range(len(CONTROL_PIECES)))
    for text in texts():
        ids = restored.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [BOS, *ids], text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode([BOS, *ids, SPAWN, EOS], skip_special_tokens=True) == text
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [EOS, CONTROL_PIECES.index("</spawn>")]


def test_what_is_written(restored, folder):
    listed = json.loads((folder / "apr_export.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*listed, "apr_export.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"} < set(listed)
    assert (folder / "tokenizer.model").read_bytes() == restored.tokenizer.to_bytes()
    jax.tree.map(
        lambda x, y: (x == y).all() or pytest.fail("other weights"),
        load_hf(folder)[0],
        restored.params,
    )


def test_another_models_folder_is_refused_and_left_alone(restored, tmp_path):
    (tmp_path / "tokenizer.json").write_text("another model's")
    with pytest.raises(
        UsageError,
        match=r"holds tokenizer\.json, which `apr export` did not write; must be a new or",
    ):
        export_folder(restored, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: is a file; must be"):
        check_folder(tmp_path / "file")


def test_an_earlier_export_is_replaced(restored, tmp_path):
    export_folder(restored, tmp_path)
    listed = json.loads((tmp_path / "apr_export.json").read_text())["files"]
    (tmp_path / "apr_export.json").write_text(json.dumps({"files": [*listed, "stale.json"]}))
    for name in ("stale.json", "tokenizer.json"):
        (tmp_path / name).write_text("of an earlier version")
    export_folder(restored, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*listed, "apr_export.json"}
    assert json.loads((tmp_path / "tokenizer.json").read_text())["version"] == "1.0"


def test_the_command_refuses_before_it_loads_a_model(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("")
    assert (
        main.run(["export", "--checkpoint", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    )
    assert f"--out {tmp_path}: holds notes.txt" in capfd.readouterr().err
