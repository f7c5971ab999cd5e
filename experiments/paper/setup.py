"""What is run: models, images, methods, policies; and the small form of it for the tests."""

from __future__ import annotations

from dataclasses import dataclass

from .fit import FULL, SMOKE, Recipe
from .models import ARCHITECTURES, SIZES

SEED = 2000003
"""Of the scenes that are explained: neither trained on nor held out."""
FAMILIES = tuple(name for name in ARCHITECTURES if name != "mixer")
"""The paper's eight; means over models are over these."""

METHODS = (
    "input-x-gradient",
    "embedding-x-gradient",
    "fullgrad",
    "fullgrad+",
    "gradcam+",
    "hirescam",
    "xgradcam+",
    "attcat",
    "genatt",
    "tokentm",
    "legrad",
)
"""Explained plain and under libra."""
SAMPLED = "integrated-gradients"
BASELINES = (SAMPLED, "random", "raw-attention", "rollout")
"""Explained plain alone: no gradient to balance, or 51 of them an image."""
LRP = ("attnlrp", "alilrp", "decompx")
RAW = ("attnlrp", "decompx")
"""Differentiate the raw logit, as in the paper; all else the softmax's weighting of the logits."""
LRP_METHODS = ("embedding-x-gradient", "fullgrad", "fullgrad+")
SUMMING = ("input-x-gradient", "embedding-x-gradient", "fullgrad", "hirescam")
"""Gradient methods whose contributions have a sum to keep."""
BARE = "hirescam+"
"""FullGrad+ without its bias maps."""
ABLATION = (
    "libra",
    "without-attention",
    "without-norm",
    "without-activation",
    "without-gate",
    "plain",
)

METRICS = (
    "mif-accuracy-drop",
    "lif-accuracy",
    "srg",
    "aopc",
    "segmentation-ap",
    "pointing-game",
)
"""Higher is better in all of them."""
DEFINITIONS = "the paper's FullGrad+ and targets"
"""What the tables rest on, kept beside the data: figures of other definitions are told apart."""
ERRORS = ("completeness-error", "relative-completeness-error")
BOUNDS = {"float32": 1e-5, "float64": 1e-10}
"""The most that Libra FullGrad's relative completeness error may be, on any image."""


@dataclass(frozen=True)
class Setup:
    """`models`: classifiers; `images` of every table (`objects`: of scenes with several objects);
    `drawn`: models in the pictures, of which the first two show every method; `scenes`: pictures of
    each."""

    recipe: Recipe = FULL
    models: tuple[str, ...] = (*ARCHITECTURES, *(s for s in SIZES if s != "vit-base"))
    ablated: str = "eva2"
    images: int = 96
    objects: int = 96
    drawn: tuple[str, ...] = tuple(ARCHITECTURES)
    scenes: int = 3
    batch: int = 32


WHOLE = Setup()
SMALL = Setup(
    SMOKE,
    models=("vit", "eva2", "gmixer", "vit-tiny"),
    images=4,
    objects=3,
    drawn=("vit", "gmixer"),
    scenes=1,
    batch=4,
)
