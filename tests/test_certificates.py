"""Certificates: the kernel makes them, and accepts no other; nothing else makes a theorem."""

from __future__ import annotations

import ast
import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fullgrad_theory as fgt
from fullgrad_theory import kernel
from fullgrad_theory.check import words
from fullgrad_theory.check.certificate import Certificate, digest, verify
from fullgrad_theory.check.report import Verdict
from fullgrad_theory.check.structure import structure_of
from fullgrad_theory.command.cli import app
from fullgrad_theory.errors import CertificateError
from fullgrad_theory.plan.states import State
from fullgrad_theory.testing.mutations import mutated
from fullgrad_theory.testing.strategies import random_architecture

KERNEL = Path(kernel.__file__)


class Block(nn.Module):
    """A pre-norm block: attention with held weights, a gated product, GELU, two residuals."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.one(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        gate, value = self.up(self.two(x)).chunk(2, -1)
        x = x + self.down(nn.functional.gelu(gate) * value)
        return self.head(x.mean(1))


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graph() -> fgt.ComputationGraph:
    return fgt.trace(Block().eval(), X)


@pytest.fixture(scope="module")
def certificate(graph: fgt.ComputationGraph) -> Certificate:
    return fgt.check_completeness(graph, policy="libra", numeric=False).certificate()


def again(certificate: Certificate, change: Callable[[Any], object]) -> Certificate:
    """The certificate that a file with one change holds."""
    data = json.loads(certificate.to_json())
    change(data)
    return Certificate.from_json(json.dumps(data))


# --------------------------------------------------------------------------- what holds


def test_a_complete_model_has_a_certificate(
    graph: fgt.ComputationGraph, certificate: Certificate, tmp_path: Path
) -> None:
    theorem = verify(certificate, graph)
    assert theorem.degree == 1
    assert theorem.value == ", ".join(node.name for node in graph.outputs)
    assert theorem.supposing == {"x is a source"}
    certificate.save(tmp_path / "block.json")
    loaded = Certificate.load(tmp_path / "block.json")
    assert loaded.to_json() == certificate.to_json()
    assert verify(loaded, graph) == theorem
    assert verify(loaded).value == theorem.value  # by its steps alone


def test_the_schema_is_that_of_the_file(certificate: Certificate) -> None:
    schema = json.loads((Path(__file__).parents[1] / "docs/certificate.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(certificate.to_json()))
    spoiled = json.loads(certificate.to_json())
    spoiled["steps"][0]["degree"] = 1.0
    assert not validator.is_valid(spoiled)


def test_the_same_model_gives_the_same_file(certificate: Certificate) -> None:
    other = fgt.check_completeness(Block().eval(), X, policy="libra", numeric=False)
    assert other.certificate().to_json() == certificate.to_json()


def test_weights_do_not_count_and_structure_does(certificate: Certificate) -> None:
    model = Block().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    verify(certificate, fgt.trace(model, X))
    with pytest.raises(CertificateError, match="another graph"):
        verify(certificate, fgt.trace(Block(16).eval(), torch.randn(2, 5, 16)))


def test_what_is_not_complete_has_none(graph: fgt.ComputationGraph) -> None:
    report = fgt.check_completeness(graph, numeric=False)
    with pytest.raises(CertificateError, match="INCOMPLETE"):
        report.certificate()


def test_a_report_from_a_file_has_none(graph: fgt.ComputationGraph) -> None:
    report = fgt.check_completeness(graph, policy="libra", numeric=False)
    read = fgt.Report.from_json(report.to_json())
    assert read == report
    with pytest.raises(CertificateError):
        read.certificate()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        pytest.param(lambda x: x.softmax(-1) @ W, "is integrated along a ray", id="an integral"),
        pytest.param(lambda x: torch.where(x > 1, 1, x), "does not jump", id="continuity"),
        pytest.param(lambda x: x.prod(-1), "is what is declared of it", id="a size"),
    ],
)
def test_what_the_kernel_cannot_know_stands_in_the_theorem(
    function: Callable[[Tensor], Tensor], words: str
) -> None:
    graph = fgt.trace(function, torch.rand(2, 3, dtype=torch.float64) + 0.5)
    report = fgt.check_completeness(graph, policy="integrated")
    assert report.complete, report
    theorem = verify(report.certificate(), graph)
    assert any(words in one for one in theorem.supposing)
    assert any("not proved" in n.reason or n.verdict == "numeric" for n in report.nodes)


W = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --------------------------------------------------------------------------- what does not


def test_only_the_rules_make_a_fact() -> None:
    with pytest.raises(kernel.Refused, match="no rule of the kernel"):
        kernel.Fact("x", Fraction(1), frozenset(), object())
    with pytest.raises(kernel.Refused, match="no rule of the kernel"):
        replace(kernel.leaf("x"), rule=None)
    assert kernel.leaf("logits").supposing == {"logits is a source"}  # it says so


def test_the_kernel_stands_alone() -> None:
    text = KERNEL.read_text()
    assert len(text.splitlines()) < 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            assert "fullgrad_theory" not in (node.module or "")
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not any("fullgrad_theory" in name for name in names)


def test_no_changed_certificate_is_accepted(
    graph: fgt.ComputationGraph, certificate: Certificate
) -> None:
    refused: Counter[str] = Counter()
    for kind, data in mutated(certificate, 1000):
        changed = Certificate.from_json(json.dumps(data))
        with pytest.raises(CertificateError):
            verify(changed, graph)
        refused[kind] += 1
    assert sum(refused.values()) == 1000
    assert len(refused) >= 15, refused


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "fullgrad-theory certificate 1"}', "{" * 5000, "null", "NaN"],
)
def test_what_is_no_certificate(text: str, tmp_path: Path) -> None:
    with pytest.raises(CertificateError):
        Certificate.from_json(text)
    file = tmp_path / "none.json"
    file.write_text(text)
    with pytest.raises(CertificateError, match=r"none\.json holds no certificate"):
        Certificate.load(file)


@pytest.mark.parametrize("place", ["steps", "claim", "outputs", "supposing"])
@pytest.mark.parametrize("value", [None, 3, "x", [3], {"a": 1}, [[]], [{"value": "x"}]])
def test_what_has_not_the_form_of_one(
    certificate: Certificate, graph: fgt.ComputationGraph, place: str, value: Any
) -> None:
    def spoil(data: Any) -> None:
        data[place] = copy.deepcopy(value)

    with pytest.raises(CertificateError):
        verify(again(certificate, spoil), graph)


def test_another_source_and_a_trusted_edit_are_refused(certificate: Certificate) -> None:
    def as_source(data: Any) -> None:
        data["claim"]["sources"] = ["x", data["steps"][5]["value"]]

    with pytest.raises(CertificateError):
        verify(again(certificate, as_source))


# --------------------------------------------------------------------------- against the labelling


@pytest.mark.slow
def test_kernel_and_labelling_agree_on_random_architectures() -> None:
    """Two ways to the degrees that share no code."""
    compared = 0
    for seed in range(70_000, 70_060):
        architecture = random_architecture(seed)
        if architecture is None:
            continue
        try:
            graph = fgt.trace(architecture.module(), architecture.example())
            structures = [structure_of(graph, policy) for policy in (None, "libra", "integrated")]
        except fgt.FullgradError:
            continue
        for structure in structures:
            labels, proof = structure.labels, structure.proof
            for name in structure.judgements:
                if name in labels.findings or name in proof.refused:
                    continue
                for k, fact in enumerate(labels.facts[name]):
                    value = f"{name}#{k}" if k else name
                    if fact.state is State.LIVE:
                        assert proof.facts[value].degree == fact.degree, architecture.source()
                        compared += 1
    assert compared > 500


# --------------------------------------------------------------------------- on the command line


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_certify_and_verify(tmp_path: Path) -> None:
    target, shape = f"{__file__}:Block", ("--input", "2,5,8")
    made = run("certify", target, *shape, "-o", tmp_path / "b.json", "--coq", tmp_path / "b.v")
    assert made.exit_code == 0, made.output
    assert "PROVED" in made.output
    assert "Theorem complete" in (tmp_path / "b.v").read_text()
    alone = run("verify", tmp_path / "b.json")
    assert alone.exit_code == 0
    assert "No model is named" in alone.output
    assert run("verify", tmp_path / "b.json", target, *shape).exit_code == 0
    other = run("verify", tmp_path / "b.json", target, "--input", "2,6,8")
    assert other.exit_code in (0, 1)  # as the sizes are open or not
    data = json.loads((tmp_path / "b.json").read_text())
    data["steps"][3]["degree"] = "2"
    (tmp_path / "b.json").write_text(json.dumps(data))
    assert run("verify", tmp_path / "b.json", target, *shape).exit_code == 1


def test_certify_plain_says_why_not(tmp_path: Path) -> None:
    target = f"{__file__}:Block"
    made = run(
        "certify", target, "--input", "2,5,8", "--policy", "plain", "-o", tmp_path / "b.json"
    )
    assert made.exit_code == 1
    assert "violated" in made.output
    assert not (tmp_path / "b.json").exists()


class Chooses(nn.Module):
    """Choosing is linear where it does not jump, which the kernel cannot see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 1, torch.ones_like(x), x)


