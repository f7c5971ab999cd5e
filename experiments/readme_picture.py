"""The README's picture, from the maps that the evaluation kept.

    python -m experiments.readme_picture [FILE]

Each row a model, trained on scenes (docs/data.md): the image, FullGrad+ of the gradient as it is,
and under libra. Red speaks for the predicted class, blue against it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from experiments.paper import figures

HERE = Path(__file__).resolve().parent
MAPS = HERE / "paper" / "results" / "heatmaps.npz"
MODELS = ("vit", "eva2", "siglip")


def picture(path: Path) -> None:
    """Draw a row each of `MODELS`."""
    kept = np.load(MAPS)
    shown = [f"map/{model}/fullgrad+/" for model in MODELS]
    maps = [key for prefix in shown for key in kept if key.startswith(prefix)]
    images = [key for key in kept if key.startswith("image/")]
    figures.models({key: kept[key] for key in (*images, *maps)}, path)


if __name__ == "__main__":
    picture(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs" / "maps.png")
