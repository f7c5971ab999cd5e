"""Scenes and the loaders of real data: exact masks, no shortcuts, one answer for one seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fullgrad_theory.data import (
    CLASSES,
    Coco,
    FunnyBirds,
    ImageFolder,
    ImageNetHard,
    ImageNetS,
    Mura,
    OxfordPets,
    Sample,
    Scenes,
    collate,
)
from fullgrad_theory.data.scenes import SHAPES, TEXTURES, Rendered, caption
from fullgrad_theory.errors import InputError


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return Scenes(1500, seed=3).render()


# --------------------------------------------------------------------------- scenes


def test_an_item_depends_on_seed_and_index_alone() -> None:
    few, many = Scenes(3, seed=5).render(), Scenes(200, seed=5).render([2, 150, 0])
    assert np.array_equal(few.images[[2, 0]], many.images[[0, 2]])
    assert np.array_equal(few.masks[[2, 0]], many.masks[[0, 2]])
    assert not np.array_equal(few.images[0], Scenes(1, seed=6).render().images[0])


def test_one_by_one_and_in_a_row_are_the_same() -> None:
    scenes = Scenes(70, seed=1, size=32)
    for index, sample in enumerate(scenes):
        alone = scenes[index]
        assert torch.equal(sample.image, alone.image)
        assert sample.label == alone.label and sample.caption == alone.caption
    assert index == 69
    with pytest.raises(IndexError):
        scenes[70]
    assert torch.equal(scenes[-1].image, alone.image)


@pytest.mark.parametrize("size", [64, 224, (48, 80), (33, 20)])
def test_any_size(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    for sample in Scenes(12, seed=2, size=size):
        assert sample.image.shape == (3, height, width) and sample.image.dtype == torch.float32
        assert sample.image.min() >= -1 and sample.image.max() <= 1
        assert sample.mask is not None and sample.mask.shape == (height, width)
        assert sample.mask.dtype == torch.bool and sample.mask.any()


def test_the_labelled_object_is_clearly_the_largest(rendered: Rendered) -> None:
    areas = rendered.masks.sum((2, 3))
    assert np.all(areas[:, 0] > 0.05 * 64 * 64)
    assert np.all(areas[:, 1:] < 0.55 * areas[:, :1])
    assert np.all(rendered.masks.sum(1) <= 1)  # objects do not overlap
    present = rendered.classes >= 0
    assert np.array_equal(areas > 0, present)
    counts = present.sum(1)
    assert {1, 2, 3} == set(counts.tolist())


def test_classes_are_balanced_and_distinct_in_an_image(rendered: Rendered) -> None:
    frequency = np.bincount(rendered.classes[:, 0], minlength=len(CLASSES)) / len(rendered.classes)
    assert np.abs(frequency - 1 / len(CLASSES)).max() < 0.03
    for row in rendered.classes:
        seen = row[row >= 0]
        assert len(set(seen.tolist())) == len(seen)


def test_masks_are_exact() -> None:
    """Without the object the image is the same outside its mask, to the byte, and not inside."""
    full, without = (Scenes(200, seed=4, keep=keep).render() for keep in ("all", "others"))
    bare = Scenes(200, seed=4, keep="none").render()
    assert np.array_equal(full.masks, without.masks) and np.array_equal(full.classes, bare.classes)
    changed = (full.images != without.images).any(1)
    assert not (changed & ~full.masks[:, 0]).any()
    inside = (changed & full.masks[:, 0]).sum() / full.masks[:, 0].sum()
    assert inside > 0.9  # a colour may happen to be that of what it covers
    changed = (full.images != bare.images).any(1)
    assert not (changed & ~full.masks.any(1)).any()


def test_figures_have_the_area_they_claim() -> None:
    """Shapes of one radius cover the same area, so size and colour do not give the shape away."""
    data = Scenes(600, seed=8, size=96).render()
    areas = data.masks[:, 0].sum((1, 2)) / (96 * 96)
    for shape in range(len(SHAPES)):
        mean = areas[data.classes[:, 0] % len(SHAPES) == shape].mean()
        assert abs(mean - np.pi * np.mean(np.linspace(0.21, 0.28, 101) ** 2)) < 0.01


def test_captions_name_the_objects() -> None:
    assert caption([0, -1, -1]) == f"a {CLASSES[0]}"
    assert caption([4, -1, 2]) == f"a {CLASSES[4]} and a {CLASSES[2]}"
    assert caption([4, 8, 2]) == f"a {CLASSES[4]}, a {CLASSES[8]} and a {CLASSES[2]}"
    for sample in Scenes(20, seed=9):
        assert sample.caption is not None
        named = {i for i, name in enumerate(CLASSES) if name in sample.caption}
        assert named == {sample.label, *sample.others}
        assert sample.caption.startswith(f"a {CLASSES[sample.label]}")


@pytest.mark.parametrize(
    "bad", [{"n": 0}, {"n": 1, "size": 8}, {"n": 1, "seed": -1}, {"n": 1, "keep": "objects"}]
)
def test_bad_arguments(bad: dict) -> None:
    with pytest.raises(InputError):
        Scenes(**bad)


# --------------------------------------------------------------------------- no shortcuts


def linear_accuracy(features: NDArray, labels: NDArray, classes: int) -> float:
    """Held-out accuracy of a ridge classifier: the last third, trained on the rest."""
    x = (features - features.mean(0)) / (features.std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    cut = len(x) * 2 // 3
    target = np.eye(classes)[labels[:cut]]
    weights = np.linalg.solve(x[:cut].T @ x[:cut] + 10 * np.eye(x.shape[1]), x[:cut].T @ target)
    return float(((x[cut:] @ weights).argmax(1) == labels[cut:]).mean())


def colour_histogram(images: NDArray) -> NDArray:
    levels = images // 32  # 8 a channel, joint for pairs of channels
    pairs = [(0, 1), (1, 2), (0, 2)]
    joint = [(levels[:, a] * 8 + levels[:, b]).reshape(len(images), -1) for a, b in pairs]
    return np.stack([[np.bincount(row, minlength=64) for row in j] for j in joint], 1).reshape(
        len(images), -1
    )


def patch_statistics(images: NDArray) -> NDArray:
    """Mean and spread of every 8 x 8 patch and channel."""
    n = len(images)
    patches = images.reshape(n, 3, 8, 8, 8, 8).astype(np.float32)
    return np.concatenate([patches.mean((3, 5)), patches.std((3, 5))], 1).reshape(n, -1)


@pytest.mark.parametrize(
    "features", [colour_histogram, patch_statistics, lambda images: images[:, :, ::4, ::4]]
)
def test_colours_patches_and_pixels_do_not_give_the_class(features, rendered: Rendered) -> None:
    values = features(rendered.images).reshape(len(rendered.images), -1)
    assert linear_accuracy(values, rendered.classes[:, 0], len(CLASSES)) < 0.3  # chance: 0.11


def test_the_probe_can_learn(rendered: Rendered) -> None:
    """The probe that fails above does find a class that is given away."""
    images = rendered.images.copy()
    images[:, 0, :4, :4] = rendered.classes[:, 0, None, None] * 28
    one_hot = np.eye(256)[images[:, 0, 0, 0]]
    values = np.concatenate([patch_statistics(images), one_hot], 1)
    assert linear_accuracy(values, rendered.classes[:, 0], len(CLASSES)) > 0.9


def test_shape_or_texture_alone_is_a_third() -> None:
    """Whoever knows the shape exactly, or the texture, is right in one case of three."""
    assert len(CLASSES) == len(SHAPES) * len(TEXTURES) == 9
    for words in (SHAPES, TEXTURES):
        for word in words:
            assert sum(word in name.split() for name in CLASSES) == 3


# --------------------------------------------------------------------------- batches


def test_collate() -> None:
    samples = list(Scenes(4, seed=0, size=32))
    batch = collate(samples)
    assert batch.images.shape == (4, 3, 32, 32) and batch.labels.dtype == torch.int64
    assert batch.masks is not None and batch.masks.shape == (4, 32, 32)
    assert len(batch) == len(batch.others) == len(batch.captions) == 4
    without = Sample(samples[0].image, 0)
    assert collate([samples[1], without]).masks is None
    loader = torch.utils.data.DataLoader(Scenes(5, size=32), batch_size=2, collate_fn=collate)
    assert [len(b) for b in loader] == [2, 2, 1]


def test_collate_wants_one_size() -> None:
    with pytest.raises(InputError, match="one size"):
        collate([Scenes(1, size=32)[0], Scenes(1, size=48)[0]])
    with pytest.raises(InputError, match="no sample"):
        collate([])
    image = Scenes(1, size=32)[0].image
    masks = [torch.zeros(32, 32, dtype=torch.bool), torch.zeros(16, 16, dtype=torch.bool)]
    with pytest.raises(InputError, match=r"masks of one size, got \(16, 16\), \(32, 32\)"):
        collate([Sample(image, 0, mask) for mask in masks])
    assert collate([*(Sample(image, 0, m) for m in masks), Sample(image, 0)]).masks is None


# --------------------------------------------------------------------------- real data


def picture(
    path: Path, size: tuple[int, int] = (40, 30), box: tuple | None = (10, 5, 29, 19)
) -> None:
    """A JPEG or PNG of width x height, black with a white box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    if box:
        ImageDraw.Draw(image).rectangle(box, fill=(255, 255, 255))
    image.save(path)


