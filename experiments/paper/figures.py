"""Figures from the data files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fullgrad_theory.data import CLASSES
from fullgrad_theory.metrics.upsample import to_pixels

from .setup import ABLATION, BARE, BOUNDS, METRICS
from .summary import MEAN, PAPER, Table
from .tables import NAMES, changed

PLAIN, LIBRA = "#8a8a8a", "#c2452d"
POLICIES = {"plain": PLAIN, "libra": LIBRA}
DOTS = 80


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    """As a PNG of few colours: a third of the size."""
    from PIL import Image

    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    few = drawn.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True, dpi=(DOTS, DOTS))


def _names(axis: Any, places: Any, names: Sequence[str]) -> None:
    axis.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)


def _bar(axis: Any, place: float, cell: Any, colour: str, label: str | None, width: float) -> None:
    """A mean in percent with its interval."""
    if cell is None:
        return
    mean, low, high = (100 * v for v in (cell.mean, cell.low, cell.high))
    error = None if not np.isfinite(low) else [[max(0.0, mean - low)], [max(0.0, high - mean)]]
    axis.bar(place, mean, width, color=colour, label=label, yerr=error, ecolor="black",
             error_kw={"lw": 0.8})  # fmt: skip


def completeness(table: Table, path: Path) -> None:
    """The worst image's relative error of FullGrad, plain and Libra, both precisions."""
    models = [m for m in table.models if m != MEAN]
    figure = _figure(1.5 + 0.55 * len(models), 3.2)
    axis = figure.subplots()
    for kind, marker in (("float32", "o"), ("float64", "s")):
        for policy, colour in POLICIES.items():
            cells = [table.at(m, "fullgrad", f"{policy}, {kind}", "relative-completeness-error")
                     for m in models]  # fmt: skip
            # an error of exactly 0 has no place on this axis
            worst = [np.nan if c is None else max(c.worst, 1e-17) for c in cells]
            axis.plot(range(len(models)), worst, marker, color=colour, label=f"{policy}, {kind}",
                      fillstyle="full" if kind == "float32" else "none")  # fmt: skip
        axis.axhline(BOUNDS[kind], color=LIBRA, lw=0.8, ls=":" if kind == "float64" else "--")
    axis.set_yscale("log")
    axis.set_ylabel("relative completeness error,\nworst image", fontsize=8)
    _names(axis, range(len(models)), models)
    axis.legend(fontsize=7, ncols=2)
    _save(figure, path)


def gains(table: Table, models: Sequence[str], path: Path) -> None:
    """libra - plain for every method and model, a panel a metric; a dot: the interval has no 0."""
    shown = [m for m in (*models, MEAN) if m in table.models]
    figure = _figure(13, 7)
    for axis, metric in zip(figure.subplots(2, 3).flat, METRICS, strict=True):
        methods = changed(table, metric)
        values = np.full((len(methods), len(shown)), np.nan)
        for i, method in enumerate(methods):
            for j, model in enumerate(shown):
                cell = table.at(model, method, "libra", metric, "plain")
                if cell is not None:
                    values[i, j] = 100 * cell.mean
                    strong = "bold" if cell.verdict else "normal"
                    axis.text(j, i, f"{100 * cell.mean:+.0f}", ha="center", va="center",
                              fontsize=6.5, fontweight=strong)  # fmt: skip
        limit = float(np.nanmax(np.abs(values))) or 1.0
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(f"{NAMES[metric]}: libra - plain", fontsize=9)
        _names(axis, range(len(shown)), shown)
        axis.set_yticks(range(len(methods)), methods, fontsize=7)
    figure.supxlabel("percentage points; bold: the interval does not hold 0; red: Libra is better",
                     fontsize=8)  # fmt: skip
    _save(figure, path)


def sizes(table: Table, models: Sequence[str], path: Path) -> None:
    """FullGrad+ and others against the size."""
    shown = [m for m in models if m in table.models]
    methods = [m for m in ("fullgrad+", "embedding-x-gradient", "xgradcam+", "genatt")
               if m in table.methods]  # fmt: skip
    chosen = ("mif-accuracy-drop", "srg", "segmentation-ap")
    figure = _figure(11, 3)
    for axis, metric in zip(figure.subplots(1, 3), chosen, strict=True):
        for number, method in enumerate(methods):
            for policy, style in (("plain", "--"), ("libra", "-")):
                cells = [table.at(m, method, policy, metric) for m in shown]
                means = [np.nan if c is None else 100 * c.mean for c in cells]
                axis.plot(shown, means, style, marker="o", ms=3, color=f"C{number}",
                          label=f"{method}, {policy}")  # fmt: skip
        axis.set_title(NAMES[metric], fontsize=9)
        axis.tick_params(labelsize=7)
    axis.legend(fontsize=6)
    _save(figure, path)


def ablation(table: Table, path: Path) -> None:
    """MIF accuracy and AP, here and in the paper."""
    model = next(m for m in table.models if m != MEAN)
    kinds = [*(("fullgrad+", p) for p in ABLATION), (BARE, "libra")]
    names = {tuple(v): k for k, v in PAPER["entries"].items()}
    figure = _figure(10, 3.2)
    chosen = (("mif-accuracy-drop", 0), ("segmentation-ap", 1))
    for axis, (metric, column) in zip(figure.subplots(1, 2), chosen, strict=True):
        for place, (method, policy) in enumerate(kinds):
            cell = table.at(model, method, policy, metric)
            label = "here" if place == 0 else None
            _bar(axis, place, cell, LIBRA if policy == "libra" else PLAIN, label, 0.6)
            theirs = PAPER["ablation"][names[method, policy]][column]
            axis.plot(place, theirs, "k_", ms=16, label=None if place else "the paper, EVA2-S")
        labels = [p if m == "fullgrad+" else "without-biases" for m, p in kinds]
        _names(axis, range(len(kinds)), labels)
        axis.set_title(f"FullGrad+ on {model}: {NAMES[metric]}", fontsize=9)
        axis.legend(fontsize=7)
    _save(figure, path)


