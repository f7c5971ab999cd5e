"""Which evidence each line of kernel.toml rests on.

    python -m proofs.evidence

Writes proofs/evidence.md. An operation is listed by what is shown of it: `symbols`, that the
residual of its lemma is 0 identically (test_operations.py); `Euler`, that relation by autograd in
float64 (tests/test_kernel_table.py); `balls`, that torch's kernel is within 1e-12 of the exact
meaning (test_balls.py); `reals`, all numbers at once (test_piecewise.py); `Coq`, the lemma of its
class (coq/Operations.v).
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path

import torch

from fullgrad_theory import kernel
from fullgrad_theory.operators import registered
from fullgrad_theory.testing.sample_calls import samples
from proofs.balls import enclosed
from proofs.test_piecewise import HOMOGENEOUS, JUMPS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "proofs" / "evidence.md"
COQ = {
    "linear": "affine_complete",
    "product": "prodop_complete, mul_scaled_complete, mul_prune_complete",
    "homogeneous": "euler",
    "piecewise": "relu_complete",
    "attention": "attention_complete",
    "norm": "layernorm_complete, rmsnorm_complete",
    "elementwise": "gate_complete",
    "smooth": "averaged_is_complete",
    "frozen": "frozen_complete",
    "zeros": "frozen_complete",
    "singular": "frozen_complete",
}
"""class -> the lemma about it in coq/Operations.v, or Integrals.v"""


def in_balls(name: str) -> bool:
    """Whether its exact meaning can be enclosed on its samples."""
    try:
        for sample in samples(name, torch.Generator().manual_seed(0)):
            enclosed(name, sample)
    except LookupError:
        return False
    return True


def found() -> dict[str, dict[str, list[str]]]:
    """Operation -> class -> its evidence."""
    sys.path.append(str(ROOT / "tests"))  # as pytest does
    table = import_module("test_kernel_table")

    proved = {o.name for o in registered() if o.proved}
    reals = {f"aten.{name}" for name in (*HOMOGENEOUS, *JUMPS)}
    made: dict[str, dict[str, list[str]]] = {}
    for name, rows in kernel.meanings().items():
        if name == "pointwise":
            continue
        ruled = name in table.RULED and name not in table.NOT_SHOWN
        shown = {
            "symbols": name in proved,
            "Euler": ruled or name in table.STOPS,
            "balls": name.startswith("aten.") and name not in table.STOPS and in_balls(name),
            "reals": name in reals,
        }
        said = [evidence for evidence, holds in shown.items() if holds]
        made[name] = {row["class"]: said for row in rows}
    return made


def page(rows: Mapping[str, Mapping[str, list[str]]]) -> str:
    """The list as Markdown: by class, then by what is shown."""
    classes: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, by_class in rows.items():
        for kind, said in by_class.items():
            classes[kind][tuple(said)].append(name)
    lines = ["# What each line of kernel.toml rests on", "", "`python -m proofs.evidence`", ""]
    lines += ["| class | operations | symbols | Euler | balls | reals | lemma in Coq |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|"]
    for kind, groups in sorted(classes.items()):
        total = sum(map(len, groups.values()))
        counts = [
            sum(len(names) for shown, names in groups.items() if evidence in shown)
            for evidence in ("symbols", "Euler", "balls", "reals")
        ]
        lines.append(f"| {kind} | {total} | {' | '.join(map(str, counts))} | {COQ[kind]} |")
    for kind, groups in sorted(classes.items()):
        lines += ["", f"## {kind}", ""]
        for shown, names in sorted(groups.items(), key=lambda group: -len(group[0])):
            lines.append(f"- **{', '.join(shown) or 'by its definition'}**: {_list(names)}")
    return "\n".join(lines) + "\n"


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name.removeprefix('aten.').removesuffix('.default')}`" for name in names)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    PAGE.write_text(page(found()))
