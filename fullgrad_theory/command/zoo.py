"""`zoo`: its arguments; what it does stands in `auditing.py`. Nothing here imports torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import FullgradError
from ..zoo.rows import Outcome
from .options import (
    Quiet,
    Reporting,
    Traceback,
    Verbose,
    fits_policy,
    known_policies,
    writable,
)


class Format(StrEnum):
    """What results are exported as."""

    MARKDOWN = "md"
    CSV = "csv"
    HTML = "html"
    PARQUET = "parquet"


class _Auditing(TyperGroup):
    """A group whose first word, where it is none of its commands, is a pattern for `audit`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["audit", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Auditing,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Audit many architectures: zoo PATTERN... is short for zoo audit PATTERN...",
)


def _shard(text: str) -> Any:
    from ..zoo.sources import Shard

    try:
        return Shard.parse(text)
    except FullgradError as error:
        raise typer.BadParameter(str(error)) from None


Results = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="A file that zoo audit wrote.")
]


@app.command(cls=Reporting)
def audit(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help="Names or families, with * and ? as a shell has them (quote them)."),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            metavar="timm|torchvision|transformers|FILE",
            help="FILE: a Python file, whose public functions without arguments make models; or a "
            "text file with package.module:attribute [SHAPE[:DTYPE]]... on each line.",
        ),
    ] = "timm",
    every: Annotated[bool, typer.Option("--all", help="All of the source.")] = False,
    one_per_family: Annotated[
        bool,
        typer.Option("--one-per-family", help="The smallest of each family, as names tell it."),
    ] = False,
    numeric: Annotated[
        bool, typer.Option("--numeric", help="Run them in float64; else structure alone.")
    ] = False,
    policy: Annotated[
        str,
        typer.Option(
            callback=fits_policy, autocompletion=known_policies, help="Whose edits are judged."
        ),
    ] = "libra",
    jobs: Annotated[int, typer.Option(min=1, help="How many processes, of one core each.")] = 1,
    time_limit: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds that one architecture may take.")
    ] = 600,
    memory_limit: Annotated[
        int, typer.Option(min=1, metavar="MiB", help="Memory that one may hold (on Linux).")
    ] = 8192,
    shard: Annotated[
        Any,
        typer.Option(parser=_shard, metavar="K/N", help="Only the K-th of N parts, from 1."),
    ] = "1/1",
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", callback=writable, help="The file of results; what is in it is kept."
        ),
    ] = Path("zoo.sqlite"),
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Audit architectures with random weights, each in a process of its own; goes on where it
    stopped. Exit code 0 where all were looked at, whatever came of them."""
    from . import auditing

    asked = auditing.Asked(source, patterns or [], every, one_per_family, shard)
    limits = auditing.Limits(jobs, time_limit, memory_limit)
    auditing.audit(asked, policy, numeric, limits, out, traceback)


@app.command(cls=Reporting)
def show(
    results: Results,
    patterns: Annotated[list[str] | None, typer.Argument(help="Names or families.")] = None,
    verdict: Annotated[
        list[Outcome] | None, typer.Option(help="Only these, once for each of them.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Show results as a table, and how many have which verdict."""
    from . import exporting

    exporting.show_results(results, patterns or [], verdict or list(Outcome), traceback)


@app.command(cls=Reporting)
def compare(
    old: Results,
    new: Results,
    traceback: Traceback = False,
) -> None:
    """Say what became worse; exit code 1 where any architecture did, else 0."""
    from . import exporting

    raise typer.Exit(exporting.compare(old, new, traceback))


@app.command(cls=Reporting)
def merge(
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Files of several machines.")
    ],
    into: Annotated[
        Path, typer.Option(callback=writable, help="The file that all of it is kept in.")
    ],
    traceback: Traceback = False,
) -> None:
    """Merge results; of two about the same, the later one that ended by itself is kept."""
    from . import exporting

    exporting.merge(files, into, traceback)


@app.command(cls=Reporting)
def export(
    results: Results,
    form: Annotated[Format, typer.Option("--format", help="What they are written as.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", callback=writable, help="Where to; left out, to stdout."),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Write results as Markdown, CSV, Parquet, or one page for a browser."""
    from . import exporting

    exporting.export(results, form, out, traceback)
