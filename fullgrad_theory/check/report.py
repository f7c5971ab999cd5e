"""The verdict of a check as data: what a `Report` holds, and its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING, Any

from ..errors import CertificateError, FullgradError
from ..plan.plan import Plan
from .certificate import Certificate
from .numeric import largest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..graph.computation import ComputationGraph

FORMAT = "fullgrad-theory report 1"
WIDTH = 100
"""columns of a report as text"""


class Verdict(StrEnum):
    """What is known of one node."""

    PROVED = "proved"
    NUMERIC = "numeric"
    VIOLATED = "violated"
    OPAQUE = "opaque"
    UNKNOWN = "unknown"


FINE = (Verdict.PROVED, Verdict.NUMERIC)
WORDS = {True: "COMPLETE", False: "INCOMPLETE", None: "COULD NOT BE JUDGED"}
"""`Report.complete` for a reader"""


class IncompleteError(FullgradError, AssertionError):
    """Raised by `Report.raise_if_incomplete`; its text is the report."""


@dataclass(frozen=True)
class NodeReport:
    """One live node. `error`: the relative local residual in float64, None where none was taken.

    `degree` is the label under which the node was judged; `edit` the edit applied to it, or, where
    it is violated, the one that would mend it; `mend` the same with the operation in place of the
    node's name, so that it reads alike for all nodes that need it.
    """

    name: str
    op: str
    verdict: Verdict
    module_path: str
    source: str
    degree: str
    error: float | None
    edit: str | None
    reason: str
    mend: str | None = None


@dataclass(frozen=True)
class EndToEnd:
    """<c, f> against <x, G_x> + sum <b, G_b> for one cotangent c over the whole output.

    `relative` divides by sum |c f|; shares are fractions of <c, f>.
    """

    where: str
    dtype: str
    absolute: float
    relative: float
    input_share: float
    bias_share: float


@dataclass(frozen=True)
class Report:
    """The verdict for a whole model.

    `complete` is None where it could not be judged. `problems` say what stands in the way, `notes`
    what a reader should know. `error` is the largest relative end-to-end residual in float64,
    `error_before` that of the unedited gradient.
    """

    model: str
    policy: str | None
    complete: bool | None
    error: float | None
    error_before: float | None
    nodes: tuple[NodeReport, ...]
    measurements: tuple[EndToEnd, ...]
    plan: Plan | None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    certified: Certificate | None = field(default=None, repr=False, compare=False)

    def certificate(self) -> Certificate:
        """The verdict's proof as data. Raises `CertificateError` where there is none: the model is
        not complete, the kernel does not follow, or the report was read from a file."""
        if self.certified is None:
            why = "the kernel does not follow all of it" if self.complete else WORDS[self.complete]
            raise CertificateError(f"{self.model} has no certificate: {why}")
        return self.certified

    def __str__(self) -> str:
        """What a terminal shows, without colour, at most 100 columns wide."""
        from .render import as_text, whole  # rich, where something is shown

        return as_text(whole(self))

    def brief(self) -> str:
        """The verdict, and what stands in the way of a complete one: where, why, the mend."""
        from .render import as_text, obstacles

        return as_text(obstacles(self))

    def __rich__(self) -> RenderableType:
        """The same for a rich console, in colour."""
        from .render import in_colour

        return in_colour(self)

    def to_html(self, graph: ComputationGraph | None = None, before: Report | None = None) -> str:
        """Everything as one page for a browser, which needs neither files beside it nor a network.

        `graph`: what was checked, as `trace` returns it; without it the computation is drawn
        without edges. `before`: the report of the same gradient without the plan.
        """
        from .webpage import to_html  # jinja2, where a page is made

        return to_html(self, graph, before)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page, in a frame of its own."""
        from ..pages import framed

        return framed(self.to_html())

    def to_json(self) -> str:
        """Everything the report holds, as JSON; `Report.from_json` reads it back.

        A number that is not finite is written as a string: "nan", "inf", "-inf".
        """
        fields = {name: getattr(self, name) for name in _WRITTEN}
        fields |= {
            "nodes": [asdict(node) for node in self.nodes],
            "measurements": [asdict(one) for one in self.measurements],
            "plan": None if self.plan is None else self.plan.to_data(),
        }
        head = {"format": FORMAT, "verdict": WORDS[self.complete]}
        return json.dumps(_strict(head | fields), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote; raises ValueError where `text` is none."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not a report in the format {FORMAT!r}")
        fields = {name: data[name] for name in _WRITTEN}
        fields |= {
            "error": _number(data["error"]),
            "error_before": _number(data["error_before"]),
            "nodes": tuple(map(_node_of, data["nodes"])),
            "measurements": tuple(map(_measurement_of, data["measurements"])),
            "plan": None if data["plan"] is None else Plan.of_data(data["plan"]),
            "problems": tuple(data["problems"]),
            "notes": tuple(data["notes"]),
        }
        return cls(**fields)

    @classmethod
    def unjudged(cls, model: str, policy: str | None, why: str) -> Report:
        """The report of a model that could not even be traced."""
        return cls(model, policy, None, None, None, (), (), None, problems=(why,))

    @property
    def exit_code(self) -> int:
        """0 complete, 1 incomplete, 2 could not be judged."""
        return {True: 0, False: 1, None: 2}[self.complete]

    def raise_if_incomplete(self) -> None:
        """Raise `IncompleteError`, the report as its text, unless the verdict is complete."""
        if not self.complete:
            raise IncompleteError(str(self))


_WRITTEN = tuple(name for name in Report.__dataclass_fields__ if name != "certified")
"""the fields that a report's file has"""


def _strict(value: Any) -> Any:
    """Plain JSON values; numbers that are not finite as strings."""
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _node_of(data: dict[str, Any]) -> NodeReport:
    read = {"verdict": Verdict(data["verdict"]), "error": _number(data["error"])}
    return NodeReport(**data | read)


def _measurement_of(data: dict[str, Any]) -> EndToEnd:
    texts = ("where", "dtype")
    return EndToEnd(**{k: v if k in texts else _number(v) for k, v in data.items()})


# --------------------------------------------------------------------------- what is alike

_SUFFIX = re.compile(r"(?<=[A-Za-z])_\d+\b")
_VARYING = re.compile(r"\d+(?:\.\d+)?e[-+]?\d+|\d+\.\d+|(?<=[A-Za-z]\.)\d+|(?<=:)\d+")


def group_nodes(nodes: Iterable[NodeReport]) -> list[list[NodeReport]]:
    """Nodes of one operation with one reason and one kind of edit; violated groups come first."""
    groups: dict[tuple[str, ...], list[NodeReport]] = {}
    for node in nodes:
        mend = node.mend or shape(node.edit or "")
        groups.setdefault((node.verdict, node.op, shape(node.reason), mend), []).append(node)
    return sorted(groups.values(), key=lambda g: (list(Verdict).index(g[0].verdict), -len(g)))


def shape(text: str) -> str:
    """The text without node numbers, block numbers, lines and measurements; a degree counts."""
    return _VARYING.sub("#", _SUFFIX.sub("", text))


def mends(group: Iterable[NodeReport]) -> list[str]:
    """What mends the nodes of a group, each once; by the node where a report has no more."""
    return list(dict.fromkeys(n.mend or n.edit or "" for n in group if n.edit))


def worst(group: Iterable[NodeReport]) -> float | None:
    """The largest error among the nodes that have one, NaN being the worst; None for none."""
    errors = [n.error for n in group if n.error is not None]
    return largest(errors) if errors else None
