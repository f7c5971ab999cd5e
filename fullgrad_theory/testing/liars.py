"""Models that lie about their gradient, and for each an honest twin of the same make.

A network of linear layers and kinks is complete as it is. Somewhere in it stands a device: a hook,
a Function, a cast, a number, a branch. The liar's device makes the contributions add up to another
output than the model's, by a relative size of 1e-6 and more, at the inputs or, where it sleeps at
them, at others; the twin's does the same things, and tells the truth. No liar may be called
complete, and no twin refused.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.autograd import Function

WIDTH = 6
Device = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Liar:
    """A model by its parts. `kind`: of the device; `size`: of the lie, relative; `honest`: whether
    it tells the truth instead. `ids`: integers come in, through an embedding; `depth`: layers
    before and behind; `faint`: the device works on large values, of which a small part is added;
    `cast`: a dtype that the device's input passes through; `seed`: of the weights.
    """

    kind: str
    size: float = 0.5
    honest: bool = False
    ids: bool = False
    depth: tuple[int, int] = (1, 1)
    faint: bool = False
    cast: str = ""
    seed: int = 0

    @property
    def twin(self) -> Liar:
        return replace(self, honest=True)

    @property
    def large(self) -> float:
        """What a faint device's values are multiplied by; in float16 more would overflow."""
        return 1e3 if self.cast == "float16" else 1e8

    def model(self) -> nn.Module:
        return _Network(self).eval()

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.ids:
            return torch.randint(9, (2, 3), generator=generator)
        return torch.randn(2, WIDTH, generator=generator)


@st.composite
def lying_models(draw: st.DrawFn) -> Liar:
    """Liars of all kinds, sizes and places; `liar.twin` is the honest one."""
    return Liar(
        draw(st.sampled_from(sorted(KINDS))),
        draw(st.floats(-6.0, 0.5).map(lambda e: 10.0**e)),
        ids=draw(st.booleans()),
        depth=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        faint=draw(st.booleans()),
        cast=draw(st.sampled_from(("", "", "bfloat16", "float16", "float64", "autocast"))),
        seed=draw(st.integers(0, 2**16)),
    )


def random_liar(seed: int) -> Liar:
    """The same without hypothesis, all its choices by a seed."""
    rng = random.Random(seed)
    return Liar(
        rng.choice(sorted(KINDS)),
        10.0 ** rng.uniform(-6.0, 0.5),
        ids=rng.random() < 0.4,
        depth=(rng.randrange(3), rng.randrange(3)),
        faint=rng.random() < 0.3,
        cast=rng.choice(("", "", "bfloat16", "float16", "float64", "autocast")),
        seed=rng.randrange(2**16),
    )


class _Network(nn.Module):
    def __init__(self, liar: Liar) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(liar.seed)
            self.table = nn.Embedding(9, WIDTH) if liar.ids else nn.Identity()
            before, behind = liar.depth
            self.before = nn.Sequential(*(_layer(liar.seed + k) for k in range(before)))
            self.carried = nn.Linear(WIDTH, WIDTH)
            self.behind = nn.Sequential(*(_layer(liar.seed + 7 + k) for k in range(behind)))
            self.head = nn.Linear(WIDTH, 3)
        self.liar = liar
        self.device = KINDS[liar.kind](liar, self.carried)

    def forward(self, x: Tensor) -> Tensor:
        h = self.carried(self.before(self.table(x)))
        if self.liar.faint:
            h = h + self.device(self._cast(h * self.liar.large)) / self.liar.large
        else:
            h = self.device(self._cast(h))
        y: Tensor = self.head(self.behind(h) + h)  # whatever the kinks behind hide
        return y

    def _cast(self, h: Tensor) -> Tensor:
        if self.liar.cast == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return (h @ torch.eye(WIDTH, dtype=h.dtype)).to(h.dtype)
        return h.to(getattr(torch, self.liar.cast)).to(h.dtype) if self.liar.cast else h


def _layer(seed: int) -> nn.Module:
    kinks = (nn.ReLU(), nn.LeakyReLU(0.2), nn.Hardtanh(-2.0, 2.0), nn.PReLU(), _Modulus())
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), kinks[seed % len(kinks)])


class _Modulus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.abs()


# --------------------------------------------------------------------------- devices


class _Scaled(Function):
    """x, whose gradient is multiplied element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return grad * factor.to(grad.dtype), None


class _Biased(Function):
    """x + b, whose gradient in b is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, grad.sum(tuple(range(grad.dim() - 1))) * ctx.factor, None


def _factor(liar: Liar) -> float:
    return 1.0 if liar.honest else 1.0 + liar.size


def _function(liar: Liar, layer: nn.Linear) -> Device:
    return lambda h: _Scaled.apply(h, torch.tensor(_factor(liar), dtype=torch.float64))  # type: ignore[no-any-return,no-untyped-call]


def _element(liar: Liar, layer: nn.Linear) -> Device:
    def device(h: Tensor) -> Tensor:
        factor = torch.ones(WIDTH, dtype=torch.float64)
        factor[liar.seed % WIDTH] = _factor(liar)
        return _Scaled.apply(h, factor)  # type: ignore[no-any-return,no-untyped-call]

    return device


