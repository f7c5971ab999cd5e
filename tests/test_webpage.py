"""The report as a page: in a real browser, at two widths, with 2,000 nodes and hostile names."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browsing, opened
from torch import nn
from typer.testing import CliRunner

import fullgrad_theory as fgt
from fullgrad_theory.check import webpage
from fullgrad_theory.check.drawing import BESIDE, KINDS, Drawn, drawn
from fullgrad_theory.check.explorer import to_explorer_graph, to_node_data
from fullgrad_theory.check.plotting import plot
from fullgrad_theory.check.report import NodeReport, Report, Verdict
from fullgrad_theory.command.cli import app

OWN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

def build():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(2)), nn.Linear(8, 3))
"""
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of a small model: as it is, and under libra."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "own.py").write_text(OWN)
    given = ["check", str(folder / "own.py:build"), "--input", "2,8"]
    files = ["--node-data", str(folder / "data.json"), "--graph", str(folder / "graph.json")]
    libra = ["--policy", "libra", "--alternatives", "1", "--html", str(folder / "libra.html")]
    for code, options in ((1, ["--html", str(folder / "plain.html"), *files]), (0, libra)):
        done = CliRunner().invoke(app, [*given, *options])
        assert done.exit_code == code, done.output
    return folder


# --------------------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_click_opens_a_node(browser: Any, written: Path, width: int) -> None:
    with opened(browser, written / "plain.html", width) as page:
        assert "does not add up to the output: the relative error is" in page.inner_text("h1")
        assert "blocks" not in page.inner_text("main") and "own.py:11" in page.inner_text("main")
        page.click("#none")  # every module closed: nothing of theirs is laid out
        assert page.locator("[data-name=layer_norm]").count() == 0
        page.click("[data-module='0']")
        page.click("[data-module='0.norm']")
        page.click("[data-name=layer_norm]")
        said = page.inner_text("#details")
        for words in ("✕ violated", "1 -> 1", "1/sigma depends on input", "0.norm", "own.py:11"):
            assert words in said
        assert "freeze" in said and re.search(r"local error\s+0\.\d+", said)
        page.click("#details >> text=input_1")  # what it reads
        assert "an input" in page.inner_text("#details")
        page.click("text=show gelu in the graph")
        assert "gelu" in page.inner_text("#details h3")
        page.fill("#find", "linear")
        page.press("#find", "Enter")
        assert "linear" in page.inner_text("#details h3")


@pytest.mark.slow
def test_by_keyboard_alone(browser: Any, written: Path) -> None:
    with opened(browser, written / "plain.html") as page:
        page.click("#none")
        page.focus("[data-module='0']")
        page.keyboard.press("Enter")
        assert page.locator("[data-module='0']").get_attribute("aria-expanded") == "true"
        page.focus("[data-name=input_1]")
        page.keyboard.press("Space")
        assert page.inner_text("#details h3") == "input_1"


@pytest.mark.slow
def test_before_and_after(browser: Any, written: Path) -> None:
    with opened(browser, written / "libra.html", 400) as page:
        said = page.inner_text("main")
        assert "before the edits)" in said and "Policy libra" in said
        shown = page.locator(".plot text").all_text_contents()
        assert {"before the edits", "after the edits", "tolerated", "1e-9"} <= set(shown)
        page.click("#all")
        page.click("[data-name=layer_norm]")
        assert "local error before the edits" in page.inner_text("#details")


def long(count: int) -> list[Drawn]:
    """A chain with a residual around every four of its nodes, and one node in three violated."""
    kinds = (Verdict.PROVED, Verdict.NUMERIC, Verdict.VIOLATED)
    return [
        Drawn(
            f"n{i}", "an.operation", f"stages.{i // 200}.blocks.{i // 8}.part", "file.py:1",
            kinds[i % 3], "1 -> 1", 10.0 ** -(i % 17), 0.5, "an edit", f"reason {i % 7}",
            tuple(f"n{j}" for j in {i - 1, i - 4 if i % 4 == 0 else i - 1} if j >= 0),
        )
        for i in range(count)
    ]  # fmt: skip


