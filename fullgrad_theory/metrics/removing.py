"""Taking patches away from an image: their tokens dropped, or zeroed, or their pixels greyed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..graph.foreign import met
from ..graph.sources import first_line
from .sequence import Grid, TokenSequence, entering, find_sequence

Remove = Callable[[Tensor, Tensor], Tensor]
"""(images (B, 3, H, W), kept patches (B, K), sorted) -> the model's output."""

WAYS = ("tokens", "zeros", "pixels")


@dataclass(frozen=True)
class Removal:
    """A way to remove patches that was tried on the model. `describe` states it in words."""

    way: str
    grid: Grid
    describe: str
    remove: Remove


def removal(
    model: nn.Module, x: Tensor, grid: Grid | None = None, way: str | None = None
) -> Removal:
    """The best way of removing patches that `model` allows, or the `way` asked for.

    "tokens": they are dropped, and the blocks run on fewer; "zeros": they are zeroed where the
    first block reads them; "pixels": patches get the image's mean colour. The first two are tried:
    what is removed must have no influence on the output. `InputError` if `way` is not possible.
    """
    if way is not None and way not in WAYS:
        raise InputError(f"patches can be removed by {', '.join(WAYS)}, not by {way!r}")
    sequence = find_sequence(model, x, grid)
    refused = {} if sequence else {"tokens": "no run of blocks reads one sequence of tokens"}
    for tried, what, remove in _ways(model, sequence) if sequence else []:
        if way in (None, "pixels", tried) and sequence is not None:
            reason = _refusal(remove, x, sequence.grid)
            if reason is None and way != "pixels":
                return Removal(tried, sequence.grid, _describe(what, refused, tried), remove)
            if reason is None:
                grid = grid or sequence.grid
            else:
                refused[tried] = reason
    if way in ("tokens", "zeros"):
        raise InputError(
            f"{type(model).__name__} does not allow removal by {way}: {refused.get(way, refused)}; "
            "leave `drop` out, or ask for 'pixels'"
        )
    grid = grid or _patches(x.shape[-2:])
    what = f"pixels of removed patches ({grid[0]} x {grid[1]}) get the image's mean colour"
    refused = refused if way is None else {}
    return Removal("pixels", grid, _describe(what, refused, "pixels"), _Grey(model, grid))


def _describe(what: str, refused: Mapping[str, str], way: str) -> str:
    """What is done, and why nothing better: `tokens ...; not tokens: ...`."""
    return "; ".join([what, *(f"not {w}: {why}" for w, why in refused.items() if w != way)])


def _ways(model: nn.Module, sequence: TokenSequence) -> list[tuple[str, str, Remove]]:
    dropped = f"tokens of removed patches are dropped before {sequence.path}"
    places = f"{dropped}; positions of the others are kept where a constant holds them"
    zeroed = f"tokens of removed patches are zeroed before {sequence.path}"
    return [
        ("tokens", dropped, _Drop(model, sequence)),
        ("tokens", places, _Drop(model, sequence, constants=True)),
        ("zeros", zeroed, _Zero(model, sequence)),
    ]


@dataclass(frozen=True)
class _Drop:
    model: nn.Module
    sequence: TokenSequence
    constants: bool = False

    def __call__(self, x: Tensor, kept: Tensor) -> Tensor:
        prefix, (height, width) = self.sequence.prefix, self.sequence.grid
        first = torch.arange(prefix, device=kept.device).expand(len(kept), prefix)
        index = torch.cat([first, kept + prefix], 1)
        with entering(self.sequence.block, lambda t: t.take_along_dim(index[..., None], 1)):
            if not self.constants:
                return logits_of(self.model, x)
            indices = {(kept.shape[1], height * width): kept}
            indices[index.shape[1], height * width + prefix] = index
            with _Restricted(indices):
                return logits_of(self.model, x)


@dataclass(frozen=True)
class _Zero:
    model: nn.Module
    sequence: TokenSequence

    def __call__(self, x: Tensor, kept: Tensor) -> Tensor:
        height, width = self.sequence.grid
        there = _indicator(kept, height * width)
        there = F.pad(there, (self.sequence.prefix, 0), value=True)[..., None]
        zeros = entering(self.sequence.block, lambda t: torch.where(there, t, torch.zeros_like(t)))
        with zeros:
            return logits_of(self.model, x)


