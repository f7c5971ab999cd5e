"""The paper's own models on its own data sets, where both lie on disk.

`files` lists what is there and what is missing; `run_full` measures, under torchrun in as many
processes as it started, each data set into a folder of its own. Nothing is ever downloaded.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import Dataset, Subset

from fullgrad_theory.data import (
    Coco,
    FunnyBirds,
    ImageFolder,
    ImageNetHard,
    ImageNetS,
    Mura,
    OxfordPets,
    Sample,
)
from fullgrad_theory.errors import InputError, unknown_name
from fullgrad_theory.measure.results import Results

from . import measure, tables
from .ready import Ready
from .setup import Setup
from .summary import PAPER, Table, cells, claims, read_cells, write_cells

Transform = Any
TIMM: dict[str, str] = PAPER["models"]
"""Our name of a model -> the paper's, in timm."""


@dataclass(frozen=True)
class Source:
    """A data set: what has to be in its folder, and its samples as a model takes them; `images`:
    how many of them the paper has."""

    needed: tuple[str, ...]
    make: Callable[[Path, Transform], Dataset[Sample]]
    images: int = 1000


DATA: dict[str, Source] = {
    "imagenet": Source((), ImageFolder),
    "imagenet-hard": Source(("metadata.jsonl",), ImageNetHard),
    "mura": Source(("valid",), Mura),
    "pet": Source(
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/test.txt",
         "oxford-iiit-pet/annotations/trimaps"), OxfordPets
    ),
    "imagenet-s": Source(("validation", "validation-segmentation"), ImageNetS, 5000),
    "coco": Source(
        ("val2017", "annotations/instances_val2017.json"),
        lambda root, transform: Coco(
            root / "val2017", root / "annotations" / "instances_val2017.json", transform
        ),
    ),
    "funnybirds": Source(("dataset_test.json", "test", "test_part_map"), FunnyBirds),
}  # fmt: skip
COMPLETE = "imagenet"
"""Where completeness errors and the ablation are measured; of so many images:"""
EXACT = 100


@dataclass(frozen=True)
class File:
    """Something that a run needs: of which model or data set, where, and whether it is there."""

    of: str
    path: Path
    there: bool


def folders(given: str) -> dict[str, Path]:
    """`imagenet:FOLDER,pet:FOLDER` as a table; raises `InputError` for what it does not know."""
    found = {}
    for part in given.split(","):
        name, colon, path = part.partition(":")
        if name not in DATA:
            raise unknown_name("data set", name, DATA)
        if not colon or not path:
            raise InputError(f"--data names a folder for each data set, as {name}:FOLDER")
        found[name] = Path(path)
    return found


def files(weights: Path, data: Mapping[str, Path], models: Sequence[str]) -> list[File]:
    """All that a run needs, in order."""
    found = [File(TIMM[m], _weights(weights, TIMM[m]), False) for m in models]
    for name, root in data.items():
        found += [File(name, root / part, False) for part in DATA[name].needed or (".",)]
    return [File(f.of, f.path, f.path.exists()) for f in found]


def _weights(folder: Path, name: str) -> Path:
    """A model's file; where there is none, the first of the names that it may have."""
    kinds = (f"{name}.safetensors", f"{name}/model.safetensors", f"{name}.pth", f"{name}.bin")
    return next((folder / k for k in kinds if (folder / k).exists()), folder / kinds[0])


def listing(found: Sequence[File]) -> str:
    """One line a file, and how many are missing."""
    lines = [f"{'there  ' if f.there else 'MISSING'}  {f.of}  {f.path}" for f in found]
    missing = sum(not f.there for f in found)
    return "\n".join([*lines, f"{missing} of {len(found)} are missing"])


def load(name: str, weights: Path) -> tuple[Ready, Transform]:
    """One of the paper's models with its weights, and how it takes pictures."""
    file = _weights(weights, TIMM[name])
    model = timm.create_model(
        TIMM[name], pretrained=True, pretrained_cfg_overlay={"file": str(file)}
    ).eval()
    config = timm.data.resolve_data_config({}, model=model)
    place = os.environ.get("LOCAL_RANK", "0")
    device = f"cuda:{place}" if torch.cuda.is_available() else "cpu"
    size = config["input_size"][1]
    return Ready(name, model.to(device), size), timm.data.create_transform(**config)


def chosen(samples: Dataset[Sample], count: int) -> Dataset[Sample]:
    """So many of them, drawn with a seed, the same for every model."""
    order = list(range(len(samples)))  # type: ignore[arg-type]
    random.Random(0).shuffle(order)
    return Subset(samples, sorted(order[:count]))


def run_full(
    setup: Setup,
    weights: Path,
    data: Mapping[str, Path],
    out: Path,
    cache: Path,
    images: int | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Measure every model on every data set, and write data and tables into `out`/data set.

    Goes on where it was interrupted. Returns the models on which Libra FullGrad's completeness
    breaks its bound. Raises `InputError` where a file is missing.
    """
    missing = [f for f in files(weights, data, setup.models) if not f.there]
    if missing:
        raise InputError("these are missing:\n" + listing(missing))
    first, failing = os.environ.get("RANK", "0") == "0", []
    for name, root in data.items():
        count = min(images or DATA[name].images, DATA[name].images)
        found: dict[str, dict[str, Results]] = {}
        for model in setup.models:
            ready, transform = load(model, weights)
            samples = DATA[name].make(root, transform)
            for study, how, many in _studies(name, model, setup, count):
                if first:
                    say(f"{name}, {model}: {study}")
                ready.samples = chosen(samples, many)  # type: ignore[assignment]
                folder = cache / f"full-{many}" / name / study / model
                found.setdefault(study, {})[model] = how(ready, setup, folder)
        if first:
            failing += [f"{name}: {what}" for what in _written(found, out / name)]
    return failing


def _studies(
    data: str, model: str, setup: Setup, count: int
) -> list[tuple[str, measure.Study, int]]:
    """What is measured of a model on a data set, and of how many images."""
    wanted: list[tuple[str, measure.Study, int]] = [("faithfulness", measure.faithfulness, count)]
    if data == COMPLETE:
        wanted.append(("completeness", measure.completeness, min(count, EXACT)))
    if model == setup.ablated and data in (COMPLETE, "imagenet-s"):
        wanted.append(("ablation", measure.ablation, count))
    return wanted


def _written(found: Mapping[str, Mapping[str, Results]], out: Path) -> list[str]:
    """Data and tables of one data set; where the completeness bound is broken."""
    out.mkdir(parents=True, exist_ok=True)
    for study, results in found.items():
        write_cells(out / f"{study}.csv", cells(results))
    sheets = {study: Table(read_cells(out / f"{study}.csv")) for study in found}
    made = claims(
        found.get("completeness", {}), found.get("faithfulness", {}), found.get("ablation", {})
    )
    (out / "orderings.json").write_text(json.dumps([asdict(c) for c in made], indent=1) + "\n")
    pages = {
        "faithfulness": tables.faithfulness(sheets["faithfulness"], (*TIMM,)),
        "orderings": tables.orderings(made, sheets["faithfulness"]),
    }
    if exact := sheets.get("completeness"):
        pages["completeness"] = tables.completeness(exact)
    if parts := sheets.get("ablation"):
        pages["ablation"] = tables.ablation(parts)
    for page, text in pages.items():
        (out / f"{page}.md").write_text(text + "\n")
    return tables.broken(exact) if exact else []
