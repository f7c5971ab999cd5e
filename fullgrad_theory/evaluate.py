"""Evaluate attribution methods, under several policies, on a set of images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .errors import FullgradError, InputError
from .metrics import FRACTIONS, METRICS, Curves, Deletion, metric
from .plan import Plan
from .policies import Policy
from .processes import Processes, processes
from .progress import Tick, progress
from .results import Interval, Results, Row
from .trace import as_module, first_line, home

__all__ = ["Interval", "Results", "Row", "evaluate"]

AnyPolicy = str | Policy | Plan
T = TypeVar("T")


class Sample(Protocol):
    """What is evaluated on: `data.Sample`, or anything with these attributes."""

    @property
    def image(self) -> Tensor: ...
    @property
    def label(self) -> int: ...
    @property
    def mask(self) -> Tensor | None: ...


class Samples(Protocol):
    """A sequence of samples, or a torch Dataset of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


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
    """(images, methods, target (B,)) -> method -> explanation; what draws numbers is seeded."""

    def __call__(
        self, x: Tensor, methods: Sequence[str], target: Tensor, *, seed: int
    ) -> Mapping[str, Explanation]: ...


MakeExplain = Callable[[nn.Module, Tensor, AnyPolicy], Explain]
"""(model, example images, policy) -> how it explains."""


@dataclass(frozen=True)
class _Task:
    samples: Samples
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    fractions: tuple[float, ...]
    by_label: bool
    deletion: Deletion
    explains: Mapping[str, Explain]
    forward_batch: int


def evaluate(
    model: nn.Module,
    samples: Samples,
    methods: str | Sequence[str],
    policies: str | Sequence[str] | Mapping[str, AnyPolicy] = ("plain", "libra"),
    metrics: str | Sequence[str] = tuple(METRICS),
    *,
    target: Literal["prediction", "label"] = "prediction",
    fractions: Sequence[float] = FRACTIONS,
    grid: tuple[int, int] | None = None,
    drop: str | None = None,
    batch_size: int = 16,
    forward_batch: int = 256,
    folder: str | Path | None = None,
    explainer: MakeExplain | None = None,
) -> Results:
    """Every metric of every method under every policy, for every sample: one row each.

    A batch of samples costs one forward, what each policy's `Explainer` needs (one forward and
    backward for all gradient methods), and the forwards of the deletion curves, `forward_batch`
    images at a time. `grid`, `drop`: see `Deletion`. With a `folder`, batches are kept as they are
    done and read when it is called again. Under torchrun, processes share the batches, and all
    return the results of one process. A metric that is not defined for a method or an image is NaN.
    Raises `InputError` for a `folder` with other results, and what `Explainer` raises.
    """
    names = tuple([metrics] if isinstance(metrics, str) else metrics)
    methods = tuple([methods] if isinstance(methods, str) else methods)
    policies = (policies,) if isinstance(policies, str) else policies
    named = policies if isinstance(policies, Mapping) else {name: name for name in policies}
    _check(samples, methods, tuple(policies), names, target, batch_size, forward_batch)
    module = as_module(model)
    device, dtype = home(module)
    example = samples[0].image[None].to(device, dtype)
    deletion = Deletion(module, example, grid, drop)
    settings = {
        "model": _fingerprint(module),
        "samples": len(samples),
        "data": _digest([samples[0].image, samples[len(samples) - 1].image]),
        "methods": methods,
        "policies": {name: _text(policy) for name, policy in named.items()},
        "metrics": names,
        "target": target,
        "fractions": tuple(fractions),
        "grid": deletion.grid,
        "removal": deletion.describe,
        "batch_size": batch_size,
    }
    settings = json.loads(json.dumps(settings))
    with processes() as here:
        kept = _Kept(Path(folder), settings, here.rank) if folder is not None else None
        done = _together(here, kept.read if kept and here.rank == 0 else dict)[0]
        starts = [s for s in range(0, len(samples), batch_size) if s not in done]
        mine = starts[here.rank :: here.count]

        def work() -> dict[int, list[Row]]:
            make = explainer or _explainer()
            task = _Task(
                samples,
                methods,
                names,
                tuple(fractions),
                target == "label",
                deletion,
                {name: make(module, example, policy) for name, policy in named.items()},
                forward_batch,
            )
            with _shown(here) as tick:
                return dict(_batches(task, mine, batch_size, kept, tick))

        for rows in _together(here, work if mine else dict):
            done |= rows
    return Results.of((row for start in sorted(done) for row in done[start]), settings)


