"""The examples run as they stand, and print trees."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_a_tree(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert "root" in said and "└ 1" in said and "┳" in said and "┻" in said


def test_own_model_is_short():
    code = [line for line in EXAMPLES[0].read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert EXAMPLES[0].stem == "own_model" and len(code) < 60


def test_the_script_says_what_is_printed(capsys):
    runpy.run_path(str(EXAMPLES[1]), run_name="__main__")
    root, first, second = capsys.readouterr().out.splitlines()
    assert root.endswith("<bos> 0 <spawn> <msg> 5 <msg> 9 </spawn> <joined> <msg> 0 <msg> 0 </joined> <join> 7 <eos>")
    # Both children start when the spawn block is closed; the root goes on when the longer one has ended.
    assert first.index("━") == second.index("━") == root.index("┳") + 1
    assert root.index("┻") == second.index("╸") > first.index("╸")