REPORT = Report("Model", "libra", False, 0.5, 0.9, (), (), None)


@pytest.mark.slow
def test_two_thousand_nodes(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webpage, "drawn", lambda *_: long(2000))
    text = REPORT.to_html()
    assert len(text.encode()) < 1_000_000
    (tmp_path / "page.html").write_text(text)
    with opened(browser, tmp_path / "page.html") as page:
        assert page.locator("#drawing [role=button]").count() < 60  # closed where it is deep
        began = time.monotonic()
        page.click("#all")
        assert page.locator("#drawing [data-name]").count() == 2000
        page.click("[data-name=n1999]")
        assert page.inner_text("#details h3") == "n1999"
        assert time.monotonic() - began < 10  # a second where nothing else runs
        # nothing lies on anything else
        assert page.evaluate("""() => {
            const drawn = [...document.querySelectorAll("[data-name] > rect")];
            const boxes = drawn.map(r => r.getBBox());
            boxes.sort((a, b) => a.y - b.y);
            return boxes.every((a, i) => boxes.slice(i + 1, i + 40).every(b =>
                b.y >= a.y + a.height || b.x >= a.x + a.width || a.x >= b.x + b.width));
        }""")


@pytest.mark.slow
@pytest.mark.parametrize("framed", [False, True])
def test_names_are_text(browser: Any, tmp_path: Path, framed: bool) -> None:
    """Whatever a model calls its parts; in a notebook the page is a frame of its own."""
    node = NodeReport(
        HOSTILE, HOSTILE, Verdict.VIOLATED, f"a.{HOSTILE}", HOSTILE, HOSTILE, 0.1, HOSTILE, HOSTILE
    )
    report = Report(
        HOSTILE, HOSTILE, False, 0.1, None, (node,), (), None, problems=(HOSTILE,), notes=(HOSTILE,)
    )
    text = f"<!doctype html>{report._repr_html_()}" if framed else report.to_html()
    (tmp_path / "page.html").write_text(text)
    with opened(browser, tmp_path / "page.html") as page:
        inside = page.frame_locator("iframe") if framed else page
        inside.locator("#all").click()
        inside.locator("#drawing [data-name]").click()
        assert HOSTILE in inside.locator("#details").inner_text()
        assert inside.locator("img").count() == 0


# --------------------------------------------------------------------------- what is written


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) * torch.sigmoid(self.b(x)) * x.shape[0]).view(x.shape[0], 4)


@pytest.fixture(scope="module")
def gate() -> tuple[fgt.ComputationGraph, Report, Report]:
    graph = fgt.trace(Gate().eval(), torch.randn(2, 4))
    return graph, fgt.check_completeness(graph), fgt.check_completeness(graph, policy="libra")


Gated = tuple[fgt.ComputationGraph, Report, Report]


def test_what_is_drawn(gate: Gated) -> None:
    graph, plain, edited = gate
    nodes = {node.name: node for node in drawn(edited, graph, plain)}
    assert [n for n in nodes if nodes[n].kind != BESIDE] == [n.name for n in edited.nodes]
    assert nodes["x"].kind == nodes["output"].kind == BESIDE
    assert nodes["mul"].reads == ("linear", "sigmoid") and nodes["mul"].module == ""
    assert nodes["linear"].module == "a" and nodes["linear"].reads == ("x",)
    assert "the plan's edits" in nodes["sigmoid"].reason  # held fixed, and drawn all the same
    before = {n.name: n.error for n in plain.nodes}
    assert nodes["mul"].before == before["mul"] and nodes["mul"].edit
    assert not any("sym_size" in name for name in nodes)
    assert all(graph.nx.has_edge(r, n.name) for n in nodes.values() for r in n.reads)


