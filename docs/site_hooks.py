"""What MkDocs does besides showing docs/*.md (it calls these functions by their names).

The pages of docs/ link to files beside docs/, as GitHub shows them. In the site such a file is a
page below repository/: Markdown as it is, code as a listing. The reference pages are made from the
code.
"""

from __future__ import annotations

import importlib
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# Pages that the menu has besides those to which others link.
IN_THE_MENU = ("CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml"}

# A relative link: `](`, the path, perhaps an anchor, `)`.
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")

# The first line of a list or a table, behind a line of text.
BLOCK_BEHIND_TEXT = re.compile(r"^(?![-*|#\s]|1\. )(.+)\n(?=[-*] |1\. |\|)", re.MULTILINE)
FENCED_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are no files of docs/: MkDocs calls it when it has listed the files."""
    sys.path.insert(0, str(DOCS))
    try:
        reference_pages = importlib.import_module("reference_pages")
    finally:
        sys.path.remove(str(DOCS))
    for path, text in reference_pages.pages().items():
        files.append(File.generated(config, path, content=text))

    pages = [ROOT / name for name in IN_THE_MENU]
    pages += sorted(DOCS.rglob("*.md"))
    for path in linked_files(pages):
        uri = uri_of(path)
        if path.suffix in (".md", *LANGUAGES):
            files.append(File.generated(config, uri, content=page_of(path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Returns the text of a page as the site needs it: MkDocs calls it for every page."""
    source = DOCS / page.file.src_uri
    if source.is_file():
        markdown = with_site_links(markdown, source)
    return with_empty_lines(markdown)


def linked_files(pages: list[Path]) -> list[Path]:
    """Returns the files outside of docs/ to which these pages lead, and those of them outside."""
    waiting = list(pages)
    found: dict[Path, None] = {}
    while waiting:
        page = waiting.pop()
        if not page.is_relative_to(DOCS):
            found[page] = None
        if page.suffix == ".md":
            targets = (target_of(page, link[1]) for link in LINK.finditer(page.read_text()))
            new = {*targets} - {*found, *pages}
            waiting += sorted(path for path in new if not path.is_relative_to(DOCS))
    return list(found)


def target_of(page: Path, link: str) -> Path:
    """Returns the file to which a link of a page leads."""
    return Path(os.path.normpath(page.parent / link))


def uri_of(path: Path) -> str:
    """Returns where a file of the repository is in the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    uri = f"repository/{path.relative_to(ROOT).as_posix()}"
    return f"{uri}.md" if path.suffix in LANGUAGES else uri


def page_of(path: Path) -> str:
    """Returns the page of a file beside docs/."""
    text = path.read_text()
    if path.suffix == ".md":
        return with_site_links(text, path)
    return f"# {path.relative_to(ROOT)}\n\n````{LANGUAGES[path.suffix]}\n{text}````\n"


def with_site_links(markdown: str, source: Path) -> str:
    """Returns a page with each relative link leading to where the site has that file."""
    folder = posixpath.dirname(uri_of(source))

    def replaced(link: re.Match[str]) -> str:
        uri = uri_of(target_of(source, link[1]))
        return f"]({posixpath.relpath(uri, folder or '.')}{link[2] or ''})"

    return LINK.sub(replaced, markdown)


def with_empty_lines(markdown: str) -> str:
    """Returns a page in which an empty line stands before each list and each table.

    GitHub needs none, but MkDocs would take the list for a part of the text before it.
    """
    parts = FENCED_CODE.split(markdown)
    parts[::2] = [BLOCK_BEHIND_TEXT.sub(r"\1\n\n", part) for part in parts[::2]]
    return "".join(parts)
