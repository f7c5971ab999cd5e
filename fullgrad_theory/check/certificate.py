"""A verdict's proof as data: what the kernel is told of a graph, and every step as it follows.

Nothing here is trusted. `verify` hands a certificate's claim and a graph to the kernel, whose
theorem it is; the steps in a certificate are for readers, for files that are compared, and for Coq.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import fx

from ..errors import CertificateError
from ..files import write_whole
from ..graph.computation import ComputationGraph
from ..kernel import UNKNOWN, Fact, Proof, Refused, carry, complete, leaf
from ..operators.calls import target_name
from ..operators.registry import lookup
from ..operators.relations import Relation
from ..plan.labelling import Degrees
from ..plan.plan import Plan

FORMAT = "fullgrad-theory certificate 1"


@dataclass(frozen=True)
class Certificate:
    """Why the gradient of a graph is complete under a plan. docs/certificate.schema.json has the
    form of its file.

    `claim`: what the kernel is told: `edits`, `sources`, `held` and `declared`, see `kernel.Proof`.
    `steps`: every value between the sources and the `outputs`, in order, with its `degree`.
    `supposing`: what the theorem rests on besides. `graph`, `plan`: digests.
    """

    model: str
    policy: str | None
    graph: str
    plan: str
    claim: Mapping[str, Any]
    outputs: tuple[str, ...]
    steps: tuple[Mapping[str, Any], ...]
    supposing: tuple[str, ...]

    def to_json(self) -> str:
        """The certificate as JSON; the same one gives the same text."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        write_whole(path, self.to_json() + "\n")

    @staticmethod
    def load(path: str | Path) -> Certificate:
        """Read what `save` wrote; raises `CertificateError` where the file holds none."""
        try:
            return Certificate.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeError) as error:
            raise CertificateError(f"{path} cannot be read: {error}") from error

    @staticmethod
    def from_json(text: str, source: str = "this") -> Certificate:
        """The certificate that `to_json` wrote; raises `CertificateError` where it is none."""
        try:
            data = json.loads(text)
            form = data.pop("format")
            fields = {name: data.pop(name) for name in Certificate.__dataclass_fields__}
            if form != FORMAT or data:
                raise ValueError(f"the format is {form!r} with {sorted(data)}")
            lists = {k: tuple(fields[k]) for k in ("outputs", "steps", "supposing")}
            return Certificate(**fields | lists)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}"[:120]
            raise CertificateError(f"{source} holds no certificate ({said})") from error


def certify(graph: ComputationGraph, policy: str | None, proof: Proof) -> Certificate:
    """The certificate of what the kernel followed; raises `CertificateError` where that does not
    reach the outputs, and says where it ends."""
    outputs = tuple(node.name for node in graph.outputs)
    with _refusing():
        for name in outputs:
            if name not in proof.facts:
                raise Refused(proof.refused.get(name, f"nothing of the input reaches {name}"))
        theorem = complete([proof.facts[name] for name in outputs])
    needed, steps = {*outputs}, []
    for value, step in reversed(proof.steps.items()):
        if value in needed and value in proof.facts:
            needed |= {read for read, factor in step["operands"].values() if factor != "0"}
            steps.append({**step, "degree": str(proof.facts[value].degree)})
    claim = {name: value for name, value in proof.claim.items() if name != "broken"}
    return Certificate(
        graph.name,
        policy,
        digest(graph.fx.graph),
        _hash(json.dumps(edit, sort_keys=True) for edit in claim["edits"]),
        claim,
        outputs,
        tuple(reversed(steps)),
        tuple(sorted(theorem.supposing)),
    )


def verify(certificate: Certificate, graph: ComputationGraph | None = None) -> Fact:
    """The kernel's theorem; raises `CertificateError` where it has none, or another one.

    Without a graph it is about any graph whose steps are those of the certificate; with one, the
    certificate is made again from its claim and that graph, and has to be the same.
    """
    theorem = _consistent(certificate)
    if graph is None:
        return theorem
    if certificate.graph != digest(graph.fx.graph):
        raise CertificateError(f"it is about another graph than that of {graph.name}")
    inputs = {node.name for node in graph.placeholders}
    with _refusing():
        if wrong := {*certificate.claim["held"]} - inputs:
            raise Refused(f"only an input is held constant, and not {', '.join(sorted(wrong))}")
        proof = Proof(graph.fx.graph, {**certificate.claim, "broken": {}})
        ends = {n for n, fact in proof.facts.items() if f"{n} is a source" in fact.supposing}
        if wrong := {*certificate.claim["sources"]} - ends:
            raise Refused(f"attribution cannot end at {', '.join(sorted(wrong))}")
    made = certify(graph, certificate.policy, proof)
    for field in ("outputs", "plan", "claim", "supposing"):
        if getattr(made, field) != getattr(certificate, field):
            raise CertificateError(f"its {field} is not what follows from its claim")
    for ours, theirs in zip_longest(made.steps, certificate.steps):
        if ours != theirs:
            named = (ours or theirs)["value"]
            raise CertificateError(f"at {named} it does not say what the graph has there")
    return theorem


