"""The variables of an integer programme, and its solver: OR-tools' CP-SAT."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ortools.sat.python import cp_model

from .solution import Decision, Solution

IntVar = cp_model.IntVar
Literal = cp_model.LiteralT
"""a Boolean variable, its negation, or a truth value"""
HIGHEST = 32
"""degrees beyond +-32 are not looked for"""


@dataclass(frozen=True)
class Candidate:
    """A decision that may be made, by the literal that it is.

    `rank`: among solutions of equal cost the lowest sum of ranks wins. `degree`: the variable of
    the degree that a scale makes 1.
    """

    literal: IntVar
    decision: Decision
    rank: int
    degree: IntVar | None


class Variables:
    """Degrees (times a common denominator, `one`), literals, and the decisions among them.

    `spent`: the solver's effort so far; `exhausted`: whether it found that there is no solution.
    """

    def __init__(self, one: int) -> None:
        self.one = one
        self.model = cp_model.CpModel()
        self.candidates: list[Candidate] = []
        self.spent, self.exhausted = 0.0, False

    def constant(self, degree: int) -> IntVar:
        return self.model.new_constant(degree * self.one)

    def degree(self, small: bool) -> IntVar:
        """A degree; a small one is 0 or 1."""
        bound = HIGHEST * self.one
        ends = [[0, 0], [self.one, self.one]] if small else [[-bound, bound]]
        return self.model.new_int_var_from_domain(cp_model.Domain.from_intervals(ends), "")

    def literal(self) -> IntVar:
        return self.model.new_bool_var("")

    def decide(self, decision: Decision, rank: int = 0, degree: IntVar | None = None) -> IntVar:
        """The literal of a decision."""
        literal = self.literal()
        self.candidates.append(Candidate(literal, decision, rank, degree))
        return literal

    def restrict(self, degree: IntVar, degrees: Iterable[int], where: IntVar) -> None:
        """Let a degree be one of `degrees` where a literal holds."""
        domain = cp_model.Domain.from_values([value * self.one for value in degrees])
        self.model.add_linear_expression_in_domain(degree, domain).only_enforce_if(where)

    def any_of(self, literals: Sequence[IntVar]) -> IntVar:
        """A literal that holds where one of `literals` does, and only there."""
        one = self.literal()
        self.model.add_bool_or(literals).only_enforce_if(one)
        self.model.add_bool_and([~literal for literal in literals]).only_enforce_if(~one)
        return one

    def all_of(self, literals: Sequence[Literal]) -> IntVar:
        """A literal that holds where all of `literals` do, and only there."""
        both = self.literal()
        self.model.add_bool_and(literals).only_enforce_if(both)
        self.model.add_bool_or([both, *(~literal for literal in literals)])  # type: ignore[operator]
        return both

    def solve(self, effort: float) -> Solution | None:
        """The cheapest decisions, in graph order; None where none were found."""
        ranks = 1 + sum(c.rank for c in self.candidates)
        prices = ((c.decision.cost * ranks + c.rank) * c.literal for c in self.candidates)
        self.model.minimize(sum(prices))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = max(effort, 0.0)
        solver.parameters.linearization_level = 2  # without it, large pieces are not proven
        status = solver.solve(self.model)
        self.spent += solver.deterministic_time
        self.exhausted = status == cp_model.INFEASIBLE
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        made = [self._made(c, solver) for c in self.candidates if solver.value(c.literal)]
        return Solution(tuple(made), status == cp_model.OPTIMAL)

    def _made(self, candidate: Candidate, solver: cp_model.CpSolver) -> Decision:
        if candidate.degree is None:
            return candidate.decision
        degree = Fraction(solver.value(candidate.degree), self.one)
        return replace(candidate.decision, degree=degree)
