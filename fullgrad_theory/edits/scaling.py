"""Scale: the gradient times a positive number."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..errors import PlanError
from ..operators.calls import as_one_call, bound_once
from .base import Edit, Stage
from .costs import Policy
from .writing import Writing


@dataclass(frozen=True, order=True)
class Scale(Edit):
    """The gradient into a node, or through one of its edges, is multiplied by a positive factor.

    1/d at a node of accumulated degree d > 0 makes its degree 1.
    """

    factor: Fraction
    argument: str | None = None

    kind = "scale"

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", Fraction(self.factor))  # in a file it is text
        if not self.factor > 0:
            raise PlanError(f"{self}: only a positive factor keeps the Jacobian an honest one")

    @staticmethod
    def price(policy: Policy, argument: str | None = None) -> int | None:
        """The cost of scaling a node; what a policy scales at the edges of a left node is free."""
        return policy.scale if argument is None else 0

    @property
    def stage(self) -> Stage:  # type: ignore[override]
        return Stage.RESULT if self.argument is None else Stage.EDGE

    def words(self, node: str) -> str:
        edge = f".{self.argument}" if self.argument else ""
        return f"scale {node}{edge} by {self.factor}"

    @property
    def place(self) -> tuple[str, str]:
        return self.kind, self.argument or ""

    def multiplies(self, argument: str | None = None) -> Fraction:
        return self.factor if argument == self.argument else Fraction(1)

    def write(self, writing: Writing) -> None:
        node = writing.nodes[self.node]
        if self.argument is not None:
            writing.on_edge(node, self.argument, scale, float(self.factor))
        else:
            writing.behind(node, scale, float(self.factor)).meta |= node.meta | {"edit": self}


@bound_once
class _Scale(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None


@as_one_call
def scale(x: Tensor, factor: float) -> Tensor:
    """The value of `x`; the gradient times `factor`, a Python number. Saves nothing.

    The result is a view of `x`: autograd refuses to write to it in place.
    """
    return _Scale.apply(x, factor)
