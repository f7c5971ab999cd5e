"""What an attribution map is worth: completeness, deletion curves, and how well it finds objects.

Everything works on plain tensors, whatever made them: maps are (B, h, w), values are one an image.
"""

from .completeness import completeness_error, relative_completeness_error
from .curves import (
    FRACTIONS,
    Curves,
    aopc,
    auc,
    lif_accuracy,
    log_odds,
    mif_accuracy,
    mif_accuracy_drop,
    srg,
)
from .deletion import Deletion
from .pointing import pointing_game
from .segmentation import (
    segmentation_accuracy,
    segmentation_ap,
    segmentation_f1,
    segmentation_iou,
)
from .table import METRICS, Metric, metric
from .upsample import to_pixels

__all__ = [
    "FRACTIONS",
    "METRICS",
    "Curves",
    "Deletion",
    "Metric",
    "aopc",
    "auc",
    "completeness_error",
    "lif_accuracy",
    "log_odds",
    "metric",
    "mif_accuracy",
    "mif_accuracy_drop",
    "pointing_game",
    "relative_completeness_error",
    "segmentation_accuracy",
    "segmentation_ap",
    "segmentation_f1",
    "segmentation_iou",
    "srg",
    "to_pixels",
]