@contextmanager
def _refusing() -> Iterator[None]:
    """What the kernel refuses, or cannot read, is an error of the certificate."""
    try:
        yield
    except Refused as error:
        raise CertificateError(str(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {error}"[:120]
        raise CertificateError(f"it does not have the form of one ({said})") from error


def _consistent(certificate: Certificate) -> Fact:
    """The theorem about the steps alone: each carries the degree that stands beside it."""
    with _refusing():
        facts = {name: leaf(name) for name in certificate.claim["sources"]}
        for step in certificate.steps:
            value = step["value"]
            if value in facts:
                raise Refused(f"{value} stands there twice")
            facts[value] = carry(step, facts)
            if not _fits(step):
                raise Refused(f"{value} is said to be {kind_of(step)}, and does not grow so")
            if facts[value].degree != Fraction(step["degree"]):
                raise Refused(
                    f"{value} is carried at {facts[value].degree}: {step['degree']} is said"
                )
        if not certificate.outputs:
            raise Refused("it has no output")
        theorem = complete([facts[name] for name in certificate.outputs])
        if tuple(sorted(theorem.supposing)) != certificate.supposing:
            raise Refused("it rests on something else than it says it is supposing")
        return theorem


OF_EDIT = {"secant": "Secant", "freeze": "Freeze", "integrate": "Integral"}
OF_CLASS = {"attention": "Attention", "piecewise": "Piecewise", "declared": "Measured"}


def kind_of(step: Mapping[str, Any]) -> str:
    """What proofs/coq calls a step: by its edit, its class, or what its monomials are."""
    powers = _powers(step)
    if not powers:
        return "Null"
    if step["edit"] in OF_EDIT or step["class"] in OF_CLASS:
        return OF_EDIT.get(step["edit"]) or OF_CLASS[step["class"]]
    if all(one == [1] for one in powers):
        return "Homogeneous" if step["class"] == "homogeneous" else "Linear"
    whole = all(p > 0 and p.denominator == 1 for one in powers for p in one)
    return "Product" if whole and all(powers) else "Homogeneous"


def _fits(step: Mapping[str, Any]) -> bool:
    """Whether a step grows as its kind does, see `kind_ok` in proofs/coq/Certificate.v."""
    alone = kind_of(step) in ("Secant", "Attention", "Piecewise")
    return not alone or _powers(step) == [[1]]


def _powers(step: Mapping[str, Any]) -> list[list[Fraction]]:
    return [[Fraction(p) for _, p in monomial] for monomial in step["monomials"]]


# --------------------------------------------------------------------------- what the kernel gets


def follow(graph: ComputationGraph, plan: Plan | None, labels: Degrees) -> Proof:
    """The kernel's account of a graph under a plan.

    What is violated has a degree that is supposed; what the kernel has no meaning of, the rule that
    is known of it here.
    """
    claim: dict[str, Any] = {
        "edits": [_plain(edit.data()) for edit in plan.edits] if plan else [],
        "sources": [*labels.live.sources],
        "held": sorted(graph.held),
        "declared": {},
        "broken": {name: labels.facts[name][0].degree for name in labels.findings},
    }
    proof = Proof(graph.fx.graph, claim)
    fine = (n for n in proof.refused if n in labels.modes and n not in labels.findings)
    known = [n for n in fine if _is_beyond(graph, labels, n, proof.refused[n])]
    if not known:
        return proof
    declared = {name: rule_of(labels.modes[name].outputs) for name in known}
    return Proof(graph.fx.graph, claim | {"declared": declared})


def _is_beyond(graph: ComputationGraph, labels: Degrees, name: str, why: str) -> bool:
    """Whether the kernel cannot know what a call means: no line of kernel.toml fits it, or its size
    makes it another function."""
    record = labels.live.calls[name].operator
    return why.startswith(UNKNOWN) or record is not lookup(target_name(graph.nodes[name].target))


def rule_of(relations: Iterable[Relation]) -> str:
    """Relations as kernel.toml writes a rule."""
    return " ; ".join(map(_result_of, relations))


def _result_of(relation: Relation) -> str:
    if relation.frozen:
        return "-"
    terms = ["*".join(f"{a}^{p}" for a, p in term) or "1^0" for term in relation.terms]
    terms += [f"{a}?" for a in relation.ray]
    return " + ".join([*terms, *(["1"] if relation.domain not in (None, (0,)) else [])])


def digest(graph: fx.Graph) -> str:
    """A hash of a graph: each node's call, what it reads, and the numbers in it."""
    return _hash(
        f"{n.op} {n.name} {target_name(n.target)} {n.args} {n.kwargs}" for n in graph.nodes
    )


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in data.items()}
