"""A progress bar for what takes longer than two seconds; silent where there is no terminal.

A command may be told to show nothing, or to say each stage in a line, wherever stderr goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from threading import Timer
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Loud(Enum):
    """How much is shown of work that goes on."""

    QUIET = "nothing"
    BAR = "a bar, on a terminal"
    LINES = "a line for each stage, with the seconds it took"


LOUD: ContextVar[Loud] = ContextVar("LOUD", default=Loud.BAR)

Tick = Callable[[str, int, int], None]
"""Told (stage, done, total) as work goes on; a total of 0 means that nobody knows."""


@contextmanager
def progress(label: str, after: float = 2.0, console: Console | None = None) -> Iterator[Tick]:
    """`with progress("check") as tick: tick("nodes", 3, 400)`.

    The bar goes to stderr, only on a terminal, `after` seconds from now, and leaves no trace when
    the block ends.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    if LOUD.get() is Loud.LINES:
        with _lines(label, console) as said:
            yield said
        return
    if LOUD.get() is Loud.QUIET or not console.is_terminal:
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(label, total=None)

    def tick(stage: str, done: int, total: int) -> None:
        bar.update(task, description=f"{label}: {stage}", completed=done, total=total or None)

    timer = Timer(after, bar.start)  # not at a tick: the first stage may be the long one
    timer.daemon = True
    timer.start()
    try:
        yield tick
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextmanager
def _lines(label: str, console: Console) -> Iterator[Tick]:
    """A line as each stage ends, the last one with the block."""
    began, current = monotonic(), ""

    def tick(stage: str, done: int, total: int) -> None:
        nonlocal began, current
        if stage == current:
            return
        if current:
            said()
        began, current = monotonic(), stage

    def said() -> None:
        words = f"{label}: {current}" if current else label
        console.print(f"{words}, {monotonic() - began:.1f} s", highlight=False, markup=False)

    try:
        yield tick
    finally:
        said()
