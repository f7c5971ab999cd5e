"""The command line: what it prints, what it refuses at the door, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from typer.testing import CliRunner

from fullgrad_theory import cli
from fullgrad_theory.errors import TraceError
from fullgrad_theory.operators import registered
from fullgrad_theory.plan import Plan
from fullgrad_theory.policies import policies
from fullgrad_theory.report import Report


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused at the door is refused before a model is made."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was done before the arguments were looked at")

    monkeypatch.setattr(cli, "_create", never)


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


def test_a_policy_completes_it() -> None:
    result = invoke("check", "test_vit", "--policy", "libra")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("COMPLETE  VisionTransformer, policy libra: relative error")
    assert "\nplan\n" in result.stdout


def test_a_relu_network_is_complete_as_it_is() -> None:
    result = invoke("check", "test_resnet")
    assert result.exit_code == 0, result.output


def test_structure_alone() -> None:
    for option in (["--no-numeric"], ["--device", "meta"]):
        result = invoke("check", "test_vit", *option)
        assert result.exit_code == 1, result.output
        assert "nothing was measured" in result.stdout.splitlines()[0]


def test_local_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    result = invoke("check", "test_vit", "--no-numeric", "--weights", tmp_path / "weights.pt")
    assert result.exit_code == 1, result.output
    torch.save({"other": torch.zeros(1)}, tmp_path / "others.pt")
    result = invoke("check", "test_vit", "--no-numeric", "--weights", tmp_path / "others.pt")
    assert result.exit_code == 2
    assert "others.pt" in said(result) and "Traceback" not in result.output


def test_derive(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = invoke("derive", "test_vit", "--save", file)
    assert result.exit_code == 0, result.output
    plan = Plan.load(file)
    assert len(plan) > 0 and plan.policy == "libra"
    assert f"{len(plan)} edits" in result.stdout


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

    monkeypatch.setattr(cli, "check_completeness", fail)
    result = invoke("check", "test_vit")
    assert result.exit_code == 2
    assert (str(error) or "out of memory") in said(result)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, 1), (None, 2)])
def test_exit_codes(complete: bool | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("f", None, complete, None, None, (), (), None)
    monkeypatch.setattr(cli, "check_completeness", lambda *a, **k: report)
    assert invoke("check", "test_vit").exit_code == code


def test_the_installed_command(tmp_path: Path) -> None:
    """As a process of its own: stdout and stderr apart, no colour in a pipe."""
    done = subprocess.run(
        [sys.executable, "-c", "from fullgrad_theory.cli import app; app()", "check", "test_vit",
         "--no-numeric", "--json", str(tmp_path / "r.json")],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "\x1b" not in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "INCOMPLETE"
