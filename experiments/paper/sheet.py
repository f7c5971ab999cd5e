"""A contact sheet of scenes, each beside its mask: `python -m experiments.paper.sheet FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fullgrad_theory.data import Scenes

ROWS, COLUMNS = 3, 6


def sheet(file: Path, seed: int = 0) -> None:
    """Write `ROWS` x `COLUMNS` pairs; the labelled object is white in the mask, others are grey."""
    made = Scenes(ROWS * COLUMNS, seed).render()
    grey = (made.masks * np.array([255, 110, 110])[:, None, None]).sum(1)
    masks = np.repeat(grey[:, None], 3, axis=1)
    pairs = np.concatenate([made.images, masks], axis=3)
    pairs = np.pad(pairs, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=255)
    height, width = pairs.shape[2:]
    grid = pairs.reshape(ROWS, COLUMNS, 3, height, width).transpose(0, 3, 1, 4, 2)
    picture = grid.reshape(ROWS * height, COLUMNS * width, 3).astype(np.uint8)
    Image.fromarray(picture).save(file, quality=85)


if __name__ == "__main__":
    sheet(Path(sys.argv[1]))
