"""The report: what it says, how wide it gets, and that JSON brings it back."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from rich.console import Console

from fullgrad_theory.check.report import (
    WIDTH,
    EndToEnd,
    IncompleteError,
    NodeReport,
    Report,
    Verdict,
    group_nodes,
)
from fullgrad_theory.edits.freezing import FreezeScale
from fullgrad_theory.edits.pruning import Prune
from fullgrad_theory.edits.scaling import Scale
from fullgrad_theory.plan.plan import Plan


def node(name: str, op: str, verdict: Verdict, path: str = "", **more: object) -> NodeReport:
    fields: dict[str, object] = {
        "source": "timm/layers/norm.py:117",
        "degree": "1",
        "error": 0.0,
        "edit": None,
        "reason": "linear without a bias: J u = v",
    }
    return NodeReport(name, op, verdict, path, **(fields | more))  # type: ignore[arg-type]


def norms(blocks: int) -> list[NodeReport]:
    return [
        node(
            f"layer_norm_{2 * block + which - 1}".removesuffix("_0"),
            "aten.layer_norm.default",
            Verdict.VIOLATED,
            f"blocks.{block}.norm{which}",
            error=0.5 + block / 100,
            edit=f"freeze 1/sigma of layer_norm_{2 * block + which - 1}".removesuffix("_0"),
            mend="freeze 1/sigma of layer_norm",
            reason="scale-invariant up to eps: of no degree where its operand has degree 1",
        )
        for block in range(blocks)
        for which in (1, 2)
    ]


def large() -> Report:
    nodes = norms(100)
    for block in range(100):
        path = f"blocks.{block}.attn.a_module_path_that_is_rather_long.and_goes_on_and_on.{block}"
        nodes += [
            node(f"linear_{block}_{i}", "aten.linear.default", Verdict.PROVED, path)
            for i in range(9)
        ]
        nodes.append(node(f"view_{block}", "aten.view.default", Verdict.NUMERIC, path, error=None))
        nodes.append(
            node(f"add_{block}", "aten.add.Tensor", Verdict.OPAQUE, path, source="", error=None,
                 reason=f"a frozen value (softmax_{block}[0]) is added to a value of degree 1")
        )  # fmt: skip
    measurements = (
        EndToEnd("output", "float64", 1.25, 1.06, 0.314159, 0.685841),
        EndToEnd("output, parameters perturbed", "float64", 2.5, 0.98, -12345.0, 12346.0),
    )
    return Report(
        model="VisionTransformer",
        policy=None,
        complete=False,
        error=1.06,
        error_before=None,
        nodes=tuple(nodes),
        measurements=measurements,
        plan=None,
        problems=("200 nodes are violated",),
        notes=("shares: the biases hold 69 % of the output; " * 4,),
    )


def plan() -> Plan:
    reasons: dict[object, str] = {
        Prune("sdpa", "query"): "attention is linear in its values " * 8,
        Scale("mul", Fraction(1, 2)): "a product of two values of degree 1",
    }
    reasons |= {FreezeScale(n.name): "of no degree" for n in norms(12)}
    where = {n.name: (n.op, n.module_path) for n in norms(12)}
    return Plan(tuple(reasons), "libra", reasons, 98, True, "0123456789abcdef", ("relu",), where)  # type: ignore[arg-type]


def test_the_verdict_comes_first() -> None:
    report = large()
    assert str(report).startswith(
        "INCOMPLETE  VisionTransformer, the gradient as it is: relative error 1.06\n"
    )
    done = replace(report, policy="libra", complete=True, error=3.1e-15, error_before=1.06)
    first = str(done).splitlines()[0]
    assert first == "COMPLETE  VisionTransformer, policy libra: relative error 1.06 -> 3.1e-15"
    unjudged = replace(report, complete=None, error=None)
    first = str(unjudged).splitlines()[0]
    assert first.startswith("COULD NOT BE JUDGED") and first.endswith("nothing was measured")


def test_a_large_report_stays_readable() -> None:
    report = large()
    text = str(report)
    lines = text.splitlines()
    assert len(report.nodes) == 1300
    assert len(lines) < 60
    assert max(map(len, lines)) <= WIDTH
    assert "\x1b" not in text
    assert text.isascii()
    words = " ".join(text.split())
    assert "blocks.{0..99}.norm1" in words and "blocks.{0..99}.norm2" in words
    assert "aten.layer_norm.default 200 violated, error up to 1.49" in words
    assert "mend freeze 1/sigma of layer_norm" in words
    assert "layer_norm_" not in words
    assert "timm/layers/norm.py:117" in words
    assert "31.4 %" in words and "68.6 %" in words
    assert "200 nodes are violated" in words
    assert "softmax_0[0]" in words, "square brackets are no markup"


def test_the_plan_is_shown_within_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = str(replace(large(), policy="libra", plan=plan()))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "24 x freeze 1/sigma of layer_norm" in text


def test_colour_only_where_the_console_has_it() -> None:
    page = io.StringIO()
    Console(file=page, force_terminal=True, color_system="standard", width=WIDTH).print(large())
    assert "\x1b[1;31mINCOMPLETE" in page.getvalue()
    page = io.StringIO()
    Console(file=page, width=WIDTH).print(large())
    assert "\x1b" not in page.getvalue()


def test_many_kinds_of_trouble_are_cut_and_counted() -> None:
    nodes = tuple(
        node(f"f{i}", f"aten.f{chr(97 + i % 26)}{chr(97 + i // 26)}.default", Verdict.UNKNOWN)
        for i in range(80)
    )
    text = str(replace(large(), nodes=nodes))
    assert "56 more kinds, 56 nodes" in text
    assert "50 other operations" in text
    assert len(text.splitlines()) < 160


def test_problems_that_differ_in_numbers_are_said_once() -> None:
    problems = [
        f"getitem_{i} (getitem) in blocks.{i}.attn, timm/a.py:12{i}: misses by {i}.5e-0{i}"
        for i in range(9)
    ]
    text = str(replace(large(), problems=(*problems, "the degree is 2", "the degree is 3")))
    words = " ".join(text.split())
    assert "misses by 0.5e-00 (and 8 more like it)" in words
    assert "the degree is 2 - the degree is 3" in words


def test_nan_is_the_worst_error() -> None:
    nodes = [replace(n, error=math.nan if i == 3 else n.error) for i, n in enumerate(norms(3))]
    assert "error up to nan" in str(replace(large(), nodes=tuple(nodes)))


def test_json_round_trip() -> None:
    report = replace(large(), policy="libra", plan=plan())
    text = report.to_json()
    assert Report.from_json(text) == report
    data = json.loads(text)
    assert data["verdict"] == "INCOMPLETE" and data["complete"] is False
    assert data["nodes"][0]["verdict"] == "violated"


def test_a_report_from_before_mends_is_read_and_shown() -> None:
    text = large().to_json()
    data = json.loads(text)
    for entry in data["nodes"]:
        del entry["mend"]
    old = Report.from_json(json.dumps(data))
    assert old.nodes == tuple(replace(n, mend=None) for n in large().nodes)
    words = " ".join(str(old).split())
    assert "aten.layer_norm.default 200 violated" in words
    assert "mend freeze 1/sigma of layer_norm; freeze 1/sigma of layer_norm_1;" in words


def test_json_is_strict_json_with_numbers_that_are_not_finite() -> None:
    report = replace(large(), error=math.inf, nodes=(replace(norms(1)[0], error=math.nan),))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = report.to_json()
    json.loads(text, parse_constant=refuse)
    again = Report.from_json(text)
    assert again.error == math.inf
    assert again.nodes[0].error is not None and math.isnan(again.nodes[0].error)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "something else"}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a report"):
        Report.from_json(text)


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, 1), (None, 2)])
def test_exit_codes(complete: bool | None, code: int) -> None:
    report = replace(large(), complete=complete)
    assert report.exit_code == code
    if complete:
        report.raise_if_incomplete()
    else:
        with pytest.raises(IncompleteError) as caught:
            report.raise_if_incomplete()
        assert str(caught.value) == str(report)


def test_an_empty_report_can_be_shown() -> None:
    report = Report("f", None, None, None, None, (), (), None, ("nothing is live",))
    assert "nothing is live" in str(report)


def test_rich_is_imported_where_something_is_shown() -> None:
    code = (
        "import sys; from fullgrad_theory.check.report import Report; assert 'rich' not in "
        "sys.modules; str(Report.unjudged('f', None, 'why')); assert 'rich' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# --------------------------------------------------------------------------- grouping


def test_nodes_group_by_operation_pattern_and_reason() -> None:
    nodes = norms(12)
    assert [len(g) for g in group_nodes(nodes)] == [24]
    other = replace(nodes[0], reason="something else")
    assert [len(g) for g in group_nodes([*nodes, other])] == [24, 1]
    unknown = replace(nodes[0], verdict=Verdict.UNKNOWN)
    assert [g[0].verdict for g in group_nodes([unknown, *nodes])] == ["violated", "unknown"]
