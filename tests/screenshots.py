"""The docs' pictures of pages, taken anew: `python tests/screenshots.py` from the root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from browser import browsing, opened
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent / "docs"
CHECK = ("check", "test_vit", "--policy", "attnlrp", "--quiet", "--html")


def main() -> None:
    """docs/report.png: a policy that leaves something incomplete, an operation of it chosen."""
    with TemporaryDirectory() as folder, browsing() as browser:
        page, picture = Path(folder, "report.html"), Path(folder, "report.png")
        code = "from fullgrad_theory.command.cli import app; app()"
        subprocess.run([sys.executable, "-c", code, *CHECK, str(page)], check=False)
        with opened(browser, page) as shown:
            shown.locator("button[data-node]").first.click()
            shown.evaluate("scrollTo(0, 0)")
            shown.screenshot(path=picture, full_page=True)
        with Image.open(picture) as taken:
            small = taken.convert("RGB").resize((taken.width * 5 // 8, taken.height * 5 // 8))
            small.quantize(160).save(DOCS / "report.png", optimize=True)


if __name__ == "__main__":
    main()
