"""How a table is written: names of one class that share the rest of their record."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ..algebra import Algebra, Role
from ..record import Operator

Table = tuple[Operator, ...]


def rows(algebra: Algebra) -> Callable[..., Table]:
    """`rows(Algebra.AFFINE)("aten.add.Tensor aten.add.Scalar", "self + other")`.

    Meanings in these tables are proved but where a row says otherwise: the proofs hold the list.
    """

    def of(
        names: str,
        signature: str = "self",
        *,
        roles: Collection[Role] = (),
        proved: bool = True,
        **fields: Any,
    ) -> Table:
        return tuple(
            Operator(name, algebra, signature, roles=frozenset(roles), proved=proved, **fields)
            for name in names.split()
        )

    return of
