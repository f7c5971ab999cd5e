"""What it costs to start: CPU time of imports and of the commands that should answer at once.

    python -m experiments.start_cost [--rounds 5] [--write]

Every candidate is a process of its own; they take turns, and medians are compared. Exits with 1
where a bar is missed: importing the package at most 1.2 times torch's own import, with every public
name touched 1.3 times; `--help` and `policies` at most 0.5 s. `--write` writes
experiments/results/start_cost.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "experiments" / "results" / "start_cost.md"
COMMAND = "from fullgrad_theory.command.cli import app; app()"


@dataclass(frozen=True)
class Start:
    """A process to start: `python -c code arguments`. `times` bars it by torch's import, `seconds`
    by itself."""

    name: str
    code: str
    arguments: tuple[str, ...] = ()
    times: float | None = None
    seconds: float | None = None


TORCH = Start("import torch", "import torch")
STARTS = (
    TORCH,
    Start("import fullgrad_theory", "import fullgrad_theory", times=1.2),
    Start("from fullgrad_theory import *", "from fullgrad_theory import *", times=1.3),
    Start("fullgrad-theory --help", COMMAND, ("--help",), seconds=0.5),
    Start("fullgrad-theory check --help", COMMAND, ("check", "--help"), seconds=0.5),
    Start("fullgrad-theory policies", COMMAND, ("policies",), seconds=0.5),
    Start("fullgrad-theory operators", COMMAND, ("operators",)),
)


def cpu_seconds(start: Start) -> float:
    """User and system time of the process and of whatever it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", start.code, *start.arguments],
        check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int) -> dict[Start, float]:
    """The median of each, all taking turns; one turn before that warms the disk up."""
    turns = [{start: cpu_seconds(start) for start in STARTS} for _ in range(rounds + 1)][1:]
    return {start: statistics.median(turn[start] for turn in turns) for start in STARTS}


def missed(found: dict[Start, float]) -> list[str]:
    """A line for each bar that is missed."""
    torch = found[TORCH]
    lines = []
    for start, seconds in found.items():
        if start.times is not None and seconds > start.times * torch:
            lines.append(f"{start.name}: {seconds / torch:.2f} x torch, more than {start.times}")
        if start.seconds is not None and seconds > start.seconds:
            lines.append(f"{start.name}: {seconds:.2f} s, more than {start.seconds}")
    return lines


def table(found: dict[Start, float]) -> str:
    """A row each, in Markdown."""
    rows = ["| start | CPU seconds | x torch | at most |", "|---|---|---|---|"]
    for start, seconds in found.items():
        bar = f"{start.times} x torch" if start.times else f"{start.seconds} s"
        bar = bar if start.times or start.seconds else "-"
        ratio = seconds / found[TORCH]
        rows.append(f"| `{start.name}` | {seconds:.2f} | {ratio:.2f} | {bar} |")
    return "\n".join(rows)


def main() -> int:
    """Measure, print, compare with the bars."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    args = parser.parse_args()
    found = measure(args.rounds)
    print(table(found))
    if args.write:
        where = f"Python {platform.python_version()}, torch {version('torch')}"
        RESULT.write_text(
            "# What it costs to start\n\n"
            f"`python -m experiments.start_cost --rounds {args.rounds} --write`: CPU time, user\n"
            f"and system, of a process each; medians of {args.rounds} turns. {where},\n"
            f"{platform.system()} {platform.machine()}.\n\n{table(found)}\n"
        )
    lines = missed(found)
    print("\n".join(lines) or "every bar is met")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
