"""What is known of an operation, all of it: one record.

An entry of the tables is a record; so is what a user registers, and what a measurement found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .algebra import Algebra, Role
from .calls import Call, Running
from .classes import CLASSES, Class
from .readers import Reader, origins
from .relations import Mode, constant_monomials
from .views import View

Gate = Callable[..., Tensor]
"""gate(u, *the operation's further arguments) = (f(u) - f(0)) / u, and f'(0) at u = 0"""


@dataclass(frozen=True)
class Frozen:
    """An operation with a part of it held fixed, 1/sigma of a norm or the weights of attention: a
    function of the operation's own arguments.

    `exact`: its value has the operation's bits; otherwise its gradient alone is used. `held`: the
    operands that it takes for fixed; where all of them are pruned, it stands for the operation.
    """

    form: Callable[..., Any]
    exact: bool = False
    held: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operator:
    """A registry entry. `signature`: the degree rule, see `relations`.

    Arguments in no monomial (indices, masks) must be seen at degree 0; one that lends nothing but
    its shape or dtype stands with exponent 0 (`self*other^0`).

    `origin`: f(0) of an elementwise operation. `gate`: its secant in closed form; by default the
    quotient is taken numerically. `frozen`: it with 1/sigma, or attention's weights, held fixed;
    `normalised` and `eps` name a norm's arguments. `vanishes`: the operand at whose 0 a smooth
    operation is 0, whatever the others are. `reader`: how bias leaves contribute, where the class
    does not tell. `view`: how what is written through it comes back. `opened`: the devices on which
    a trace holds torch's own steps in its place, None for all. `steps`: it in operations that have
    degrees, which a trace holds beside it: the gradient is theirs; with `together`, only where all
    of these operands depend on the input. `refuses`: a reason to refuse a
    call (training-mode batch norm). `becomes`: the record that it has where the arguments and what
    moves among them make it another function (a determinant of known size). `jumps`: the operands
    whose factor jumps, "1" for a constant that is none. `misreads`: whether torch's backward of it
    misreads a cotangent that lies in memory otherwise than the result. `roles`: what it is used
    for. `proved`: whether its meaning was proved.
    """

    name: str
    algebra: Algebra
    signature: str = "self"
    origin: float = 0.0
    vanishes: str = ""
    gate: Gate | None = None
    frozen: Frozen | None = None
    normalised: str = "input"
    eps: str = "eps"
    reader: Reader | None = None
    view: View | None = None
    opened: Collection[str] | None = ()
    steps: Callable[..., Any] | None = None
    together: tuple[str, ...] = ()
    refuses: Callable[[Mapping[str, Any]], str | None] | None = None
    becomes: Callable[[Mapping[str, Any], Collection[str]], Operator | None] | None = None
    jumps: Callable[[Mapping[str, Any]], Collection[str]] | None = None
    misreads: bool = False
    roles: frozenset[Role] = frozenset()
    proved: bool = False
    note: str = ""

    @property
    def kind(self) -> Class:
        """What its class brings."""
        return CLASSES[self.algebra]

    @property
    def edits(self) -> tuple[str, ...]:
        """Which edits of its own it takes, besides `prune` and `scale`."""
        return self.kind.edits

    def modes(self, call: Call) -> tuple[Mode, ...]:
        """The ways this call can be consistent, unedited first."""
        return self.kind.modes(self, call)

    @cached_property
    def shapes(self) -> frozenset[str]:
        """Arguments of a structural operation that lend nothing but their shape or dtype."""
        if self.algebra is not Algebra.STRUCTURAL:
            return frozenset()
        return frozenset(re.findall(r"(\w+)\^0\b", self.signature))

    @property
    def every_output(self) -> bool:
        """Whether each output has an f(0) of its own for a bias leaf, not the first alone."""
        return self.kind.reader is None

    def bias_operands(self, call: Call) -> tuple[str, ...]:
        """An operand of each constant monomial: a bias leaf where the output's degree is 1.

        It leads the monomial; a norm is linear in its weight, and not in a constant input.
        """
        place = -1 if self.algebra is Algebra.NORMALISER else 0
        return tuple(dict.fromkeys(names[place] for names in constant_monomials(call)))

    def bias_maps(self, running: Running, outputs: list[Tensor]) -> list[Tensor]:
        """J_b b of every output that has bias leaves, the first ones."""
        read = self.reader or self.kind.reader
        return origins(running) if read is None else [read(running, outputs[0])]
