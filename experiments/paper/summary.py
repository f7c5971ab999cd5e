"""Rows to numbers with intervals: the data files that tables and figures are made from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fullgrad_theory.measure.results import Interval, Results, Row
from fullgrad_theory.metrics import METRICS

from .setup import FAMILIES

MEAN = "mean"
"""Stands for a model: the mean over the paper's families that the method applies to."""
INSIDE = "the paper's difference is inside the interval"
UNEXPLAINED = "unexplained"
PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "paper.json").read_text())
ByModel = Mapping[str, Results]


@dataclass(frozen=True)
class Cell:
    """The mean over `count` images, its interval, and the largest value. Where `than` names a
    policy, of the differences, image by image, to it."""

    model: str
    method: str
    policy: str
    than: str
    metric: str
    mean: float
    low: float
    high: float
    worst: float
    count: int

    @property
    def verdict(self) -> int:
        """1 if the interval is above 0, -1 if below, else 0."""
        return (self.low > 0) - (self.high < 0)


COLUMNS = tuple(f.name for f in fields(Cell))


def cells(results: ByModel) -> list[Cell]:
    """A cell for whatever was measured, and the differences of libra to plain."""
    whole = dict(results)
    if len({*FAMILIES} & {*results}) > 1:
        whole[MEAN] = over_models(results)
    return [c for model, found in whole.items() for c in _cells(model, found)]


def _cells(model: str, found: Results) -> Iterator[Cell]:
    measured = dict.fromkeys((r.method, r.policy, r.metric) for r in found)
    for method, policy, metric in measured:
        values = found.values(method, policy, metric)
        if np.isnan(values).all():
            continue
        at = found.mean(method, policy, metric)
        yield Cell(model, method, policy, "", metric, *_numbers(at, values))
        than = policy.replace("libra", "plain")
        if than != policy and (method, than, metric) in measured:
            change = values - found.values(method, than, metric)
            at = found.difference(method, metric, policy, than)
            yield Cell(model, method, policy, than, metric, *_numbers(at, change))


def _numbers(at: Interval, values: np.ndarray) -> tuple[float, float, float, float, int]:
    four = (at.mean, at.low, at.high, float(np.nanmax(values)))
    mean, low, high, worst = (float(f"{v:.5g}") for v in four)
    return mean, low, high, worst, at.count


def over_models(results: ByModel, families: Sequence[str] = FAMILIES) -> Results:
    """Image by image, the mean over those of `families` that a method applies to."""
    found: dict[tuple[str, str, str, int], list[float]] = {}
    for name in families:
        for row in results.get(name, ()):
            found.setdefault((row.method, row.policy, row.metric, row.image), []).append(row.value)
    return Results.of(
        Row(image, -1, -1, method, policy, metric, float(np.mean(values)))
        for (method, policy, metric, image), values in found.items()
    )


# --------------------------------------------------------------------------- the paper's orderings


@dataclass(frozen=True)
class Claim:
    """What the paper says of two entries of one of its tables, and what was found here.

    `mean`, `low`, `high`: by how much the first is better than the second here, positive being
    what the paper says; `paper`: the same there, None where it gives no figures. `verdict`: "yes",
    "no" or "undecided" (0 inside the interval); `reason`: why it differs.
    """

    table: str
    better: str
    worse: str
    paper: float | None
    mean: float
    low: float
    high: float
    count: int
    verdict: str
    reason: str

    @property
    def key(self) -> str:
        return f"{self.table}: {self.better} > {self.worse}"


def orders(table: Mapping[str, float], higher: bool, champion: str) -> list[tuple[str, str]]:
    """The pairs (better, worse) that are compared: Libra's against its plain form, the champion
    against everybody, everybody against random, and neighbours in the paper's ranking."""
    ranking = sorted(table, key=lambda e: -table[e] if higher else table[e])
    pairs = [(f"Libra {e}", e) for e in table if f"Libra {e}" in table]
    pairs += [(champion, e) for e in ranking if e != champion]
    pairs += [(e, "random") for e in ranking if e != "random" and "random" in table]
    pairs += list(pairwise(ranking))
    strict = [(a, b) for a, b in pairs if table[a] != table[b]]
    turned = [(a, b) if (table[a] > table[b]) == higher else (b, a) for a, b in strict]
    return list(dict.fromkeys(turned))


