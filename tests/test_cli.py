"""The command line: what it prints, what it refuses at the door, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest
import timm
import torch
from click.testing import Result
from typer.testing import CliRunner

from fullgrad_theory.check.report import Report
from fullgrad_theory.command import checking, cli
from fullgrad_theory.command.options import Shape, draw
from fullgrad_theory.edits.costs import policies
from fullgrad_theory.errors import TraceError
from fullgrad_theory.operators import registered
from fullgrad_theory.plan.plan import Plan


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused at the door is refused before a model is made."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was done before the arguments were looked at")

    monkeypatch.setattr(checking, "create", never)


@pytest.mark.slow
def test_an_incomplete_model(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = invoke("check", "test_vit", "--json", file)
    assert result.exit_code == 1, result.output
    first = result.stdout.splitlines()[0]
    assert first.startswith("INCOMPLETE  VisionTransformer")
    for cause in ("aten.layer_norm.default", "aten.gelu.default", "scaled_dot_product_attention"):
        assert cause in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    report = Report.from_json(file.read_text())
    assert report.complete is False
    assert report.error is not None and report.error > 1e-3
    assert str(report).splitlines()[0] == first


@pytest.mark.slow
def test_a_policy_completes_it() -> None:
    result = invoke("check", "test_vit", "--policy", "libra")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("COMPLETE  VisionTransformer, policy libra: relative error")
    assert "\nplan\n" in result.stdout


@pytest.mark.slow
def test_a_relu_network_is_complete_as_it_is() -> None:
    result = invoke("check", "test_resnet")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_structure_alone() -> None:
    for option in (["--no-numeric"], ["--device", "meta"]):
        result = invoke("check", "test_vit", *option)
        assert result.exit_code == 1, result.output
        assert "nothing was measured" in result.stdout.splitlines()[0]


@pytest.mark.slow
def test_local_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    result = invoke("check", "test_vit", "--no-numeric", "--weights", tmp_path / "weights.pt")
    assert result.exit_code == 1, result.output
    torch.save({"other": torch.zeros(1)}, tmp_path / "others.pt")
    result = invoke("check", "test_vit", "--no-numeric", "--weights", tmp_path / "others.pt")
    assert result.exit_code == 2
    assert "others.pt" in said(result) and "Traceback" not in result.output


@pytest.mark.slow
def test_derive(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = invoke("derive", "test_vit", "--save", file)
    assert result.exit_code == 0, result.output
    plan = Plan.load(file)
    assert len(plan) > 0 and plan.policy == "libra"
    assert f"{len(plan)} edits" in result.stdout


@pytest.mark.slow
def test_derive_alternatives(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = invoke("derive", "test_vit", "--alternatives", "2", "--save", file)
    assert result.exit_code == 0, result.output
    assert len(Plan.load(file).alternatives) == result.stdout.count("alternative ") <= 2
    refused = invoke("derive", "test_vit", "--alternatives", "2", "--policy", "attnlrp")
    assert refused.exit_code == 2 and "partial" in said(refused)
    assert invoke("derive", "test_vit", "--alternatives", "-1").exit_code == 2


def test_every_policy_is_listed() -> None:
    result = invoke("policies")
    assert result.exit_code == 0
    assert {p.name for p in policies()} <= set(result.stdout.split())


def test_every_operation_is_listed() -> None:
    result = invoke("operators")
    assert result.exit_code == 0
    assert {o.name for o in registered()} <= set(result.stdout.split())


def test_help_names_the_exit_codes() -> None:
    assert "2 could not be judged" in " ".join(invoke("check", "--help").stdout.split())


# --------------------------------------------------------------------------- the door


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dtype", "float65"], "float64"),
        (["--policy", "libre"], "did you mean libra"),
        (["--device", "gpu please"], "no device"),
        (["--device", "cuda:99"], "try --device cpu"),
        (["--json", "no/such/folder/report.json"], "does not exist"),
        (["--json", "."], "is a folder"),
        (["--sarif", "no/such/folder/r.sarif"], "does not exist"),
        (["--junit", "."], "is a folder"),
        (["--weights", "no/such/weights.pt"], "does not exist"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_options(options: list[str], complaint: str) -> None:
    result = invoke("check", "test_vit", *options)
    assert result.exit_code == 2
    assert complaint in said(result)


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = invoke("check", "test_vit", "--json", tmp_path / "report.json")
    assert result.exit_code == 2
    assert "cannot be written" in said(result)


@pytest.mark.slow
def test_an_unknown_model_is_named_with_its_neighbours() -> None:
    result = invoke("check", "vit_tiny_patch16_225")
    assert result.exit_code == 2
    assert "did you mean" in said(result) and "vit_tiny_patch16_224" in said(result)
    assert len(result.stderr.strip().splitlines()) == 1


def test_two_sources_of_weights() -> None:
    result = invoke("check", "test_vit", "--pretrained", "--device", "meta")
    assert result.exit_code == 2
    assert "choose one" in said(result)


@pytest.mark.parametrize("error", [TraceError("cannot trace it"), MemoryError()])
def test_what_cannot_be_judged(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(checking, "check_completeness", fail)
    result = invoke("check", "test_vit")
    assert result.exit_code == 2
    assert (str(error) or "out of memory") in said(result)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, 1), (None, 2)])
def test_exit_codes(complete: bool | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("f", None, complete, None, None, (), (), None)
    monkeypatch.setattr(checking, "check_completeness", lambda *a, **k: report)
    assert invoke("check", "test_vit").exit_code == code


@pytest.mark.slow
def test_the_installed_command(tmp_path: Path) -> None:
    """As a process of its own: stdout and stderr apart, no colour in a pipe."""
    done = subprocess.run(
        [sys.executable, "-c", "from fullgrad_theory.command.cli import app; app()", "check",
         "test_vit", "--no-numeric", "--json", str(tmp_path / "r.json")],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "\x1b" not in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "INCOMPLETE"


# --------------------------------------------------------------------------- models of one's own

MODELS = """
import torch
from torch import nn

