"""A certificate as a theorem of Coq: that every network of its form is complete.

proofs/coq says what a network of that form is, and proves the checker that accepts the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from ..errors import CertificateError
from .certificate import Certificate, kind_of

HEADER = """\
(* {model} under {policy}: graph {graph}, plan {plan}.
   Every network that realises this certificate is complete: for every size, input and parameter. *)
From Fullgrad Require Import Certificate.
Local Open Scope Q_scope.
"""
CLAIM = """\
Theorem complete : forall P, realises this P -> all_complete this outputs P.
Proof. apply check_sound. vm_compute. reflexivity. Qed.
Print Assumptions complete.
"""
CHUNK = 100
"""items in one definition, which Coq reads faster than a long one"""


def to_coq(certificate: Certificate) -> str:
    """The `.v` file whose theorem is the certificate's, for `coqc -Q proofs/coq Fullgrad`.

    Raises `CertificateError` where a step reads what is not before it.
    """
    head = HEADER.format(
        model=_quiet(certificate.model),
        policy=_quiet(certificate.policy or "no edits"),
        graph=certificate.graph[:16],
        plan=certificate.plan[:16],
    )
    return f"{head}\n{definitions(certificate)}{CLAIM}"


def definitions(certificate: Certificate, suffix: str = "") -> str:
    """`this`, the certificate in Coq's language, and its `outputs`."""
    items, places = list(items_of(certificate)), places_of(certificate)
    parts = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    lines = [
        f"Definition part{k}{suffix} : certificate := [\n  " + ";\n  ".join(part) + "]."
        for k, part in enumerate(parts)
    ]
    whole = " ++ ".join(f"part{k}{suffix}" for k in range(len(parts)))
    outputs = "; ".join(str(len(items) - places[name]) for name in certificate.outputs)
    return "\n".join(
        [
            *lines,
            f"Definition this{suffix} : certificate := {whole}.",
            f"Definition outputs{suffix} : list positive := [{outputs}]%positive.",
            "",
        ]
    )


def places_of(certificate: Certificate) -> dict[str, int]:
    """The place of every value among the items: the sources first."""
    names = [*certificate.claim["sources"], *(step["value"] for step in certificate.steps)]
    places = {name: place for place, name in enumerate(names)}
    if len(places) < len(names) or not {*certificate.outputs} <= {*places}:
        raise CertificateError("a value stands there twice, or an output not at all")
    return places


def items_of(certificate: Certificate) -> Iterator[str]:
    """The items of the certificate, one a source and one a step."""
    places = places_of(certificate)
    yield from ("Leaf" for _ in certificate.claim["sources"])
    for step in certificate.steps:
        yield _item(step, places)


def _item(step: Mapping[str, Any], places: Mapping[str, int]) -> str:
    here, positions = places[step["value"]], {a: i for i, a in enumerate(step["operands"])}
    edges = []
    for value, factor in step["operands"].values():
        back = here - places.get(value, here)
        if Fraction(factor) and back < 1:
            raise CertificateError(f"{step['value']} reads {value}, which is not before it")
        edges.append(f"Live {back} {_number(factor)}" if Fraction(factor) else "Held")
    monomials = [
        "; ".join(f"({positions[a]}%nat, {_number(p)})" for a, p in monomial if a in positions)
        for monomial in step["monomials"]
    ]
    listed = "; ".join(f"[{monomial}]" for monomial in monomials)
    constant = "true" if step["bias"] and monomials else "false"
    numbers = f"{_number(step['scale'])} {_number(step['degree'])}"
    return f"Op (Node {kind_of(step)} [{'; '.join(edges)}] [{listed}] {constant} {numbers})"


def _number(text: str) -> str:
    number = Fraction(text)
    return f"({number.numerator}#{number.denominator})"


def _quiet(text: str) -> str:
    """Text that ends no comment."""
    return text.replace("*)", "* )").replace("(*", "( *").replace('"', "'")
