"""What is printed: tables and reports to stdout, one red line to stderr. Needs no torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from traceback import print_exception
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..edits.costs import policies as published
from ..errors import FullgradError

WIDTH = 100
"""columns at most, as a report has them"""


class _Console(Console):
    """A reader that has seen enough (`| head -1`) changes nothing: not the exit code either."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is buffered is flushed at the end


def show(*parts: Any) -> None:
    """Print to stdout, `WIDTH` wide at most."""
    if sys.stdout is None:  # a process that was started without one
        return
    console = _Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    for part in parts:
        with suppress(ValueError):  # the user's code closed it
            console.print(part)


def table(*columns: str, unbroken: str = "") -> Table:
    """An empty table of these columns, the `unbroken` one on one line each."""
    made = Table(box=SIMPLE, pad_edge=False)
    for title in columns:
        made.add_column(title, overflow="fold", no_wrap=title == unbroken)
    return made


INTERRUPTED = 130
"""the exit code after Ctrl-C: not 1, which is a verdict"""


@contextmanager
def judging(
    record: Callable[[str], None] = lambda why: None, traceback: bool = False
) -> Iterator[None]:
    """Anything that keeps a model from being judged is one message, recorded, and exit code 2.

    That is whatever the user's code raises, `sys.exit(0)` included. `traceback`: show it as well.
    """
    streams = sys.stdout, sys.stderr
    try:
        with _warned_of_after(even_of_failures=traceback):
            yield
        return
    except KeyboardInterrupt:
        why, code = "interrupted", INTERRUPTED
    except BaseException as error:  # noqa: BLE001  no exit code of theirs is a verdict
        why, code = _said(error), 2
        if traceback:
            print_exception(error, file=streams[1])
    finally:
        sys.stdout, sys.stderr = streams  # the user's code may have put others there
    try:
        record(why)
    except OSError as error:
        why = f"{why} (and this could not be written down: {error})"
    error_line(why)
    raise typer.Exit(code)


@contextmanager
def _warned_of_after(even_of_failures: bool) -> Iterator[None]:
    """Warnings wait for the end: an error is one line, and what led to it is in that."""
    failed = True
    with warnings.catch_warnings(record=True) as given:
        try:
            yield
            failed = False
        finally:
            kept = list(given) if even_of_failures or not failed else []
    for warning in kept:
        warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def _said(error: BaseException) -> str:
    """What kept a model from being judged, in words for the one line."""
    from ..graph.sources import first_line, raised_at

    if _out_of_memory(error):
        return "out of memory; --no-numeric needs less, and --device meta next to none"
    if isinstance(error, FullgradError | OSError):
        return str(error)
    at = raised_at(error)
    if at:
        return f"{first_line(error)} (at {at})"
    return (
        f"an error of this library, please report it with what --traceback shows: "
        f"{first_line(error)}"
    )


def error_line(why: str) -> None:
    """The one red line to stderr."""
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {why}", style="red"))


def _out_of_memory(error: BaseException | None) -> bool:
    """Of the machine or of a device, also where an error of ours came of that."""
    import torch

    from ..graph.sources import said

    while error is not None:
        words = said(error)
        lacking = isinstance(error, RuntimeError) and "memory" in words and "allocat" in words
        if lacking or isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


# --------------------------------------------------------------------------- lists


def policies() -> None:
    """Print all policies."""
    made = table("policy", "complete", "what it does", "source")
    for entry in published():
        words = "yes" if entry.complete else "no"
        made.add_row(entry.name, words, Text(entry.description), Text(entry.source))
    show(made)


def operators() -> None:
    """Print all operations by their class, and what each class brings."""
    from ..operators.classes import CLASSES
    from ..operators.registry import registered

    lemmas = table("class", "lemma")
    for algebra, kind in CLASSES.items():
        lemmas.add_row(str(algebra), Text(kind.lemma))
    made = table("operation", "class", "degree rule", "edit of its own", unbroken="operation")
    for entry in sorted(registered(), key=lambda o: (list(CLASSES).index(o.algebra), o.name)):
        cells = (entry.name, str(entry.algebra), entry.signature, ", ".join(entry.edits))
        made.add_row(*map(Text, cells))
    show(made, lemmas)
