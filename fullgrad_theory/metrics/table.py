"""The metrics by name, with what each needs and which direction is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from ..errors import unknown_name
from .completeness import completeness_error, relative_completeness_error
from .curves import aopc, auc, lif_accuracy, log_odds, mif_accuracy, mif_accuracy_drop, srg
from .pointing import pointing_game
from .segmentation import (
    segmentation_accuracy,
    segmentation_ap,
    segmentation_f1,
    segmentation_iou,
)

Needs = Literal["curves", "masks", "total"]


@dataclass(frozen=True)
class Metric:
    """`compute` takes what `needs` says: curves; (values, masks); or (output, total)."""

    name: str
    needs: Needs
    higher_is_better: bool
    compute: Callable[..., Tensor]


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("completeness-error", "total", False, completeness_error),
        Metric("relative-completeness-error", "total", False, relative_completeness_error),
        Metric("mif-accuracy", "curves", False, mif_accuracy),
        Metric("mif-accuracy-drop", "curves", True, mif_accuracy_drop),
        Metric("lif-accuracy", "curves", True, lif_accuracy),
        Metric("aopc", "curves", True, aopc),
        Metric("lif-aopc", "curves", False, partial(aopc, order="lif")),
        Metric("mif-auc", "curves", False, auc),
        Metric("lif-auc", "curves", True, partial(auc, order="lif")),
        Metric("log-odds", "curves", False, log_odds),
        Metric("lif-log-odds", "curves", True, partial(log_odds, order="lif")),
        Metric("srg", "curves", True, srg),
        Metric("srg-accuracy", "curves", True, partial(srg, of="accuracy")),
        Metric("segmentation-ap", "masks", True, segmentation_ap),
        Metric("segmentation-iou", "masks", True, segmentation_iou),
        Metric("segmentation-accuracy", "masks", True, segmentation_accuracy),
        Metric("segmentation-f1", "masks", True, segmentation_f1),
        Metric("pointing-game", "masks", True, pointing_game),
    )
}


def metric(name: str) -> Metric:
    """The metric of that name; an unknown one is an error that names those near it."""
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]
