"""All cells of the tutorial's notebook run."""

import json
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]

# What makes the run shorter: settings of the page -> those of the test.
SHORTER = {
    "demonstrations=8_000": "demonstrations=400",
    "heldout=200": "heldout=20",
    "sft=SftConfig(steps=600": "sft=SftConfig(steps=20",
    "                steps=30": "                steps=2",
    "validation=100": "validation=10",
}


@pytest.mark.thorough
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch):
    page = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    (config,) = [cell for cell in page.cells if "> check_digit_config.py" in cell.source]
    for setting, shorter in SHORTER.items():
        assert config.source.count(setting) == 1, setting
        config.source = config.source.replace(setting, shorter)

    # As in a terminal in which the environment is active, but compiled as quickly as can be.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        page, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    commands = [cell for cell in page.cells if cell.cell_type == "code"]
    check = next(cell for cell in commands if "apr task check" in cell.source)
    assert "fault" not in check.outputs[0].text
    assert (tmp_path / "tree.html").is_file()
    for name in ("eval_sft", "eval_rl"):
        summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        assert (summary["n"], summary["samples"]) == (20, 4)
    lines = (tmp_path / "runs" / "rl" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