def box_mask(height: int = 30, width: int = 40) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[5:20, 10:30] = True
    return mask


def eval_transform(size: int = 24):
    return timm.data.create_transform(input_size=(3, size, size), crop_pct=0.9)


def train_transform():
    return timm.data.create_transform(
        input_size=(3, 24, 24), is_training=True, hflip=0.5, color_jitter=None
    )


def test_image_folder(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / name / "1.png")
    data = ImageFolder(tmp_path)
    assert [s.label for s in data] == [0, 1] and data.classes == ("cat", "dog")
    assert data[0].image.shape == (3, 30, 40) and data[0].mask is None
    assert data[0].image.max() == 1 and data[0].image.min() == -1
    named = ImageFolder(tmp_path, eval_transform(), classes=["bird", "dog", "cat"])
    assert [named[i].label for i in range(2)] == [2, 1]
    assert named[0].image.shape == (3, 24, 24)
    with pytest.raises(InputError, match="cat"):
        ImageFolder(tmp_path, classes=["dog"])


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    picture(base / "images" / "Abyssinian_1.jpg")
    picture(base / "images" / "pug_2.jpg")
    trimap = np.full((30, 40), 2, np.uint8)
    trimap[4:21, 9:31] = 3
    trimap[5:20, 10:30] = 1
    (base / "annotations" / "trimaps").mkdir(parents=True)
    for name in ("Abyssinian_1", "pug_2"):
        Image.fromarray(trimap).save(base / "annotations" / "trimaps" / f"{name}.png")
    (base / "annotations" / "test.txt").write_text("Abyssinian_1 1 1 1\npug_2 2 2 1\n")


