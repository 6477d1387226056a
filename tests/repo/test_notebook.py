"""The notebook of the tutorial is made from its page."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
notebook = importlib.import_module("notebook")


def test_the_notebook_is_the_page(capsys):
    assert notebook.main(["--check"]) == 0, capsys.readouterr().out


def test_commands_become_cells_and_nothing_is_lost():
    cells = notebook.notebook("# A\n\n```bash\na\n\nb\n```\n\nThen\n\n    c\n").cells
    assert [(cell.cell_type, cell.source) for cell in cells] == [
        ("markdown", "# A"),
        ("code", "%%bash -e\na\n\nb"),
        ("markdown", "Then\n\n    c"),
    ]
