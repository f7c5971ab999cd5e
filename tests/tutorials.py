"""The tutorials as they are followed: a page's blocks run in order, in one folder.

A block of python runs in one session, as a notebook's cells do; one with a title is a file that the
reader saves; one of sh is run by the shell. A block of text after it is what it prints, `...` where
something is left out. `python tests/tutorials.py` from the root takes these prints anew.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "tutorials"
PAGES = [page for page in sorted(FOLDER.glob("*.md")) if page.name != "index.md"]
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.M | re.S)
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_SESSION = """
import contextlib, io, json, sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(json.loads(line), "tutorial.py", "exec"), names)
    print(json.dumps(said.getvalue()), flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A block of a page; `says` is the text behind it, None where there is none."""

    language: str
    title: str | None
    code: str
    says: str | None
    place: tuple[int, int]
    """where the text behind it begins and ends"""


def blocks(page: str) -> Iterator[Block]:
    """The blocks that are run or saved, in order."""
    found = list(_BLOCK.finditer(page))
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block[1] not in ("python", "sh", "yaml", "toml"):
            continue
        follows = after and after[1] == "text" and not page[block.end() : after.start()].strip()
        yield Block(
            block[1],
            block[2],
            block[3],
            after[3] if after and follows else None,
            after.span(3) if after and follows else (0, 0),
        )


@contextmanager
def following(folder: Path) -> Iterator[object]:
    """A reader in a folder: a function that does what a block says, and returns what it prints."""
    beside = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "CI"):
        environment.pop(name, None)
    complaints = folder / ".complaints"  # progress, warnings, and what ends the session
    session = subprocess.Popen(
        [sys.executable, "-c", _SESSION],
        cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints.open("w"),
    )  # fmt: skip

    def follow(block: Block) -> str:
        if block.title is not None:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code)
            return ""
        if block.language == "sh":
            done = subprocess.run(
                ["bash", "-c", block.code],
                cwd=folder, env=environment, text=True, timeout=300,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            return done.stdout
        if block.language != "python":
            return ""
        assert session.stdin and session.stdout
        session.stdin.write(json.dumps(block.code) + "\n")
        session.stdin.flush()
        answer = session.stdout.readline()
        if not answer:
            raise AssertionError(f"{block.code}\n{complaints.read_text()}")
        return str(json.loads(answer))

    try:
        yield follow
    finally:
        session.kill()
        session.communicate()


def differs(says: str, printed: str) -> str | None:
    """Why what is printed is not what the page says, or None.

    Blanks do not count, and numbers may differ by a little: by 3 %, or at rounding level.
    """
    lines = [" ".join(line.split()) for line in says.strip().splitlines()]
    pattern = ""
    for part in re.split(rf"(\.\.\.|{_NUMBER})", "\n".join(lines)):
        if part == "...":
            pattern += "(?:.|\n)*?"
        elif re.fullmatch(_NUMBER, part):
            pattern += f"({_NUMBER})"
        else:
            pattern += re.escape(part)
    got = "\n".join(" ".join(line.split()) for line in printed.strip().splitlines())
    match = re.fullmatch(pattern, got)
    if match is None:
        return f"the page says\n{says}\nand it prints\n{printed}"
    for stands, found in zip(re.findall(_NUMBER, "\n".join(lines)), match.groups(), strict=True):
        if not math.isclose(float(stands), float(found), rel_tol=0.03, abs_tol=1e-6):
            return f"the page says {stands} and it prints {found}, in\n{printed}"
    return None


def retaken(text: str) -> str:
    """A page with the prints as they are today; what still fits is left as it is."""
    with TemporaryDirectory() as name, following(Path(name)) as follow:
        for block in list(blocks(text)):
            printed = follow(block)
            print(f"{block.code}{printed}")
            if block.says is not None and differs(block.says, printed):
                clean = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
                mark = f"\0{len(text)}"
                text = text.replace(f"{block.code}```\n\n```text\n{block.says}```", mark, 1)
                text = text.replace(mark, f"{block.code}```\n\n```text\n{clean}\n```", 1)
    return text


if __name__ == "__main__":
    for page in [FOLDER / f"{name}.md" for name in sys.argv[1:]] or PAGES:
        page.write_text(retaken(page.read_text()))
