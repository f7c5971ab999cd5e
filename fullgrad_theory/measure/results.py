"""Results of an evaluation: one value an image, method, policy and metric; means with intervals."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, unknown_name
from ..extras import require
from ..files import whole


class Row(NamedTuple):
    """One value. `image`: its place among the samples; `target`: the class explained."""

    image: int
    label: int
    target: int
    method: str
    policy: str
    metric: str
    value: float


@dataclass(frozen=True)
class Interval:
    """A mean over `count` images and its confidence interval, which is never NaN: all numbers where
    the values say nothing of others. `note` says what is out of the ordinary; empty for BCa."""

    mean: float
    low: float
    high: float
    count: int
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        said = f" ({self.note})" if self.note else ""
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]{said}"


@dataclass(frozen=True)
class Results:
    """Columns of equal length, one entry a `Row`; `settings` says how they were made."""

    columns: Mapping[str, Sequence[Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(rows: Iterable[Row], settings: Mapping[str, Any] | None = None) -> Results:
        """Results from rows, in the order of image, method, policy and metric that they come in."""
        rows = list(rows)
        columns = {name: tuple(row[i] for row in rows) for i, name in enumerate(Row._fields)}
        return Results(columns, settings or {})

    def __len__(self) -> int:
        return len(self.columns["value"])

    def __iter__(self) -> Any:
        return map(Row._make, zip(*(self.columns[n] for n in Row._fields), strict=True))

    @cached_property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.columns["method"]))

    @cached_property
    def policies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.columns["policy"]))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.columns["metric"]))

    @cached_property
    def _cells(self) -> dict[tuple[str, str, str], dict[int, float]]:
        cells: dict[tuple[str, str, str], dict[int, float]] = {}
        for row in self:
            cells.setdefault((row.method, row.policy, row.metric), {})[row.image] = row.value
        return cells

    def values(self, method: str, policy: str, metric: str) -> np.ndarray:
        """One value an image, (n,), in the images' order. NaN where the metric says nothing."""
        for kind, name, known in (
            ("method", method, self.methods),
            ("policy", policy, self.policies),
            ("metric", metric, self.metrics),
        ):
            if name not in known:
                raise unknown_name(f"{kind} in these results", name, known)
        cell = self._cells[method, policy, metric]
        return np.array([cell[image] for image in sorted(cell)], dtype=float)

    def mean(
        self, method: str, policy: str, metric: str, confidence: float = 0.95, resamples: int = 2000
    ) -> Interval:
        """The mean over images (those with a value), and a bootstrap interval of it."""
        return _bootstrap(self.values(method, policy, metric), confidence, resamples)

    def difference(
        self,
        method: str,
        metric: str,
        policy: str = "libra",
        than: str = "plain",
        confidence: float = 0.95,
        resamples: int = 2000,
    ) -> Interval:
        """Mean of (value under `policy` - value under `than`), image by image.

        The bootstrap is paired: it draws images, whose two values stay together.
        """
        pair = (self.values(method, policy, metric), self.values(method, than, metric))
        return _bootstrap(pair[0] - pair[1], confidence, resamples)

    def save(self, path: str | Path) -> None:
        """Writes JSON (with the settings) or CSV (the columns alone), by the file's suffix."""
        _suffix(Path(path))
        whole(path, self._write)

    def _write(self, path: Path) -> None:
        if _suffix(path) == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(Row._fields)
                writer.writerows((*row[:-1], repr(row.value)) for row in self)
            return
        columns = {**self.columns, "value": [_portable(v) for v in self.columns["value"]]}
        path.write_text(json.dumps({"settings": dict(self.settings), "columns": columns}))

    @staticmethod
    def load(path: str | Path) -> Results:
        """Reads what `save` wrote; values come back bit for bit."""
        path = Path(path)
        try:
            if _suffix(path) == ".csv":
                with path.open(newline="") as file:
                    return Results.of(_row(entry) for entry in csv.DictReader(file))
            held = json.loads(path.read_text())
            names = held["columns"]
            entries = zip(*(names[n] for n in Row._fields), strict=True)
            rows = [_row(dict(zip(Row._fields, e, strict=True))) for e in entries]
            return Results.of(rows, held["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path.name} does not hold results: {error!r}") from error


def _suffix(path: Path) -> str:
    if path.suffix not in (".csv", ".json"):
        raise InputError(f"results are kept as .json or .csv, not as {path.name!r}")
    return path.suffix


def _portable(value: float) -> float | str | None:
    """JSON has no NaN (here null) and no infinity (here a string)."""
    return None if math.isnan(value) else str(value) if math.isinf(value) else value


def _row(entry: Mapping[str, Any]) -> Row:
    value = entry["value"]
    return Row(
        int(entry["image"]),
        int(entry["label"]),
        int(entry["target"]),
        str(entry["method"]),
        str(entry["policy"]),
        str(entry["metric"]),
        math.nan if value is None else float(value),
    )


def _bootstrap(values: np.ndarray, confidence: float, resamples: int) -> Interval:
    """Bias-corrected and accelerated (Efron 1987), seeded: the same results give the same one.

    Its corrections are not defined where no resample's mean, or every one, lies below the mean, or
    where leaving one value out changes nothing: a few values that are equal but for their last
    digits. There it is the percentile interval of the same resamples. Fewer than two values, or an
    infinite one, bound nothing: the interval is all numbers.
    """
    stats = require("scipy.stats", "measure")
    values = values[~np.isnan(values)]
    count = len(values)
    with np.errstate(all="ignore"):  # a sum that overflows is told below
        mean = float(values.mean()) if count else math.nan
    anywhere = partial(Interval, mean, -math.inf, math.inf, count)
    if count < 2:
        return anywhere("one value" if count else "no values")
    if not np.isfinite(values).all():
        return anywhere("an infinite value")
    if (values == values[0]).all():
        return Interval(mean, mean, mean, count, "all values equal")
    bootstrap = partial(
        stats.bootstrap,
        (values,),
        np.mean,
        confidence_level=confidence,
        batch=max(1, 2**24 // count),
    )
    note = ""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = bootstrap(n_resamples=resamples, rng=np.random.default_rng(0))
        if np.isnan(found.confidence_interval).any():
            found = bootstrap(n_resamples=0, bootstrap_result=found, method="percentile")
            note = "percentiles, for BCa is not defined here"
    low, high = map(float, found.confidence_interval)
    if math.isnan(low) or math.isnan(high):
        return anywhere("sums overflow")
    return Interval(mean, low, high, count, note)
