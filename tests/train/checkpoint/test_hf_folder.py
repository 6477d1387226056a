"""An exported folder: its tokenizer gives others the same ids, and no other model's files stay or
are touched.
"""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
import tokenizers
from helpers import foreign

from apr_jax.cli import main
from apr_jax.errors import UsageError
from apr_jax.model.config import ModelConfig
from apr_jax.model.hf import load_hf
from apr_jax.model.transformer import init_params
from apr_jax.text.hugging_face import HuggingFaceTokenizer
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import BOS, CONTROL_PIECES, EOS, SPAWN
from apr_jax.train.checkpoint.hf_folder import check_folder, export_folder, tokenizer_warning
from apr_jax.train.checkpoint.hf_import import import_folder
from apr_jax.train.checkpoint.restored import Pretrained, Restored

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
    export_folder(restored.pretrained, path)
    return path


@pytest.mark.parametrize(
    ("biased", "theirs", "is_misread"),
    [
        (False, None, False),
        (True, None, True),
        (True, foreign.byte_level(), True),
        (True, foreign.byte_level(qwen=True), False),
    ],
    ids=["Llama", "characters", "bytes", "Qwen's own"],
)
def test_warning_where_auto_tokenizer_misreads_a_qwen2(restored, biased, theirs, is_misread):
    tokenizer = restored.tokenizer
    if theirs is not None:
        tokenizer = HuggingFaceTokenizer.make(foreign.description(theirs), 400)
    model = dataclasses.replace(restored.config.model, qkv_bias=biased)
    pretrained = Pretrained(restored.params, model, tokenizer, "somewhere")
    assert bool(tokenizer_warning(pretrained)) == is_misread


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


NETWORK = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, head_size=8, mlp=24, tied=False)
TEXTS = ["The answer is 12 + 3 = 15.", "a<spawn>b<|im_end|></joined>", " é\n", "<bos><apr:bos>", ""]


@pytest.mark.parametrize("taken", [(), ("<bos>", "<unk>")], ids=["free", "taken"])
def test_an_imported_tokenizer_goes_out_with_its_own_ids(taken, tmp_path):
    """The control pieces are behind them, under another name where it has a piece of that name."""
    theirs = foreign.byte_level(special=[*foreign.SPECIAL, *taken])
    count = theirs.get_vocab_size()
    model = import_folder(foreign.write_folder(tmp_path / "in", NETWORK, theirs))
    export_folder(model, tmp_path / "out")
    out = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    spelled = [f"<apr:{piece[1:-1]}>" if piece in taken else piece for piece in CONTROL_PIECES]
    assert [out.token_to_id(piece) for piece in spelled] == list(range(count, count + 10))
    assert out.get_vocab_size() == count + 10

    out.encode_special_tokens = True
    for text in TEXTS:
        ours = model.tokenizer.encode(text)
        expected = [token - len(CONTROL_PIECES) for token in ours]
        assert out.encode(text).ids == [count + BOS, *expected], text
        assert out.decode(out.encode(text).ids) == text
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.model" not in written
    with pytest.raises(UsageError, match="is an export of apr_jax"):
        import_folder(tmp_path / "out")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fields", "qwen"),
    [({"tied": True}, False), ({}, False), ({"qkv_bias": True}, True), ({"qk_norm": True}, True)],
    ids=["llama, tied", "llama", "qwen2", "qwen3"],
)
def test_an_imported_model_goes_out_as_it_came_in(fields, qwen, tmp_path):
    """Transformers loads both folders; the logits of all tokens that both have are equal.

    For Qwen2 it cuts texts into words as Qwen does, whatever tokenizer.json says.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network = dataclasses.replace(NETWORK, **fields)
    theirs = foreign.byte_level(qwen=qwen)
    model = import_folder(foreign.write_folder(tmp_path / "in", network, theirs))
    export_folder(model, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    count = model.tokenizer.piece_count
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_PIECES)) == list(range(count, count + 10))
    for text in TEXTS:
        expected = [token - len(CONTROL_PIECES) for token in model.tokenizer.encode(text)]
        assert tokenizer(text)["input_ids"] == [count + BOS, *expected], text

    ids = torch.arange(count)[None]
    networks = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        for name in ("in", "out")
    ]
    with torch.inference_mode():
        before, after = (network(ids).logits[0].numpy() for network in networks)
    np.testing.assert_array_equal(after[:, :count], before[:, :count])
    # Embeddings without a token come last.
    np.testing.assert_array_equal(after[:, count + 10 :], before[:, count:])
    # A row of a control piece is in its place: <eos> was copied from their own end token.
    end = foreign.SPECIAL.index("<|im_end|>")
    np.testing.assert_array_equal(after[:, count + EOS], before[:, end])
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == [count + EOS, count + CONTROL_PIECES.index("</spawn>")]


def test_another_models_folder_is_refused_and_left_alone(restored, tmp_path):
    (tmp_path / "tokenizer.json").write_text("another model's")
    with pytest.raises(
        UsageError,
        match=r"holds tokenizer\.json, which `apr export` did not write; must be a new or",
    ):
        export_folder(restored.pretrained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: is a file; must be"):
        check_folder(tmp_path / "file")


def test_an_earlier_export_is_replaced(restored, tmp_path):
    export_folder(restored.pretrained, tmp_path)
    listed = json.loads((tmp_path / "apr_export.json").read_text())["files"]
    (tmp_path / "apr_export.json").write_text(json.dumps({"files": [*listed, "stale.json"]}))
    for name in ("stale.json", "tokenizer.json"):
        (tmp_path / name).write_text("of an earlier version")
    export_folder(restored.pretrained, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*listed, "apr_export.json"}
    assert json.loads((tmp_path / "tokenizer.json").read_text())["version"] == "1.0"


def test_the_command_refuses_before_it_loads_a_model(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("")
    assert (
        main.run(["export", "--checkpoint", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    )
    assert f"--out {tmp_path}: holds notes.txt" in capfd.readouterr().err
