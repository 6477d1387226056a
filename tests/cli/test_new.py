"""`apr new`: what it writes works as it is, and nothing is overwritten."""

import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.cli.main import run

NAMES = ["test_word_sums.py", "word_sums.py", "word_sums_config.py"]


def test_what_it_writes_passes_its_own_test_and_task_check(tmp_path, capfd):
    folder = tmp_path / "tasks"
    assert run(["new", "word_sums", "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert f"next: apr task check --config {folder}/word_sums_config.py" in capfd.readouterr().out

    config = str(folder / "word_sums_config.py")
    assert run(["task", "check", "--config", config, "--problems", "50"]) == 0
    said = capfd.readouterr().out
    assert "fault" not in said and "demonstrations parallel: 50 of 50" in said

    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_word_sums.py"]
    ended = subprocess.run(test, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0 and "3 passed" in ended.stdout, ended.stdout


def test_no_name_of_the_template_is_left(tmp_path):
    assert run(["new", "word_sums", "--out", str(tmp_path)]) == 0
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert "my_task" not in text and "MyTask" not in text and "WordSums" in text


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_overwritten(tmp_path, capfd, name):
    (tmp_path / name).write_text("mine")
    assert run(["new", "word_sums", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / name} is there already" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["Sums", "word-sums", "2sums", "../sums", "class", "", "a b"])
def test_a_name_that_is_no_module_is_refused(tmp_path, capfd, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert run(["new", name]) == 2
    assert "must be the name of a Python module" in capfd.readouterr().err
    assert list(Path().iterdir()) == []
