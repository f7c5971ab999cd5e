"""From the token grid to pixels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError


def to_pixels(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w), bicubically interpolated to (B, H, W); those of that size are unchanged."""
    if values.dim() != 3:
        raise InputError(f"maps must have shape (B, h, w), got {tuple(values.shape)}")
    if tuple(values.shape[1:]) == tuple(size):
        return values
    return F.interpolate(values[:, None].float(), size, mode="bicubic", align_corners=False)[:, 0]


def on_masks(values: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps in the size of the masks (B, H, W), both on the CPU; errors where they do not fit.

    The maps are float64: numpy knows no bfloat16, and nothing is lost.
    """
    if masks.dim() != 3 or values.dim() != 3 or len(values) != len(masks):
        raise InputError(
            f"maps (B, h, w) and masks (B, H, W) are needed for the same B images, got "
            f"{tuple(values.shape)} and {tuple(masks.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise InputError("the maps hold NaN or Inf; a ranking of pixels needs finite values")
    height, width = masks.shape[1:]
    return to_pixels(values.detach(), (height, width)).cpu().double(), masks.bool().cpu()
