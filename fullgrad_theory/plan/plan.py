"""A plan: the edits that a policy makes to one graph's backward pass, and why. It is data."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from ..edits.kinds import Edit, edit_of_data
from ..errors import PlanError
from ..files import write_whole
from ..graph.computation import ComputationGraph, holds_tensor
from ..operators.algebra import Algebra
from ..operators.calls import target_name
from ..operators.registry import lookup
from .words import PlanText
from .words import compress as compress

FORMAT = "fullgrad-theory plan 1"
AS_THEY_ARE: Mapping[str, type] = {
    "policy": str, "cost": int, "optimal": bool, "stopped": bool, "fingerprint": str
}  # fmt: skip
"""what a file holds of a plan in no other form"""


def fingerprint(graph: ComputationGraph) -> str:
    """A hash of the operations on the input, each by its class and what it reads of it, in order.

    Sizes do not count, nor constants: with a parameter for a literal it is the same graph, although
    `1 - z` is then another operation.
    """
    lines: list[str] = []
    moving: dict[fx.Node, int] = {}
    for node in filter(_is_value, graph.fx.graph.nodes):
        reads = [moving[n] for n in node.all_input_nodes if n in moving]
        if node.op == "placeholder" or reads:
            moving[node] = len(lines)
            lines.append(f"{_kind(node)} {reads}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _kind(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.op
    name = target_name(node.target)
    known = lookup(name)
    if known is None:
        return name
    return known.signature if known.algebra is Algebra.HOMOGENEOUS else str(known.algebra)


def _is_value(node: fx.Node) -> bool:
    return node.op == "placeholder" or holds_tensor(node)


class PlanDiff(NamedTuple):
    """What one plan has that the other lacks."""

    removed: tuple[Edit, ...]
    added: tuple[Edit, ...]

    def __str__(self) -> str:
        lines = [f"- {edit}" for edit in self.removed] + [f"+ {edit}" for edit in self.added]
        return "\n".join(lines) or "no difference"


@dataclass(frozen=True)
class Plan:
    """The edits for one graph, in graph order, with the reason for each.

    `cost` is their sum under `policy`; `optimal` says whether that is proven to be the least (of an
    alternative: the next). `left` are the nodes that stay inconsistent, `where` maps nodes to
    (operation, module path). `cuts`: pruned edge -> the value held fixed there, followed by all
    nodes that leave the backward with it. `alternatives` are the plans that cost next to
    this one, in order; `stopped` says that the search for them met its limit.
    """

    edits: tuple[Edit, ...]
    policy: str
    reasons: Mapping[Edit, str]
    cost: int
    optimal: bool
    fingerprint: str
    left: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    cuts: Mapping[Edit, tuple[str, ...]] = field(default_factory=dict)
    alternatives: tuple[Plan, ...] = ()
    stopped: bool = False

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __bool__(self) -> bool:
        return True  # an empty plan is a plan

    def __str__(self) -> str:
        return str(PlanText(self))

    def _repr_html_(self) -> str:
        """What a notebook shows: each kind of edit with its places and reason, and alternatives."""
        from ..pages import filled, framed  # jinja2, where a page is made

        return framed(filled("plan.html", plan=self, paragraphs=PlanText(self)._paragraphs()), 420)

    def meaning(self, edit: Edit) -> str:
        """One edit in words: what it does to the backward, and what leaves the backward with it."""
        return PlanText(self).meaning(edit)

    @cached_property
    def pruned(self) -> frozenset[tuple[str, str]]:
        """The edges (node, argument) that carry no gradient."""
        return frozenset((e.node, e.held) for e in self.edits if e.held is not None)

    @cached_property
    def _by_node(self) -> dict[str, tuple[Edit, ...]]:
        by_node: dict[str, tuple[Edit, ...]] = {}
        for edit in self.edits:
            by_node[edit.node] = (*by_node.get(edit.node, ()), edit)
        return by_node

    def edits_of(self, node: str) -> tuple[Edit, ...]:
        """The edits at one node."""
        return self._by_node.get(node, ())

    def diff(self, other: Plan) -> PlanDiff:
        """The edits that only this plan has, and those that only `other` has."""
        mine, others = set(self.edits), set(other.edits)
        return PlanDiff(
            tuple(e for e in self.edits if e not in others),
            tuple(e for e in other.edits if e not in mine),
        )

    def check_fits(self, graph: ComputationGraph) -> None:
        """Raise `PlanError` where the plan was derived for another graph."""
        missing = [e.node for e in self.edits if e.node not in graph.nodes]
        if missing or self.fingerprint != fingerprint(graph):
            hint = f"it has no node {missing[0]!r}" if missing else "its operations differ"
            raise PlanError(
                f"this plan was derived for another graph than that of {graph.name}: {hint}; "
                "derive it again with derive_rules(model, inputs)"
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON with its alternatives, factors as text."""
        write_whole(path, json.dumps(self.to_data(), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote; raises `PlanError` where the file holds no plan."""
        with _reading(str(path)):
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(text, parse_constant=_no_number)
        return Plan.of_data(data, str(path))

    def to_data(self) -> dict[str, Any]:
        """What `save` writes, for `json.dumps`; `of_data` reads it."""
        return {"format": FORMAT} | _data_of(self)

    @staticmethod
    def of_data(data: Any, source: str = "this") -> Plan:
        """The plan that `to_data` wrote, also where it went through JSON.

        Raises `PlanError` where it is none; `source` is what the message calls it.
        """
        with _reading(source):
            if _known(data, Mapping)["format"] != FORMAT:
                raise PlanError(f"{source} has the format {data['format']!r}, not {FORMAT!r}")
            return _plan_of(data)


def _data_of(plan: Plan) -> dict[str, Any]:
    edits = [
        edit.data()
        | {"reason": plan.reasons.get(edit, "")}
        | ({"cuts": list(plan.cuts[edit])} if edit in plan.cuts else {})
        for edit in plan.edits
    ]
    return {key: getattr(plan, key) for key in AS_THEY_ARE} | {
        "edits": edits,
        "left": list(plan.left),
        "where": {node: list(where) for node, where in plan.where.items()},
        "alternatives": [_data_of(other) for other in plan.alternatives],
    }


def _plan_of(data: Mapping[str, Any]) -> Plan:
    entries = [_known(entry, Mapping) for entry in _known(data["edits"], list)]
    edits = [(_edit_of(entry), entry) for entry in entries]
    where, others = _known(data["where"], Mapping), _known(data["alternatives"], list)
    return Plan(
        **{key: _known(data[key], kind) for key, kind in AS_THEY_ARE.items()},
        edits=tuple(edit for edit, _ in edits),
        reasons={edit: _known(entry["reason"], str) for edit, entry in edits},
        left=_texts(data["left"]),
        where={node: (operation, module) for node, (operation, module) in _pairs(where)},
        cuts={edit: _texts(entry["cuts"]) for edit, entry in edits if "cuts" in entry},
        alternatives=tuple(_plan_of(_known(other, Mapping)) for other in others),
    )


def _edit_of(entry: Mapping[str, Any]) -> Edit:
    """An edit whose every field is of its kind: what is wrong otherwise shows far from here."""
    _known(entry["edit"], str)
    _known(entry["node"], str)
    if entry.get("argument") is not None:
        _known(entry["argument"], str)
    if "factor" in entry and not _FACTOR.fullmatch(_known(entry["factor"], str)):
        raise ValueError(f"{entry['factor']!r} is no factor")
    _texts(entry.get("region", []))
    if not -math.inf < _known(entry.get("origin", 0.0), (int, float)) < math.inf:
        raise ValueError(f"{entry['origin']!r} is no value")
    edit = edit_of_data(entry)
    if edit.kind == "prune" and not edit.held:
        raise ValueError(f"{entry!r} names no edge")
    return edit


_FACTOR = re.compile(r"[1-9]\d{0,8}(/[1-9]\d{0,8})?")


def _known(value: Any, kind: Any) -> Any:
    """The value, where it is of that kind; a truth value is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{reprlib.repr(value)} stands where it cannot")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_known(value, str) for value in _known(values, list))


def _pairs(where: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    return ((_known(node, str), _texts(place)) for node, place in where.items())


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Whatever a file may hold that is no plan is said in one way."""
    try:
        yield
    except PlanError:
        raise
    except RecursionError:
        raise PlanError(f"{source} holds no plan: it is nested too deeply") from None
    except OSError as error:
        raise PlanError(f"{source} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        said = reprlib.repr(str(error)).strip("'\"")
        raise PlanError(
            f"{source} holds no plan ({type(error).__name__}: {said}); write one with plan.save"
        ) from error
