"""Real data from a local path, in the layout it is distributed in. Nothing is ever downloaded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import InputError
from ..extras import require
from .sample import Sample
from .transform import Transform, apply

Masks = dict[int, NDArray[np.bool_]]


def _need(path: str | Path, what: str, folder: bool = True) -> Path:
    path = Path(path)
    if not (path.is_dir() if folder else path.is_file()):
        kind = "folder" if folder else "file"
        raise InputError(f"{what}: there is no {kind} {path}; nothing is downloaded, name yours")
    return path


def _opened(file: Path) -> Any:
    """An image file in RGB, its pixels as they are stored."""
    with require("PIL.Image", "vision").open(file) as opened:
        return opened.convert("RGB")


def _sample(
    file: Path, label: int, masks: Masks, transform: Transform | None, known: bool = True
) -> Sample:
    """`known`: whether an object without a mask is nowhere, rather than anywhere."""
    # The pixels as they are stored, whatever EXIF says of the camera: the masks of COCO, ImageNet-S
    # and Oxford-IIIT Pet are drawn on these, and torchvision and timm, by which models are trained
    # and their published accuracies measured, read an image folder in this way.
    picture = _opened(_need(file, "the data set names an image that is missing", False))
    if known and label not in masks:
        masks = masks | {label: np.zeros(picture.size[::-1], bool)}
    image, moved = apply(picture, masks, transform)
    return Sample(image, label, moved.pop(label, None), moved)


def _numbers(classes: Sequence[str] | None, folders: Sequence[str], what: str) -> dict[str, int]:
    """Folder -> label: its place in `classes`, which is the model's order."""
    order = list(folders if classes is None else classes)
    lost = sorted(set(folders) - set(order))
    if lost:
        raise InputError(f"{what}: classes does not name the folders {', '.join(lost[:5])}")
    return {name: order.index(name) for name in folders}


class ImageFolder(Dataset[Sample]):
    """`root`/class/picture, as ImageNet's validation set is kept; there are no masks.

    `classes`: the folders' names in the order of the model's outputs, None for the alphabet's;
    `transform`: as the model takes its images. Raises `InputError` for a path that is missing.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Transform | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        root = _need(root, "image folder")
        datasets = require("torchvision.datasets", "vision")
        try:
            found = datasets.ImageFolder(root)
        except FileNotFoundError as error:
            raise InputError(f"image folder: {root} holds no class/picture: {error}") from error
        self.transform = transform
        self.classes = tuple(found.classes if classes is None else classes)
        numbers = _numbers(classes, found.classes, "image folder")
        self.files = [(Path(path), numbers[found.classes[i]]) for path, i in found.samples]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return _sample(*self.files[index], {}, self.transform, known=False)


class OxfordPets(Dataset[Sample]):
    """Oxford-IIIT Pet: `root`/oxford-iiit-pet/{images,annotations}, 37 breeds, trimaps as masks.

    The mask is the trimap's foreground; its unclassified border counts as background. `split`:
    "test" or "trainval". Raises `InputError` for a path that is missing.
    """

    def __init__(
        self, root: str | Path, transform: Transform | None = None, split: str = "test"
    ) -> None:
        base = Path(root) / "oxford-iiit-pet"
        _need(base / "images", "Oxford-IIIT Pet")
        _need(base / "annotations" / f"{split}.txt", "Oxford-IIIT Pet", folder=False)
        self.transform = transform
        datasets = require("torchvision.datasets", "vision")
        self.pets = datasets.OxfordIIITPet(root, split, ("category", "segmentation"))
        self.classes = tuple(self.pets.classes)

    def __len__(self) -> int:
        return len(self.pets)

    def __getitem__(self, index: int) -> Sample:
        picture, (label, trimap) = self.pets[index]
        mask = np.array(trimap) == 1
        image, moved = apply(picture, {label: mask}, self.transform)
        return Sample(image, label, moved[label])


def _imagenet() -> Sequence[str]:
    """The WordNet ids of ImageNet-1k, in the order of its models' outputs."""
    names: Sequence[str] = require("timm.data", "vision").ImageNetInfo("imagenet-1k").label_names()
    return names


