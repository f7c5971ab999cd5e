"""What is printed: tables and reports to stdout, one red line to stderr. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def show(*parts: Any) -> None:
    """Print to stdout, `WIDTH` wide at most."""
    console = Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    for part in parts:
        console.print(part)


def table(*columns: str, unbroken: str = "") -> Table:
    """An empty table of these columns, the `unbroken` one on one line each."""
    made = Table(box=SIMPLE, pad_edge=False)
    for title in columns:
        made.add_column(title, overflow="fold", no_wrap=title == unbroken)
    return made


@contextmanager
def judging(record: Callable[[str], None] = lambda why: None) -> Iterator[None]:
    """Anything that keeps a model from being judged is one message, recorded, and exit code 2."""
    try:
        yield
        return
    except (FullgradError, OSError) as error:
        why = str(error)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        why = "out of memory; --no-numeric needs less, and --device meta next to none"
    record(why)
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {why}", style="red"))
    raise typer.Exit(2)


def _out_of_memory(error: Exception) -> bool:
    """Of the machine or of a device."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError)


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
