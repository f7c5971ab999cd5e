"""The registry: one record an operation; registering twice is an error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from .algebra import Algebra, Role
from .calls import argument_names, overload, target_name
from .classes import CLASSES
from .gates import Gate
from .readers import Reader
from .record import Frozen, Operator
from .relations import signature_names
from .steps import BITS
from .tables import LIBRARIES, TABLES
from .views import View


def region_of(inner: nn.Module, label: str, *values: Any) -> Any:
    """A sub-layer as one operation: `inner` of what it reads from outside. `label` names it."""
    return inner(*values)


REGION = Operator(f"{region_of.__module__}.{region_of.__name__}", Algebra.SMOOTH)
"""no operation of its own: a sub-layer that was folded into one call, to be integrated"""
LEAF = "leaf."
"""what the names of modules and Functions that are kept whole begin with"""


_REGISTRY: dict[str, Operator] = {}


def _add(operator: Operator) -> None:
    known = _REGISTRY.setdefault(operator.name, operator)
    if known is not operator:
        raise ValueError(f"{operator.name} is registered already as {known.algebra}")


def lookup(name: str) -> Operator | None:
    """The record of an operation, None where nobody registered it."""
    return _REGISTRY.get(name)


def record_of(node: fx.Node) -> Operator | None:
    """The record of the operation that a node calls."""
    return lookup(target_name(node.target)) if node.op == "call_function" else None


def has_role(node: Any, role: Role) -> bool:
    """Whether a value is a node that calls an operation of that role."""
    record = record_of(node) if isinstance(node, fx.Node) else None
    return record is not None and role in record.roles


def registered() -> Iterator[Operator]:
    """All records, by name; of other libraries' operations what users register."""
    known = (o for o in _REGISTRY.values() if o not in (REGION, BITS, *LIBRARIES))
    return iter(sorted(known, key=lambda operator: operator.name))


def register(
    name: str,
    algebra: Algebra,
    signature: str | None = None,
    *,
    origin: float = 0.0,
    vanishes: str = "",
    gate: Callable[..., Tensor] | None = None,
    frozen: Frozen | Callable[..., Any] | None = None,
    normalised: str = "",
    eps: str = "eps",
    reader: Reader | None = None,
    view: View | None = None,
    refuses: Callable[[Mapping[str, Any]], str | None] | None = None,
    roles: Collection[Role] = (),
    note: str = "",
) -> Operator:
    """Add one operation, e.g. `register('mylib.scale.default', Algebra.STRUCTURAL, 'x')`.

    `name` is the overload as torch prints it, `leaf.<class>.default` for what a trace keeps whole.
    `signature` is its degree rule over argument names; left out, it is the one tensor it takes. The
    rest is in `Operator`; a class has a default for most of it. Raises ValueError, with the words
    to write, where the name is registered or unknown to torch, an argument is not the schema's, or
    the class needs what is not given.
    """
    names = _known_names(name)
    ruled = CLASSES[algebra].ruled or signature is not None
    rule = signature if signature is not None else _only_tensor(name, algebra) if ruled else "self"
    operator = Operator(
        name,
        algebra,
        rule,
        origin,
        vanishes,
        Gate(gate) if gate is not None and not isinstance(gate, Gate) else gate,
        Frozen(frozen) if callable(frozen) else frozen,
        normalised or signature_names(rule)[0],
        eps,
        reader,
        view,
        refuses=refuses,
        roles=frozenset(roles),
        note=note,
    )
    said = signature_names(rule) if ruled else ()
    for argument in (*said, *filter(None, (vanishes, normalised))):
        check_argument(name, names, argument)
    lacking = operator.kind.lacks(operator)
    if lacking:
        raise ValueError(f"{name} is registered as {algebra} and needs {lacking}")
    _add(operator)
    return operator


def check_argument(name: str, names: Collection[str] | None, argument: str) -> None:
    """Raise ValueError where a degree rule names an argument that the operation does not have."""
    if names is not None and argument not in names:
        raise ValueError(f"{name} has no argument {argument!r}; it takes {', '.join(names)}")


def _known_names(name: str) -> tuple[str, ...] | None:
    """The arguments of an operation, None where they are known only when it is traced."""
    if name.startswith(LEAF):
        return None
    try:
        return argument_names(overload(name))
    except (AttributeError, ValueError):
        raise ValueError(
            f"torch knows no operation {name!r}: write its overload as torch prints it, "
            "'mylib.blend.default', and define it before (torch.library.custom_op); a module or a "
            "Function that is kept whole is 'leaf.<its class>.default'"
        ) from None


def _only_tensor(name: str, algebra: Algebra) -> str:
    if name.startswith(LEAF):
        return "self"
    tensors = [a.name for a in overload(name)._schema.arguments if str(a.type) == "Tensor"]
    if len(tensors) == 1:
        return tensors[0]
    raise ValueError(
        f"{name} takes {', '.join(argument_names(overload(name)) or ())}: write its degree rule, a "
        f"sum of products of these, for example register({name!r}, Algebra.{algebra.name}, "
        f"{' + '.join(tensors) or 'tensors'!r})"
    )


for _operator in (REGION, BITS, *LIBRARIES, *(row for table in TABLES for row in table)):
    _add(_operator)