def test_a_report_by_itself_has_no_edges(gate: Gated) -> None:
    _, plain, _ = gate
    assert [n.reads for n in drawn(plain)] == [()] * len(plain.nodes)
    assert "made without the traced graph" in plain.to_html()
    assert Report.from_json(plain.to_json()).to_html() == plain.to_html()
    assert "data-node" not in Report.unjudged("m", None, "why not").to_html()


def test_a_page_stands_by_itself(gate: Gated) -> None:
    graph, plain, edited = gate
    text = edited.to_html(graph, plain)
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://(?!www\.w3\.org)", text)
    assert "default-src 'none'" in unescape(text)
    assert unescape(edited._repr_html_()).count("<!doctype html>") == 1


def test_a_plan_in_a_notebook(gate: Gated) -> None:
    _, _, edited = gate
    assert edited.plan is not None
    shown = unescape(unescape(edited.plan._repr_html_()))
    for words in ("Policy <b>libra</b>", "held fixed", "prune mul."):
        assert words in shown


def test_the_plot_holds_every_error() -> None:
    nodes = long(50)
    nodes[3] = Drawn("odd", "op", "", "", Verdict.UNKNOWN, error=math.nan, before=math.inf)
    shown = plot(nodes)
    assert shown is not None
    marks = {s["name"]: s["path"].count("M") for s in shown["series"]}
    assert marks == {"before the edits": 50, "after the edits": 50}
    assert not re.search("nan|inf", str(shown))
    heights = [float(y) for y in re.findall(r"M\S+ (\S+)h0", shown["series"][-1]["path"])]
    assert heights[0] < heights[16] and heights[3] == shown["top"]
    assert plot([]) is None


def test_kinds_are_told_apart_without_colour() -> None:
    assert set(KINDS) == {*Verdict, BESIDE}
    for part in ("sign", "word", "colour", "rank"):
        assert len({getattr(kind, part) for kind in KINDS.values()}) == len(KINDS)


def test_the_page_of_what_could_not_be_judged(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("of an earlier run")
    done = CliRunner().invoke(app, ["check", "no.such:model", "--html", str(page)])
    assert done.exit_code == 2
    assert "COULD NOT BE JUDGED" in page.read_text() and "no module" in page.read_text()
    done = CliRunner().invoke(app, ["check", "x", "--policy", "libre", "--html", str(page)])
    assert done.exit_code == 2 and not page.exists()


# --------------------------------------------------------------------------- Model Explorer


def test_the_formats_of_model_explorer(gate: Gated) -> None:
    """Keys as in its graph_builder.py and node_data_builder.py."""
    graph, plain, _ = gate
    collection = json.loads(to_explorer_graph(plain, drawn(plain, graph)))
    assert set(collection) == {"label", "graphs"}
    (found,) = collection["graphs"]
    assert found["id"] == "Gate"
    nodes = {node["id"]: node for node in found["nodes"]}
    for node in nodes.values():
        assert set(node) == {"id", "label", "namespace", "attrs", "incomingEdges"}
        assert all(
            set(a) == {"key", "value"} and isinstance(a["value"], str) for a in node["attrs"]
        )
        for edge in node["incomingEdges"]:
            assert set(edge) == {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}
            assert edge["sourceNodeId"] in nodes
    data = json.loads(to_node_data(plain))
    assert list(data) == [found["id"]]
    assert set(data["Gate"]["results"]) <= set(nodes)
    for result in data["Gate"]["results"].values():
        assert set(result) == {"value", "bgColor", "textColor"}


@pytest.mark.slow
def test_the_files_of_the_command(written: Path) -> None:
    graph, data = (json.loads((written / f"{n}.json").read_text()) for n in ("graph", "data"))
    assert {n["namespace"] for n in graph["graphs"][0]["nodes"]} >= {"", "0/norm", "1/up", "2"}
    assert data["Sequential"]["results"]["layer_norm"]["value"] == "✕ violated"
