"""A report for other people's tools: SARIF 2.1.0 for code scanning, JUnit XML for test reports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree as xml

from ..plan.plan import compress
from .report import FINE, NodeReport, Report, Verdict, group_nodes, mends, worst

TOOL = "fullgrad-theory"
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True)
class _Rule:
    level: str
    title: str
    text: str
    help: str


PROBLEM = "problem"
_RULES: dict[str, _Rule] = {
    Verdict.VIOLATED: _Rule(
        "error",
        "The gradient of this operation is not complete",
        "The operation is inconsistent: with the degrees it sees, its backward does not return "
        "what its forward puts in. Its local residual is the witness.",
        "Apply the edit that the message names (fullgrad_theory.balance, or a policy), or replace "
        "the operation by a homogeneous one.",
    ),
    Verdict.OPAQUE: _Rule(
        "error",
        "Part of the output belongs to nobody",
        "A value that carries no gradient but depends on the input is added here.",
        "Multiply by such a value instead of adding it, or let the gradient through.",
    ),
    Verdict.UNKNOWN: _Rule(
        "warning",
        "This operation could not be judged",
        "The lemma and the measurement disagree, or nothing is known of the operation.",
        "Register the operation with fullgrad_theory.register, or report the disagreement.",
    ),
    PROBLEM: _Rule(
        "error",
        "The model is not complete, or could not be judged",
        "Something that concerns the model as a whole rather than one operation of it.",
        "The message says what; fullgrad-theory check prints the whole report.",
    ),
}


# --------------------------------------------------------------------------- SARIF


def to_sarif(
    report: Report, *, defined: str = "", category: str | None = None, root: Path | None = None
) -> str:
    """The report as SARIF 2.1.0 (OASIS): a result for each violating source line and reason.

    `defined` ('models.py:12', see `trace.definition`) is where problems of the whole model are
    shown. `category` tells analyses of one commit apart; model and policy by default. Files below
    `root` (the working folder) are relative to `%SRCROOT%`, those of libraries to `SITE-PACKAGES`.
    """
    root = root or Path.cwd()
    category = category or f"{report.model}/{report.policy or 'plain'}"
    # GitHub refuses a whole file if one of its results has no place
    home = defined or _likeliest(report.nodes, root) or f"{report.model}:1"
    results = [
        _result(
            group[0].verdict,
            _sentence(group),
            group[0].source or home,
            root,
            list(dict.fromkeys(n.module_path for n in group if n.module_path)),
            {"nodes": [n.name for n in group], "error": _plain(worst(group))},
        )
        for group in _groups(report.nodes)
    ]
    results += [
        _result(PROBLEM, f"{report.model}: {problem}", home, root, [], {})
        for problem in report.problems
    ]
    driver = {"name": TOOL, "rules": [_descriptor(name, rule) for name, rule in _RULES.items()]}
    run = {
        "tool": {"driver": driver | _version()},
        "automationDetails": {"id": f"{TOOL}/{category}/"},
        "originalUriBaseIds": {
            "%SRCROOT%": {"description": {"text": "the folder that the check ran in"}},
            "SITE-PACKAGES": {"description": {"text": "where Python's libraries are installed"}},
        },
        "invocations": [
            {
                "executionSuccessful": report.complete is not None,
                "exitCode": report.exit_code,
                "toolExecutionNotifications": [
                    {"level": "note", "message": {"text": note}} for note in report.notes
                ],
            }
        ],
        "results": results,
        "properties": {
            "model": report.model,
            "policy": report.policy,
            "complete": report.complete,
            "error": _plain(report.error),
        },
    }
    log = {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1, allow_nan=False)


def _descriptor(name: str, rule: _Rule) -> dict[str, Any]:
    return {
        "id": str(name),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.text},
        "help": {"text": rule.help},
        "defaultConfiguration": {"level": rule.level},
    }


def _version() -> dict[str, str]:
    try:
        return {"version": metadata.version(TOOL)}
    except metadata.PackageNotFoundError:  # run from a checkout
        return {}


def _result(
    rule: str, text: str, source: str, root: Path, paths: Sequence[str], more: dict[str, Any]
) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": _physical(source, root)}
    if paths:
        location["logicalLocations"] = [{"fullyQualifiedName": p, "kind": "member"} for p in paths]
    found: dict[str, Any] = {
        "ruleId": str(rule),
        "ruleIndex": list(_RULES).index(rule),
        "level": _RULES[rule].level,
        # a brace would have to be doubled (SARIF 3.11.5), and is then shown so
        "message": {"text": text.translate({ord("{"): "[", ord("}"): "]"})},
        "locations": [location],
    }
    return found | ({"properties": more} if more else {})


def _physical(source: str, root: Path) -> dict[str, Any]:
    file, line = _split(source)
    artifact = {"uri": quote(file), "uriBaseId": "SITE-PACKAGES"}
    if Path(file).is_absolute():
        artifact = {"uri": Path(file).as_uri()}
    elif (root / file).is_file():
        artifact["uriBaseId"] = "%SRCROOT%"
    return {"artifactLocation": artifact, "region": {"startLine": line}}


def _split(source: str) -> tuple[str, int]:
    file, _, line = source.rpartition(":")
    return file, max(1, int(line))


def _likeliest(nodes: Sequence[NodeReport], root: Path) -> str:
    """A source line of the model's, rather the user's than a library's."""
    sources = list(dict.fromkeys(n.source for n in nodes if n.source))
    own = [s for s in sources if (root / _split(s)[0]).is_file()]
    return next(iter(own or sources), "")


