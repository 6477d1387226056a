"""Tokenizer and problems of another build are refused by name wherever they would be read; nothing
else would notice them.
"""

import shutil

import pytest
from helpers.puzzles import read_problems

from apr_jax.data.build import build, check_files
from apr_jax.errors import UsageError, UserError
from apr_jax.paper import pipeline, results
from apr_jax.tasks import save_problems
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft


@pytest.fixture
def copied(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    return tmp_path / "data"


def spoil(folder, name):
    """Makes a file one that is as well-formed as the one that was built."""
    path = folder / name
    if path.suffix == ".jsonl":
        save_problems(read_problems(path)[1:], path)
    else:
        other = bytearray(path.read_bytes())
        other[-1] ^= 1
        path.write_bytes(bytes(other))


def refused(name):
    return pytest.raises(
        UserError,
        match=rf"data .*{name}: is not the file that this folder was built with \(its SHA-",
    )


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "validation.jsonl", "test.jsonl", "train.jsonl"]
)
def test_each_file_of_another_build_is_refused(config, copied, tmp_path, name):
    check_files(copied)
    spoil(copied, name)
    with refused(name):
        check_files(copied)
    with refused(name):
        train_sft(config, copied, tmp_path / "run", "apr", progress=False)
    with refused(name):
        build(config, copied, methods=("apr",), progress=False)
    assert not (tmp_path / "run").exists()
    (copied / name).unlink()
    check_files(copied)  # Whoever reads it says that it is missing.


def test_rl_evaluations_and_report_refuse_them(config, checkpoint, copied, tmp_path):
    spoil(copied, "test.jsonl")
    with refused("test.jsonl"):
        train_rl(config, copied, tmp_path / "run", checkpoint, progress=False)
    assert not (tmp_path / "run").exists()
    folders = pipeline.Folders(tmp_path, copied, tmp_path)
    stages = pipeline.stages_of(config, folders)
    with refused("test.jsonl"):
        next(stage for stage in stages if stage.name == "eval/apr-sft").run()
    with refused("test.jsonl"):
        results._oracle(copied, config)


def test_method_is_not_added_to_foreign_data(config, copied, monkeypatch):
    """Another version of the library built them."""
    before = (copied / "tokenizer.model").read_bytes()
    monkeypatch.setattr("apr_jax.tasks.countdown.render_compact.ALPHABET", "0123456789?")
    with pytest.raises(
        UsageError, match="tokenizer.model: this version of apr_jax would write another one"
    ):
        build(config, copied, methods=("sos",), progress=False, workers=1)
    assert (copied / "tokenizer.model").read_bytes() == before
