"""The documentation site: its menu, the pages that are made from the code, and a strict build."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt

from apr_jax.cli.main import app
from apr_jax.config import flatten_fields, load, to_dict
from apr_jax.scales import SCALES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
reference_pages = importlib.import_module("reference_pages")
site_hooks = importlib.import_module("site_hooks")


def written_pages():
    return {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def test_the_menu_has_every_page():
    menu = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    others = {f"repository/{name}" for name in site_hooks.IN_THE_MENU}
    made = {
        f"reference/{package.removeprefix('apr_jax.')}.md"
        for package in reference_pages.public_packages()
    }
    made |= {"reference/command_line.md", "reference/configuration.md"}
    assert menu == written_pages() | made | others


def test_command_line_page_has_every_flag():
    page = reference_pages.command_line()
    root = typer.main.get_command(app)
    for words, command in reference_pages.commands(root, ("apr",)):
        section = page.split(f"## {' '.join(words)}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for flag in parameter.opts:
                row = f"| `{flag}"
                assert row in section or parameter.param_type_name == "argument", (words, flag)
    assert "| `--samples <int range>` | Trees for each problem. | `default: 1; x>=1` |" in page


def test_configuration_page_has_every_field():
    page = reference_pages.configuration()
    for scale in SCALES:
        for field in flatten_fields(to_dict(load(scale))):
            assert f"| `{field}` |" in page or field == "task.kind", field
    assert "| `train.sft.save_every` | `int` | `200` | steps between checkpoints. |" in page
    assert '`"tree" or "token" or "sequence"`' in page


def test_a_field_without_a_meaning_is_refused():
    @dataclasses.dataclass
    class Half:
        """Half of it.

        Attributes:
          known: is told.
        """

        known: int
        unknown: int

    with pytest.raises(ValueError, match=r"Half\.unknown: its class's docstring has no line"):
        reference_pages.attribute_meanings(Half)


def test_a_name_is_documented_on_one_page_and_linked_on_others():
    assert "::: apr_jax.threads.Limits" in reference_pages.api("apr_jax.threads")
    top = reference_pages.api("apr_jax")
    assert "::: apr_jax.threads.Limits" not in top and "::: apr_jax.Limits" not in top
    assert "| [`Limits`][apr_jax.threads.Limits] | `apr_jax.threads` |" in top
    assert "::: apr_jax.load_config" in top


def test_links_out_of_docs_lead_to_pages_of_the_site():
    text = "[a](../examples/x.py) [b](data.md#c) [c](#d) [d](https://e.org/f) [e](../docs/log.md)"
    assert site_hooks.with_site_links(text, ROOT / "docs" / "index.md") == (
        "[a](repository/examples/x.py.md) [b](data.md#c) [c](#d) [d](https://e.org/f) [e](log.md)"
    )
    assert site_hooks.with_site_links("[a](docs/log.md)", ROOT / "CONTRIBUTING.md") == (
        "[a](../log.md)"
    )


def test_lists_and_tables_behind_text_get_an_empty_line():
    code = "```\ncode\n- code\n```\n"
    text = f"text\n- one\n  more\n- two\n\ntext\n| a |\n| --- |\n\n{code}## x\n- y\n"
    assert site_hooks.with_empty_lines(text) == (
        f"text\n\n- one\n  more\n- two\n\ntext\n\n| a |\n| --- |\n\n{code}## x\n- y\n"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a broken link, a missing page or a wrong docstring ends the build."""
    folder = tmp_path_factory.mktemp("site")
    # Whatever would be fetched from another host fails at once.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.thorough
def test_no_page_loads_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"?stylesheet[^>]+(https?:[^\s\">]+)", text)
        assert not loaded, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:", sheet.read_text()), sheet


@pytest.mark.thorough
def test_the_site_shows_what_github_shows(site):
    """Python-Markdown wants an empty line before a list or a table where GitHub wants none."""
    github = MarkdownIt("commonmark").enable("table")
    for name in sorted(written_pages()):
        expected = github.render((ROOT / "docs" / name).read_text())
        page = (site / name).with_suffix(".html").read_text()
        shown = page.split("<article")[1].split("</article>")[0]
        for tag in ("<table", "<td", "<li>", "<pre", "<h2", "<h3", "<img"):
            assert shown.count(tag) == expected.count(tag), (name, tag)


@pytest.mark.thorough
def test_the_reference_shows_docstrings(site):
    threads = (site / "reference" / "threads.html").read_text()
    assert 'id="apr_jax.threads.Limits"' in threads
    assert "the most positions that one thread may occupy at a time" in threads