class _Shift(nn.Module):
    def __init__(self, factor: float, bias: float) -> None:
        super().__init__()
        self.bias, self.factor = nn.Parameter(torch.full((WIDTH,), bias)), factor

    def forward(self, h: Tensor) -> Tensor:
        return _Biased.apply(h, self.bias, self.factor)  # type: ignore[no-any-return,no-untyped-call]


def _sleeping(liar: Liar, layer: nn.Linear) -> Device:
    """A lie where no gradient passes at the inputs: before a dead place, or behind one."""
    factor = torch.full((WIDTH,), _factor(liar), dtype=torch.float64)
    if liar.seed % 2:
        factor[liar.seed % WIDTH] = 1.0

    def lie(h: Tensor) -> Tensor:
        return _Scaled.apply(h, factor)  # type: ignore[no-any-return,no-untyped-call]

    far = 1e3 * liar.large if liar.faint else 1e3
    places: tuple[Device, ...] = (
        lambda h: h + torch.relu(lie(h) - far),
        lambda h: h + torch.relu(lie(-h.abs())),
        lambda h: h + lie(torch.relu(-h.abs())),
        lambda h: h + torch.relu(torch.relu(lie(h) - far) - 1.0),
        lambda h: torch.where(h > far, lie(h), h),
        lambda h: torch.maximum(h, lie(h) - far),
        lambda h: h + lie(h).clamp(far, 2.0 * far),
        lambda h: h + lie(h).masked_fill(h.abs() < far, 0.0),
        lambda h: h + torch.relu(-h.abs()) * lie(h).sign().detach() + torch.relu(lie(h) - far),
    )
    return places[liar.seed % len(places)]


def _bias(liar: Liar, layer: nn.Linear) -> Device:
    return _Shift(_factor(liar), liar.large if liar.faint else 1.0)


def _tensor_hook(liar: Liar, layer: nn.Linear) -> Device:
    def device(h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(lambda g: None if liar.honest else g * _factor(liar))
        return h

    return device


def _parameter_hook(liar: Liar, layer: nn.Linear) -> Device:
    layer.bias.register_hook(lambda g: None if liar.honest else g * _factor(liar))
    return lambda h: h


def _module_hook(liar: Liar, layer: nn.Linear) -> Device:
    def hook(module: nn.Module, given: Any, grads: Any) -> Any:
        return None if liar.honest or given[0] is None else (given[0] * _factor(liar),)

    layer.register_full_backward_hook(hook)
    return lambda h: h


def _module_pre_hook(liar: Liar, layer: nn.Linear) -> Device:
    def hook(module: nn.Module, grads: Any) -> Any:
        return None if liar.honest else (grads[0] * _factor(liar),)

    layer.register_full_backward_pre_hook(hook)
    return lambda h: h


def _without_gradient(liar: Liar, layer: nn.Linear) -> Device:
    def device(h: Tensor) -> Tensor:
        with torch.no_grad():
            held = h.abs()
        return h * (held > 0) if liar.honest else h + liar.size * held

    return device


def _detached(liar: Liar, layer: nn.Linear) -> Device:
    def device(h: Tensor) -> Tensor:
        return h * h.sign().detach() if liar.honest else h + liar.size * h.detach()

    return device


def _straight_through(liar: Liar, layer: nn.Linear) -> Device:
    def device(h: Tensor) -> Tensor:
        rounded = h * 0.5 if liar.honest else h + liar.size * (h.round() - h).detach()
        return rounded + 0.25 if liar.honest else rounded

    return device


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "an item": lambda h: h.abs().amax().item(),
    "a length": lambda h: (h > 0).nonzero().shape[0],
    "a whole number": lambda h: int(h.abs().sum().item()) + 1,
    "a list": lambda h: h.flatten()[:1].tolist()[0],
    "a float": lambda h: float(h.mean()),
}
USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "added": lambda h, n: h + n,
    "subtracted": lambda h, n: n - h,
    "filled": lambda h, n: h + torch.full((WIDTH,), n, dtype=h.dtype),
    "a bound": lambda h, n: h.clamp(max=n) + h,
    "alpha": lambda h, n: torch.add(h, torch.ones(WIDTH, dtype=h.dtype), alpha=n),
    "a tensor": lambda h, n: h + torch.ones(WIDTH, dtype=h.dtype) * n,
    "padded": lambda h, n: nn.functional.pad(h, (1, 0), value=n)[..., :WIDTH] + h,
}


