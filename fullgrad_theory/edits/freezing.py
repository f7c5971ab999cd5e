"""FreezeScale: 1/sigma of a normalisation is held fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import PlanError
from ..operators.calls import target_name
from ..operators.registry import lookup
from ..operators.steps import with_bits_of
from .base import OwnEdit
from .writing import Target, Writing


@dataclass(frozen=True, order=True)
class FreezeScale(OwnEdit):
    """A normalisation layer's 1/sigma is held fixed; its centring stays linear."""

    kind = "freeze"

    def words(self, node: str) -> str:
        return f"freeze 1/sigma of {node}"

    def write(self, writing: Writing) -> None:
        node = writing.nodes[self.node]
        frozen = writing.operator(self.node).frozen
        if frozen is None:
            raise PlanError(f"{writing.describe(self.node)} has no form with 1/sigma held fixed")
        if frozen.exact:
            node.target = frozen.form
        else:
            node.target = FrozenForm(node.target, frozen.form)


class FrozenForm(Target):
    """An operation with the gradient of its frozen form, which computes the same with other bits.

    `form` takes the operation's arguments, and is run beside it. Raises `PlanError` where its
    result is of another shape. One that has no name to be pickled by is found again in the record.
    """

    def __init__(self, function: Any, form: Any) -> None:
        super().__init__(function)
        self.__module__, self.__name__ = __name__, "frozen_form"
        self.form = form

    def __getstate__(self) -> dict[str, Any]:
        nameless = "<" in getattr(self.form, "__qualname__", "")  # a lambda, a function in another
        return super().__getstate__() | ({"form": None} if nameless else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.form is None:
            name = target_name(self.function)
            record = lookup(name)
            if record is None or record.frozen is None:
                raise PlanError(
                    f"{name} has no frozen form here: register it before this is loaded"
                )
            self.form = record.frozen.form

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        value, other = self.function(*args, **kwargs), self.form(*args, **kwargs)
        if value.shape != other.shape:
            raise PlanError(
                f"the frozen form of {target_name(self.function)} gives {tuple(other.shape)}, the "
                f"operation {tuple(value.shape)}"
            )
        return with_bits_of(other, value)