def paired(table: Table, models: Sequence[str], metric: str, path: Path) -> None:
    """Bars of every method, plain and libra, a panel a model."""
    methods = changed(table, metric)
    shown = [m for m in models if m in table.models]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(0.4 + 4 * columns, 2.7 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    for axis, model in zip(axes, shown, strict=False):
        for place, method in enumerate(methods):
            for side, (policy, colour) in enumerate(POLICIES.items()):
                cell = table.at(model, method, policy, metric)
                _bar(axis, place + 0.4 * side, cell, colour, None if place else policy, 0.4)
        axis.axhline(0, color="black", lw=0.6)
        _names(axis, np.arange(len(methods)) + 0.2, methods)
        axis.set_title(f"{model}: {NAMES[metric]}", fontsize=8)
    axis.legend(fontsize=7)
    _save(figure, path)


# --------------------------------------------------------------------------- heatmaps

Arrays = Mapping[str, np.ndarray]


def methods(arrays: Arrays, path: Path) -> None:
    """Every method of the models that have them all: a column a model, policy and scene."""
    full, rows = _models(arrays), _rows(arrays)
    full = [
        m
        for m in full
        if len([k for k in arrays if k.startswith(f"map/{m}/")]) > 2 * _count(arrays)
    ]
    few = range(min(2, _count(arrays)))
    columns = [(m, p, i) for m in full for i in few for p in POLICIES]
    _sheet(
        arrays,
        ["image", *rows],
        [f"{m}\n{p}" for m, p, _ in columns],
        lambda row, column: (
            columns[column][2],
            None if row == 0 else "map/{1}/{0}/{2}/{3}".format(rows[row - 1], *columns[column]),
        ),
        path,
    )


def models(arrays: Arrays, path: Path) -> None:
    """FullGrad+ of every model: a row a model, for each scene the image, plain and libra."""
    names, count = _models(arrays), _count(arrays)
    columns = [(i, p) for i in range(count) for p in (None, *POLICIES)]
    _sheet(
        arrays,
        names,
        [p or "image" for _, p in columns],
        lambda row, column: (
            columns[column][0],
            None
            if columns[column][1] is None
            else "map/{0}/fullgrad+/{2}/{1}".format(names[row], *columns[column]),
        ),
        path,
    )


def text(arrays: Arrays, path: Path) -> None:
    """FullGrad+ of a CLIP for the texts of the objects there: a row a scene and text."""
    rows = [
        (i, label)
        for i in range(_count(arrays))
        for label in dict.fromkeys(
            int(k.split("/")[1]) for k in arrays if k.startswith("map/") and k.endswith(f"/{i}")
        )
    ]
    policies = (None, *POLICIES)
    _sheet(
        arrays,
        [f"a {CLASSES[label]}".replace(" ", "\n") for _, label in rows],
        [p or "image" for p in policies],
        lambda row, column: (
            rows[row][0],
            None
            if policies[column] is None
            else f"map/{rows[row][1]}/{policies[column]}/{rows[row][0]}",
        ),
        path,
    )


def _models(arrays: Arrays) -> list[str]:
    return list(dict.fromkeys(k.split("/")[1] for k in arrays if k.startswith("map/")))


def _rows(arrays: Arrays) -> list[str]:
    return list(dict.fromkeys(k.split("/")[2] for k in arrays if k.startswith("map/")))


def _count(arrays: Arrays) -> int:
    return sum(k.startswith("image/") for k in arrays)


def _sheet(
    arrays: Arrays, rows: Sequence[str], columns: Sequence[str], what: Any, path: Path
) -> None:
    """A table of pictures; `what(row, column)` -> (scene, the map's key, or None: the image).

    Maps lie over the grey image: red speaks for the target, blue against it, each map on its own
    scale, maps that are never negative from their least value on; one that does not exist is left
    out.
    """
    side = 0.85
    figure = _figure(1.0 + side * len(columns), 0.4 + side * len(rows))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, name in enumerate(rows):
        for j, above in enumerate(columns):
            axis = axes[i, j]
            axis.set_xticks([]), axis.set_yticks([])
            if i == 0:
                axis.set_title(above, fontsize=6)
            if j == 0:
                axis.set_ylabel(name, fontsize=6, rotation=0, ha="right", va="center")
            scene, key = what(i, j)
            image = arrays[f"image/{scene}"]
            if key is None:
                axis.imshow(image)
            elif key in arrays:
                _lay(axis, image, arrays[key])
            else:
                axis.axis("off")
    _save(figure, path)


def _lay(axis: Any, image: np.ndarray, values: np.ndarray) -> None:
    height, width = image.shape[:2]
    fine = to_pixels(torch.from_numpy(values)[None], (height, width))[0].numpy()
    if values.min() >= 0:  # of one sign by definition: from its own least value
        fine = np.clip(fine - values.min(), 0, None)
    limit = float(np.abs(fine).max()) or 1.0
    axis.imshow(image.mean(2), cmap="gray", vmin=-200, vmax=255)  # lighter, so that colours show
    axis.imshow(fine, cmap="RdBu_r", vmin=-limit, vmax=limit,
                alpha=np.clip(np.abs(fine) / limit, 0, 1) * 0.85)  # fmt: skip
