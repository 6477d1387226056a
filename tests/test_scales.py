"""The experiment files of the scales, in a clone and in the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import apr_jax
from apr_jax.cli.main import run
from apr_jax.config import load
from apr_jax.errors import UsageError
from apr_jax.scales import SCALES, scale_file

ROOT = Path(__file__).parents[1]


def test_the_clone_needs_no_copies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [scale_file(scale) for scale in SCALES] == [
        ROOT / "experiments" / f"{scale}.py" for scale in SCALES
    ]


def test_a_file_of_the_current_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    for name in ("nano", "mine"):
        file = tmp_path / "experiments" / f"{name}.py"
        file.write_text((ROOT / "experiments" / "nano.py").read_text())
        assert scale_file(name).samefile(file)


def test_a_config_may_be_a_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("nano", ["seed=3"]) == load(ROOT / "experiments" / "nano.py", ["seed=3"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("evaluate.methods=serial, nested", ("serial", "nested")),
        ("evaluate.methods=", ()),
        ("evaluate.children=2, 5", (2, 5)),
        ("evaluate.temperatures=0.5,1.0", (0.5, 1.0)),
        ("data.demonstrations=12", 12),
        ("data.demonstrations=trees.jsonl", "trees.jsonl"),
    ],
)
def test_a_setting_is_read_as_its_field_is_declared(setting, expected):
    group, name = setting.partition("=")[0].split(".")
    assert getattr(getattr(load("nano", [setting]), group), name) == expected


def test_solve_takes_the_model_of_the_library_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["solve", "no numbers"]) == 2
    assert "numbers and target" in capsys.readouterr().err


def test_python_loads_the_model_of_the_library_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = apr_jax.load()
    assert (model.name, model.restored.config.name) == ("apr-rl", "mini")


@pytest.mark.parametrize("name", ["huge", "launch", "../setup"])
def test_an_unknown_scale_is_told_the_known_ones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="demo, nano, mini, paper"):
        scale_file(name)


@pytest.mark.slow
def test_the_wheel_holds_the_scales_and_the_assets(tmp_path):
    """Built from a copy of the clone, as building leaves files behind."""
    others = shutil.ignore_patterns(".*", "build", "dist", "docs", "runs", "tests", "*.egg-info")
    clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=others)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path]
    subprocess.run([*pip, clone], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        for scale in SCALES:
            source = (ROOT / "experiments" / f"{scale}.py").read_bytes()
            assert file.read(f"apr_jax/scales/{scale}.py") == source
        model = (ROOT / "experiments" / "mini" / "apr-rl.safetensors").read_bytes()
        assert file.read("apr_jax/scales/apr-rl.safetensors") == model
        names = set(file.namelist())
    assert {"apr_jax/py.typed", "apr_jax/report/assets/viewer.js"} <= names
    assert not any("launch" in name for name in names)