class ImageNetS(Dataset[Sample]):
    """ImageNet-S: `root`/{split}/wnid/*.JPEG and `root`/{split}-segmentation/wnid/*.png.

    A segmentation's red + 256 green is the category, 1 for the first folder of the alphabet; 0 is
    background, 1000 unclassified. `classes`: the WordNet ids in the order of the model's outputs,
    None for ImageNet-1k's. Raises `InputError` for a path that is missing.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Transform | None = None,
        split: str = "validation",
        classes: Sequence[str] | None = None,
    ) -> None:
        images = _need(Path(root) / split, "ImageNet-S")
        segmentations = _need(Path(root) / f"{split}-segmentation", "ImageNet-S")
        self.transform = transform
        self.classes = tuple(_imagenet() if classes is None else classes)
        folders = sorted(p.name for p in images.iterdir() if p.is_dir())
        numbers = _numbers(self.classes, folders, "ImageNet-S")
        self.label_of = {i + 1: numbers[name] for i, name in enumerate(folders)}
        self.files = [
            (image, image_mask, numbers[image.parent.name])
            for image_mask in sorted(segmentations.glob("*/*.png"))
            for image in [images / image_mask.parent.name / f"{image_mask.stem}.JPEG"]
        ]
        if not self.files:
            raise InputError(f"ImageNet-S: {segmentations} holds no wnid/*.png")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image, segmentation, label = self.files[index]
        pixels = np.array(_opened(segmentation)).astype(np.int64)
        category = pixels[..., 0] + 256 * pixels[..., 1]
        present = [int(c) for c in np.unique(category) if int(c) in self.label_of]
        masks = {self.label_of[c]: category == c for c in present}
        return _sample(image, label, masks, self.transform)


class ImageNetHard(Dataset[Sample]):
    """ImageNet-Hard as a folder of pictures and `root`/metadata.jsonl, whose lines name a picture,
    `file_name`, and the classes of ImageNet-1k that are right for it, `label`.

    The sample's label is the first of them, `labels[index]` has all; there are no masks. Raises
    `InputError` for a path that is missing, and for a line without a label.
    """

    def __init__(self, root: str | Path, transform: Transform | None = None) -> None:
        root = _need(root, "ImageNet-Hard")
        lines = _need(root / "metadata.jsonl", "ImageNet-Hard", folder=False).read_text()
        entries = [json.loads(line) for line in lines.splitlines() if line.strip()]
        self.transform = transform
        self.files = [root / entry["file_name"] for entry in entries]
        self.labels = [_several(entry.get("label")) for entry in entries]
        if not entries or not all(self.labels):
            raise InputError("ImageNet-Hard: metadata.jsonl names no picture, or one without label")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        label = self.labels[index][0]
        return _sample(self.files[index], label, {}, self.transform, known=False)


def _several(label: Any) -> tuple[int, ...]:
    """One class or several."""
    if label is None:
        return ()
    return tuple(map(int, label)) if isinstance(label, list) else (int(label),)


class Mura(Dataset[Sample]):
    """MURA: `root`/{split}/XR_PART/patient*/study*_{negative,positive}/image*.png, radiographs.

    The label is its study's: 0 is normal, 1 abnormal; there are no masks. `split`: "valid" or
    "train"; `part`: "ELBOW", "WRIST", ..., None for all. Raises `InputError` for a path that is
    missing.
    """

    classes = ("negative", "positive")

    def __init__(
        self,
        root: str | Path,
        transform: Transform | None = None,
        split: str = "valid",
        part: str | None = None,
    ) -> None:
        base = _need(Path(root) / split, "MURA")
        self.transform = transform
        found = base.glob(f"XR_{part or '*'}/patient*/study*_*/image*.png")
        pairs = [(file, file.parent.name.rpartition("_")[2]) for file in sorted(found)]
        self.files = [(f, self.classes.index(kind)) for f, kind in pairs if kind in self.classes]
        if not self.files:
            raise InputError(f"MURA: {base} holds no XR_{part or '*'}/patient*/study*_*/image*.png")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return _sample(*self.files[index], {}, self.transform, known=False)


class FunnyBirds(Dataset[Sample]):
    """FunnyBirds: `root`/dataset_{split}.json, whose i-th entry has `class_idx`, the picture in
    `root`/{split}/class/00000i.png and its parts in `root`/{split}_part_map/class/00000i.png.

    The mask is all parts that a class is told by (beak, eyes, feet, tail, wings; not the body), and
    None where there is no folder of part maps. `split`: "test" or "train". Raises `InputError` for
    a path that is missing.
    """

    def __init__(
        self, root: str | Path, transform: Transform | None = None, split: str = "test"
    ) -> None:
        self.root, self.split = _need(root, "FunnyBirds"), split
        _need(self.root / split, "FunnyBirds")
        listed = _need(self.root / f"dataset_{split}.json", "FunnyBirds", folder=False)
        self.labels = [int(entry["class_idx"]) for entry in json.loads(listed.read_text())]
        self.transform = transform
        self.masked = (self.root / f"{split}_part_map").is_dir()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        label = self.labels[index]
        place = Path(str(label)) / f"{index:06d}.png"
        masks: Masks = {}
        if self.masked:
            parts = _need(self.root / f"{self.split}_part_map" / place, "FunnyBirds", folder=False)
            masks[label] = np.array(_opened(parts)).max(-1) > 0
        file = self.root / self.split / place
        return _sample(file, label, masks, self.transform, known=False)


class Coco(Dataset[Sample]):
    """COCO: a folder of images and an `instances_*.json`. Every image with an object is a sample.

    The label is the category that covers most of the image, by its position among the sorted
    category ids; `others` holds the rest. Crowd regions count as their category. `captions`: a
    `captions_*.json`, whose first caption of an image is kept. Raises `InputError` for a path that
    is missing.
    """

    def __init__(
        self,
        images: str | Path,
        instances: str | Path,
        transform: Transform | None = None,
        captions: str | Path | None = None,
    ) -> None:
        self.images, self.transform = _need(images, "COCO"), transform
        read = json.loads(_need(instances, "COCO", folder=False).read_text())
        kinds = sorted(read["categories"], key=lambda kind: kind["id"])
        self.classes = tuple(kind["name"] for kind in kinds)
        self.label_of = {kind["id"]: i for i, kind in enumerate(kinds)}
        self.objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for found in read["annotations"]:
            self.objects[found["image_id"]].append(found)
        self.entries = [entry for entry in read["images"] if entry["id"] in self.objects]
        self.said: dict[int, str] = {}
        if captions is not None:
            text = json.loads(_need(captions, "COCO", folder=False).read_text())
            for note in text["annotations"]:
                self.said.setdefault(note["image_id"], note["caption"])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        size = entry["height"], entry["width"]
        masks: Masks = {}
        for found in self.objects[entry["id"]]:
            label = self.label_of[found["category_id"]]
            mask = _outline(found["segmentation"], size)
            masks[label] = masks[label] | mask if label in masks else mask
        label = max(masks, key=lambda key: int(masks[key].sum()))
        sample = _sample(self.images / entry["file_name"], label, masks, self.transform)
        return replace(sample, caption=self.said.get(entry["id"]))


def _outline(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) bool from polygons [[x, y, x, y, ...], ...] or from counts of an uncompressed run."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            raise InputError("COCO: a compressed run; decode it with pycocotools, or use polygons")
        values = np.arange(len(counts)) % 2 == 1  # runs of outside and inside, column by column
        return np.repeat(values, counts).reshape(size[::-1]).T
    canvas = require("PIL.Image", "vision").new("1", size[::-1])
    draw = require("PIL.ImageDraw", "vision").Draw(canvas)
    for polygon in segmentation:
        draw.polygon(polygon, fill=1)
    return np.array(canvas, bool)
