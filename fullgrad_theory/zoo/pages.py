"""Results as a table: Markdown, CSV, Parquet, and one page for a browser. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..extras import require
from ..files import whole
from ..pages import filled
from .rows import Row, counts

TITLES = (
    "architecture", "family", "by", "as it is", "under the policy", "error before", "error",
    "breaks it", "edits", "nonlinear", "input", "biases", "CPU s", "MiB",
)  # fmt: skip
_NUMBERS = {"error before", "error", "nonlinear", "input", "biases", "CPU s", "MiB"}


def figure(value: float | None, form: str = ".1e") -> str:
    """A number for a reader; nothing where there is none."""
    return "" if value is None else format(value, form)


def few(counted: Mapping[str, int], most: int = 3) -> str:
    """`25 x layer_norm, 12 x gelu, ...`: the most frequent."""
    named = [f"{count} x {name}" for name, count in list(counted.items())[:most]]
    return ", ".join(named + ["..."] * (len(counted) > most))


def cells(row: Row, most: int = 3) -> tuple[str, ...]:
    """A row as `TITLES` has it."""
    return (
        row.name,
        row.family,
        row.kind,
        row.plain or "",
        f"{row.policy}: {row.verdict}",
        figure(row.error_before),
        figure(row.error),
        why(row, most),
        few(row.edits, most),
        figure(row.nonlinear, "d"),
        figure(row.input_share, ".1%"),
        figure(row.bias_share, ".1%"),
        figure(row.seconds, ".1f"),
        figure(row.memory, ".0f"),
    )


def why(row: Row, most: int = 3) -> str:
    """What stands in the way: what was raised, else the operations, else the first problem."""
    if row.failure:
        return f"{row.failure_class}: {row.failure}" if row.failure_class else row.failure
    return few(row.operations, most) or "; ".join(row.problems[:1])


def summary(rows: Sequence[Row]) -> str:
    """`51 architectures: 49 complete, 2 raised`."""
    each = ", ".join(f"{count} {outcome}" for outcome, count in counts(rows).items())
    return f"{len(rows)} architecture{'s' * (len(rows) != 1)}" + (f": {each}" if each else "")


# --------------------------------------------------------------------------- formats


def markdown(rows: Sequence[Row]) -> str:
    """A table, the counts above it, and below it how often each operation is in the way."""
    lines = [summary(rows) + ".", "", _line(TITLES)]
    lines.append(_line("---:" if title in _NUMBERS else "---" for title in TITLES))
    lines += [_line(cells(row)) for row in rows]
    lines += ["", "| operation | architectures | nodes |", "|---|---:|---:|"]
    lines += [_line((name, str(where), str(nodes))) for name, where, nodes in _operations(rows)]
    return "\n".join(lines) + "\n"


def _line(texts: Any) -> str:
    return f"| {' | '.join(str(text).replace('|', chr(92) + '|') for text in texts)} |"


def _operations(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """Operation, in how many architectures it breaks the gradient as it is, and how many nodes."""
    where, nodes = Counter[str](), Counter[str]()
    for row in rows:
        where.update(row.operations.keys())
        nodes.update(row.operations)
    return [(name, count, nodes[name]) for name, count in where.most_common()]


def flat(row: Row) -> dict[str, Any]:
    """All fields as one cell each: what is counted or listed as JSON."""
    return {
        name: json.dumps(value) if isinstance(value, (dict, list)) else value
        for name, value in row.to_data().items()
    }


def comma_separated(rows: Sequence[Row]) -> str:
    """Every field of every row as CSV."""
    page = io.StringIO()
    writer = csv.DictWriter(page, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(flat, rows))
    return page.getvalue()


def html(rows: Sequence[Row]) -> str:
    """One page to sort and to search, which needs no network and no file beside it."""
    return filled(
        "zoo.html",
        summary=summary(rows),
        titles=[(title, title in _NUMBERS) for title in TITLES],
        rows=[list(zip(cells(row, 100), _orders(row), strict=True)) for row in rows],
        operations=_operations(rows),
        versions=sorted({f"{r.version}, torch {r.torch}, policy {r.policy}" for r in rows}),
        version=metadata.version("fullgrad-theory"),
    )


def _orders(row: Row) -> tuple[Any, ...]:
    """What a page sorts each of the cells by."""
    last = float("inf")
    numbers = (row.nonlinear, row.input_share, row.bias_share, row.seconds, row.memory)
    errors = (row.error_before, row.error)
    return (
        *cells(row)[:5], *(last if e is None else e for e in errors),
        sum(row.operations.values()), sum(row.edits.values()),
        *(last if n is None else n for n in numbers),
    )  # fmt: skip


def parquet(rows: Sequence[Row], path: Path) -> None:
    """Every field of every row as a Parquet file; needs pyarrow."""
    arrow, files = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    table = arrow.Table.from_pylist([_plain(row) for row in rows])
    whole(path, lambda beside: files.write_table(table, beside))


def _plain(row: Row) -> dict[str, Any]:
    return {n: str(v) if n in ("verdict", "plain") and v else v for n, v in flat(row).items()}
