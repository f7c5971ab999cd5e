"""Deletion: remove patches in the order of a map, and watch the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..backward.targets import Target, named_classes
from ..bars import Tick
from ..errors import InputError
from ..graph.door import Inputs, Model, as_module, split_inputs
from .curves import FRACTIONS, Curves
from .removing import logits_of, removal
from .sequence import Grid


class Deletion:
    """Removes patches from the images of one model, which is not changed.

    `inputs`: example images (B, 3, H, W), if the model does not say what it takes. `grid`: rows and
    columns of patches, found where there are tokens. `drop`: "tokens", "zeros" or "pixels" (see
    `removal`), the best possible by default; `describe` says what it is, `way` in one word.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs = None,
        grid: Grid | None = None,
        drop: str | None = None,
    ) -> None:
        self.model = as_module(model)
        args, kwargs = split_inputs(model, inputs)
        if kwargs or len(args) != 1 or args[0].dim() != 4:
            raise InputError("deletion needs a model of one argument, images (B, 3, H, W)")
        example = args[0][:1].repeat(2, 1, 1, 1)
        logits_of(self.model, example)
        found = removal(self.model, example, grid, drop)
        self.grid, self.way, self.describe, self._remove = (
            found.grid,
            found.way,
            found.describe,
            found.remove,
        )

    def predict(self, x: Tensor, batch_size: int = 256) -> Tensor:
        """The model's output for whole images: (B, classes)."""
        return torch.cat([logits_of(self.model, part) for part in x.split(batch_size)])

    def curves(
        self,
        x: Tensor,
        scores: Mapping[str, Tensor],
        target: Target = None,
        fractions: Sequence[float] = FRACTIONS,
        *,
        batch_size: int = 256,
        output: Tensor | None = None,
        tick: Tick | None = None,
    ) -> dict[str, Curves]:
        """Curves of every map in `scores`, name -> (B, h, w) on the grid, for images `x`.

        All images and maps with one fraction removed share batches of `batch_size`; where the same
        patches of an image are kept twice, it is run once. At most B x maps x 2 x fractions images
        go through the model, and the B whole ones where `output` (of `predict`) is not given.
        """
        cells = self.grid[0] * self.grid[1]
        removed = [round(f * cells) for f in fractions]
        self._check(x, scores, fractions, removed)
        output = self.predict(x, batch_size) if output is None else output
        target = named_classes(target, output)
        orders = [_order(values).to(x.device) for values in scores.values()]
        start, right = _judge(output, target)
        columns: list[tuple[Tensor, Tensor]] = []
        for done, count in enumerate(removed):
            if tick is not None:
                tick("deletion", done, len(removed))
            kept = torch.cat([k for o in orders for k in (o[:, count:], o[:, : cells - count])])
            columns.append(_judge(*self._removed(x, kept, target, batch_size)))
        shape = (len(scores), 2, len(x), len(fractions))
        logs, rights = (torch.stack(c, -1).reshape(shape) for c in zip(*columns, strict=True))
        return {
            name: Curves(tuple(fractions), start, right, log[0], log[1], hit[0], hit[1])
            for name, log, hit in zip(scores, logs, rights, strict=True)
        }

    def _removed(
        self, x: Tensor, kept: Tensor, target: Tensor, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Outputs for rows of kept patches, (R, K), whose images repeat; and the rows' targets."""
        image = torch.arange(len(x), device=x.device).repeat(len(kept) // len(x))
        rows = torch.cat([image[:, None], kept.sort(1).values], 1)
        distinct, where = rows.unique(dim=0, return_inverse=True)
        parts = [self._remove(x[p[:, 0]], p[:, 1:]) for p in distinct.split(batch_size)]
        return torch.cat(parts)[where], target[image]

    def _check(
        self,
        x: Tensor,
        scores: Mapping[str, Tensor],
        fractions: Sequence[float],
        removed: Sequence[int],
    ) -> None:
        cells = self.grid[0] * self.grid[1]
        if not scores:
            raise InputError("no maps were given to delete by")
        for name, values in scores.items():
            if tuple(values.shape) != (len(x), *self.grid):
                raise InputError(
                    f"the map {name!r} has shape {tuple(values.shape)}; for these images and this "
                    f"model's patches it must be {(len(x), *self.grid)}"
                )
            if not bool(values.isfinite().all()):
                raise InputError(f"the map {name!r} holds NaN or Inf, which have no order")
        ordered = list(fractions) == sorted(set(fractions))
        if not fractions or not ordered or not 0 < min(fractions) <= max(fractions) < 1:
            raise InputError(f"fractions must grow from above 0 to below 1, got {fractions}")
        if removed[0] < 1 or cells - removed[-1] < 2:
            raise InputError(
                f"a grid of {self.grid[0]} x {self.grid[1]} is too coarse for these fractions: at "
                "least one patch must be removed and two must stay"
            )


def _order(values: Tensor) -> Tensor:
    """Patches from the most to the least influential, (B, N); ties in reading order."""
    return values.detach().flatten(1).argsort(dim=1, descending=True, stable=True)


def _judge(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the target, and whether it is the prediction."""
    log = output.double().log_softmax(1).gather(1, target[:, None])[:, 0]
    return log, output.argmax(1) == target