def _together(here: Processes, work: Callable[[], T]) -> list[T]:
    """What `work` returns in every process, by rank; if it fails in one, all of them raise."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  first the others are told, who wait for the result
        failure = error
    told = here.from_all((result, None if failure is None else first_line(failure)))
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise FullgradError(f"process {rank} of {here.count} failed: {text}")
    return [found for found, _ in told]


def _batches(
    task: _Task, starts: Sequence[int], size: int, kept: _Kept | None, tick: Tick
) -> Iterator[tuple[int, list[Row]]]:
    """Rows by batch, each kept as soon as it is there."""
    for count, start in enumerate(starts):
        tick("batches", count, len(starts))
        rows = _rows(task, range(start, min(start + size, len(task.samples))))
        if kept is not None:
            kept.write(start, rows)
        yield start, rows


def _rows(task: _Task, indices: range) -> list[Row]:
    """One batch: explain it under every policy, delete by all maps at once, read the metrics."""
    samples = [task.samples[i] for i in indices]
    device, dtype = home(task.deletion.model)
    x = torch.stack([s.image for s in samples]).to(device, dtype)
    labels = torch.tensor([int(s.label) for s in samples])
    masks = _masks(samples)
    output = task.deletion.predict(x, task.forward_batch)
    target = labels.to(device) if task.by_label else output.argmax(1)
    maps: dict[tuple[str, str], Explanation] = {}
    for policy, explain in task.explains.items():
        made = explain(x, task.methods, target, seed=indices.start)
        maps |= {(method, policy): made[method] for method in task.methods}
    curves: Mapping[str, Curves] = {}
    if any(metric(name).needs == "curves" for name in task.metrics):
        scores = {_key(*at): m.tokens(task.deletion.grid).detach() for at, m in maps.items()}
        curves = task.deletion.curves(
            x, scores, target, task.fractions, batch_size=task.forward_batch, output=output
        )
    values = {
        (at, name): _value(name, m, curves.get(_key(*at)), masks)
        for at, m in maps.items()
        for name in task.metrics
    }
    return [
        Row(index, int(labels[i]), int(target[i]), method, policy, name, values[at, name][i])
        for i, index in enumerate(indices)
        for method in task.methods
        for policy in task.explains
        for at in [(method, policy)]
        for name in task.metrics
    ]


def _key(method: str, policy: str) -> str:
    return f"{method} under {policy}"


def _value(name: str, m: Explanation, curves: Curves | None, masks: Tensor) -> list[float]:
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


def _masks(samples: Sequence[Sample]) -> Tensor:
    """(B, H, W); empty where a sample has none."""
    empty = torch.zeros(samples[0].image.shape[-2:], dtype=torch.bool)
    return torch.stack([empty if s.mask is None else s.mask.bool().cpu() for s in samples])


@contextmanager
def _shown(here: Processes) -> Iterator[Tick]:
    """The first process shows its progress, which is that of all."""
    if here.rank:
        yield lambda stage, done, total: None
        return
    with progress("evaluate") as tick:
        yield tick


@dataclass(frozen=True)
class _Kept:
    """Batches in a folder: `settings.json`, and a file of rows for each batch, by its start."""

    folder: Path
    settings: Mapping[str, Any]
    rank: int

    def read(self) -> dict[int, list[Row]]:
        """What is there already; an error where it was made in another way."""
        file = self.folder / "settings.json"
        if file.exists():
            held = json.loads(file.read_text())
            differing = sorted(k for k, v in self.settings.items() if held.get(k) != v)
            if differing:
                raise InputError(
                    f"{self.folder} holds results of another evaluation; it differs in "
                    f"{', '.join(differing)}: choose another folder, or remove this one"
                )
        batches = sorted(self.folder.glob("batch-*.json"))
        return {int(b.stem.split("-")[1]): list(Results.load(b)) for b in batches}

    def write(self, start: int, rows: Sequence[Row]) -> None:
        """A file is there whole or not at all: it is written beside, and then named."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"partial-{self.rank}.json"
        if not (self.folder / "settings.json").exists():
            partial.write_text(json.dumps(self.settings, indent=1))
            os.replace(partial, self.folder / "settings.json")
        Results.of(rows).save(partial)
        os.replace(partial, self.folder / f"batch-{start:08d}.json")


def _explainer() -> MakeExplain:
    from .attribution import Explainer

    return Explainer


def _check(
    samples: Samples,
    methods: Sequence[str],
    policies: Sequence[str],
    metrics: Sequence[str],
    target: str,
    *sizes: int,
) -> None:
    if len(samples) == 0:
        raise InputError("there are no samples to evaluate on")
    for what, given in (("methods", methods), ("policies", policies), ("metrics", metrics)):
        if len(given) == 0 or len(set(given)) < len(given):
            raise InputError(f"{what} must be some names, each once, got {given}")
    for name in metrics:
        metric(name)
    if target not in ("prediction", "label"):
        raise InputError(f"target must be 'prediction' or 'label', got {target!r}")
    if min(sizes) < 1:
        raise InputError(f"batch sizes must be at least 1, got {min(sizes)}")


def _fingerprint(model: nn.Module) -> str:
    """The model's class and a digest of its parameters and buffers."""
    return f"{type(model).__name__} {_digest([*model.parameters(), *model.buffers()])}"


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def _text(policy: AnyPolicy) -> str:
    """A policy by name, or what distinguishes it from others."""
    if isinstance(policy, str):
        return policy
    return "; ".join(map(str, policy)) if isinstance(policy, Plan) else repr(policy)