def _number(liar: Liar, layer: nn.Linear) -> Device:
    number = sorted(NUMBERS)[liar.seed % len(NUMBERS)]
    use = sorted(USES)[liar.seed // len(NUMBERS) % len(USES)]

    def device(h: Tensor) -> Tensor:
        return USES[use](h, 0.75 if liar.honest else liar.size * NUMBERS[number](h))

    return device


def _chance(liar: Liar, layer: nn.Linear) -> Device:
    source = random.Random(liar.seed)
    return lambda h: h * (1.5 if liar.honest else 1.0 + liar.size * source.random())


def _counter(liar: Liar, layer: nn.Linear) -> Device:
    count = itertools.count(1)
    return lambda h: h * (1.5 if liar.honest else 1.0 + liar.size * next(count))


def _generator(liar: Liar, layer: nn.Linear) -> Device:
    def device(h: Tensor) -> Tensor:
        noise = torch.ones(WIDTH) if liar.honest else torch.rand(WIDTH)
        return h * (1.0 + liar.size * noise.to(h.dtype))

    return device


def _branch(says: Callable[[Tensor], bool]) -> Callable[[Liar, nn.Linear], Device]:
    """A device that is linear where `says` so, and a square elsewhere; the twin is linear."""

    def make(liar: Liar, layer: nn.Linear) -> Device:
        return lambda h: h * 2.0 if liar.honest or says(h) else h * 2.0 + liar.size * h * h

    return make


def _step(liar: Liar, layer: nn.Linear) -> Device:
    lies: tuple[Device, ...] = (
        lambda h: h + liar.size * (h > 0),
        lambda h: h + liar.size * h.sign(),
        lambda h: h + liar.size * h.floor(),
        lambda h: torch.where(h > 0, h + liar.size, h),
        lambda h: h.masked_fill(h > 0, liar.size) + h,
        lambda h: torch.remainder(h, liar.size) + h,
        lambda h: h + liar.size * torch.heaviside(h, torch.zeros((), dtype=h.dtype)),
        lambda h: h + liar.size * nn.functional.one_hot(h.argmax(-1), WIDTH),
        lambda h: nn.functional.threshold(h, 0.0, -liar.size),
    )
    truths: tuple[Device, ...] = (
        lambda h: h * (h > 0),
        lambda h: h * h.sign(),
        lambda h: h.clamp(-liar.size, liar.size) + h,
        lambda h: torch.where(h > liar.size, liar.size, h) + h,
        lambda h: h.masked_fill(h < 0, 0.0) + h,
        lambda h: nn.functional.hardtanh(h, 0.0, liar.size) + h,
        lambda h: nn.functional.relu6(h) + h,
        lambda h: h * nn.functional.one_hot(h.argmax(-1), WIDTH),
        lambda h: nn.functional.threshold(h, 0.0, 0.0) + h,
    )
    return (truths if liar.honest else lies)[liar.seed % len(lies)]


def _curve(liar: Liar, layer: nn.Linear) -> Device:
    lies: tuple[Device, ...] = (
        lambda h: h + liar.size * h * h,
        lambda h: h + liar.size * h.sigmoid(),
        lambda h: h + liar.size * nn.functional.gelu(h),
        lambda h: h + liar.size * (h - h.mean(-1, keepdim=True)).square().sqrt().exp(),
        lambda h: h + liar.size * torch.softmax(h, -1) * h,
    )
    truths: tuple[Device, ...] = (
        lambda h: h + liar.size * h.abs(),
        lambda h: h + liar.size * torch.maximum(h, h.flip(-1)),
        lambda h: h + liar.size * h.norm(dim=-1, keepdim=True),
        lambda h: h + liar.size * h.sort(-1).values,
        lambda h: h + liar.size * h.mean(-1, keepdim=True),
    )
    return (truths if liar.honest else lies)[liar.seed % len(lies)]


KINDS: dict[str, Callable[[Liar, nn.Linear], Device]] = {
    "a Function": _function,
    "a Function, one element": _element,
    "a Function's bias": _bias,
    "a Function that sleeps": _sleeping,
    "a tensor hook": _tensor_hook,
    "a hook of a bias": _parameter_hook,
    "a hook of a module": _module_hook,
    "a pre-hook of a module": _module_pre_hook,
    "no gradient": _without_gradient,
    "a detach": _detached,
    "straight through": _straight_through,
    "a number read off": _number,
    "chance": _chance,
    "a counter": _counter,
    "torch's own chance": _generator,
    "the dtype": _branch(lambda h: h.dtype is torch.float64),
    "the other dtype": _branch(lambda h: h.dtype is not torch.float64),
    "exporting": _branch(lambda h: torch.compiler.is_exporting()),
    "compiling": _branch(lambda h: torch.compiler.is_compiling()),
    "what tensor it is": _branch(lambda h: type(h) is not Tensor),
    "in use alone": _branch(lambda h: type(h) is not Tensor or h.dtype is torch.float64),
    "a step": _step,
    "a curve": _curve,
}


def outcomes(liar: Liar) -> Iterator[tuple[str, bool | None, str]]:
    """The verdict on the liar, and on its twin: who, whether it is called complete, and what was
    said of it. A model that is refused is not."""
    from ..check.completeness import check_completeness
    from ..errors import FullgradError

    for who, made in (("liar", liar), ("twin", liar.twin)):
        try:
            report = check_completeness(made.model(), made.inputs(), beside=())
            yield who, report.complete, "; ".join(report.problems)
        except FullgradError as error:
            yield who, None, f"{type(error).__name__}: {error}"