def test_oxford_pets(tmp_path: Path) -> None:
    pets(tmp_path)
    data = OxfordPets(tmp_path)
    assert len(data) == 2 and data.classes == ("Abyssinian", "Pug")
    sample = data[1]
    assert sample.label == 1 and sample.mask is not None
    assert torch.equal(sample.mask, box_mask())
    with pytest.raises(InputError, match=r"trainval\.txt"):
        OxfordPets(tmp_path, split="trainval")


def test_imagenet_s(tmp_path: Path) -> None:
    names = [f"n{i:08}" for i in range(300)]
    for name in names:
        (tmp_path / "validation" / name).mkdir(parents=True)
    picture(tmp_path / "validation" / names[258] / "a.JPEG")
    category = np.zeros((30, 40, 3), np.uint8)
    category[5:20, 10:30] = (259 % 256, 259 // 256, 0)  # the 259th folder
    category[0:3, 0:3] = (7, 0, 0)  # another one
    category[25:, 30:] = (1000 % 256, 1000 // 256, 0)  # unclassified
    target = tmp_path / "validation-segmentation" / names[258] / "a.png"
    target.parent.mkdir(parents=True)
    Image.fromarray(category).save(target)
    order = [*reversed(names)]
    sample = ImageNetS(tmp_path, classes=order)[0]
    assert sample.label == order.index(names[258]) and sample.mask is not None
    assert torch.equal(sample.mask, box_mask())
    assert list(sample.others) == [order.index(names[6])]
    assert sample.others[order.index(names[6])].sum() == 9
    with pytest.raises(InputError, match="n00000000"):
        ImageNetS(tmp_path)  # these are no WordNet ids of ImageNet-1k


def test_imagenet_s_labels_are_those_of_imagenet_1k(tmp_path: Path) -> None:
    picture(tmp_path / "validation" / "n01443537" / "a.JPEG")
    target = tmp_path / "validation-segmentation" / "n01443537" / "a.png"
    target.parent.mkdir(parents=True)
    Image.new("RGB", (40, 30), (1, 0, 0)).save(target)
    sample = ImageNetS(tmp_path)[0]
    assert sample.label == 1 and sample.mask is not None and sample.mask.all()  # goldfish


def test_imagenet_hard(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    lines = [{"file_name": "b.png", "label": [7, 3]}, {"file_name": "a.png", "label": 900}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    data = ImageNetHard(tmp_path)
    assert len(data) == 2 and [s.label for s in data] == [7, 900]
    assert data.labels == [(7, 3), (900,)] and data[0].mask is None
    assert torch.equal(data[1].image, ImageNetHard(tmp_path)[-1].image)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(InputError, match="without label"):
        ImageNetHard(tmp_path)


def test_mura(tmp_path: Path) -> None:
    studies = ("XR_WRIST/patient2/study1_positive", "XR_ELBOW/patient1/study1_negative",
               "XR_ELBOW/patient1/study2_positive")  # fmt: skip
    for study in studies:
        picture(tmp_path / "valid" / study / "image1.png")
    (tmp_path / "valid" / studies[0] / "._image1.png").write_text("no picture")  # as distributed
    data = Mura(tmp_path)
    assert [s.label for s in data] == [0, 1, 1] and data.classes == ("negative", "positive")
    assert len(Mura(tmp_path, part="ELBOW")) == 2 and data[0].mask is None
    with pytest.raises(InputError, match="no XR_HAND"):
        Mura(tmp_path, part="HAND")


@pytest.mark.parametrize("masked", [True, False])
def test_funny_birds(tmp_path: Path, masked: bool) -> None:
    labels = [4, 0]
    (tmp_path / "dataset_test.json").write_text(
        json.dumps([{"class_idx": c, "beak_model": "beak01.glb"} for c in labels])
    )
    parts = np.zeros((30, 40, 4), np.uint8)
    parts[..., 3] = 255  # not of the mask: an opaque ground
    parts[3:7, 5:9, :3], parts[20:25, 1:3, :3] = (255, 255, 0), (0, 0, 255)  # a beak, a tail
    for index, label in enumerate(labels):
        picture(tmp_path / "test" / str(label) / f"{index:06d}.png")
        if masked:
            folder = tmp_path / "test_part_map" / str(label)
            folder.mkdir(parents=True)
            Image.fromarray(parts).save(folder / f"{index:06d}.png")
    data = FunnyBirds(tmp_path)
    assert len(data) == 2 and [s.label for s in data] == [4, 0]
    wanted = torch.zeros(30, 40, dtype=torch.bool)
    wanted[3:7, 5:9] = wanted[20:25, 1:3] = True
    for sample in (data[0], data[-1]):
        assert sample.image.shape == (3, 30, 40)
        assert torch.equal(sample.mask, wanted) if masked else sample.mask is None
    with pytest.raises(IndexError):
        data[2]


def coco(root: Path) -> tuple[Path, Path, Path]:
    picture(root / "val" / "1.jpg")
    picture(root / "val" / "2.jpg")
    inside = np.zeros((30, 40), int)
    inside[20:30, 0:4] = 1
    flat = inside.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, len(flat)]).tolist()
    box = [10, 5, 29, 5, 29, 19, 10, 19]
    found = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 30, "width": 40} for i in (1, 2)],
        "categories": [{"id": 90, "name": "cup"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 3, 1, 3, 3]]},
            {"image_id": 1, "category_id": 90, "iscrowd": 0, "segmentation": [box]},
            {
                "image_id": 1,
                "category_id": 3,
                "iscrowd": 1,
                "segmentation": {"counts": runs, "size": [30, 40]},
            },
        ],
    }
    instances, said = root / "instances.json", root / "captions.json"
    instances.write_text(json.dumps(found))
    notes = [{"image_id": 1, "caption": c} for c in ("a cup and a car", "two things")]
    said.write_text(json.dumps({"annotations": notes}))
    return root / "val", instances, said


