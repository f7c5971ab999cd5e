"""The residual along the depth as a plot: numbers for the template that draws it as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import floor, isfinite, log10
from typing import Any

from .drawing import BESIDE, KINDS, Drawn
from .report import Verdict
from .verdict import LOCAL_TOLERANCE

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 1100, 300, 58, 28, 270
_FLOOR = 1e-18
"""what is less, an exact 0 among it, is drawn there"""

Mark = Callable[[float, float], str]


def plot(nodes: Sequence[Drawn]) -> dict[str, Any] | None:
    """The errors of nodes by their place, on a logarithmic scale; None where nothing was measured.

    Before the edits a cross, after them (or without any) a dot. What is not finite is at the top.
    """
    placed = [node for node in nodes if node.kind != BESIDE]
    after = [(i, n.error) for i, n in enumerate(placed) if n.error is not None]
    before = [(i, n.before) for i, n in enumerate(placed) if n.before is not None]
    if not after:
        return None
    finite = [e for _, e in (*after, *before) if isfinite(e)]
    top = max(1.0, *finite, _FLOOR)
    decades = log10(top) - log10(_FLOOR)
    step = (_WIDTH - _LEFT - 12) / max(1, len(placed) - 1)

    def x(place: int) -> float:
        return round(_LEFT + 6 + step * place, 1)

    def y(error: float) -> float:
        kept = min(max(error, _FLOOR), top) if isfinite(error) else top
        return round(_BOTTOM - (_BOTTOM - _TOP) * (log10(kept) - log10(_FLOOR)) / decades, 1)

    def path(points: Sequence[tuple[int, float]], mark: Mark) -> str:
        return "".join(mark(x(place), y(error)) for place, error in points)

    named = "after the edits" if before else "the gradient as it is"
    series = [_series(named, path(after, _dot), _dot, KINDS[Verdict.NUMERIC].colour, 5, 66)]
    if before:
        crosses = path(before, _cross)
        colour = KINDS[Verdict.VIOLATED].colour
        series.insert(0, _series("before the edits", crosses, _cross, colour, 1.6, 200))
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "top": _TOP,
        "bottom": _BOTTOM,
        "bound": y(LOCAL_TOLERANCE),
        "ticks": [
            {"y": y(10.0**power), "text": f"1e{power}" if power else "1"}
            for power in range(-18, floor(log10(top)) + 1, 3)
        ],
        "bands": list(_bands(placed, x)),
        "series": series,
    }


def _dot(x: float, y: float) -> str:
    return f"M{x} {y}h0"


def _cross(x: float, y: float) -> str:
    return f"M{x - 3:.1f} {y - 3:.1f}l6 6m0-6l-6 6"


def _series(name: str, path: str, mark: Mark, colour: str, pen: float, x: int) -> dict[str, Any]:
    key = mark(x, 12)
    return {"name": name, "path": path, "key": key, "colour": colour, "pen": pen, "x": x}


def _bands(placed: Sequence[Drawn], x: Callable[[int], float]) -> Iterator[dict[str, Any]]:
    """Where a stage of the model begins: `blocks.3`, `head`; named where there is room."""
    free, deep = 0.0, _depth([node.module for node in placed])
    for stage, group in groupby(enumerate(placed), lambda pair: _stage(pair[1].module, deep)):
        places = [place for place, _ in group]
        at, width = x(places[0]), x(places[-1]) - x(places[0])
        if not stage or len(places) < 2:
            continue
        room = at >= free and width > 6.5 * len(stage)
        free = at + 6.5 * len(stage) + 8 if room else free
        yield {"x": at, "text": stage if room else ""}


def _depth(modules: Sequence[str], most: int = 40) -> int:
    """How many names of a path tell stages apart, so that there are no more than can be shown."""
    longest = max((module.count(".") + 1 for module in modules), default=1)
    fits = (d for d in range(longest, 1, -1) if len({_stage(m, d) for m in modules}) <= most)
    return next(fits, 1)


def _stage(module: str, depth: int) -> str:
    """The first names of a path, up to the last number among them: a block, not a part of it."""
    parts = module.split(".")[:depth]
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts)
