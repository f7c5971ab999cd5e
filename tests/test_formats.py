"""SARIF and JUnit: what the formats ask for, what GitHub asks for besides, what a reader sees."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest

from fullgrad_theory.check.formats import to_junit, to_sarif
from fullgrad_theory.check.report import NodeReport, Report, Verdict

FORBIDDEN = "\x00\x1b\ud800"


def node(name: str, op: str, verdict: Verdict, path: str, source: str, **more: Any) -> NodeReport:
    fields: dict[str, Any] = {"degree": "1 -> 1", "error": 0.0, "edit": None, "reason": "a lemma"}
    return NodeReport(name, op, verdict, path, source, **(fields | more))


def gelu(block: int) -> NodeReport:
    name = f"gelu_{block}" if block else "gelu"
    return node(
        name, "aten.gelu.default", Verdict.VIOLATED, f"blocks.{block}.act", "my models/net.py:7",
        error=0.1 * (block + 1), edit=f"secant {name}", mend="secant gelu", reason="of no degree",
    )  # fmt: skip


NODES = (
    node("linear", "aten.linear.default", Verdict.PROVED, "head", "my models/net.py:7"),
    gelu(0),
    gelu(1),
    node("norm", "aten.layer_norm.default", Verdict.VIOLATED, "norm", "timm/layers/norm.py:89",
         error=math.nan),
    node("add", "aten.add.Tensor", Verdict.OPAQUE, "", "", error=None, reason="a frozen value"),
    node("odd", "aten.cos.default", Verdict.UNKNOWN, "odd", "my models/net.py:9",
         reason=f"<&> {FORBIDDEN}"),
)  # fmt: skip
REPORT = Report(
    "Net", "plain", False, 0.5, None, NODES, (), None, ("the sum misses",), ("look at the shares",)
)
REPORTS = {
    "incomplete": REPORT,
    "complete": replace(REPORT, complete=True, nodes=NODES[:1], problems=()),
    "structure alone": replace(REPORT, error=None, nodes=NODES[:2], problems=()),
    "unjudged": Report.unjudged("vit_tiny", None, "cannot be traced"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "my models").mkdir()
    (tmp_path / "my models" / "net.py").write_text("\n" * 9)
    return tmp_path


# --------------------------------------------------------------------------- SARIF

# object: required properties, and those it may have besides (of the ones written here), after
# the schema of SARIF 2.1.0, in which no object but a property bag takes any others
PROPERTIES = {
    "log": ("version runs", "$schema"),
    "run": ("tool", "automationDetails originalUriBaseIds invocations results properties"),
    "tool": ("driver", ""),
    "driver": ("name", "rules version"),
    "rule": ("id", "shortDescription fullDescription help defaultConfiguration"),
    "result": ("message", "ruleId ruleIndex level locations properties"),
    "message": ("text", ""),
    "location": ("", "physicalLocation logicalLocations"),
    "physical": ("artifactLocation", "region"),
    "artifact": ("", "uri uriBaseId description"),
    "region": ("", "startLine"),
    "logical": ("", "fullyQualifiedName kind"),
    "invocation": ("executionSuccessful", "exitCode toolExecutionNotifications"),
    "notification": ("message", "level"),
    "details": ("", "id"),
}
LEVELS = {"none", "note", "warning", "error"}


def is_a(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    required, allowed = (set(words.split()) for words in PROPERTIES[kind])
    assert required <= value.keys() <= required | allowed, (kind, value)
    return value


def is_text(value: dict[str, Any]) -> None:
    assert isinstance(is_a("message", value)["text"], str) and value["text"]


def parsed(text: str) -> dict[str, Any]:
    """The only run of a log that is valid, and that GitHub's code scanning takes."""
    log = is_a("log", json.loads(text, parse_constant=lambda c: pytest.fail(c)))
    assert log["version"] == "2.1.0" and len(log["runs"]) == 1
    run: dict[str, Any] = is_a("run", log["runs"][0])
    rules = is_a("driver", is_a("tool", run["tool"])["driver"])["rules"]
    for rule in rules:
        for name in ("shortDescription", "fullDescription", "help"):
            is_text(is_a("rule", rule)[name])
        assert rule["defaultConfiguration"]["level"] in LEVELS
    assert len({rule["id"] for rule in rules}) == len(rules)
    for base in run["originalUriBaseIds"].values():
        is_text(is_a("artifact", base)["description"])
    for invocation in run["invocations"]:
        assert isinstance(is_a("invocation", invocation)["executionSuccessful"], bool)
        for notification in invocation["toolExecutionNotifications"]:
            is_text(is_a("notification", notification)["message"])
            assert notification["level"] in LEVELS
    assert is_a("details", run["automationDetails"])["id"].endswith("/")
    for result in run["results"]:
        is_text(is_a("result", result)["message"])
        assert not set("{}") & set(result["message"]["text"]), "these would be placeholders"
        assert result["level"] in LEVELS
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        (location,) = result["locations"]
        place = is_a("physical", is_a("location", location)["physicalLocation"])
        uri = is_a("artifact", place["artifactLocation"])["uri"]
        assert uri and uri.isascii() and " " not in uri
        assert place["artifactLocation"].get("uriBaseId", "%SRCROOT%") in run["originalUriBaseIds"]
        line = is_a("region", place["region"])["startLine"]
        assert isinstance(line, int) and line >= 1
        for logical in location.get("logicalLocations", ()):
            assert is_a("logical", logical)["fullyQualifiedName"]
    return run


