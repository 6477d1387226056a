"""Tables and numbers of the documents are those of the result files, and `docs/figures.py` says
where they are not.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
figures = importlib.import_module("figures")

DOCUMENT = """# A document

It gains <!--=gain-->12.0<!----> points.

<!-- figures: scores -->

| | score |
| --- | --- |
| tree | 84.1 |
| chain | |

<!-- end -->
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a README that is up to date, and the two figures that it shows."""
    monkeypatch.setitem(figures.NUMBERS, "gain", lambda: "12.0")
    rows = [["", "score"], ["tree", "84.1"], ["chain", ""]]
    monkeypatch.setitem(figures.TABLES, "scores", lambda: rows)
    (tmp_path / "README.md").write_text(DOCUMENT)
    return tmp_path


def test_documents_show_the_result_files(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().out


def test_every_figure_is_shown_somewhere():
    texts = [(ROOT / "README.md").read_text()]
    texts += [path.read_text() for path in (ROOT / "docs").rglob("*.md")]
    for name in figures.TABLES:
        assert any(f"<!-- figures: {name} -->" in text for text in texts), name
    for name in figures.NUMBERS:
        assert any(f"<!--={name}-->" in text for text in texts), name


@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [("12.0", "13.0", 3), ("84.1", "48.1", 9), ("| chain | |\n", "", 10)],
)
def test_a_wrong_figure_is_found_and_mended(folder, capsys, right, wrong, line):
    document = folder / "README.md"
    assert figures.main(["--check"], folder) == 0
    document.write_text(DOCUMENT.replace(right, wrong))
    capsys.readouterr()
    assert figures.main(["--check"], folder) == 1
    said = capsys.readouterr().out
    assert (
        said.startswith(f"README.md:{line}:\n") and f"+ {DOCUMENT.splitlines()[line - 1]}" in said
    )
    assert document.read_text() != DOCUMENT, "--check writes nothing"
    assert figures.main([], folder) == 0
    assert document.read_text() == DOCUMENT


def test_an_empty_marker_is_filled(folder):
    empty = "It gains <!--=gain--><!----> points.\n<!-- figures: scores -->\n<!-- end -->\n"
    filled = figures.fill(empty, "x.md")
    assert "<!--=gain-->12.0<!----> points" in filled and "\n| tree | 84.1 |\n" in filled
    assert figures.fill(filled, "x.md") == filled


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("=gain", "=gian", "README.md:3: no figure is called 'gian'; there are"),
        ("figures: scores", "figures: score", "README.md:5: no figure is called 'score'"),
        ("<!-- end -->\n", "", "README.md:5: the table has no <!-- end -->"),
        ("| chain | |", "<!-- figures: scores -->", "README.md:10: the table of line 5 has no"),
        ("<!-- figures: scores -->\n", "", "README.md:11: no table ends here"),
        ("<!---->", "", "README.md:3: a number needs <!----> behind it"),
        ("It gains ", "", "README.md:3: put a word before the number"),
        ("It gains ", "- ", "README.md:3: put a word before the number"),
    ],
)
def test_wrong_marker_is_named_by_file_and_line(folder, capsys, right, wrong, message):
    (folder / "README.md").write_text(DOCUMENT.replace(right, wrong))
    (folder / "docs").mkdir()
    later = folder / "docs" / "later.md"
    later.write_text(DOCUMENT.replace("12.0", "13.0"))
    assert figures.main([], folder) == 2
    assert message in capsys.readouterr().err
    assert "13.0" in later.read_text(), "an error leaves all documents as they are"


def test_a_missing_result_names_marker_file_and_key(folder, capsys, monkeypatch):
    path = folder / "results.json"
    path.write_text(json.dumps({"main": {"apr": [{"accuracy": 0.5}]}}))
    row = figures.read(path)["main"]["apr"][0]
    assert figures.percent(row["accuracy"]) == "50.0%"
    monkeypatch.setitem(figures.NUMBERS, "gain", lambda: row["gain"])
    assert figures.main(["--check"], folder) == 2
    said = capsys.readouterr().err
    assert said.startswith("README.md:3: figure 'gain': ")
    assert f"{path}: results.main.apr[0] has no 'gain'" in said


def test_a_missing_result_file_is_named(tmp_path):
    with pytest.raises(figures.FiguresError, match=r"absent.json cannot be read"):
        figures.read(tmp_path / "absent.json")


def test_row_is_found_by_a_unique_name():
    rows = figures.Record({"rows": [{"name": "one"}, {"name": "other"}]}, "file")["rows"]
    assert figures.find_row(rows, "name", "one") is rows[0]
    assert figures.find_row_by_start(rows, "name", "ot") is rows[1]
    with pytest.raises(figures.FiguresError, match=r"2 rows beside file.rows\[0\] have the name"):
        figures.find_row_by_start(rows, "name", "o")
    with pytest.raises(figures.FiguresError, match="0 rows .* have the name 'on', not one"):
        figures.find_row(rows, "name", "on")


def test_wider_beams_stand_in_the_row_of_their_comparison(monkeypatch):
    def comparison(name, other, n):
        tokens = {"total_tokens": 9.0}
        return {
            "comparison": name,
            "one": 0.8,
            "other": other,
            "one_spent": tokens,
            "other_spent": tokens,
            "gap": 0.8 - other,
            "low": 0.0,
            "high": 0.5,
            "p": None,
            "n": n,
            "unit": "%",
            "paper": "",
            "reached": None,
            "chosen": "",
            "note": "",
        }

    rows = [
        comparison("same window: APR, SoS+", 0.5, 1000),
        comparison("same tokens: APR after RL, SoS+ after RL cons@5", 0.6, 160),
        comparison(
            "same tokens, SoS+ with beams 1 to 15 too: "
            "APR after RL, SoS+ with beams 1 to 15 cons@3",
            0.7,
            1000,
        ),
        comparison("RL's gain, APR", 0.7, 160),
    ]
    monkeypatch.setattr(figures, "results", lambda scale: {"comparisons": rows})
    _, window, tokens = figures.against_serial_search("any")
    interval = "(0.0 to 50.0)"
    assert window == ["same window", "80.0", "50.0", f"+30.0 {interval}", "", "", "", "1,000"]
    assert tokens == [
        "same tokens",
        "80.0 (after RL)",
        "60.0 (after RL, cons@5)",
        f"+20.0 {interval}",
        "",
        "70.0 (cons@3)",
        f"+10.0 {interval}",
        "160; 1,000",
    ]
    _, gain = figures.gains_by_rl("any")
    assert gain == ["APR", "70.0", "80.0", f"+10.0 {interval}", "", "160"]


def test_kind_of_rl_is_shown_once_trained(monkeypatch):
    scores = {
        "accuracy": 0.5,
        "ci95": [0.4, 0.6],
        "children": 2.0,
        "total_tokens": 90.0,
        "sequential_tokens": 60.0,
    }
    gap = {"accuracy": [0.1, 0.0, 0.2], "total_tokens": [9, 8, 10], "children": [1, 0.5, 1.5]}
    rows = {"seed 0, supervised": scores, "seed 0, T = 1": scores}
    gaps = []
    for arm in ("", "always cut, "):
        for seed in range(3):
            name = f"{arm}seed {seed}, after RL"
            rows |= {name: scores, f"{name}, T = 1": scores}
            gaps.append({"one": f"{name}, T = 1", **gap})
    record = figures.Record({"rows": rows, "gaps": gaps}, "early.json")
    monkeypatch.setattr(figures, "early", lambda: record)

    _, *shown = figures.early_models()
    assert [label for label, *_ in shown] == [
        "supervised",
        *(f"RL, seed {seed}" for seed in range(3)),
        *(f"RL, every gradient cut, seed {seed}" for seed in range(3)),
    ]
    assert shown[0] == ["supervised", "50.0% (40.0 to 60.0)", "2.0", "90", "60", "50.0%"]
    assert figures.early_gaps()[4] == [
        "effect of cutting every gradient, seed 0",
        "+10.0 (0.0 to 20.0)",
        "+9 (8 to 10)",
        "+1.0 (0.5 to 1.5)",
    ]


def test_versions_are_those_of_setup_py():
    assert figures.jax_version().count(".") == 2
    with pytest.raises(figures.FiguresError, match=r"setup.py names no oldest version of 'torchx'"):
        figures.oldest_version("torchx")
