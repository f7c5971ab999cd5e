"""Check real timm models, plain and under libra, and compare forwards bit for bit.

    python experiments/models.py [NAME ...]

Weights are random (seeded); each model's row is written to experiments/results/models.json as soon
as it is known, so an interrupted run goes on where it stopped. `models.md` is the table.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch

import fullgrad_theory as fgt
from fullgrad_theory.check.report import Report, Verdict

NAMES = """
vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224 vit_large_patch16_224
eva02_small_patch14_336 beitv2_large_patch16_224 flexivit_large vit_so400m_patch14_siglip_gap_378
vit_huge_patch14_clip_224 deit3_huge_patch14_224 mixer_b16_224 gmixer_24_224
resnet18 vgg11 convmixer_768_32 convmixer_1536_20
""".split()
RESULTS = Path(__file__).parent / "results"


def culprits(report: Report) -> dict[str, int]:
    """Operation -> how many of its nodes break completeness."""
    sound = (Verdict.PROVED, Verdict.NUMERIC)
    return dict(Counter(n.op for n in report.nodes if n.verdict not in sound))


def forwards_equal(model: torch.nn.Module, x: torch.Tensor) -> dict[str, bool]:
    """Whether the balanced forward is bitwise the model's, with and without grad, per dtype."""
    equal = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, x = model.to(dtype), x.to(dtype)
        balanced = fgt.balance(model, x)
        with torch.no_grad():
            same = torch.equal(balanced(x), model(x))
        grown = x.clone().requires_grad_()
        equal[str(dtype).removeprefix("torch.")] = same and torch.equal(
            balanced(grown).detach(), model(grown).detach()
        )
    return equal


def judge(name: str) -> dict[str, Any]:
    """One model's row."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    start = time.perf_counter()
    structural = fgt.check_completeness(model, numeric=False)
    seconds_structural = time.perf_counter() - start
    start = time.perf_counter()
    plain = fgt.check_completeness(model)
    seconds_full = time.perf_counter() - start
    libra = fgt.check_completeness(model, policy="libra")
    torch.manual_seed(1)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(libra.nodes),
        "plain_complete": plain.complete,
        "plain_error": plain.error,
        "culprits": culprits(plain),
        "structural_agrees": culprits(structural) == culprits(plain),
        "libra_complete": libra.complete,
        "libra_error": libra.error,
        "libra_worst_node": max(
            (n.error for n in libra.nodes if n.error is not None), default=None
        ),
        "edits": dict(Counter(type(e).__name__ for e in (libra.plan or ()))),
        "verdicts": dict(Counter(str(n.verdict) for n in libra.nodes)),
        "forward_bitwise": forwards_equal(model, x),
        "problems": [*libra.problems],
        "seconds_structural": round(seconds_structural, 2),
        "seconds_full": round(seconds_full, 1),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Real models, plain and under libra",
        "",
        f"`python experiments/models.py`, torch {torch.__version__}, timm {timm.__version__}, CPU, "
        "random weights; errors are relative, in float64, at the whole output, the larger of the "
        "model's own and perturbed parameters. Times are of one run each, on two shared cores.",
        "",
        "| model | plain error | breaks completeness | libra error | edits | forward bitwise |",
        "|---|---|---|---|---|---|",
    ]
    mark = {True: " (complete)", False: "", None: " (not judged)"}
    for name, row in rows.items():
        broken = ", ".join(f"{n} x {op.split('.')[1]}" for op, n in row["culprits"].items()) or "-"
        edits = ", ".join(f"{n} {kind}" for kind, n in row["edits"].items()) or "none"
        equal = ", ".join(k for k, v in row["forward_bitwise"].items() if v) or "no"
        lines.append(
            f"| {name} | {row['plain_error']:.1e}{mark[row['plain_complete']]} "
            f"| {broken} | {row['libra_error']:.1e}{mark[row['libra_complete']]} "
            f"| {edits} | {equal} |"
        )
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    store = RESULTS / "models.json"
    rows = json.loads(store.read_text()) if store.exists() else {}
    for name in names or NAMES:
        if name in rows:
            continue
        row = judge(name)
        print(name, json.dumps(row), flush=True)
        rows = (json.loads(store.read_text()) if store.exists() else {}) | {name: row}
        ordered = {n: rows[n] for n in [*NAMES, *rows] if n in rows}
        store.write_text(json.dumps(ordered, indent=1) + "\n")
        (RESULTS / "models.md").write_text(table(ordered))


if __name__ == "__main__":
    main(sys.argv[1:])
