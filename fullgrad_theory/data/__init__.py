"""Labelled images with masks: scenes made on the fly, and data sets from a local path."""

from .folders import (
    Coco,
    FunnyBirds,
    ImageFolder,
    ImageNetHard,
    ImageNetS,
    Mura,
    OxfordPets,
)
from .sample import Batch, Sample, collate
from .scenes import CLASSES, Scenes
from .transform import Transform

__all__ = [
    "CLASSES",
    "Batch",
    "Coco",
    "FunnyBirds",
    "ImageFolder",
    "ImageNetHard",
    "ImageNetS",
    "Mura",
    "OxfordPets",
    "Sample",
    "Scenes",
    "Transform",
    "collate",
]
