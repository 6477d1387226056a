"""What the documents promise is there: commands, targets, files, packages."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from apr_jax.cli.main import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tpu_setup" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]
COMMAND = re.compile(r"^ {4}(?:\S+=\S+ )*(?:\.venv/bin/)?(apr .*)$", re.M)


def spoken(path):
    for line in COMMAND.findall(path.read_text()):
        yield shlex.split(line.partition("  #")[0])[1:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_with_their_flags(path):
    root = typer.main.get_command(app)
    for words in spoken(path):
        command = root
        rest = words
        while hasattr(command, "commands"):
            command = command.commands[rest[0]]
            rest = rest[1:]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= flags, words
        for word in rest:
            if word.startswith("experiments/"):
                assert (ROOT / word).is_file()


def test_the_readme_speaks_of_most_commands():
    assert len(list(spoken(ROOT / "README.md"))) >= 7


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^(?: {4}|`)?make ([a-z0-9-]+)", path.read_text(), re.M)) <= targets


def test_files_that_the_documents_name_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = (
        "tasks|text|data|model|threads|train|evaluate|report|paper|check|plan|bench|new_task|cli|io"
    )
    named = set(re.findall(rf"`((?:{folders})/[\w/]*(?:\.py)?|\w+\.py)`", text))
    assert len(named) > 20
    for name in named:
        assert (ROOT / "apr_jax" / name).exists(), name


def test_every_dependency_has_its_line_and_both_bounds():
    setup = (ROOT / "setup.py").read_text()
    required = re.findall(r'"([A-Za-z][\w-]*)([<>=!]=?\d[^"]*)"', setup.replace('">=3.11"', ""))
    told = (ROOT / "docs" / "dependencies.md").read_text().lower()
    assert len(required) > 15
    for name, bounds in required:
        assert name.lower() in told, name
        assert ">=" in bounds and "<" in bounds, name


def test_no_machine_path_and_no_registry_address():
    files = [
        path
        for folder in ("apr_jax", "docs", "experiments", "tests", "tpu_setup")
        for path in (ROOT / folder).rglob("*")
    ]
    for path in [*files, ROOT / "setup.py", ROOT / "Makefile", ROOT / "README.md"]:
        if (
            path.is_file()
            and path.suffix in (".py", ".md", ".toml", ".sh", "")
            and path != Path(__file__)
        ):
            text = path.read_text()
            assert not re.search(r"/home/\w|/root/|/work/|index-url|pypi\.org", text), path
