"""Files that are there whole or not at all: written beside, then named. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place once it is whole.

    What stood there stays until then. Raises `OSError` with the path's name for a full disk or a
    folder that cannot be written, and leaves nothing.
    """
    path = Path(path)
    target = path.resolve()  # what a link names, and not the link
    if (path.exists() and not path.is_file()) or not os.access(target.parent, os.W_OK):
        yield path  # a pipe, a terminal, /dev/stdout: nothing can be put beside it
        return
    beside = target.with_name(f".{target.stem[:100]}-{uuid4().hex[:8]}{target.suffix}")
    try:
        yield beside
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o7777)
        os.replace(beside, target)
    except OSError as error:
        raise OSError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a file as UTF-8 so."""
    whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """The same for what `write` writes to the path it is given, which ends as `path` does."""
    with replacing(path) as beside:
        write(beside)