class Gate(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.a(x) * torch.sigmoid(self.b(x))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(2, 4), nn.Linear(4, 3)

    def forward(self, ids, mask):
        return self.head((self.embed(ids) * mask[..., None]).sum(1))

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()

def relu(width=4):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, 1))

def double(x, by=2.0):
    return x * by

def square(x=None):
    return None if x is None else x * x

def broken():
    return nn.Linear(
        "wide", 3)

def nothing():
    return 3

instance = Gate()
number = 3
"""

GATE = "        return self.a(x) * torch.sigmoid(self.b(x))"


def line_of(text: str) -> int:
    return 1 + MODELS.splitlines().index(text)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user's own, which is left as it was: neither importable nor imported."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for file, text in {
        "mine/__init__.py": "",
        "mine/models.py": MODELS,
        "mine/relative.py": "from .models import relu as build\n",
        "mine/needs.py": "import no_such_library\n",
        "scripts/one.py": "from beside import build\n",
        "scripts/beside.py": "from mine.models import relu as build\n",
        "raises.py": "\n\nx = undefined\n",
        "leaves.py": "raise SystemExit(0)\n",
        "syntax.py": "x = 1\ndef f(:\n",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("arguments", "code", "title"),
    [
        (["mine.models:relu", "--input", "2,4"], 0, "Sequential"),
        (["mine/models.py:relu", "--input", "2,4", "--device", "meta"], 0, "Sequential"),
        (["mine/relative.py:build", "--input", "2,4"], 0, "Sequential"),
        (["scripts/one.py:build", "--input", "2,4"], 0, "Sequential"),
        (["mine.models:Gate", "--input", "2,4"], 1, "Gate"),
        (["mine.models:instance", "--input", "2,4", "--policy", "libra"], 0, "Gate"),
        (["mine.models:double", "--input", "2,4", "--dtype", "float64"], 0, "double"),
        (["mine.models:square", "--input", "2,4"], 1, "square"),
        (["mine.models:Tokens", "--input", "2,5:int64", "--input", "2,5:bool"], 0, "Tokens"),
    ],
)
def test_a_model_of_ones_own(arguments: list[str], code: int, title: str) -> None:
    result = invoke("check", *arguments)
    assert result.exit_code == code, result.output
    assert result.stdout.split()[1].rstrip(",") == title


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("mine.models:rleu", "mine.models has no attribute 'rleu'; did you mean relu"),
        ("mine.modles:relu", "no module 'mine.modles'; did you mean models?"),
        ("mien.models:relu", "no module 'mien.models' here; did you mean mine?"),
        ("mine/modles.py:relu", "no file mine/modles.py; did you mean models.py"),
        ("mine/models.py", "name the model in mine/models.py: mine/models.py:Gate"),
        (":relu", "no package.module:attribute"),
        ("mine.needs:x", "cannot import mine.needs: ModuleNotFoundError: No module named "
         "'no_such_library' (at mine/needs.py:1)"),
        ("raises:x", "NameError: name 'undefined' is not defined (at raises.py:3)"),
        ("raises.py:x", "NameError: name 'undefined' is not defined (at raises.py:3)"),
        ("leaves:x", "SystemExit: 0 (at leaves.py:1)"),
        ("syntax.py:f", "(at syntax.py:2)"),
        ("mine.models:broken", f"(at mine/models.py:{line_of('    return nn.Linear(')})"),
        ("mine.models:nothing", "mine.models:nothing() returns of type int"),
        ("mine.models:number", "mine.models:number is of type int"),
        ("mine.models:Wide", "mine.models:Wide needs arguments, Wide(width)"),
        ("mine.models:relu", "Sequential does not run on inputs of shape (2, 7)"),
        ("mine.models:instance", f"at mine/models.py:{line_of(GATE)}"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_one_line(target: str, complaint: str) -> None:
    result = invoke("check", target, "--input", "2,7")
    assert result.exit_code == 2, result.output
    assert complaint in said(result)
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


@pytest.mark.usefixtures("project")
def test_inputs_have_to_be_known_and_options_to_fit() -> None:
    for target in ("mine.models:relu", "mine.models:double"):
        result = invoke("check", target)
        assert result.exit_code == 2 and "for example --input 1,3,224,224" in said(result)
    assert "is for timm models" in said(invoke("check", "mine.models:relu", "--pretrained"))
    result = invoke("check", "mine.models:double", "--input", "2", "--weights", "raises.py")
    assert result.exit_code == 2 and "is a function" in said(result)
    for shape, complaint in {"2,x": "no shape", "0,2": "no shape", "2:int65": "no dtype"}.items():
        result = invoke("check", "mine.models:relu", "--input", shape)
        assert result.exit_code == 2 and complaint in said(result)


def test_weights_of_ones_own(project: Path) -> None:
    wide = torch.nn.Linear(4, 4).state_dict()
    state = {f"{name}.{key}": value for name in "ab" for key, value in wide.items()}
    torch.save(state, project / "weights.pt")
    arguments = ("mine.models:Gate", "--input", "2,4", "--no-numeric", "--weights", "weights.pt")
    assert invoke("check", *arguments).exit_code == 1
    result = invoke("check", "mine.models:relu", *arguments[1:])
    assert result.exit_code == 2 and "weights.pt" in said(result)


def test_another_size_for_a_timm_model() -> None:
    result = invoke("check", "test_vit", "--no-numeric", "--input", "1,3,161,160")
    assert result.exit_code == 2 and "does not run on inputs of shape (1, 3, 161, 160)" in said(
        result
    )


@pytest.mark.usefixtures("project")
def test_derive_for_ones_own() -> None:
    result = invoke("derive", "mine.models:Gate", "--input", "2,4")
    assert result.exit_code == 0, result.output
    assert "prune mul" in result.stdout


def test_drawn_values() -> None:
    shapes = [Shape.parse(text) for text in ("50,2", "50:int32", "50:bool", "50:float16")]
    assert shapes[0] == Shape((50, 2)) and shapes[1] == Shape((50,), torch.int32)
    cpu = torch.device("cpu")
    first, ids, mask, half = draw(shapes, cpu, torch.float64)
    assert first.shape == (50, 2) and first.dtype == torch.float64
    assert ids.dtype == torch.int32 and set(ids.tolist()) == {0, 1}
    assert mask.dtype == torch.bool and half.dtype == torch.float16
    assert all(map(torch.equal, draw(shapes, cpu, torch.float64), (first, ids, mask, half)))


# --------------------------------------------------------------------------- files for other tools


def written(folder: Path) -> tuple[dict[str, Any], xml.Element, Report]:
    run = json.loads((folder / "r.sarif").read_text())["runs"][0]
    report = Report.from_json((folder / "r.json").read_text())
    return run, xml.fromstring((folder / "r.xml").read_text().encode()), report


FILES = ("--sarif", "r.sarif", "--junit", "r.xml", "--json", "r.json")


def test_sarif_and_junit_name_the_line(project: Path) -> None:
    result = invoke("check", "mine.models:Gate", "--input", "2,4", *FILES)
    assert result.exit_code == 1, result.output
    run, suites, report = written(project)
    line = line_of(GATE)
    places = [r["locations"][0]["physicalLocation"] for r in run["results"]]
    assert {p["artifactLocation"]["uri"] for p in places} == {"mine/models.py"}
    found = {
        (r["ruleId"], p["region"]["startLine"]) for r, p in zip(run["results"], places, strict=True)
    }
    assert found == {("violated", line), ("problem", line_of("class Gate(nn.Module):"))}
    assert report.complete is False
    failed = [c for c in suites.iter("testcase") if c.find("failure") is not None]
    assert {c.get("line") for c in failed} == {str(line), None}


def test_what_cannot_be_judged_replaces_the_files_of_an_earlier_run(project: Path) -> None:
    for name in ("r.sarif", "r.xml", "r.json"):
        (project / name).write_text("of an earlier run")
    result = invoke("check", "mine.models:broken", "--input", "2,4", *FILES)
    assert result.exit_code == 2
    run, suites, report = written(project)
    assert (
        report.complete is None
        and f"mine/models.py:{line_of('    return nn.Linear(')}" in report.problems[0]
    )
    assert run["invocations"][0]["executionSuccessful"] is False
    assert run["automationDetails"]["id"] == "fullgrad-theory/mine.models:broken/plain/"
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "mine/models.py"
    assert suites.get("errors") == "1"


def test_nothing_is_found_in_a_complete_model(project: Path) -> None:
    assert invoke("check", "mine.models:relu", "--input", "2,4", *FILES).exit_code == 0
    run, suites, report = written(project)
    assert run["results"] == [] and report.complete
    assert suites.get("failures") == suites.get("errors") == "0"
