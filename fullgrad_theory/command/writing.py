"""Files that a command writes: never those of an earlier run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def withdraw(path: Path | None) -> Path | None:
    """Remove what an earlier run left there, so that nothing of it is taken for this one's.

    Returns the path in full: the user's code may change the folder. What is no regular file (a
    pipe, /dev/stdout) stays.
    """
    if path is None:
        return None
    path = path.resolve()  # a link goes on pointing there
    if path.is_file() and os.access(path.parent, os.W_OK):
        path.unlink()
    return path


def named_by(options: Sequence[str], arguments: Sequence[str]) -> Iterator[Path]:
    """The files that arguments name for these options (`--json r.json`, `--json=r.json`)."""
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in options and equals:
            yield Path(value)
        elif option in options and position + 1 < len(arguments):
            yield Path(arguments[position + 1])
