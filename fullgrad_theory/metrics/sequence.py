"""Where a model's token sequence begins: the first of the run of blocks that all read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

Grid = tuple[int, int]


@dataclass(frozen=True)
class TokenSequence:
    """`block` (at `path`) is the first to read the sequence (B, prefix + h * w, C)."""

    block: nn.Module
    path: str
    prefix: int
    grid: Grid


def find_sequence(model: nn.Module, x: Tensor, grid: Grid | None = None) -> TokenSequence | None:
    """The sequence that the largest run of sibling blocks reads, None where there is none.

    Blocks are children of one ModuleList or Sequential; each is given (B, T, C) of one shape, B
    being the batch and T the cells of a grid of the image's aspect (or `grid`) behind some prefix
    tokens. Every patch is assumed to have its token, row by row; `removal` proves it by trying.
    """
    containers = (nn.ModuleList, nn.Sequential)
    parents = {
        id(child): path
        for path, module in model.named_modules()
        if isinstance(module, containers)
        for child in module.children()
    }
    runs: dict[tuple[str, torch.Size], list[nn.Module]] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0] if args else None
        if id(module) in parents and isinstance(tokens, Tensor) and tokens.dim() == 3:
            runs.setdefault((parents[id(module)], tokens.shape), []).append(module)

    with _calling(record), torch.no_grad():
        model(x)
    fitting = {}
    for (path, shape), blocks in runs.items():
        cells = _cells(shape[1], x.shape[-2:], grid)
        if shape[0] == len(x) and cells is not None:
            fitting[path] = (len(blocks), blocks[0], shape[1], cells)
    if not fitting:
        return None
    _, block, count, (height, width) = max(fitting.values(), key=lambda run: run[0])
    path = next(p for p, m in model.named_modules() if m is block)
    return TokenSequence(block, path, count - height * width, (height, width))


@contextmanager
def entering(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the first call of `block` reads `change(tokens)`.

    The hook is torch's, for all modules; it is not the model's, and it is gone afterwards.
    """
    met = False

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal met
        if module is not block or met:
            return None
        met = True
        return (change(args[0]), *args[1:])

    with _calling(hook):
        yield


@contextmanager
def _calling(hook: Callable[[nn.Module, tuple[Any, ...]], Any]) -> Iterator[None]:
    """`hook(module, args)` before every call of a module, in this thread alone."""
    thread = threading.get_ident()
    handle = register_module_forward_pre_hook(
        lambda module, args: hook(module, args) if threading.get_ident() == thread else None
    )
    try:
        yield
    finally:
        handle.remove()


def _cells(count: int, image: torch.Size, grid: Grid | None) -> Grid | None:
    """The largest grid of the image's aspect with at most `count` cells; the rest is a prefix."""
    if grid is not None:
        return grid if 0 < grid[0] * grid[1] <= count else None
    height, width = image
    for rows in range(height, 0, -1):
        columns, left = divmod(rows * width, height)
        if not left and rows * columns <= count:
            return rows, columns
    return None
