"""Labelled images with masks: scenes made on the fly, and data sets from a local path."""

from .sample import Batch, Sample, collate
from .scenes import CLASSES, Scenes

__all__ = ["CLASSES", "Batch", "Sample", "Scenes", "collate"]