def place(result: dict[str, Any]) -> tuple[str, str | None, int]:
    physical = result["locations"][0]["physicalLocation"]
    artifact = physical["artifactLocation"]
    return artifact["uri"], artifact.get("uriBaseId"), physical["region"]["startLine"]


@pytest.mark.parametrize("name", REPORTS)
def test_sarif_is_valid(name: str, root: Path) -> None:
    report = REPORTS[name]
    run = parsed(to_sarif(report, root=root))
    assert run["invocations"][0]["exitCode"] == report.exit_code
    assert run["invocations"][0]["executionSuccessful"] == (report.complete is not None)
    assert bool(run["results"]) == (report.complete is not True)


def test_a_result_for_each_line_and_reason(root: Path) -> None:
    run = parsed(to_sarif(REPORT, defined="my models/net.py:3", root=root))
    found = [(r["ruleId"], r["level"], *place(r)) for r in run["results"]]
    own, library = "%SRCROOT%", "SITE-PACKAGES"
    assert found == [
        ("violated", "error", "my%20models/net.py", own, 7),
        ("violated", "error", "timm/layers/norm.py", library, 89),
        ("opaque", "error", "my%20models/net.py", own, 3),
        ("unknown", "warning", "my%20models/net.py", own, 9),
        ("problem", "error", "my%20models/net.py", own, 3),
    ]
    first = run["results"][0]
    assert first["message"]["text"] == (
        "aten.gelu.default in blocks.[0..1].act is violated (2 nodes, degrees 1 -> 1, error 0.2): "
        "of no degree. Mend: secant gelu."
    )
    paths = [one["fullyQualifiedName"] for one in first["locations"][0]["logicalLocations"]]
    assert paths == ["blocks.0.act", "blocks.1.act"]
    assert first["properties"] == {"nodes": ["gelu", "gelu_1"], "error": 0.2}
    assert run["results"][1]["properties"]["error"] == "nan"
    assert run["results"][-1]["message"]["text"] == "Net: the sum misses"
    notes = run["invocations"][0]["toolExecutionNotifications"]
    assert [n["message"]["text"] for n in notes] == ["look at the shares"]


def test_a_problem_without_a_place_is_shown_at_the_users_code(root: Path) -> None:
    nodes = (NODES[3], NODES[0])  # the library's line comes first in the graph
    run = parsed(to_sarif(replace(REPORT, nodes=nodes), root=root))
    assert place(run["results"][-1]) == ("my%20models/net.py", "%SRCROOT%", 7)


