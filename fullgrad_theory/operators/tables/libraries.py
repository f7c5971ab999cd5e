"""Operations that other libraries define: torch knows them where these are imported."""

from ..algebra import Algebra
from .row import Table, rows

multilinear = rows(Algebra.MULTILINEAR)

TABLE: Table = (
    # rows of `input`, sorted by group, each times the matrix of its group
    *multilinear(
        "transformers.grouped_mm_fallback.default", "input*weight", python=True, proved=False
    ),
)
