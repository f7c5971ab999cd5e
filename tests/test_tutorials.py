"""The tutorials, followed from top to bottom: what they say is printed is what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tutorials import FOLDER, PAGES, blocks, differs, following

EXTRAS = {
    "vision.md": ("timm", "matplotlib"),
    "policy.md": ("timm",),
    "language.md": ("transformers",),
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    for module in EXTRAS.get(page.name, ()):
        pytest.importorskip(module)
    with following(tmp_path) as follow:
        for block in blocks(page.read_text()):
            printed = follow(block)
            if block.says is not None:
                wrong = differs(block.says, printed)
                assert wrong is None, (
                    f"{wrong}\n(python tests/tutorials.py {page.stem} takes it anew)"
                )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_print_of_a_tutorial_is_looked_at(page: Path) -> None:
    """A text that no block stands before would be a claim that nobody checks."""
    text = page.read_text()
    assert text.count("```text\n") == sum(block.says is not None for block in blocks(text)) > 0


def test_every_tutorial_is_listed() -> None:
    listed = (FOLDER / "index.md").read_text()
    assert len(PAGES) >= 6
    assert not [page.name for page in PAGES if f"({page.name})" not in listed]


def test_prints_are_compared() -> None:
    """A little in the numbers, nothing in the words, and what is left out where it says so."""
    assert differs("error 0.995  in 3 nodes", "error 0.994 in 3 nodes\n") is None
    assert differs("error 2.0e-16", "error 0") is None
    assert differs("1 failed in ...s", "1 failed in 3.21s") is None
    assert differs("first\n...\nlast 7", "first\nsecond\nlast 7") is None
    assert differs("error 0.995", "error 0.9") is not None
    assert differs("3 nodes", "4 nodes") is not None
    assert differs("True", "False") is not None
    assert differs("first\nlast", "first\nsecond\nlast") is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_is_a_notebook(page: Path) -> None:
    """Its blocks of Python are cells; where most blocks are of the shell, behind `%%python`."""
    jupytext = pytest.importorskip("jupytext")
    text = page.read_text()
    cells = jupytext.reads(text, fmt="md").cells
    code = [c.source.removeprefix("%%python\n") for c in cells if c.cell_type == "code"]
    python = [block.code for block in blocks(text) if block.language == "python"]
    assert [p.strip() for p in python if p.strip() not in code] == [], code
    assert text.splitlines()[0] in cells[0].source
