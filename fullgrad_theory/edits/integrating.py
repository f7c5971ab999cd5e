"""Integrate: the Jacobian of a smooth operation, or of a sub-layer, averaged along a ray from 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from ..operators.calls import led_by, overload, target_name
from ..operators.registry import REGION, region_of
from .base import OwnEdit
from .quadrature import integrated
from .writing import Target, Writing


@dataclass(frozen=True, order=True)
class Integrate(OwnEdit):
    """J~ = integral of J(t u) over t from 0 to 1, u the live operands; f(0) is a bias leaf.

    With a `region`, the names of nodes that `node` ends, all of them count as one function of what
    they read from outside.
    """

    region: tuple[str, ...] = ()

    kind = "integrate"

    @property
    def folds(self) -> tuple[str, ...]:
        return self.region

    def words(self, node: str) -> str:
        inner = f" with the {len(self.region)} nodes it ends" if self.region else ""
        return f"integrate {node}{inner}"

    @classmethod
    def of_data(cls, entry: Mapping[str, Any]) -> Self:
        return cls(entry["node"], tuple(entry["region"]))

    def write(self, writing: Writing) -> None:
        node = writing.nodes[self.node]
        along, label = writing.rays(self.node), writing.describe(self.node)
        if isinstance(node.target, nn.Module):
            node.target = Integrated(node.target, along, label)
        else:
            node.args = (target_name(node.target), along, label, *node.args)
            node.target = integrate


@led_by(3)
def integrate(op: str, along: tuple[str, ...], label: str, *args: Any, **kwargs: Any) -> Any:
    """The operation `op` of these arguments; its Jacobian in the operands `along` is the integral
    along the ray from 0, the others being held fixed and keeping their true gradient.

    `op` is the overload's name, 'aten.softmax.int'; `along` holds operand names, 'hx[0]' in a list;
    `label` names the node in messages. Warns with `NonConvergenceWarning`; raises `NonFiniteError`
    in the backward where the ray is singular. Its gradient can be differentiated; not vmapped.
    """
    function = region_of if op == REGION.name else overload(op)
    return integrated(function, along, label, args, kwargs)


class Integrated(Target):
    """`integrate` for what is kept whole, a module or a Function: it has no name to be found by."""

    def __init__(self, function: nn.Module, along: tuple[str, ...], label: str) -> None:
        super().__init__(function)
        self.__module__, self.__name__ = __name__, "integrated"
        self.along, self.label = along, label

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return integrated(self.function, self.along, self.label, args, kwargs)
