"""`check`, `derive` and `fuzz`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import Tensor

from ..bars import LOUD, Loud, progress
from ..check.completeness import check_completeness
from ..check.drawing import Drawn, drawn
from ..check.explorer import to_explorer_graph, to_node_data
from ..check.formats import to_junit, to_sarif
from ..check.report import Report
from ..errors import NoPlanError
from ..extras import require
from ..files import write_whole
from ..graph.computation import ComputationGraph
from ..graph.door import Model, definition
from ..graph.tracing import trace
from ..plan.derivation import derive_rules
from ..plan.plan import Plan
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
    html: Path | None = None
    node_data: Path | None = None
    graph: Path | None = None

    def withdrawn(self) -> Files:
        """The same files, those of an earlier run removed."""
        return Files(*map(withdraw, astuple(self)))

    @property
    def drawn(self) -> bool:
        """Whether one of them draws the traced graph."""
        return any((self.html, self.node_data, self.graph))

    def write(self, found: Found, defined: str, category: str) -> None:
        """`defined`: the file and line of the model; `category`: of the analysis, for SARIF."""
        report = found.report
        _write(self.json, report.to_json)
        _write(self.sarif, lambda: to_sarif(report, defined=defined, category=category))
        _write(self.junit, lambda: to_junit(report))
        _write(self.html, lambda: report.to_html(found.graph, found.before))
        _write(self.node_data, lambda: to_node_data(report))
        _write(self.graph, lambda: to_explorer_graph(report, found.drawn()))


@dataclass(frozen=True)
class Found:
    """A report, what it is about, and that of the gradient as it is, where these are drawn."""

    report: Report
    graph: ComputationGraph | None = None
    before: Report | None = None

    def drawn(self) -> list[Drawn]:
        """The nodes of the drawing."""
        return drawn(self.report, self.graph, self.before)


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
    alternatives: int = 0,
) -> int:
    """Check, write and print; the exit code."""
    name = chosen.name
    category = f"{name}/{policy or 'plain'}"  # the same whether it could be judged or not

    def unjudged(why: str) -> None:  # or the files of an earlier run would speak for this one
        files.write(Found(Report.unjudged(name, policy, why)), file_of(name), category)

    with judging(unjudged, traceback):
        files = files.withdrawn()
        model = create(chosen)
        given = inputs_of(model, chosen)
        judged = partial(check_completeness, numeric=numeric, unknown=unknown)
        if files.drawn or alternatives:
            found = found_of(judged, model, given, policy, alternatives, asked)
        else:
            found = Found(judged(model, given, policy=policy, **asked.keywords))
    with judging(traceback=traceback):
        files.write(found, definition(model) or file_of(name), category)
    show_report(found.report)
    return found.report.exit_code


def show_report(report: Report) -> None:
    """Print it, in colour on a terminal; its first line alone where little is to be said."""
    if LOUD.get() is Loud.QUIET:
        show(Text(str(report).partition("\n")[0]))
    else:
        show(report if sys.stdout.isatty() else Text(str(report)))


def found_of(
    judged: Callable[..., Report],
    model: Model,
    given: tuple[Tensor, ...],
    policy: str | None,
    alternatives: int,
    asked: Asked,
) -> Found:
    """The same verdict, with the graph that it is about, and with what there was before."""
    with progress("tracing"):
        graph = trace(model, given, **asked.keywords)
    plan: str | Plan | None = policy
    if policy is not None and alternatives:
        with suppress(NoPlanError), progress("deriving"):  # the report says so
            plan = derive_rules(graph, policy=policy, alternatives=alternatives)
    before = judged(graph, policy=None, beside=()) if policy is not None else None
    return Found(judged(graph, policy=plan), graph, before)


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
