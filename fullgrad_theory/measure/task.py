"""What is measured of a batch: every metric of every method under every policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..backward.targets import Contrast, SoftmaxWeighted, Target, named_classes
from ..graph.door import home
from ..metrics.curves import Curves
from ..metrics.deletion import Deletion
from ..metrics.table import metric
from .batches import Batch, need_finite
from .results import Results, Row
from .settings import AnyPolicy, Request, one_each


class Explanation(Protocol):
    """The part of `attribution.Map` that metrics need."""

    @property
    def values(self) -> Tensor: ...
    @property
    def output(self) -> Tensor: ...
    @property
    def total(self) -> Tensor | None: ...
    def tokens(self, grid: tuple[int, int], /) -> Tensor: ...
    def pixels(self, size: tuple[int, int], /) -> Tensor: ...


class Explain(Protocol):
    """(images, methods, target) -> method -> explanation; what draws numbers is seeded."""

    def __call__(
        self, x: Tensor, methods: Sequence[str], target: Target, *, seed: int
    ) -> Mapping[str, Explanation]: ...


MakeExplain = Callable[[nn.Module, Tensor, AnyPolicy], Explain]
"""(model, example images, policy) -> how it explains."""

Key = tuple[str, str]
"""(method, policy)"""


@dataclass(frozen=True)
class BatchTask:
    """Explains a batch under every policy, deletes by all maps at once, and reads the metrics.

    `explains`: how it is explained under each policy.
    """

    request: Request
    deletion: Deletion
    explains: Mapping[str, Explain]

    def results(self, batch: Batch) -> Results:
        """A row for every sample, method, policy and metric, in this order."""
        x = batch.images.to(*home(self.deletion.model))
        output = self.deletion.predict(x, self.request.forward_batch)
        need_finite(output, "the model's output", batch.indices)
        if self.request.target == "label":
            batch.need_classes(output.shape[1])
        explained = self._target(batch)
        target = named_classes(explained, output)
        named = explained if isinstance(explained, (Contrast, SoftmaxWeighted)) else target
        maps = self._maps(x, named, seed=batch.indices.start)
        curves = self._curves(x, maps, target, output)
        values = {
            (key, name): _values(name, found, curves.get(_words(key)), batch.masks)
            for key, found in maps.items()
            for name in self.request.metrics
        }
        rows = [
            Row(index, int(batch.labels[i]), int(target[i]), *key, name, values[key, name][i])
            for i, index in enumerate(batch.indices)
            for key in ((m, p) for m in self.request.methods for p in self.explains)
            for name in self.request.metrics
        ]
        return Results.of(rows, {"data": batch.digest})

    def _target(self, batch: Batch) -> Target:
        """What is explained of a batch."""
        target = self.request.target
        if target == "label":
            return batch.labels
        if not one_each(target):
            return target
        return target[batch.indices.start : batch.indices.stop]  # type: ignore[index,return-value]

    def _maps(self, x: Tensor, target: Target, seed: int) -> dict[Key, Explanation]:
        maps: dict[Key, Explanation] = {}
        for policy, explain in self.explains.items():
            made = explain(x, self.request.methods, target, seed=seed)
            maps |= {(method, policy): made[method] for method in self.request.methods}
        return maps

    def _curves(
        self, x: Tensor, maps: Mapping[Key, Explanation], target: Tensor, output: Tensor
    ) -> Mapping[str, Curves]:
        if not any(metric(name).needs == "curves" for name in self.request.metrics):
            return {}
        scores = {_words(key): m.tokens(self.deletion.grid).detach() for key, m in maps.items()}
        return self.deletion.curves(
            x,
            scores,
            target,
            self.request.fractions,
            batch_size=self.request.forward_batch,
            output=output,
        )


def _words(key: Key) -> str:
    return f"{key[0]} under {key[1]}"


def _values(name: str, m: Explanation, curves: Curves | None, masks: Tensor) -> list[float]:
    """One metric of one method and policy: a value an image."""
    chosen = metric(name)
    if chosen.needs == "masks":
        height, width = masks.shape[1:]
        return chosen.compute(m.pixels((height, width)), masks).tolist()
    if chosen.needs == "curves":
        return chosen.compute(curves).tolist()
    if m.total is None:
        return [float("nan")] * len(m.output)
    return chosen.compute(m.output, m.total).tolist()
