"""Scenes and the loaders of real data: exact masks, no shortcuts, one answer for one seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fullgrad_theory.data import CLASSES, Sample, Scenes, collate
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
        assert abs(mean - np.pi * np.mean(np.linspace(0.17, 0.25, 101) ** 2)) < 0.01


def test_captions_name_the_objects_by_size() -> None:
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
