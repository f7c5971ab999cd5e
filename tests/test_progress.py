"""The progress bar: late, on a terminal only, and gone afterwards."""

from __future__ import annotations

import io
import threading
import time

from rich.console import Console

from fullgrad_theory.bars import LOUD, Loud, progress


def run(seconds: float, after: float, terminal: bool) -> str:
    page = io.StringIO()
    console = Console(file=page, force_terminal=terminal, width=80)
    with progress("check", after, console) as tick:
        tick("nodes", 3, 10)
        time.sleep(seconds)
        tick("nodes", 10, 10)
    return page.getvalue()


def test_a_short_run_shows_nothing() -> None:
    before = {*threading.enumerate()}
    assert run(0.0, after=30.0, terminal=True) == ""
    assert {*threading.enumerate()} <= before


def test_a_long_run_shows_its_stage_and_clears_the_line() -> None:
    shown = run(0.5, after=0.05, terminal=True)
    assert "check: nodes" in shown and "3/10" in shown
    assert shown.endswith("\x1b[2K")


def test_no_terminal_no_bar() -> None:
    assert run(0.2, after=0.0, terminal=False) == ""


def test_an_error_passes_through() -> None:
    try:
        with progress("check", 0.0, Console(file=io.StringIO(), force_terminal=True)):
            raise KeyError("x")
    except KeyError:
        return
    raise AssertionError("swallowed")


def told(loud: Loud, terminal: bool) -> str:
    before = LOUD.set(loud)
    try:
        return run(0.2, 0.0, terminal)
    finally:
        LOUD.reset(before)


def test_quiet_shows_nothing_on_a_terminal_either() -> None:
    assert told(Loud.QUIET, terminal=True) == ""


def test_lines_are_for_a_file_too() -> None:
    (line,) = told(Loud.LINES, terminal=False).splitlines()
    assert line.startswith("check: nodes, 0.") and line.endswith(" s")