def test_coco(tmp_path: Path) -> None:
    images, instances, captions = coco(tmp_path)
    data = Coco(images, instances, captions=captions)
    assert len(data) == 1 and data.classes == ("car", "cup")  # image 2 has no object
    sample = data[0]
    assert sample.label == 1 and sample.caption == "a cup and a car" and sample.mask is not None
    assert torch.equal(sample.mask, box_mask())
    car = sample.others[0]
    assert car[20:30, 0:4].all() and car[1, 1] and car[3, 3] and not car[3, 1]
    assert car.sum() == 40 + car[:5, :5].sum()
    (images / "1.jpg").unlink()
    with pytest.raises(InputError, match="missing"):
        data[0]


def test_coco_refuses_compressed_runs(tmp_path: Path) -> None:
    images, instances, _ = coco(tmp_path)
    found = json.loads(instances.read_text())
    found["annotations"][0]["segmentation"] = {"counts": "abc", "size": [30, 40]}
    instances.write_text(json.dumps(found))
    with pytest.raises(InputError, match="pycocotools"):
        Coco(images, instances)[0]


@pytest.mark.parametrize("make", [eval_transform, train_transform])
def test_masks_go_through_the_transform_with_the_image(tmp_path: Path, make) -> None:
    """The object is white on black: where the transformed image is bright is the mask."""
    pets(tmp_path)
    data = OxfordPets(tmp_path, make())
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        random.seed(seed)
        sample = data[0]
        assert sample.mask is not None and sample.mask.shape == (24, 24)
        black = (-0.485 / 0.229, 1 - 0.485 / 0.229)
        bright = sample.image[0] * 0.229 + 0.485 > 0.5
        assert black[0] - 1e-3 <= sample.image.min()
        assert (bright != sample.mask).float().mean() < 0.02  # JPEG and rounding, at the edge
        assert 0.02 < sample.mask.float().mean() < 0.98
        seen.add(int(sample.mask.sum()))
    assert len(seen) == 1 if make is eval_transform else len(seen) > 1


