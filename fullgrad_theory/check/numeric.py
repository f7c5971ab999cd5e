"""A random cotangent c, what is paired with it, and the gradients of that."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..operators.calls import is_ray
from . import words


def float_leaves(tree: Any) -> list[Tensor]:
    """The real and complex floating-point tensors of nested containers, in order."""
    return [t for t in pytree.tree_leaves(tree) if is_ray(t)]


def aligned(value: Tensor, seed: int) -> Tensor:
    """A random cotangent with the signs of the output, so that <c, f> has no cancellation."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value) + 0.5
    return size * torch.sgn(value.detach())


def paired(cotangents: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """<c, f> over all outputs; of complex ones the real part."""
    sums = [(c.conj() * o).real.sum() for c, o in zip(cotangents, outputs, strict=True)]
    return torch.stack(sums).sum()


def gradients(value: Tensor, given: list[Tensor]) -> list[Tensor]:
    """The gradient of a number by each tensor, 0 where it does not depend on one.

    Raises `TraceError` where torch has no derivative of an operation on the way.
    """
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in given]
    try:
        grads = torch.autograd.grad(value, given, allow_unused=True)
    except RuntimeError as error:
        if "derivative for" in str(error):  # torch has none: this backward never runs
            raise TraceError(words.no_gradient(error)) from error
        raise
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, given, strict=True)]


def largest(errors: Iterable[float]) -> float:
    """The largest error, NaN being the worst of all (`max` passes over it); 0 for none."""
    return max(errors, default=0.0, key=lambda e: float("inf") if math.isnan(e) else e)


@lru_cache(2)
def long_draw(seed: int) -> Tensor:
    """Two million standard normal numbers in float64, the second half being the first."""
    draw = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([draw, draw])


class Noise:
    """Random cotangents cut from one long draw at random places: a fresh draw a node is slow."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.draw = long_draw(seed)

    def like(self, value: Tensor) -> Tensor:
        """Standard normal numbers of the shape of `value`."""
        if value.is_complex():
            return torch.complex(self.like(value.real), self.like(value.imag))
        count, half = value.numel(), self.draw.numel() // 2
        # at an even place: two numbers in a row may be viewed as a complex one
        start = 2 * int(torch.randint(half // 2, (), generator=self.generator))
        long = self.draw if count <= half else self.draw.repeat(count // half + 1)
        return long[start : start + count].to(value).reshape(value.shape)