@dataclass(frozen=True)
class _Grey:
    model: nn.Module
    grid: Grid

    def __call__(self, x: Tensor, kept: Tensor) -> Tensor:
        there = pixels_of(_indicator(kept, self.grid[0] * self.grid[1]), self.grid, x.shape[-2:])
        return logits_of(self.model, torch.where(there, x, x.mean((2, 3), keepdim=True)))


class _Restricted(TorchFunctionMode):
    """Where a call fails because a constant still has an entry for every token, keep the kept.

    A table of rotations (N, d), a bias for every pair (heads, N, N): the model's code reads them
    for all tokens. `indices`: (entries now, entries of the whole) -> which, (B, entries now).
    """

    def __init__(self, indices: Mapping[tuple[int, int], Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            shape, constants = _broadcast(func, args, kwargs)
            fits = {id(t): self._fit(t, shape) for t in constants}
            if all(fits[id(t)] is t for t in constants):
                raise
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: fits.get(id(t), t), (args, kwargs))
        return func(*args, **kwargs)

    def _fit(self, constant: Tensor, shape: tuple[int, ...]) -> Tensor:
        fitted = constant
        dims = zip(reversed(range(len(shape))), reversed(constant.shape), strict=False)
        for dim, whole in dims:
            index = self.indices.get((shape[dim], whole))
            if whole != shape[dim] and index is not None:
                places = [len(index), *[1] * (len(shape) - 1)]
                places[dim] = shape[dim]
                fitted = fitted[(None,) * (len(shape) - fitted.dim())]
                fitted = fitted.take_along_dim(index.reshape(places), dim)
        return fitted


def _broadcast(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[int, ...], list[Tensor]]:
    """The shape that the operands of a call are broadcast to, and those that may be constants."""
    if func is F.scaled_dot_product_attention:
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, mask = named["query"], named["key"], named.get("attn_mask")
        return (*query.shape[:-1], key.shape[-2]), [] if mask is None else [mask]
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    largest = max(tensors, key=Tensor.dim, default=None)
    return tuple(() if largest is None else largest.shape), [t for t in tensors if t is not largest]


def _refusal(remove: Remove, x: Tensor, grid: Grid) -> str | None:
    """None if what `remove` takes away has no influence on the output, else why it failed.

    Prime numbers of patches: no code can take them for a smaller grid.
    """
    cells = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    for count in [k for k in (3, 7, 13, 31, 97) if k < cells]:
        kept = torch.rand((len(x), cells), generator=generator).argsort(1)[:, :count]
        kept = kept.sort(1).values.to(x.device)
        there = pixels_of(_indicator(kept, cells), grid, x.shape[-2:])
        noise = torch.randn(x.shape, generator=generator).to(x)
        try:
            before, after = (remove(y, kept) for y in (x, torch.where(there, x, noise)))
        except Exception as error:  # noqa: BLE001  whatever the model's own code raises
            return first_line(error.__cause__ or error)
        if not bool(before.isfinite().all()):
            return "the output for the patches that stay is not finite"
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-5 * float(before.abs().max())):
            return "removed patches still change the output"
    return None


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output for images, (B, classes)."""
    with torch.no_grad(), met(f"{type(model).__name__} does not run on images {tuple(x.shape)}"):
        output = model(x)
    flat = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    if not flat or flat[0].dim() != 2:
        raise InputError(
            f"deletion needs logits of shape (B, classes), {type(model).__name__} returns "
            f"{tuple(flat[0].shape) if flat else type(output).__name__}"
        )
    return flat[0]


def _indicator(kept: Tensor, cells: int) -> Tensor:
    """(B, cells): whether a patch is kept."""
    there = torch.zeros((len(kept), cells), dtype=torch.bool, device=kept.device)
    return there.scatter(1, kept, True)


def pixels_of(patches: Tensor, grid: Grid, image: torch.Size) -> Tensor:
    """Booleans a patch (B, h * w) as booleans a pixel, (B, 1, H, W)."""
    cells = patches.reshape(-1, 1, *grid).float()
    return F.interpolate(cells, tuple(image), mode="nearest-exact") > 0.5


def _patches(image: torch.Size) -> Grid:
    """At most 14 square patches a side, as many as divide the image."""
    height, width = image
    for side in range(1, max(height, width) + 1):
        if height % side == 0 == width % side and max(height, width) // side <= 14:
            return height // side, width // side
    return min(height, 14), min(width, 14)
