"""Headless Chromium for the tests of pages: opens a file as a reader would, and hears what it says
and asks for.

Needs Chromium (Debian: `apt-get install chromium`), which `.ci/run` installs.
"""

import contextlib
import shutil

import pytest
from playwright.sync_api import sync_playwright

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"
)
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 375, "height": 740}


@contextlib.contextmanager
def chromium():
    """The browser; its sandbox wants a user who is not root, and what it opens here is ours."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextlib.contextmanager
def tabs(browser):
    """Opens files in new tabs; at the end no error may have been said, and nothing asked for but
    those files.
    """
    opened = []
    files = set()
    said = []
    asked = []

    def open_file(path, anchor="", viewport=WIDE, scheme="light", motion="reduce"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion=motion)
        context.set_default_timeout(15_000)
        opened.append(context)
        files.add(path.as_uri())
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri() + anchor)
        settle(tab)
        return tab

    yield open_file
    for context in opened:
        context.close()
    assert said == []
    assert {url.partition("#")[0] for url in asked} <= files


def settle(tab):
    """Waits until everything asked for is drawn."""
    tab.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
