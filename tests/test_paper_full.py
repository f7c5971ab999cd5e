"""The paper's own scale, on made pictures in the layouts that the data sets are distributed in.

A small timm model with random weights, kept as a file, stands for one of the paper's.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from experiments.paper import full
from experiments.paper import run as command
from fullgrad_theory.errors import InputError, UnknownNameError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TINY = {"eva2": "test_vit.r160_in1k"}
WORDS = ("n01440764", "n01443537")  # the first classes of ImageNet-1k


def picture(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    noise[8:20, 8:30] = 40 * seed % 256
    Image.fromarray(noise).save(path)


def layouts(root: Path, count: int = 6) -> dict[str, Path]:
    """All seven data sets in their own layouts."""
    found = {name: root / name for name in full.DATA}
    mask = np.zeros((40, 48, 3), np.uint8)
    mask[8:20, 8:30, 0] = 1  # ImageNet-S: category 1
    for i in range(count):
        word = WORDS[i % 2]
        picture(found["imagenet"] / word / f"{i}.JPEG", i)
        picture(found["imagenet-hard"] / f"{i}.png", i)
        study = f"XR_WRIST/patient{i}/study1_{('negative', 'positive')[i % 2]}"
        picture(found["mura"] / "valid" / study / "image1.png", i)
        picture(found["imagenet-s"] / "validation" / word / f"{i}.JPEG", i)
        marked = found["imagenet-s"] / "validation-segmentation" / word / f"{i}.png"
        marked.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask * (1 + i % 2)).save(marked)
        picture(found["funnybirds"] / "test" / "0" / f"{i:06d}.png", i)
        picture(found["funnybirds"] / "test_part_map" / "0" / f"{i:06d}.png", i)
        picture(found["coco"] / "val2017" / f"{i}.jpg", i)
        base = found["pet"] / "oxford-iiit-pet"
        picture(base / "images" / f"pug_{i}.jpg", i)
        (base / "annotations" / "trimaps").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask[..., 0] + 1).save(base / "annotations" / "trimaps" / f"pug_{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "label": [i]}) for i in range(count)]
    (found["imagenet-hard"] / "metadata.jsonl").write_text("\n".join(lines))
    entries = [{"class_idx": 0}] * count
    (found["funnybirds"] / "dataset_test.json").write_text(json.dumps(entries))
    rows = "".join(f"pug_{i} 1 1 1\n" for i in range(count))
    (found["pet"] / "oxford-iiit-pet" / "annotations" / "test.txt").write_text(rows)
    box = [8, 8, 29, 8, 29, 19, 8, 19]
    sizes = {"height": 40, "width": 48}
    objects = [{"image_id": i, "category_id": 1, "segmentation": [box]} for i in range(count)]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg", **sizes} for i in range(count)],
        "annotations": objects,
        "categories": [{"id": 1, "name": "square"}],
    }
    (found["coco"] / "annotations").mkdir()
    (found["coco"] / "annotations" / "instances_val2017.json").write_text(json.dumps(coco))
    return found


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*full.TIMM]:
        monkeypatch.delitem(full.TIMM, name)
    for name, value in TINY.items():
        monkeypatch.setitem(full.TIMM, name, value)


def weights(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model(TINY["eva2"])
    save_file(model.state_dict(), folder / f"{TINY['eva2']}.safetensors")
    return folder


def test_the_papers_models_are_timms() -> None:
    assert {*full.TIMM} == {*command.WHOLE.models} - {"mixer"}
    assert {*full.TIMM.values()} <= {*timm.list_pretrained()}


def test_every_layout_is_read(tmp_path: Path, tiny: None) -> None:
    ready, transform = full.load("eva2", weights(tmp_path / "weights"))
    torch.manual_seed(0)
    kept = timm.create_model(TINY["eva2"]).state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in ready.module.state_dict().items())
    for name, root in layouts(tmp_path).items():
        samples = full.chosen(full.DATA[name].make(root, transform), 4)
        assert len(samples) == 4  # type: ignore[arg-type]
        assert samples[0].image.shape == (3, 160, 160)
        assert (samples[0].mask is not None) == (
            name in ("pet", "imagenet-s", "coco", "funnybirds")
        )


def test_the_list_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without --files: nothing is measured where anything is missing."""
    data = layouts(tmp_path)
    (data["pet"] / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    given = ",".join(f"{name}:{root}" for name, root in data.items())
    for more in (["--files"], []):
        argv = ["run", "--weights", str(tmp_path), "--data", given, "--models", "vit", *more]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 1
        said = capsys.readouterr().out.splitlines()
        missing = [line for line in said if line.startswith("MISSING")]
        assert len(missing) == 2 and said[-1] == f"2 of {len(said) - 1} are missing"
        assert "vit_base_patch16_224.augreg2_in21k_ft_in1k.safetensors" in missing[0]
        assert "annotations/test.txt" in missing[1]
        assert not (tmp_path / "out").exists()
    for bad in ("imagenet", "imagenett:x"):
        with pytest.raises((InputError, UnknownNameError)):
            full.folders(bad)


RUN = """
import sys
from experiments.paper import full, run

full.TIMM.clear()
full.TIMM.update({tiny!r})
run.main()
"""


def test_two_processes_measure_and_resume(tmp_path: Path) -> None:
    """Every table of two data sets; a second run measures nothing and writes the same bytes."""
    data = layouts(tmp_path)
    given = ",".join(f"{name}:{data[name]}" for name in ("imagenet", "imagenet-s"))
    script = tmp_path / "script.py"
    script.write_text(RUN.format(tiny=TINY))
    arguments = ["--weights", weights(tmp_path / "weights"), "--data", given, "--smoke",
                 "--out", tmp_path / "out", "--cache", tmp_path / "cache"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               script, *arguments]  # fmt: skip
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    out = tmp_path / "out"
    assert {p.stem for p in (out / "imagenet").glob("*.md")} == {
        "faithfulness", "completeness", "ablation", "orderings",
    }  # fmt: skip
    assert {p.stem for p in (out / "imagenet-s").glob("*.md")} == {
        "faithfulness", "ablation", "orderings",
    }  # fmt: skip
    with (out / "imagenet-s" / "faithfulness.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "segmentation-ap"]
    assert rows and {r["count"] for r in rows} == {"6"}
    first = {p: p.read_bytes() for p in out.rglob("*.*")}
    batches = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("batch-*.json")}
    assert len(batches) > 2
    alone = [sys.executable, script, *arguments]
    subprocess.run(list(map(str, alone)), env=environment, check=True, capture_output=True)
    assert {p: p.read_bytes() for p in out.rglob("*.*")} == first
    assert batches == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("batch-*.json")}
