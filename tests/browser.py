"""A real browser for the tests of pages: Chromium as the system has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@contextmanager
def browsing() -> Iterator[Any]:
    """Chromium without a window; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: pages are not tried in a browser (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    # as root, in a container, the browser's own sandbox cannot be
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, file: Path, width: int = 1280) -> Iterator[Any]:
    """A file's page, which neither complains nor asks for anything else, and fits the width."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda asked: wrong.append(asked.url))
    address = file.absolute().as_uri()
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    wrong = [w for w in wrong if w != address and not w.startswith("data:")]
    assert not wrong
    page.close()
