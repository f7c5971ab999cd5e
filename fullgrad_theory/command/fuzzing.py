"""`fuzz`."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from ..bars import progress
from ..extras import require
from .page import judging, show


def campaign(examples: int, jobs: int, seed: int, out: Path | None) -> int:
    """Run a campaign and print its summary; the exit code."""
    with judging():
        require("hypothesis", "fuzz")
        from ..testing.campaign import Campaign, summary

        run = Campaign(examples, jobs, seed, out)
        with progress("fuzzing", after=0.0) as tick:
            run.run(tick)
            run.write_summary()
    show(Text(summary(run)))
    return 1 if run.tally.failures else 0
