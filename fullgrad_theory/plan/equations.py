"""Linear equations between degrees, read off measured rows in rational numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..operators.relations import Relation

ZERO_TOLERANCE = 1e-8
"""singular values below this, relative to the largest, are none"""
RATIONAL_TOLERANCE = 1e-6
FINEST = 24
"""the largest denominator of a coefficient"""


@dataclass(frozen=True)
class Equations:
    """The reduced rows of a matrix over (d, e_1, ..., e_n), the output's degree and the operands'.

    Without rows where they are not `rational`.
    """

    rows: tuple[tuple[Fraction, ...], ...]
    rational: bool = True

    @classmethod
    def of(cls, rows: Tensor) -> Equations:
        """The equations that hold for the degrees, each row a measurement of sum = 0."""
        if not bool(rows.any()):
            return cls(())
        matrix = _reduced(rows)
        exact = [[Fraction(float(x)).limit_denominator(FINEST) for x in row] for row in matrix]
        rounded = torch.tensor([[float(x) for x in row] for row in exact], dtype=torch.float64)
        rational = bool(((rounded - matrix).abs() < RATIONAL_TOLERANCE).all())
        return cls(tuple(map(tuple, exact)) if rational else (), rational)

    @property
    def determine(self) -> bool:
        """Whether the output's degree follows from the operands'."""
        return bool(self.rows) and self.rows[0][0] == 1

    @property
    def degree_free(self) -> bool:
        """Whether the output's degree can be other than 0."""
        return self.determine and any(self.rows[0][1:])

    def relation(self, names: Sequence[str]) -> Relation:
        """d as a sum of operand degrees, once a further equation; what can only be 0 in `zero`."""
        if not self.determine:
            return Relation(zero=tuple(sorted(names)))
        lead, *others = (
            {n: c for n, c in zip(names, row[1:], strict=True) if c} for row in self.rows
        )
        lead = {name: -c for name, c in lead.items()}
        zero = [name for row in others if len(row) == 1 for name in row]
        ties = [row for row in others if len(row) != 1]
        sums = [lead, *(_sum(lead, tie) for tie in ties)]
        if not lead and ties:  # d = 0, and the degrees of operands are tied to each other
            sums = [scaled for tie in ties for scaled in (tie, _sum(tie, tie))]
        terms = tuple(tuple(sorted(s.items())) for s in sums if s)
        return Relation(tuple(dict.fromkeys(terms)), tuple(sorted(zero)))

    def solutions(self) -> list[tuple[Fraction, ...]]:
        """A basis of the solutions (d, e_1, ..., e_n): one a column without a pivot."""
        width = len(self.rows[0])
        pivots = [next(i for i, x in enumerate(row) if x) for row in self.rows]
        found = []
        for free in (i for i in range(width) if i not in pivots):
            solution = [Fraction(int(i == free)) for i in range(width)]
            for row, pivot in zip(self.rows, pivots, strict=True):
                solution[pivot] = -row[free]
            found.append(tuple(solution))
        return found


def _sum(a: Mapping[str, Fraction], b: Mapping[str, Fraction]) -> dict[str, Fraction]:
    total = {n: a.get(n, Fraction(0)) + b.get(n, Fraction(0)) for n in [*a, *b]}
    return {n: c for n, c in total.items() if c}


def _reduced(rows: Tensor) -> Tensor:
    """A basis of the row space in reduced echelon form."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > ZERO_TOLERANCE * sizes[0]).sum())
    matrix = basis[:rank].clone()
    row = 0
    for column in range(matrix.shape[1]):
        if row == rank:
            break
        best = row + int(matrix[row:, column].abs().argmax())
        if float(matrix[best, column].abs()) < 1e-7:
            continue
        matrix[[row, best]] = matrix[[best, row]]
        matrix[row] /= matrix[row, column].clone()
        others = [i for i in range(rank) if i != row]
        matrix[others] -= matrix[others, column : column + 1] * matrix[row]
        row += 1
    return matrix
