"""What `fullgrad` hands out over torch's operator and module databases, against plain autograd.

    pip install expecttest  # which torch's databases import
    python -m experiments.contributions_database --samples 1

Every sample in float64 that has a plan under libra is balanced and split, without a target. A split
is right where the value is the largest of each sample, the input's part is its gradient times it by
autograd over the balanced module, and each sample's parts add up to its value. Anything else is a
clear error of the library's own. Writes contributions_database.md; goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments.operator_database import cases, is_float
from experiments.sweep import Sweep
from fullgrad_theory import FullGrad, FullgradError, balance, fullgrad

CLOSE = 1e-7


def first(made: Any) -> Tensor:
    return next(v for v in pytree.tree_leaves(made) if is_float(v))


def dense(g: Tensor) -> Tensor:
    return g.to_dense() if g.is_sparse else g


def by_hand(balanced: Any, given: tuple[Tensor, ...], parts: FullGrad) -> list[Tensor]:
    """Each input times its gradient of the largest values, those that `parts` has."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    output = first(balanced(*leaves))
    output = output.real if output.is_complex() else output
    if parts.batch is None:
        chosen = output.flatten()[output.flatten().argmax()]
    else:
        rows = output.movedim(parts.batch, 0).reshape(parts.samples, -1)
        chosen = rows.gather(1, rows.argmax(1, keepdim=True)).sum(1)
    if not torch.equal(chosen.detach(), parts.output):
        raise ArithmeticError("the value is not the largest of each sample")
    if not chosen.requires_grad:
        return [torch.zeros_like(x.real) for x in leaves]
    grads = torch.autograd.grad(chosen.sum(), leaves, allow_unused=True)
    return [
        torch.zeros_like(x.real) if g is None else (dense(g).conj() * x.detach()).real
        for g, x in zip(grads, leaves, strict=True)
    ]


def fault(balanced: Any, given: tuple[Tensor, ...], parts: FullGrad) -> str:
    """What is wrong with a split, "" where nothing is."""
    try:
        wanted = by_hand(balanced, given, parts)
    except ArithmeticError as error:
        return str(error)
    found = parts.input if isinstance(parts.input, tuple) else (parts.input,)
    if len(found) == len(wanted):
        for k, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            if not torch.allclose(ours, theirs.nan_to_num(0.0, 0.0, 0.0), rtol=1e-9, atol=1e-12):
                return f"input {k} differs from its gradient times it"
    size = parts.output.abs().clamp(min=1e-6)
    off = float(((parts.total - parts.output).abs() / size).max())
    close = max(CLOSE, 8 * torch.finfo(parts.output.dtype).eps)
    return f"the parts of a sample miss its value by {off:.2g}" if off > close else ""


def split(name: str, model: Any, given: tuple[Tensor, ...]) -> dict[str, Any]:
    return {"name": name} | _split(model, given)


def _split(model: Any, given: tuple[Tensor, ...]) -> dict[str, Any]:
    try:
        balanced = balance(model.eval(), given, "libra", unknown="measure")
    except FullgradError as error:
        return {"found": "no plan", "why": f"{type(error).__name__}: {error}"[:200]}
    try:
        parts = fullgrad(balanced, given)
        wrong = fault(balanced, given, parts)
    except FullgradError as error:
        return {"found": "refused", "why": f"{type(error).__name__}: {error}"[:200]}
    except Exception as error:  # noqa: BLE001  which is what is counted
        return {"found": "RAISED", "why": f"{type(error).__name__}: {error}"[:300]}
    return {"found": "WRONG" if wrong else "right", "why": wrong, "samples": parts.samples}


def table(rows: list[dict[str, Any]], command: str) -> str:
    count = Counter(r["found"] for r in rows)
    lines = [
        f"# `fullgrad` of {len(rows)} samples of torch's operator and module databases",
        "",
        f"`{command}`, torch {torch.__version__}",
        "",
        "| what comes out | samples |",
        "|---|---:|",
        *(f"| {k} | {n} |" for k, n in count.most_common()),
        "",
    ]
    for found in ("WRONG", "RAISED", "refused"):
        lines += [f"## {found}: {count[found]}", ""]
        lines += [f"- `{r['name']}`: {r['why']}" for r in rows if r["found"] == found]
        lines.append("")
    return "\n".join(lines)


def is_fault(row: dict[str, Any]) -> bool:
    return row["found"] in ("WRONG", "RAISED")


SWEEP = Sweep("contributions_database", cases, split, is_fault, table, samples=1)

if __name__ == "__main__":
    raise SystemExit(SWEEP.main(__doc__))
