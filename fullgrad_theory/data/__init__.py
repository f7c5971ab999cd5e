"""Labelled images with masks: scenes made on the fly, and data sets from a local path."""

from .folders import Coco, ImageFolder, ImageNetS, OxfordPets
from .sample import Batch, Sample, collate
from .scenes import CLASSES, Scenes
from .transform import Transform

__all__ = [
    "CLASSES",
    "Batch",
    "Coco",
    "ImageFolder",
    "ImageNetS",
    "OxfordPets",
    "Sample",
    "Scenes",
    "Transform",
    "collate",
]
