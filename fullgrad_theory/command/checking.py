"""`check`, `derive` and `fuzz`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ..bars import progress
from ..check.completeness import check_completeness
from ..check.formats import to_junit, to_sarif
from ..check.report import Report
from ..extras import require
from ..files import write_whole
from ..graph.door import definition
from ..plan.derivation import derive_rules
from .making import Chosen, create, inputs_of
from .options import Unknown
from .page import judging, show
from .target import file_of
from .writing import withdraw


@dataclass(frozen=True)
class Files:
    """Where a report is written, besides the terminal."""

    json: Path | None = None
    sarif: Path | None = None
    junit: Path | None = None

    def withdrawn(self) -> Files:
        """The same files, those of an earlier run removed."""
        return Files(*map(withdraw, (self.json, self.sarif, self.junit)))

    def write(self, report: Report, defined: str, category: str) -> None:
        """`defined`: the file and line of the model; `category`: of the analysis, for SARIF."""
        _write(self.json, report.to_json)
        _write(self.sarif, lambda: to_sarif(report, defined=defined, category=category))
        _write(self.junit, lambda: to_junit(report))


def _write(path: Path | None, text: Callable[[], str]) -> None:
    if path is not None:
        write_whole(path, text() + "\n")


@dataclass(frozen=True)
class Asked:
    """What is judged of the output, and what is held constant of the inputs."""

    output: str | None = None
    constant: list[str] | None = None
    explain: list[str] | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """As `trace` takes them."""
        place = self.output is not None and self.output.lstrip("-").isdecimal()
        return {
            "output": int(self.output or 0) if place else self.output,
            "constant": self.constant or (),
            "explain": self.explain or None,
        }


def check(
    chosen: Chosen,
    policy: str | None,
    numeric: bool,
    unknown: Unknown,
    files: Files,
    traceback: bool = False,
    asked: Asked = Asked(),
) -> int:
    """Check, write and print; the exit code."""
    name = chosen.name
    category = f"{name}/{policy or 'plain'}"  # the same whether it could be judged or not

    def unjudged(why: str) -> None:  # or the files of an earlier run would speak for this one
        files.write(Report.unjudged(name, policy, why), file_of(name), category)

    with judging(unjudged, traceback):
        files = files.withdrawn()
        model = create(chosen)
        given = inputs_of(model, chosen)
        report = check_completeness(
            model, given, policy=policy, numeric=numeric, unknown=unknown, **asked.keywords
        )
    with judging(traceback=traceback):
        files.write(report, definition(model) or file_of(name), category)
    show(report if sys.stdout.isatty() else Text(str(report)))
    return report.exit_code


def derive(
    chosen: Chosen,
    policy: str,
    alternatives: int,
    unknown: Unknown,
    save: Path | None,
    traceback: bool = False,
    asked: Asked = Asked(),
) -> None:
    """Derive a plan, write and print it."""
    with judging(traceback=traceback):
        save = withdraw(save)
        model = create(chosen, otherwise="meta")
        given = inputs_of(model, chosen)
        with progress("deriving"):
            plan = derive_rules(
                model,
                given,
                policy=policy,
                alternatives=alternatives,
                unknown=unknown,
                **asked.keywords,
            )
        if save is not None:
            plan.save(save)
    show(Text(str(plan)))


def campaign(examples: int, jobs: int, seed: int, out: Path | None, traceback: bool = False) -> int:
    """Run a campaign and print its summary; the exit code."""
    with judging(traceback=traceback):
        require("hypothesis", "fuzz")
        from ..testing.campaign import Campaign, summary

        run = Campaign(examples, jobs, seed, out)
        with progress("fuzzing", after=0.0) as tick:
            run.run(tick)
            run.write_summary()
    show(Text(summary(run)))
    return 1 if run.tally.failures else 0
