"""How long a derivation takes, on blocks and on hard layers that no cut makes smaller.

    python experiments/derive_speed.py [--alternatives 3] [--save]

Tracing is not counted. `--save` writes experiments/results/derive_speed.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullgrad_theory.errors import FullgradError
from fullgrad_theory.graph.tracing import trace
from fullgrad_theory.plan.derivation import derive_rules

RESULT = Path(__file__).parent / "results" / "derive_speed.md"
GENERATOR = torch.Generator().manual_seed(0)
U, V, W = (torch.randn(4, 4, generator=GENERATOR) for _ in range(3))
B = torch.randn(4, generator=GENERATOR)
X = torch.randn(3, 4, generator=GENERATOR)


class Block(nn.Module):
    """A transformer block with a gated MLP."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        x = x + self.proj(torch.softmax(q @ k.mT / 3, -1) @ v)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def gru(steps: int) -> Callable[[Tensor], Tensor]:
    """An unrolled gated recurrent unit over one input."""

    def layer(x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, W, B))
        for _ in range(steps):
            z = torch.sigmoid(F.linear(x, W, B) + F.linear(h, V))
            r = torch.sigmoid(F.linear(x, V, B) + F.linear(h, U))
            n = torch.tanh(F.linear(x, U, B) + F.linear(r * h, W))
            h = (1 - z) * n + z * h
        return h

    return layer


def lstm(steps: int) -> Callable[[Tensor], Tensor]:
    """An unrolled LSTM cell; the state c has no norm and no cut."""

    def layer(x: Tensor) -> Tensor:
        h, c = F.linear(x, U), F.linear(x, V)
        for _ in range(steps):
            i, f, g, o = (F.linear(x, w, B) + F.linear(h, u) for w, u in ((W, V), (V, U)) * 2)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h

    return layer


def dense(depth: int) -> Callable[[Tensor], Tensor]:
    """Dense connections: every layer reads the sum of all before it, through a gated product."""

    def layer(x: Tensor) -> Tensor:
        values = [F.gelu(F.linear(x, W, B))]
        for i in range(depth):
            total = torch.stack(values[-4:]).sum(0)
            gate = torch.sigmoid(F.linear(values[i // 2], V))
            values.append(F.gelu(F.linear(total, W, B)) * gate)
        return torch.stack(values).sum(0)

    return layer


def tree(leaves: int) -> Callable[[Tensor], Tensor]:
    """A balanced tree of products over activations: the degree is the number of leaves."""

    def layer(x: Tensor) -> Tensor:
        values = [torch.tanh(F.linear(x, W * (i + 1), B)) for i in range(leaves)]
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [a * b + b for a, b in pairs]
        return values[0]

    return layer


def ladder(steps: int) -> Callable[[Tensor], Tensor]:
    """A recurrence of products and quotients: degrees grow on the way and have to be mended."""

    def layer(x: Tensor) -> Tensor:
        a, b = F.linear(x, W), F.linear(x, V)
        for _ in range(steps):
            a, b = a * F.silu(b) + a, F.linear(b, U, B) * torch.sigmoid(a) + a
        return a + b

    return layer


CASES: dict[str, Callable[[], tuple[Callable[..., Tensor], Tensor]]] = {
    "transformer block": lambda: (Block().eval(), torch.randn(2, 5, 8, generator=GENERATOR)),
    "24 transformer blocks": lambda: (
        nn.Sequential(*(Block() for _ in range(24))).eval(),
        torch.randn(2, 5, 8, generator=GENERATOR),
    ),
    "GRU, 26 steps": lambda: (gru(26), X),
    "LSTM, 20 steps": lambda: (lstm(20), X),
    "dense connections, 60 layers": lambda: (dense(60), X),
    "product tree, 128 leaves": lambda: (tree(128), X),
    "ladder of products, 60 steps": lambda: (ladder(60), X),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--alternatives", type=int, default=3)
    parser.add_argument("--effort", type=float, default=10.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = f"with {options.alternatives} alternatives"
    lines = [
        f"| layer | nodes | best plan, s | {found}, s | edits | cost | proven | alternatives |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, make in CASES.items():
        if options.only not in name:
            continue
        graph = trace(*make())
        start = time.perf_counter()
        try:
            plan = derive_rules(graph, effort=options.effort)
        except FullgradError as error:
            print(f"{name}: {time.perf_counter() - start:.1f} s, {str(error)[:300]}")
            continue
        alone = time.perf_counter() - start
        start = time.perf_counter()
        more = derive_rules(graph, alternatives=options.alternatives, effort=options.effort)
        both = time.perf_counter() - start
        calls = sum(node.op == "call_function" for node in graph.nodes.values())
        others = f"{len(more.alternatives)}" + (", stopped" if more.stopped else "")
        lines.append(
            f"| {name} | {calls} | {alone:.2f} | {both:.2f} | {len(plan)} | {plan.cost} | "
            f"{'yes' if plan.optimal else 'no'} | {others} |"
        )
        print(lines[-1], flush=True)
    if options.save:
        where = f"{platform.machine()}, one core, torch {torch.__version__.split('+')[0]}"
        head = (
            f"Written by `experiments/derive_speed.py --save` ({where}). Tracing is not counted.\n"
        )
        RESULT.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
