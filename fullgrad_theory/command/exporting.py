"""`zoo show`, `compare`, `merge` and `export`: what is done with results. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.text import Text

from ..errors import InputError
from ..files import write_whole
from ..zoo.compare import change, compared
from ..zoo.pages import comma_separated, figure, html, markdown, parquet, summary, why
from ..zoo.rows import Outcome
from ..zoo.sources import matches
from ..zoo.store import reading, writing
from .page import judging, show, table
from .zoo import Format


def show_results(
    results: Path, patterns: Sequence[str], verdicts: Collection[Outcome], traceback: bool
) -> None:
    """Print those of these verdicts, and the counts of all that match."""
    with judging(traceback=traceback), reading(results) as store:
        rows = store.latest()
    if patterns:
        rows = [row for row in rows if any(matches(row, pattern) for pattern in patterns)]
    titles = ("architecture", "as it is", "edited", "error", "edits", "in the way", "CPU s")
    made = table(*titles, unbroken="architecture")
    for row in rows:
        if row.verdict in verdicts:
            judged = (row.plain or "-", f"{row.policy}: {row.verdict}")
            counted = (figure(row.error) or "-", str(sum(row.edits.values())))
            texts = (row.name, *judged, *counted, why(row, 2), figure(row.seconds, ".1f"))
            made.add_row(*map(Text, texts))
    show(made, Text(f"{summary(rows)}."))


def compare(old: Path, new: Path, traceback: bool) -> int:
    """Print what changed; the exit code."""
    with judging(traceback=traceback), reading(old) as first, reading(new) as second:
        found = compared(first.latest(), second.latest())
    for word, pairs in (("worse", found.worse), ("better", found.better)):
        for was, now in pairs:
            show(Text(f"{word:6}  {now.source} {now.name}: {change(was, now)}"))
    show(
        Text(
            f"{len(found.worse)} worse, {len(found.better)} better, {found.same} as before; "
            f"{len(found.gone)} only in {old.name}, {len(found.added)} only in {new.name}"
        )
    )
    return 1 if found.worse else 0


def merge(files: Sequence[Path], into: Path, traceback: bool) -> None:
    """Keep the rows of all files in one."""
    with judging(traceback=traceback), writing(into) as store:
        for file in files:
            with reading(file) as other:
                for row in other.rows.values():
                    store.keep(row)
        rows = store.latest()
    show(Text(f"{summary(rows)}. In {into}."))


def export(results: Path, form: Format, out: Path | None, traceback: bool) -> None:
    """Write them to a file, or to stdout as they are."""
    with judging(traceback=traceback):
        with reading(results) as store:
            rows = store.latest()
        if form is Format.PARQUET:
            if out is None:
                raise InputError("Parquet is no text: name a file with --out")
            parquet(rows, out)
            return
        text = {Format.MARKDOWN: markdown, Format.CSV: comma_separated, Format.HTML: html}[form](
            rows
        )
        if out is None:
            sys.stdout.write(text)
        else:
            write_whole(out, text)
