"""How a table is written: names of one class that share the rest of their record."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ..algebra import Algebra, Role
from ..record import Operator

Table = tuple[Operator, ...]


def rows(algebra: Algebra) -> Callable[..., Table]:
    """`rows(Algebra.AFFINE)("add.Tensor neg", "self + other")`: aten.add.Tensor, aten.neg.default.

    `python`: the names are of Python's own operators. Meanings in these tables are proved but where
    a row says otherwise: the proofs hold the list.
    """

    def of(
        names: str,
        signature: str = "self",
        *,
        python: bool = False,
        roles: Collection[Role] = (),
        proved: bool = True,
        **fields: Any,
    ) -> Table:
        full = (name if python else aten_name(name) for name in names.split())
        return tuple(
            Operator(name, algebra, signature, roles=frozenset(roles), proved=proved, **fields)
            for name in full
        )

    return of


def aten_name(name: str) -> str:
    """`'aten.gelu.default'` for `'gelu'`, `'aten.add.Tensor'` for `'add.Tensor'`."""
    return f"aten.{name}" if "." in name else f"aten.{name}.default"
