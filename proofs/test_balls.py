"""The error of completeness, bounded: proved of every input and parameter that rounds to the given
ones, and not sampled. No gradient of torch is taken, and no rounding goes unaccounted for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fullgrad_theory as fgt
from fullgrad_theory.check.structure import Structure, structure_of
from fullgrad_theory.operators import Algebra, registered
from fullgrad_theory.testing.sample_calls import Sample, overload, samples
from fullgrad_theory.testing.strategies import random_architecture
from proofs.balls import Account, account, enclosed, off

BOUND = 1e-12
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
Made = tuple[nn.Module | Callable[[Tensor], Tensor], tuple[Tensor, ...]]


class Block(nn.Module):
    """A pre-norm block: attention, a gated product, two residuals."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.gate = nn.LayerNorm(4), nn.RMSNorm(4), gate
        self.qkv, self.up, self.down = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.one(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        gate, value = self.up(self.two(x)).chunk(2, -1)
        return x + self.down(self.gate(gate) * value)


class Spelled(nn.Module):
    """Attention and GPT-2's GELU in primitives."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(4, 12), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + (q @ k.mT / 2.0).softmax(-1) @ v
        u = self.up(x)
        return self.down(0.5 * u * (1 + torch.tanh(0.8 * (u + 0.044715 * u**3))))


class Cell(nn.Module):
    """Three steps of a gated recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.read = nn.Linear(6, 9), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for step in x.unbind(1):
            keep, take, new = self.gates(torch.cat([step, h], -1)).chunk(3, -1)
            h = keep.sigmoid() * h + take.sigmoid() * new.tanh()
        return self.read(h)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


MODELS: dict[str, Callable[[], Made]] = {
    "a block with GELU": lambda: (Block(F.gelu), (torch.randn(1, 3, 4),)),
    "a block with SiLU": lambda: (Block(F.silu), (torch.randn(2, 2, 4),)),
    "a block with sigmoid": lambda: (Block(torch.sigmoid), (torch.randn(1, 3, 4),)),
    "spelled out": lambda: (Spelled(), (torch.randn(1, 3, 4),)),
    "convolutions": lambda: (convolutional(), (torch.randn(2, 2, 4, 4),)),
    "a recurrence": lambda: (Cell(), (torch.randn(2, 3, 3),)),
    "a mixer": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.Mish(), nn.Softplus(), nn.Linear(4, 2), nn.Hardswish()),
        (torch.randn(2, 3, 4),),
    ),
}


@cache
def found(name: str, policy: str | None) -> tuple[Structure, Account, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    assert isinstance(model, nn.Module)
    inputs = tuple(x.double() for x in inputs)
    structure = structure_of(fgt.trace(model.double().eval(), *inputs), policy)
    return structure, account(structure, inputs), inputs


@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_carried_at_its_degree(name: str) -> None:
    structure, made, _ = found(name, "libra")
    assert {node.name for node in structure.unfolded.outputs} <= made.gaps.keys()
    assert made.worst <= BOUND


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_gradient_is_incomplete(name: str) -> None:
    """Some element of the output is missed by an amount that no rounding explains."""
    structure, made, _ = found(name, None)
    assert any(not e.contains(0) for e in off(structure, made))


@pytest.mark.parametrize("name", MODELS)
def test_torch_is_as_near(name: str) -> None:
    """The value that autograd splits in float64, and the sum of its parts, lie within the bound."""
    structure, made, inputs = found(name, "libra")
    (node,) = structure.unfolded.outputs
    values = made.values[node.name][0].values
    balanced = fgt.balance(structure.unfolded, policy=structure.plan or "libra")
    parts = fgt.fullgrad(balanced, inputs, target=(0,) * (values.ndim - 1))
    exact = values.reshape(len(values), -1)[:, 0]
    for ball, output, total in zip(exact, parts.output, parts.total, strict=True):
        for number in (output, total):
            assert float((ball - float(number)).abs_upper()) <= BOUND


GRADIENTLESS = {Algebra.FREEZING, Algebra.FACTORY, Algebra.COMPOSITE}
NAMES = [o.name for o in registered() if o.algebra not in GRADIENTLESS]
UNWRITTEN: dict[str, str] = {}
"""of which Arb has no function, or which are complex"""


def of_torch(name: str, sample: Sample) -> list[Tensor]:
    made = overload(name)(*sample.args, **sample.kwargs)
    return list(made) if isinstance(made, (list, tuple)) else [made]


@pytest.mark.parametrize("name", NAMES)
def test_torch_computes_what_is_meant(name: str) -> None:
    """The float64 kernel's error on each sample, against the exact meaning that its lemma is of."""
    for sample in samples(name, torch.Generator().manual_seed(0)):
        try:
            exact = enclosed(name, sample)
        except LookupError as error:
            pytest.skip(str(error))
        for balls, tensor in zip(exact, of_torch(name, sample), strict=True):
            if not tensor.is_floating_point():
                continue
            for ball, number in zip(balls.values.ravel(), tensor.ravel().tolist(), strict=True):
                assert float((ball - number).abs_upper()) <= BOUND * (1 + abs(number))


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_drawn_architectures(first: int) -> None:
    """Those that libra mends, of exact meanings: each of their values is carried at its degree."""
    judged = 0
    for seed in range(first, first + 20):
        drawn = random_architecture(seed)
        if drawn is None:
            continue
        model, inputs = drawn.module(), drawn.example()
        try:
            structure = structure_of(fgt.trace(model, inputs), "libra")
        except fgt.FullgradError:
            continue
        if structure.plan is None or structure.problems:
            continue
        try:
            made = account(structure, inputs, spread=0.0)
        except LookupError:
            continue
        judged += 1
        assert made.worst <= BOUND, drawn.source()
    assert judged > 3