def turn(path: Path) -> None:
    """Says in the file that the camera was held on its side; the pixels stay as they are."""
    with Image.open(path) as opened:
        exif = opened.getexif()
        exif[0x0112] = 6
        opened.load()
        opened.save(path, format="JPEG", exif=exif)


def test_pixels_are_read_as_they_are_stored_so_that_masks_lie_on_them(tmp_path: Path) -> None:
    pets(tmp_path)
    images, instances, _ = coco(tmp_path / "coco")
    picture(tmp_path / "validation" / "n01443537" / "a.JPEG")
    drawn = np.zeros((30, 40, 3), np.uint8)
    drawn[5:20, 10:30, 0] = 1
    target = tmp_path / "validation-segmentation" / "n01443537" / "a.png"
    target.parent.mkdir(parents=True)
    Image.fromarray(drawn).save(target)
    for path in tmp_path.rglob("*.*"):
        if path.suffix in (".jpg", ".JPEG"):
            turn(path)
            with Image.open(path) as opened:
                assert opened.getexif()[0x0112] == 6
    for data in (OxfordPets(tmp_path), Coco(images, instances), ImageNetS(tmp_path)):
        sample = data[0]
        assert sample.mask is not None and torch.equal(sample.mask, box_mask())
        assert sample.image.shape == (3, 30, 40)
        assert ((sample.image[0] > 0) != sample.mask).float().mean() < 0.02  # JPEG, at the edge
    assert ImageFolder(tmp_path / "validation")[0].image.shape == (3, 30, 40)


def test_a_transform_without_a_tensor(tmp_path: Path) -> None:
    pets(tmp_path)
    with pytest.raises(InputError, match="ToTensor"):
        OxfordPets(tmp_path, lambda image: image.resize((8, 8)))[0]  # type: ignore[arg-type]


def test_missing_paths_are_one_clear_sentence(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    loaders = (ImageFolder, OxfordPets, ImageNetS, ImageNetHard, Mura, FunnyBirds)
    for make in (*loaders, lambda path: Coco(path, path / "a.json")):
        with pytest.raises(InputError, match=r"nowhere.*nothing is downloaded"):
            make(nowhere)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="empty"):
        ImageFolder(empty)