def test_what_is_supposed_stands_in_the_headline(tmp_path: Path) -> None:
    target, shape = f"{__file__}:Chooses", ("--input", "2,5")
    made = run("certify", target, *shape, "--policy", "plain", "-o", tmp_path / "b.json")
    assert made.exit_code == 0, made.output
    assert "PROVED" not in made.output
    assert "SUPPOSING" in run("verify", tmp_path / "b.json").output


@pytest.mark.parametrize(("field", "said"), [("held", "only an input"), ("sources", "cannot end")])
def test_what_a_claim_names_besides_is_refused(
    graph: fgt.ComputationGraph, field: str, said: str
) -> None:
    """It would change no step, and stand in the sentence that people read."""
    made = fgt.check_completeness(graph, policy="libra").certificate()
    steps = {step["value"] for step in made.steps}
    inner = next(n for n in graph.nodes if n.startswith("getitem") and n not in steps)  # pruned
    changed = replace(made, claim={**made.claim, field: [*made.claim[field], inner]})
    with pytest.raises(CertificateError, match=said):
        verify(changed, graph)


def test_another_degree_in_the_kernel_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    said = kernel.meanings() | {"aten.relu.default": [{"class": "homogeneous", "rule": "self^2"}]}
    monkeypatch.setattr(kernel, "meanings", lambda: said)
    report = fgt.check_completeness(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    assert report.complete is None
    assert report.exit_code == 2
    (reason,) = [n.reason for n in report.nodes if n.verdict is Verdict.UNKNOWN]
    assert reason.startswith(words.KERNEL_DISAGREES)


def test_a_digest_is_of_the_graph_alone(graph: fgt.ComputationGraph) -> None:
    assert digest(graph.fx.graph) == digest(copy.deepcopy(graph.fx.graph))
