"""Pictures of attribution maps: an image as a model sees it, and maps laid over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attribution.map import Map
from ..errors import InputError
from ..extras import require
from ..files import whole
from ..graph.door import Model


@dataclass(frozen=True)
class Seen:
    """An image as a model takes it, `pixels` (1, 3, H, W), and as a person does, `shown`
    (H, W, 3) in [0, 1]: the same crop, before it was normalised."""

    pixels: Tensor
    shown: Tensor


def read(path: Path) -> Any:
    """An image file as a PIL image in RGB, upright; raises `InputError` where it is none."""
    pillow, operations = (require(f"PIL.{name}", "vision") for name in ("Image", "ImageOps"))
    try:
        with pillow.open(path) as opened:
            # cameras store how they were held beside the pixels
            return operations.exif_transpose(opened).convert("RGB")
    except (OSError, pillow.DecompressionBombError) as error:
        raise InputError(f"{str(path)!r} is not an image that can be read: {error}") from error


def see(picture: Any, model: Model, example: Tensor) -> Seen:
    """Resize, crop and normalise as timm's configuration of the model says, to the example's size.

    A model without a configuration gets timm's default: ImageNet's mean and deviation.
    """
    data = require("timm.data", "vision")
    channels, *size = example.shape[1:]
    if channels != 3:
        raise InputError(f"the model takes {channels} channels; pictures have 3")
    config = data.resolve_data_config(
        {"input_size": (3, *size)}, model=model if isinstance(model, nn.Module) else None
    )
    pixels = data.create_transform(**config, is_training=False)(picture)
    if tuple(pixels.shape[1:]) != tuple(size):
        raise InputError(
            f"the model's transform makes {tuple(pixels.shape[1:])} of the image, the model takes "
            f"{tuple(size)}"
        )
    mean, deviation = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
    shown = (pixels * deviation + mean).clamp(0, 1).permute(1, 2, 0)
    return Seen(pixels[None].to(example), shown)


def class_name(model: Model, index: int) -> str:
    """What a class is called, where timm knows; else `'class 7'`."""
    data = require("timm.data", "vision")
    config = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("label_names") if isinstance(config, Mapping) else None
    if names and len(names) > index:
        return f"{names[index]} ({index})"
    subset = data.infer_imagenet_subset(model) if config else None
    if subset is None:
        return f"class {index}"
    return f"{data.ImageNetInfo(subset).index_to_description(index)} ({index})"


def draw(
    seen: Seen, maps: Mapping[str, Mapping[str, Map]], title: str, path: Path | None = None
) -> Any:
    """A matplotlib figure of `maps[method][policy]`, each of one image; saved where a path says.

    A row a method. For each policy, the map on its own grid, and the same over the image. Signed
    maps have a scale that is symmetric about 0 (red speaks for the target, blue against it); a row
    without a negative value has one from 0 up. Both are told apart by all kinds of colour vision.
    """
    agg = require("matplotlib.backends.backend_agg", "plots")
    figures = require("matplotlib.figure", "plots")
    policies = list(next(iter(maps.values())))
    rows, columns = len(maps), 1 + 2 * len(policies)
    height, width = seen.shown.shape[:2]
    tall = 2.0 * height / width
    size = (2.4 * columns + 0.4, (tall + 0.35) * rows + 0.4)
    figure = figures.Figure(figsize=size, layout="constrained")
    agg.FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (method, by_policy) in zip(axes, maps.items(), strict=True):
        for axis in row:
            axis.set_xticks([]), axis.set_yticks([])
        row[0].imshow(seen.shown.numpy())
        row[0].set_ylabel(method, fontsize=9)
        signed = any(bool((found.values[0] < 0).any()) for found in by_policy.values())
        for number, policy in enumerate(policies):
            pair = row[1 + 2 * number : 3 + 2 * number]
            _pair(figure, pair, by_policy[policy], policy, seen, signed)
    if path is not None:
        whole(path, lambda beside: figure.savefig(beside, dpi=150))
    return figure


def _pair(
    figure: Any, axes: Sequence[Any], found: Map, policy: str, seen: Seen, signed: bool
) -> None:
    """The map alone, and over the image where its strength is how opaque it is."""
    height, width = seen.shown.shape[:2]
    values, fine = found.values[0].detach().cpu().float(), found.pixels((height, width))[0]
    fine = fine.detach().cpu().float()
    limit = reach(values)
    cmap, low = ("RdBu_r", -limit) if signed else ("cividis", 0.0)
    scale = {"cmap": cmap, "vmin": low, "vmax": limit, "extent": (0, width, height, 0)}
    heat = axes[0].imshow(values.numpy(), interpolation="nearest", **scale)
    beyond = (bool((values < low).any()), bool((values > limit).any()))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    bar = figure.colorbar(heat, ax=axes[0], shrink=0.8, pad=0.02, extend=extend.get(beyond, "both"))
    bar.ax.tick_params(labelsize=6)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(6)
    axes[0].set_title(policy, fontsize=8)
    grey = seen.shown.mean(-1).numpy()
    axes[1].imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    opacity = (fine.abs() / limit).clamp(0, 1) * 0.85
    axes[1].imshow(fine.numpy(), alpha=opacity.numpy(), **scale)
    axes[1].set_title(_completeness(found), fontsize=8)


def reach(values: Tensor) -> float:
    """How far a colour scale goes: what all but the largest hundredth of the values keep to, so
    that one outlier does not leave the rest without colour."""
    sizes = values.abs().flatten()
    return float(sizes.quantile(0.99)) or float(sizes.max()) or 1.0


def _completeness(found: Map) -> str:
    if found.error is None:
        return "over the image"
    return f"completeness error {float(found.error[0]):.2g}"
