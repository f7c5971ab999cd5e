"""Certificates with one thing changed: a degree, an edge, a class, an edit, a missing step."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from ..check.certificate import Certificate
from ..kernel import EDITS


def changes(data: Any, rng: random.Random) -> str:
    """One change of a certificate, in place: its kind, "" where there was nothing to change."""
    step = rng.choice(data["steps"])
    kind = rng.choice(
        "degree edge class operation edit missing swapped factor bias monomial scale source output "
        "order claimed_edit supposing held".split()
    )
    operands = step["operands"]
    some = rng.choice([*operands]) if operands else ""
    if kind == "degree":
        step["degree"] = rng.choice([d for d in ("0", "1", "2", "1/2") if d != step["degree"]])
    elif kind == "edge":
        values = [s["value"] for s in data["steps"]] + data["claim"]["sources"]
        operands[some][0] = rng.choice([v for v in values if v != operands[some][0]])
    elif kind == "class":
        step["class"] = rng.choice([c for c in ("linear", "norm", "smooth") if c != step["class"]])
    elif kind == "operation":
        step["operation"] += "_"
    elif kind == "edit":
        step["edit"] = rng.choice([e for e in ("", "freeze", "secant") if e != step["edit"]])
    elif kind == "missing":
        data["steps"].remove(step)
    elif kind == "swapped" and len(operands) > 1:
        other = rng.choice([a for a in operands if a != some])
        if operands[some] == operands[other]:
            return ""
        operands[some], operands[other] = operands[other], operands[some]
    elif kind == "factor":
        operands[some][1] = rng.choice(
            [f for f in ("0", "1", "1/2", "-1") if f != operands[some][1]]
        )
    elif kind == "bias":
        step["bias"] = not step["bias"]
    elif kind == "monomial" and step["monomials"]:
        step["monomials"].remove(rng.choice(step["monomials"]))
    elif kind == "scale":
        step["scale"] = rng.choice([f for f in ("1", "2", "1/2", "-1") if f != step["scale"]])
    elif kind == "source":
        data["claim"]["sources"] = rng.choice([[], [step["value"]], ["nobody"]])
    elif kind == "output":
        data["outputs"] = [rng.choice([s["value"] for s in data["steps"][:-1]])]
    elif kind == "order":
        index = data["steps"].index(step)
        other = rng.randrange(len(data["steps"]))
        if other == index:
            return ""
        data["steps"].insert(other, data["steps"].pop(index))
    elif kind == "claimed_edit" and data["claim"]["edits"]:
        edit = rng.choice(data["claim"]["edits"])
        if rng.random() < 0.5:
            data["claim"]["edits"].remove(edit)
        else:
            edit["edit"] = rng.choice([e for e in (*EDITS, "double") if e != edit["edit"]])
    elif kind == "supposing":
        data["supposing"] = [*data["supposing"], "nothing"]
    elif kind == "held":
        data["claim"]["held"] = [*data["claim"]["sources"]]
    else:
        return ""
    return kind


def mutated(certificate: Certificate, count: int, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """Certificates with one change each, as data."""
    rng = random.Random(seed)
    while count:
        data = json.loads(certificate.to_json())
        kind = changes(data, rng)
        if kind:
            count -= 1
            yield kind, data