def test_a_file_elsewhere_is_absolute(root: Path) -> None:
    elsewhere = root / "my models" / "net.py"
    nodes = (replace(NODES[1], source=f"{elsewhere}:7"),)
    run = parsed(to_sarif(replace(REPORT, nodes=nodes), root=root / "other"))
    assert place(run["results"][0]) == (elsewhere.as_uri(), None, 7)


def test_categories_tell_analyses_apart(root: Path) -> None:
    reports = (REPORT, replace(REPORT, policy=None, model="Other"), replace(REPORT, policy="libra"))
    texts = [to_sarif(report, root=root) for report in reports]
    texts += [to_sarif(REPORT, root=root, category=name) for name in "ab"]
    ids = [parsed(text)["automationDetails"]["id"] for text in texts]
    assert len(set(ids)) == 5


# --------------------------------------------------------------------------- JUnit


def suite_of(report: Report) -> xml.Element:
    """The only suite of a document with JUnit's structure: its counts are those of its cases."""
    root = xml.fromstring(to_junit(report).encode())
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.tag == "testsuite"
    order = [child.tag for child in suite]
    assert order == sorted(order, key=["properties", "testcase", "system-out"].index)
    cases = suite.findall("testcase")
    for element in (root, suite):
        assert int(element.get("tests", "")) == len(cases)
        assert int(element.get("failures", "")) == sum(len(c.findall("failure")) for c in cases)
        assert int(element.get("errors", "")) == sum(len(c.findall("error")) for c in cases)
    for case in cases:
        assert case.get("name") and case.get("classname") == report.model
        assert len(case) <= 1
        for mark in case:
            assert mark.tag in ("failure", "error")
            assert mark.get("message") and mark.get("type") and mark.text
    names = [case.get("name") for case in cases]
    assert len(set(names)) == len(names)
    return suite


@pytest.mark.parametrize("name", REPORTS)
def test_junit_is_valid(name: str) -> None:
    report = REPORTS[name]
    suite = suite_of(report)
    marks = [mark.tag for case in suite.findall("testcase") for mark in case]
    assert bool(marks) == (report.complete is not True)
    assert ("error" in marks) == (report.complete is None)


def test_a_case_for_each_operation_and_line() -> None:
    suite = suite_of(REPORT)
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert set(cases) == {
        "aten.linear.default at my models/net.py:7",
        "aten.gelu.default at my models/net.py:7",
        "aten.layer_norm.default at timm/layers/norm.py:89",
        "aten.add.Tensor",
        "aten.cos.default at my models/net.py:9",
        "the whole",
    }
    assert not list(cases["aten.linear.default at my models/net.py:7"])
    gelu = cases["aten.gelu.default at my models/net.py:7"]
    assert (gelu.get("file"), gelu.get("line")) == ("my models/net.py", "7")
    failure = gelu.find("failure")
    assert failure is not None and failure.get("type") == "violated"
    assert "blocks.{0..1}.act" in (failure.text or "") and "Mend: secant" in (failure.text or "")
    whole = cases["the whole"].find("failure")
    assert whole is not None and "the sum misses" in (whole.text or "")
    assert suite.findtext("system-out") == "look at the shares"


def test_what_xml_cannot_hold_is_replaced() -> None:
    text = to_junit(REPORT)
    assert not set(FORBIDDEN) & set(text)
    assert "&lt;&amp;&gt; \ufffd\ufffd\ufffd" in text


def test_the_brief_says_what_stands_in_the_way() -> None:
    text = REPORT.brief()
    assert text.startswith("INCOMPLETE  Net, policy plain: relative error 0.5\n")
    for word in ("the sum misses", "blocks.{0..1}.act", "my models/net.py:7", "of no degree"):
        assert word in text
    assert "linear" not in text and "look at the shares" not in text
    assert REPORTS["unjudged"].brief().startswith("COULD NOT BE JUDGED  vit_tiny")
