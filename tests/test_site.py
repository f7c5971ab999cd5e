"""The documentation site: built strictly, whole, and nothing in it comes from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from browser import browsing

ROOT = Path(__file__).resolve().parent.parent
# what makes a browser fetch something; a plain link does not
LOADS = {
    ("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"),
    ("audio", "src"), ("embed", "src"), ("object", "data"), ("link", "href"), ("use", "href"),
    ("img", "srcset"), ("source", "srcset"), ("input", "src"),
}  # fmt: skip

pytestmark = pytest.mark.slow


class Read(HTMLParser):
    """What a page defines, what it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value is None:
                continue
            if key == "id" or (tag == "a" and key == "name"):
                self.anchors.add(value)
            if (tag, key) in LOADS:
                self.loads.append(value)
            if (tag, key) in LOADS or (tag == "a" and key == "href"):
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="the site is not built: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Read]:
    return {file: Read(file.read_text()) for file in sorted(site.rglob("*.html"))}


def inside(pages: dict[Path, Read]) -> Iterator[tuple[Path, str, Path, str]]:
    """All links within the site: page, link, file, anchor."""
    for page, read in pages.items():
        if page.name == "404.html":
            continue  # it may stand in for any address, so its links begin at the root
        for link in read.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            file = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            yield (
                page,
                link,
                file / "index.html" if file.is_dir() else file,
                unquote(parts.fragment),
            )


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Read]) -> None:
    links = list(inside(pages))
    assert len(links) > 1000
    root = site.resolve()
    dead = [
        f"{page.relative_to(site)}: {link}"
        for page, link, file, anchor in links
        if not file.is_relative_to(root)
        or not file.is_file()
        or (anchor and file.suffix == ".html" and anchor not in pages[file].anchors)
    ]
    assert not dead, dead


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Read]) -> None:
    """Neither by a page, nor by a style sheet."""
    far = [
        f"{page.relative_to(site)}: {link}"
        for page, read in pages.items()
        for link in read.loads
        if urlsplit(link).netloc
    ]
    far += [
        str(sheet.relative_to(site))
        for sheet in site.rglob("*.css")
        if "url(http" in sheet.read_text() or "url(//" in sheet.read_text()
    ]
    assert not far, far


def test_every_public_name_has_its_place(pages: dict[Path, Read]) -> None:
    import fullgrad_theory

    reference = [read.anchors for page, read in pages.items() if page.parent.name == "api"]
    lost = [
        name
        for name in fullgrad_theory.__all__
        if not any(f"fullgrad_theory.{name}" in anchors for anchors in reference)
    ]
    assert not lost, lost


def test_every_document_is_a_page(site: Path) -> None:
    lost = [
        document.name
        for document in (ROOT / "docs").rglob("*.md")
        if not (site / document.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    ]
    assert not lost


def test_the_table_of_operations_is_the_registry(site: Path) -> None:
    from fullgrad_theory.operators.registry import registered

    table = (site / "api" / "table.html").read_text()
    assert not [entry.name for entry in registered() if entry.name not in table]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site, served to this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_pages_fit_a_desk_and_a_telephone(site: Path, address: str) -> None:
    """In a browser: nothing is asked of others, no error is said, no page scrolls sideways."""
    wrong: list[str] = []
    with browsing() as browser:
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
            page.on(
                "request",
                lambda asked: None if asked.url.startswith(address) else wrong.append(asked.url),
            )
            for file in sorted(site.rglob("*.html")):
                if file.name == "404.html":
                    continue
                page.goto(address + file.relative_to(site).as_posix())
                if not page.evaluate("document.documentElement.scrollWidth <= innerWidth"):
                    wrong.append(f"{page.url} scrolls sideways at {width}")
            page.close()
    assert not wrong, wrong


def test_the_search_finds(address: str) -> None:
    with browsing() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address + "index.html")
        page.locator("input[name=query]").click()
        page.locator("input[name=query]").press_sequentially("check_completeness")
        page.locator("a.md-search-result__link").first.wait_for(timeout=20_000)
        found = page.locator("a.md-search-result__link").evaluate_all("all => all.map(a => a.href)")
        assert any("api/check.html" in link for link in found), found
