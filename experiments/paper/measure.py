"""What is measured of one model: rows, one an image, method, policy and metric.

Everything is kept in a folder as it is done, and read from there the next time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from fullgrad_theory.data import Sample, Scenes
from fullgrad_theory.measure.evaluation import evaluate
from fullgrad_theory.measure.results import Results, Row
from fullgrad_theory.metrics import pointing_game, segmentation_ap

from .ready import Ready
from .setup import (
    ABLATION,
    BARE,
    BASELINES,
    ERRORS,
    LRP,
    LRP_METHODS,
    METHODS,
    METRICS,
    SEED,
    SUMMING,
    Setup,
)

Study = Callable[[Ready, Setup, Path], Results]


@lru_cache(maxsize=4)
def scenes(count: int) -> tuple[Sample, ...]:
    """What is explained, the same for every model."""
    return tuple(Scenes(count, SEED))


@lru_cache(maxsize=4)
def crowded(count: int) -> tuple[Sample, ...]:
    """The first scenes that hold several objects."""
    return tuple([s for s in Scenes(3 * count + 20, SEED) if s.others][:count])


def joined(parts: Sequence[Results]) -> Results:
    """The rows of several evaluations; the settings of each in a list."""
    rows = [row for part in parts for row in part]
    return Results.of(rows, {"parts": [dict(part.settings) for part in parts]})


def completeness(ready: Ready, setup: Setup, folder: Path) -> Results:
    """Completeness errors in both precisions; a policy is called `libra, float64` here."""
    parts = []
    for kind, model in (("float32", ready), ("float64", ready.double())):
        found = evaluate(
            model.module,
            scenes(setup.images),
            model.applying(SUMMING),
            ("plain", "libra", *LRP),
            ERRORS,
            batch_size=setup.batch,
            folder=folder / kind,
            explainer=model.explain,
        )
        named = (row._replace(policy=f"{row.policy}, {kind}") for row in found)
        parts.append(Results.of(named, found.settings))
    return joined(parts)


def faithfulness(ready: Ready, setup: Setup, folder: Path) -> Results:
    """Every method plain and under libra, under the rules of LRP, and the baselines.

    Integrated gradients, 50 passes an image, are run here alone, so their errors are from here.
    """
    runs = {
        "libra": (METHODS, ("plain", "libra"), METRICS),
        "lrp": (LRP_METHODS, LRP, METRICS),
        "baselines": (BASELINES, ("plain",), (*METRICS, *ERRORS)),
    }
    return joined(
        [
            evaluate(
                ready.module,
                scenes(setup.images),
                ready.applying(methods),
                policies,
                metrics,
                batch_size=setup.batch,
                folder=folder / part,
                explainer=ready.explain,
            )
            for part, (methods, policies, metrics) in runs.items()
        ]
    )


def ablation(ready: Ready, setup: Setup, folder: Path) -> Results:
    """FullGrad+ with parts of libra left out, and without its bias maps."""
    return evaluate(
        ready.module,
        scenes(setup.images),
        ("fullgrad+", BARE),
        ABLATION,
        METRICS,
        batch_size=setup.batch,
        folder=folder,
        explainer=ready.explain,
    )


def discrimination(ready: Ready, setup: Setup, folder: Path) -> Results:
    """Maps for every object's class against every object's mask; one row an image.

    `own`: a mask against the map of its own class; `other`: the same masks against the maps of the
    other objects' classes; means over the objects. `gap`: own - other. The masks being the same, a
    map that ignores its target has a gap of 0, however large the objects are.
    """
    samples = crowded(setup.objects)
    methods = ready.applying((*METHODS, "random"))
    settings = {"images": len(samples), "methods": methods, "policies": ("plain", "libra")}
    name = hashlib.sha256(json.dumps([settings, ready.digest]).encode()).hexdigest()[:12]
    file = folder / f"{name}.json"
    if file.exists():
        return Results.load(file)
    rows: list[Row] = []
    for policy in ("plain", "libra"):
        explain = ready.explainer(policy)
        for index, sample in enumerate(samples):
            masks = {sample.label: sample.mask, **sample.others}
            classes = torch.tensor(list(masks))
            stack = torch.stack([m for m in masks.values() if m is not None])
            images = sample.image.expand(len(classes), -1, -1, -1)
            maps = explain(images, methods, classes, seed=100 * index)
            for method, found in maps.items():
                for metric, value in _against(found.pixels(), stack).items():
                    rows.append(Row(index, sample.label, -1, method, policy, metric, value))
    results = Results.of(rows, settings)
    folder.mkdir(parents=True, exist_ok=True)
    results.save(file)
    return results


def _against(pixels: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Every object's map against every object's mask, both (K, H, W)."""
    count = len(masks)
    same = torch.eye(count, dtype=torch.bool)
    found: dict[str, float] = {}
    for of, compute in (("AP", segmentation_ap), ("pointing", pointing_game)):
        pairs = compute(pixels.repeat_interleave(count, 0), masks.repeat(count, 1, 1))
        table = pairs.reshape(count, count)  # [map, mask]
        own, other = float(table[same].mean()), float(table[~same].mean())
        found |= {f"{of} own": own, f"{of} other": other, f"{of} gap": own - other}
    return found
