"""Whether a process that goes on calling this library stays as large as it is.

    python -m experiments.memory_flat [--calls 1000] [--write]

Each call is made `--calls` times over in one process, after a tenth as many to warm up. Counted are
live tensors before and after, and the resident memory of the process, least of ten looks in each
half. Exits with 1 where a tensor more is alive, or where memory grows by more than `BAR` a call.
`--write` writes experiments/results/memory_flat.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fullgrad_theory as fgt

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "experiments" / "results" / "memory_flat.md"
BAR = 4096
"""bytes a call: what torch.export and torch.fx intern, of which a model's tensors are no part"""


@dataclass(frozen=True)
class Growth:
    """What one kind of call left behind. `bytes`: of resident memory, a call."""

    name: str
    calls: int
    seconds: float
    tensors: int
    bytes: float

    @property
    def flat(self) -> bool:
        return self.tensors <= 0 and self.bytes <= BAR


def calls(names: list[str]) -> Mapping[str, Callable[[], Any]]:
    """What is called, on a small vision transformer."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    graph = fgt.trace(model, x)
    balanced, explainer = fgt.balance(graph), fgt.Explainer(graph, policy="libra")
    every: dict[str, Callable[[], Any]] = {
        "Explainer": lambda: explainer(x, ["fullgrad", "fullgrad+", "genatt"]),
        "fullgrad": lambda: fgt.fullgrad(balanced, x, target=1),
        "check(graph)": lambda: fgt.check_completeness(graph, policy="libra", beside=()),
        "derive_rules(graph)": lambda: fgt.derive_rules(graph),
        "balance(graph)": lambda: fgt.balance(graph),
        "backward": lambda: balanced(x.clone().requires_grad_()).sum().backward(),
        "trace": lambda: fgt.trace(model, x),
    }
    return {name: every[name] for name in names or every}


def measure(name: str, call: Callable[[], Any], count: int) -> Growth:
    """Call it again and again."""
    _often(call, max(3, count // 10))
    before = live_tensors()
    start = time.perf_counter()
    first = _often(call, count // 2)
    second = _often(call, count - count // 2)
    seconds = (time.perf_counter() - start) / count
    return Growth(name, count, seconds, live_tensors() - before, (second - first) / (count / 2))


def _often(call: Callable[[], Any], count: int) -> int:
    """The least that the process held between the calls."""
    held = []
    for index in range(count):
        call()
        if (index + 1) % max(1, count // 10) == 0:
            gc.collect()
            held.append(resident())
    return min(held)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def resident() -> int:
    """Bytes that the process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table(rows: list[Growth]) -> str:
    lines = [
        "| call | calls | seconds each | tensors more | bytes more a call | flat |",
        "|---|---:|---:|---:|---:|---|",
        *(
            f"| {r.name} | {r.calls} | {r.seconds:.3f} | {r.tensors} | {r.bytes:.0f} "
            f"| {'yes' if r.flat else 'NO'} |"
            for r in rows
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=[], help="names of calls")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, call in calls(options.only).items():
        rows.append(measure(name, call, options.calls))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if options.write:
        title = f"# Memory over {options.calls} calls, torch {torch.__version__}\n\n"
        RESULT.write_text(title + table(rows) + "\n", encoding="utf-8")
    return 0 if all(r.flat for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
