"""Makes docs/tutorial.ipynb from docs/tutorial.md: the same text, its blocks of commands as cells.

python docs/notebook.py            # writes the notebook
python docs/notebook.py --check    # writes nothing; exit status 1 if it is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "tutorial.md"
NOTEBOOK = DOCS / "tutorial.ipynb"
COMMANDS = re.compile(r"^```bash\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def notebook(markdown: str) -> nbformat.NotebookNode:
    """Returns a page as a notebook, in which the commands run by bash and stop at an error."""
    cells = []
    # The split gives text and commands by turns.
    for index, part in enumerate(COMMANDS.split(markdown)):
        if index % 2:
            cells.append(nbformat.v4.new_code_cell(f"%%bash -e\n{part}", id=f"cell-{index}"))
        elif part.strip():
            cells.append(nbformat.v4.new_markdown_cell(part.strip(), id=f"cell-{index}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def main(arguments: list[str]) -> int:
    """Writes the notebook, or checks it, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is old")
    flags = parser.parse_args(arguments)
    text = nbformat.writes(notebook(PAGE.read_text(encoding="utf-8"))) + "\n"
    if NOTEBOOK.is_file() and NOTEBOOK.read_text(encoding="utf-8") == text:
        return 0
    if flags.check:
        print("docs/tutorial.ipynb is out of date: python docs/notebook.py")
        return 1
    NOTEBOOK.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