def claims(
    exact: ByModel, faithful: ByModel, ablated: ByModel, families: Sequence[str] = FAMILIES
) -> list[Claim]:
    """Every claim that the rows at hand can answer."""
    made: list[Claim] = []
    if exact:
        errors = over_models({m: _single(found) for m, found in exact.items()}, families)
        table = PAPER["completeness"]
        for pair in orders(table, False, "Libra FullGrad"):
            made.append(_claim("completeness error", pair, table, errors, "completeness-error"))
    if faithful:
        table = PAPER["mif"]
        for pair in orders(table, True, "Libra FullGrad+"):
            # means over the same models, those with both methods
            methods = [PAPER["entries"][e][0] for e in pair]
            able = [m for m in families if m in faithful and {*methods} <= {*faithful[m].methods}]
            both = over_models(faithful, able)
            made.append(_claim("MIF accuracy", pair, table, both, "mif-accuracy-drop"))
        for model, table in PAPER["exceptions"].items():
            if model in faithful:
                first, second = sorted(table, key=lambda e: -table[e])
                name = f"MIF accuracy on {model}"
                made.append(
                    _claim(name, (first, second), table, faithful[model], "mif-accuracy-drop")
                )
        able = [m for m in families if m in faithful and "legrad" in faithful[m].methods]
        later = PAPER["later"]
        pair = (later["better"], later["worse"])
        made.append(_claim("SRG (later work)", pair, None, over_models(faithful, able), "srg"))
    for found in ablated.values():
        for i, (name, metric) in enumerate(
            (("ablation, MIF accuracy", "mif-accuracy-drop"), ("ablation, AP", "segmentation-ap"))
        ):
            table = {entry: numbers[i] for entry, numbers in PAPER["ablation"].items()}
            made += [
                _claim(name, pair, table, found, metric)
                for pair in orders(table, True, "Libra FullGrad+")
            ]
    return made


def _single(exact: Results) -> Results:
    """Errors in float32, by the policies' own names."""
    rows = (r for r in exact if r.policy.endswith("float32"))
    return Results.of(r._replace(policy=r.policy.split(",")[0]) for r in rows)


def _claim(
    table: str,
    pair: Sequence[str],
    paper: Mapping[str, float] | None,
    found: Results,
    metric: str,
) -> Claim:
    better, worse = pair
    (first, one), (second, other) = (PAPER["entries"][e] for e in pair)
    values = found.values(first, one, metric) - found.values(second, other, metric)
    sign = 1 if METRICS[metric].higher_is_better else -1
    rows = [Row(i, -1, -1, "gain", "", metric, sign * float(v)) for i, v in enumerate(values)]
    at = Results.of(rows).mean("gain", "", metric)
    verdict = "yes" if at.low > 0 else "no" if at.high < 0 else "undecided"
    said = None if paper is None else round(abs(paper[better] - paper[worse]), 4)
    unit = 1 if metric == "completeness-error" else 100
    inside = said is not None and unit * at.low <= said <= unit * at.high
    why = INSIDE if inside else PAPER["reasons"].get(f"{table}: {better} > {worse}", UNEXPLAINED)
    reason = "" if verdict == "yes" else why
    mean, low, high = (float(f"{v:.5g}") for v in (at.mean, at.low, at.high))
    return Claim(table, better, worse, said, mean, low, high, at.count, verdict, reason)


# --------------------------------------------------------------------------- files


def write_cells(path: Path, found: Sequence[Cell]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(astuple(cell) for cell in found)


def read_cells(path: Path) -> list[Cell]:
    with path.open(newline="") as file:
        return [_cell(row) for row in csv.DictReader(file)]


def _cell(row: Mapping[str, str]) -> Cell:
    model, method, policy, than, metric = (row[name] for name in COLUMNS[:5])
    mean, low, high, worst = (float(row[name]) for name in COLUMNS[5:9])
    count = int(row["count"])
    return Cell(model, method, policy, than, metric, mean, low, high, worst, count)


class Table:
    """Cells by what they are of."""

    def __init__(self, found: Sequence[Cell]) -> None:
        self.cells = list(found)
        self._by = {(c.model, c.method, c.policy, c.than, c.metric): c for c in found}
        self.models = tuple(dict.fromkeys(c.model for c in found))
        self.methods = tuple(dict.fromkeys(c.method for c in found))

    def at(self, model: str, method: str, policy: str, metric: str, than: str = "") -> Cell | None:
        return self._by.get((model, method, policy, than, metric))
