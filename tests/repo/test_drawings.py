"""The drawings of docs/concepts.md are those of `docs/drawings.py`."""

import importlib
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
drawings = importlib.import_module("drawings")


def test_the_drawings_are_current(capsys):
    assert drawings.main(["--check"]) == 0, capsys.readouterr().out


def test_the_page_shows_each_with_its_own_title():
    page = (ROOT / "docs" / "concepts.md").read_text()
    shown = {name: title for title, name in re.findall(r"!\[(.+)\]\(img/(\w+)\.svg\)", page)}
    titles = {
        path.stem: next(iter(ElementTree.parse(path).getroot())).text
        for path in (ROOT / "docs" / "img").glob("*.svg")
        if path.stem in drawings.DRAWINGS
    }
    assert shown == titles and len(shown) == len(drawings.DRAWINGS)


def test_an_old_drawing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawings, "FOLDER", tmp_path)
    monkeypatch.setattr(drawings, "DRAWINGS", {"packing": drawings.packing})
    assert drawings.main([]) == 0
    assert drawings.main(["--check"]) == 0
    (tmp_path / "packing.svg").write_text("<svg/>")
    capsys.readouterr()
    assert drawings.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/img/packing.svg is out of date\n"


def test_slots_hold_one_thread_at_a_time_and_children_follow_their_root():
    trees = drawings.examples()
    stays = drawings.schedule(trees, slots=2)
    for first in stays:
        for second in stays:
            if first is not second and first.slot == second.slot:
                assert first.stop <= second.start or second.stop <= first.start
    for tree in range(len(trees)):
        before, *children, after = [stay for stay in stays if stay.tree == tree]
        assert (before.thread, after.thread) == (0, 0)
        assert len(children) == len(trees[tree].threads) - 1
        assert all(before.stop <= child.start for child in children)
        assert all(child.stop <= after.start for child in children)


@pytest.mark.parametrize("name", list(drawings.DRAWINGS))
def test_every_text_is_inside_its_drawing(name):
    root = ElementTree.parse(ROOT / "docs" / "img" / f"{name}.svg").getroot()
    width, height = map(float, root.get("viewBox").split()[2:])
    texts = root.findall("{http://www.w3.org/2000/svg}text")
    assert texts
    for text in texts:
        size = float(text.get("font-size"))
        right = float(text.get("x")) + 0.61 * size * len(text.text)
        assert right <= width and 0 < float(text.get("y")) <= height, text.text
