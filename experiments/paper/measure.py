"""What is measured of one model: rows, one an image, method, policy and metric.

Everything is kept in a folder as it is done, and read from there the next time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from fullgrad_theory import Target, softmax_weighted
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
    RAW,
    SAMPLED,
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
    """Completeness errors of the raw logit, in both precisions; a policy is called `libra, float64`
    here. Of integrated gradients, 50 passes an image, in float32 alone."""
    wide = ready.double()
    kinds = [
        ("float32", ready, SUMMING, ("plain", "libra", *LRP)),
        ("float64", wide, SUMMING, ("plain", "libra", *LRP)),
        ("float32", ready, (SAMPLED,), ("plain",)),
    ]
    parts = []
    for kind, model, methods, policies in kinds:
        part = folder / (kind if SAMPLED not in methods else SAMPLED)
        found = _evaluated(model, setup, part, methods, policies, ERRORS, None)
        named = (row._replace(policy=f"{row.policy}, {kind}") for row in found)
        parts.append(Results.of(named, found.settings))
    return joined(parts)


def faithfulness(ready: Ready, setup: Setup, folder: Path) -> Results:
    """Every method plain and under libra, under the rules of LRP, and the baselines, each of the
    target that the paper has for it."""
    weighted = tuple(p for p in LRP if p not in RAW)
    runs: dict[str, tuple[Sequence[str], Sequence[str], Target]] = {
        "libra": (METHODS, ("plain", "libra"), softmax_weighted()),
        "lrp": (LRP_METHODS, RAW, None),
        "lrp, weighted": (LRP_METHODS, weighted, softmax_weighted()),
        "baselines": (BASELINES, ("plain",), softmax_weighted()),
    }
    return joined(
        [
            _evaluated(ready, setup, folder / part, methods, policies, METRICS, target)
            for part, (methods, policies, target) in runs.items()
        ]
    )


def ablation(ready: Ready, setup: Setup, folder: Path) -> Results:
    """FullGrad+ with parts of libra left out, and without its bias maps."""
    return _evaluated(
        ready, setup, folder, ("fullgrad+", BARE), ABLATION, METRICS, softmax_weighted()
    )


def _evaluated(
    ready: Ready,
    setup: Setup,
    folder: Path,
    methods: Sequence[str],
    policies: Sequence[str],
    metrics: Sequence[str],
    target: Target,
) -> Results:
    """The samples' rows, of those of `methods` that apply."""
    return evaluate(
        ready.module,
        scenes(setup.images) if ready.samples is None else ready.samples,
        ready.applying(methods),
        policies,
        metrics,
        target="prediction" if target is None else target,
        batch_size=setup.batch,
        folder=folder,
        explainer=ready.explain,
    )


def definitions(ready: Ready, setup: Setup, folder: Path) -> Results:
    """What a definition changes: the correlation of two maps of one image, on the grid of tokens.

    `raw logit`: each method's map of the raw logit with that of the softmax's weighting; `early
    biases`: FullGrad+ with that which counts the biases before the first block besides.
    """
    methods = ready.applying(METHODS)
    settings = {"images": setup.images, "methods": methods, "policies": ("plain", "libra")}

    def measured() -> Iterator[Row]:
        for policy in ("plain", "libra"):
            explain = ready.explainer(policy)
            for index, sample in enumerate(scenes(setup.images)):
                x = sample.image[None]
                made = explain(x, (*methods, BARE), softmax_weighted())
                raw = explain(x, methods, None)
                for method, found in raw.items():
                    value = _correlation(found.values, made[method].values)
                    yield Row(index, sample.label, -1, method, policy, "raw logit", value)
                grid = made["fullgrad"].values.shape[1:]
                pixels = made["input-x-gradient"].tokens((grid[0], grid[1]))
                early = made["fullgrad"].values - pixels + made[BARE].values
                value = _correlation(made["fullgrad+"].values, early)
                yield Row(index, sample.label, -1, "fullgrad+", policy, "early biases", value)

    return _kept(folder, ready, settings, measured)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def discrimination(ready: Ready, setup: Setup, folder: Path, weighted: bool = True) -> Results:
    """Maps for every object's class against every object's mask; one row an image.

    `own`: a mask against the map of its own class; `other`: the same masks against the maps of the
    other objects' classes; means over the objects. `gap`: own - other. The masks being the same, a
    map that ignores its target has a gap of 0, however large the objects are. `weighted`: of the
    softmax's weighting of logits, else of the raw one.
    """
    samples = crowded(setup.objects)
    methods = ready.applying((*METHODS, "random"))
    settings = {
        "images": len(samples),
        "methods": methods,
        "policies": ("plain", "libra"),
        "weighted": weighted,
    }

    def measured() -> Iterator[Row]:
        for policy in ("plain", "libra"):
            explain = ready.explainer(policy)
            for index, sample in enumerate(samples):
                masks = {sample.label: sample.mask, **sample.others}
                classes = torch.tensor(list(masks))
                target = softmax_weighted(classes) if weighted else classes
                stack = torch.stack([m for m in masks.values() if m is not None])
                images = sample.image.expand(len(classes), -1, -1, -1)
                maps = explain(images, methods, target, seed=100 * index)
                for method, found in maps.items():
                    for metric, value in _against(found.pixels(), stack).items():
                        yield Row(index, sample.label, -1, method, policy, metric, value)

    return _kept(folder, ready, settings, measured)


text: Study = partial(discrimination, weighted=False)
"""Of a CLIP, whose logits are cosines, the paper differentiates the raw one."""


def _kept(
    folder: Path, ready: Ready, settings: Mapping[str, Any], measured: Callable[[], Iterable[Row]]
) -> Results:
    """Rows from the folder, or measured now and kept there, by model and settings."""
    name = hashlib.sha256(json.dumps([settings, ready.digest]).encode()).hexdigest()[:12]
    file = folder / f"{name}.json"
    if file.exists():
        return Results.load(file)
    results = Results.of(measured(), settings)
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
