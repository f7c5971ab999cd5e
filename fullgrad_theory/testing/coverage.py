"""What random architectures exercise: every operation, and the contexts it was met in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..operators.registry import lookup
from ..operators.relations import parse_signature
from .independent import is_real
from .sample_calls import overload
from .strategies import Architecture, Statement, Value, Weight, argument_positions, as_lists, weight


def run_values(architecture: Architecture) -> list[Any]:
    """The value of every input and statement at the architecture's own example, with gradients."""
    weights = [
        torch.tensor(as_lists(w.data), dtype=getattr(torch, w.kind.removeprefix("torch.")))
        if w.data is not None
        else weight(w.shape, w.kind, w.seed)
        for w in architecture.weights
    ]
    values: list[Any] = [
        x.requires_grad_() for x in architecture.example()[: len(architecture.inputs)]
    ]

    def runtime(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return values[leaf.index]
        return weights[leaf.index] if isinstance(leaf, Weight) else leaf

    with torch.enable_grad():
        for s in architecture.statements:
            args, kwargs = pytree.tree_map(runtime, (as_lists(s.args), dict(s.kwargs)))
            values.append(overload(s.target)(*args, **{k: as_lists(v) for k, v in kwargs.items()}))
    return values


@dataclass(frozen=True)
class Operand:
    """A value that a statement reads: whether it depends on the input, and by a gradient, and how
    often it is read in all."""

    value: Any
    moving: bool
    live: bool
    reads: int


@dataclass(frozen=True)
class User:
    """A statement that reads another one's value: whether it reads `other` live values beside it,
    one of them from before it (`earlier`)."""

    target: str
    other: bool
    earlier: bool


@dataclass(frozen=True)
class Surroundings:
    """A statement with its value, operands and users. `constant`: argument -> for each value,
    weight and number in it, whether it is a constant; `tied`: another statement has its weight."""

    statement: Statement
    value: Any
    operands: tuple[Operand, ...]
    users: tuple[User, ...]
    constant: Mapping[str, list[bool]]
    tied: bool

    @property
    def moving(self) -> bool:
        """Whether its value depends on the input."""
        return any(o.moving for o in self.operands)

    @cached_property
    def monomials(self) -> list[list[bool]]:
        """For each monomial of its degree rule which of its arguments are constant."""
        entry = lookup(self.statement.target)
        terms = [t for output in parse_signature(entry.signature) for t in output] if entry else []
        whole = {name: all(flags) for name, flags in self.constant.items()}
        words = [term.replace("*", " ").replace("/", " ").split() for term in terms]
        return [[flag for name, flag in whole.items() if name in term] for term in words]


def _attends(user: User) -> bool:
    return "attention" in user.target or ("matmul" in user.target and user.other)


def _recurs(at: Surroundings) -> bool:
    return at.tied or any(word in at.statement.target for word in ("lstm", "gru", "rnn"))


def _is_small(value: Any) -> bool:
    return isinstance(value, Tensor) and (1 in value.shape or not value.shape)


def _stands_alone(at: Surroundings) -> bool:
    """A constant operand in a monomial of its own, or in a list beside moving ones."""
    mixed = any(any(flags) and not all(flags) for flags in at.constant.values())
    return mixed or any(flags and all(flags) for flags in at.monomials)


def _multiplies(at: Surroundings) -> bool:
    """A constant operand beside a moving factor."""
    return any(any(flags) and not all(flags) for flags in at.monomials)


_TOLD: dict[str, Callable[[Surroundings], bool]] = {
    "residual": lambda at: any(u.target.startswith("aten.add.") and u.earlier for u in at.users),
    "fan-out": lambda at: len(at.users) > 1,
    "branch": lambda at: any(o.reads > 1 for o in at.operands),
    "gate": lambda at: any(u.target.startswith("aten.mul.") and u.other for u in at.users),
    "attention": lambda at: any(map(_attends, at.users)),
    "recurrence": _recurs,
    "multi-output": lambda at: isinstance(at.value, (tuple, list)),
    "degenerate size": lambda at: any(_is_small(o.value) for o in at.operands),
    "bias position": _stands_alone,
    "coefficient position": _multiplies,
    "frozen operand": lambda at: any(o.moving and not o.live for o in at.operands),
}
CONTEXTS = ("chain", *_TOLD)
"""what a statement can be in; a `chain` where it is in nothing else"""


def contexts(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Every (operation, context) that the architecture exercises."""
    for at in surroundings(architecture):
        if at.statement.target != "getitem":
            met = [name for name, holds in _TOLD.items() if at.moving and holds(at)]
            alone = "chain" if at.moving else "coefficient position"
            yield from ((at.statement.target, name) for name in met or [alone])


def surroundings(architecture: Architecture) -> Iterator[Surroundings]:
    """What is around each statement, in order."""
    values, count = run_values(architecture), len(architecture.inputs)
    statements = architecture.statements
    live = {i for i, v in enumerate(values) if _is_live(v)}
    readers: dict[int, list[int]] = {}
    moving, before = set(range(count)), [{i} for i in range(count)]
    for own, s in enumerate(statements, count):
        for read in s.reads:
            readers.setdefault(read, []).append(own)
        before.append({own}.union(*(before[r] for r in s.reads)))
        if not moving.isdisjoint(s.reads):
            moving.add(own)
    used = Counter(w for s in statements for w in set(s.weights))

    def user(reader: int, own: int) -> User:
        other = statements[reader - count]
        beside = [r for r in other.reads if r != own and r in live]
        return User(other.target, bool(beside), any(r in before[own] for r in beside))

    for own, s in enumerate(statements, count):
        yield Surroundings(
            s,
            values[own],
            tuple(Operand(values[r], r in moving, r in live, len(readers[r])) for r in s.reads),
            tuple(user(reader, own) for reader in readers.get(own, [])),
            _constants(s, moving),
            any(used[w] > 1 for w in s.weights),
        )


def _is_live(value: Any) -> bool:
    return any(is_real(t) and t.requires_grad for t in pytree.tree_leaves(value))


def _constants(statement: Statement, moving: set[int]) -> dict[str, list[bool]]:
    """Argument -> for each value, weight and number in it whether it is constant."""
    given = [
        *zip(argument_positions(statement.target), statement.args, strict=False),
        *statement.kwargs,
    ]
    flags = {
        name: [
            not (isinstance(leaf, Value) and leaf.index in moving)
            for leaf in pytree.tree_leaves(argument)
            if isinstance(leaf, (Value, Weight, float))
        ]
        for name, argument in given
    }
    return {name: own for name, own in flags.items() if own}
