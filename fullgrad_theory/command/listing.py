"""`policies`, which needs no torch, and `operators`."""

from __future__ import annotations

from rich.text import Text

from ..edits.costs import policies as published
from .page import show, table


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