# --------------------------------------------------------------------------- JUnit


def to_junit(report: Report) -> str:
    """The report as JUnit XML: a test case an operation and source line, and one for the whole.

    A case fails if one of its nodes is not proved or numeric; the whole's is an error where the
    model could not be judged.
    """
    cases: dict[tuple[str, str], list[NodeReport]] = {}
    for node in report.nodes:
        cases.setdefault((node.op, node.source), []).append(node)
    suite = xml.Element("testsuite", name=_clean(f"{TOOL} {report.model}"))
    properties = xml.SubElement(suite, "properties")
    for name in ("policy", "complete", "error"):
        xml.SubElement(properties, "property", name=name, value=_clean(str(getattr(report, name))))
    for (op, source), nodes in cases.items():
        case = xml.SubElement(suite, "testcase", classname=_clean(report.model))
        case.set("name", _clean(f"{op} at {source}" if source else op))
        if source:
            file, line = _split(source)
            case.attrib |= {"file": _clean(file), "line": str(line)}
        groups = _groups(nodes)
        if groups:
            _mark(case, "failure", groups[0][0].verdict, [_sentence(group) for group in groups])
    whole = xml.SubElement(suite, "testcase", classname=_clean(report.model), name="the whole")
    if not report.complete:
        tag, kind = ("error", "unjudged") if report.complete is None else ("failure", "incomplete")
        _mark(whole, tag, kind, [report.brief().splitlines()[0], *report.problems])
    if report.notes:
        xml.SubElement(suite, "system-out").text = _clean("\n".join(report.notes))
    counts = {
        "tests": len(suite.findall("testcase")),
        "failures": len(suite.findall("testcase/failure")),
        "errors": len(suite.findall("testcase/error")),
        "skipped": 0,
    }
    suites = xml.Element("testsuites", name=TOOL)
    for element in (suites, suite):
        element.attrib |= {name: str(count) for name, count in counts.items()}
    suites.append(suite)
    xml.indent(suites, " ")
    return xml.tostring(suites, encoding="unicode", xml_declaration=True)


def _mark(case: xml.Element, tag: str, kind: str, lines: Sequence[str]) -> None:
    mark = xml.SubElement(case, tag, type=str(kind), message=_clean(lines[0]))
    mark.text = _clean("\n".join(lines))


_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _clean(text: str) -> str:
    """The text without what XML 1.0 has no character for."""
    return _NO_XML.sub("\ufffd", text)


# --------------------------------------------------------------------------- both


def _groups(nodes: Iterable[NodeReport]) -> list[list[NodeReport]]:
    """Nodes that are not fine, by source line; of one line, by reason and edit."""
    by_line: dict[str, list[NodeReport]] = {}
    for node in nodes:
        if node.verdict not in FINE:
            by_line.setdefault(node.source, []).append(node)
    return [group for line in by_line.values() for group in group_nodes(line)]


def _sentence(group: Sequence[NodeReport]) -> str:
    """`'aten.gelu.default in blocks.{0..11}.mlp.act is violated (...): why. Mend: secant ...'`."""
    first, error = group[0], worst(group)
    where = ", ".join(compress(n.module_path for n in group if n.module_path))
    facts = [f"{len(group)} nodes"] if len(group) > 1 else []
    facts += [f"degrees {first.degree}"] if first.degree else []
    facts += [f"error {error:.2g}"] if error is not None else []
    edits = "; ".join(mends(group))
    return (
        first.op
        + (f" in {where}" if where else "")
        + f" is {first.verdict}"
        + (f" ({', '.join(facts)})" if facts else "")
        + f": {first.reason.rstrip('.')}."
        + (f" Mend: {edits}." if edits else "")
    )


def _plain(number: float | None) -> float | str | None:
    return number if number is None or isfinite(number) else str(number)
