"""Evaluate attribution methods, under several policies, on a set of images."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..bars import Tick, progress
from ..data.sample import need_one_size
from ..edits.policy import Policy
from ..errors import FullgradError, InputError, NonFiniteError
from ..graph.door import as_module, home
from ..graph.sources import first_line
from ..metrics.curves import FRACTIONS, Curves
from ..metrics.deletion import Deletion
from ..metrics.table import METRICS, metric
from ..plan.plan import Plan
from .results import Interval, Results, Row
from .workers import Processes, processes

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
class _Batch:
    """Samples that were read: `images` (B, 3, H, W), `labels` (B,), `masks` (B, h, w)."""

    indices: range
    images: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def digest(self) -> str:
        return _digest([self.images, self.labels, self.masks])


Read = Callable[[int], _Batch]
"""Where a batch starts -> the batch."""


@dataclass(frozen=True)
class _Task:
    read: Read
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
    done; called again, it reads their samples and compares them, and computes the rest. Under
    torchrun, processes share the batches, and all return the results of one process. A metric that
    is not defined for a method or an image is NaN.
    Raises `InputError` for a `folder` with other results and for samples that do not fit,
    `NonFiniteError` for NaN, and what `Explainer` raises.
    """
    names = tuple([metrics] if isinstance(metrics, str) else metrics)
    methods = tuple([methods] if isinstance(methods, str) else methods)
    policies = (policies,) if isinstance(policies, str) else policies
    named = policies if isinstance(policies, Mapping) else {name: name for name in policies}
    _check(samples, methods, tuple(policies), names, target, batch_size, forward_batch)
    module = as_module(model)
    device, dtype = home(module)
    first = _sample(samples, 0).image
    _need_finite(first[None], "the image", range(1))
    example = first[None].to(device, dtype)
    deletion = Deletion(module, example, grid, drop)
    settings = {
        "model": _fingerprint(module),
        "samples": len(samples),
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

    def read(start: int) -> _Batch:
        return _read(samples, range(start, min(start + batch_size, len(samples))), first)

    with processes() as here:
        kept = None
        if folder is not None:
            kept = _Kept(Path(folder), settings, deletion.predict(example)[0], here.rank)
        done = _together(here, kept.read if kept and here.rank == 0 else dict)[0]
        _together(here, lambda: _need_same(done, read, here))
        starts = [s for s in range(0, len(samples), batch_size) if s not in done]
        mine = starts[here.rank :: here.count]

        def work() -> dict[int, Results]:
            make = explainer or _explainer()
            task = _Task(
                read,
                methods,
                names,
                tuple(fractions),
                target == "label",
                deletion,
                {name: make(module, example, policy) for name, policy in named.items()},
                forward_batch,
            )
            with _shown(here) as tick:
                return dict(_batches(task, mine, kept, tick))

        for made in _together(here, work if mine else dict):
            done |= made
    parts = [done[start] for start in sorted(done)]
    data = hashlib.sha256("".join(p.settings["data"] for p in parts).encode()).hexdigest()[:16]
    return Results.of((row for part in parts for row in part), settings | {"data": data})


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
    task: _Task, starts: Sequence[int], kept: _Kept | None, tick: Tick
) -> Iterator[tuple[int, Results]]:
    """Results by batch, each kept as soon as it is there, with the digest of its samples."""
    for count, start in enumerate(starts):
        tick("batches", count, len(starts))
        batch = task.read(start)
        results = Results.of(_rows(task, batch), {"data": batch.digest})
        if kept is not None:
            kept.write(start, results)
        yield start, results


def _need_same(done: Mapping[int, Results], read: Read, here: Processes) -> None:
    """Batches that were kept are of the very samples given now; each process reads its share.

    Reading them again is cheap beside what made them, and nothing less tells: labels and masks may
    have changed, or any image.
    """
    mine = sorted(done)[here.rank :: here.count]
    with _shown(here) as tick:
        for count, start in enumerate(mine):
            tick("comparing what was kept", count, len(mine))
            batch = read(start)
            if batch.digest != done[start].settings["data"]:
                raise InputError(
                    f"the folder's batch-{start:08d}.json was made of other images, labels or "
                    f"masks than samples {start} to {batch.indices[-1]} have now: choose another "
                    "folder, or remove this one; samples drawn anew at each reading cannot be kept"
                )


def _sample(samples: Samples, index: int) -> Sample:
    """One sample; an error where it is not made like one."""
    sample = samples[index]
    lacking = [name for name in ("image", "label", "mask") if not hasattr(sample, name)]
    if lacking:
        raise InputError(
            f"sample {index} is a {type(sample).__name__} without {', '.join(lacking)}; every "
            "sample has an image, a label and a mask (or None), as data.Sample does"
        )
    if not isinstance(sample.image, Tensor) or sample.image.dim() != 3:
        shape = tuple(getattr(sample.image, "shape", ())) or type(sample.image).__name__
        raise InputError(f"sample {index} needs an image tensor (3, H, W), its image is {shape}")
    return sample


def _read(samples: Samples, indices: range, first: Tensor) -> _Batch:
    """A batch; its images are of the size of the `first` of all, for which the model was tried."""
    found = [_sample(samples, i) for i in indices]
    images = [s.image for s in found]
    need_one_size([first, *images], "images")
    x = torch.stack(images)
    _need_finite(x, "the image", indices)
    labels = torch.tensor([int(s.label) for s in found])
    return _Batch(indices, x, labels, _masks(found))


def _need_finite(values: Tensor, what: str, indices: range) -> None:
    """`values`: one row a sample."""
    broken = ~values.detach().flatten(1).isfinite().all(1)
    if bool(broken.any()):
        raise NonFiniteError(
            f"{what} of sample {indices[int(broken.nonzero()[0])]} holds NaN or Inf; leave the "
            "sample out, or look at what made it"
        )


def _need_labels(labels: Tensor, classes: int, indices: range) -> None:
    """Every label is a class: a negative one would silently count from the last."""
    for index, label in zip(indices, labels.tolist(), strict=True):
        if not 0 <= label < classes:
            raise InputError(
                f"sample {index} has the label {label}, the model {classes} classes: labels must "
                f"be 0 to {classes - 1} for target='label'"
            )


def _rows(task: _Task, batch: _Batch) -> list[Row]:
    """One batch: explain it under every policy, delete by all maps at once, read the metrics."""
    indices, labels, masks = batch.indices, batch.labels, batch.masks
    device, dtype = home(task.deletion.model)
    x = batch.images.to(device, dtype)
    output = task.deletion.predict(x, task.forward_batch)
    _need_finite(output, "the model's output", indices)
    if task.by_label:
        _need_labels(labels, output.shape[1], indices)
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
    """(B, h, w), of the image's size or of the masks' own; empty where a sample has none."""
    given = [s.mask.bool().cpu() for s in samples if s.mask is not None]
    size = given[0].shape if given else samples[0].image.shape[-2:]
    empty = torch.zeros(size, dtype=torch.bool)
    need_one_size([empty, *given], "masks")
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
    """Batches in a folder: `settings.json`, and a file of results for each batch, by its start.

    `output`: the model's for the first sample. It is kept with the settings, because a digest of
    the parameters knows nothing of the code that uses them; and compared as numbers, because other
    devices or threads round otherwise.
    """

    folder: Path
    settings: Mapping[str, Any]
    output: Tensor
    rank: int

    def read(self) -> dict[int, Results]:
        """What is there already; an error where it was made in another way."""
        file = self.folder / "settings.json"
        batches = sorted(self.folder.glob("batch-*.json"))
        if not batches and not file.exists():
            return {}
        instead = "choose another folder, or remove this one"
        try:
            held = dict(json.loads(file.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{file} holds no settings: {error}; {instead}") from error
        found = {int(b.stem.split("-")[1]): Results.load(b) for b in batches}
        if "output" not in held or any("data" not in part.settings for part in found.values()):
            raise InputError(
                f"{self.folder} was kept by an earlier version, without what tells whether its "
                f"results are of this model and of these samples: {instead}"
            )
        differing = sorted(k for k, v in self.settings.items() if held.get(k) != v)
        if not differing and not self._same_output(held["output"]):
            differing = ["the model's output for the first sample"]
        if differing:
            raise InputError(
                f"{self.folder} holds results of another evaluation; it differs in "
                f"{', '.join(differing)}: {instead}"
            )
        return found

    def _same_output(self, held: Sequence[float]) -> bool:
        """Up to the root of the dtype's precision: far above rounding, far below another model."""
        then, now = torch.tensor(held, dtype=torch.float64), self.output.double().cpu()
        bound = torch.finfo(self.output.dtype).eps ** 0.5 * now.abs().max()
        return then.shape == now.shape and bool((then - now).abs().max() <= bound)

    def write(self, start: int, results: Results) -> None:
        """A file is there whole or not at all: it is written beside, and then named."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"partial-{self.rank}.json"
        if not (self.folder / "settings.json").exists():
            kept = {**self.settings, "output": self.output.tolist()}
            partial.write_text(json.dumps(kept, indent=1))
            os.replace(partial, self.folder / "settings.json")
        results.save(partial)
        os.replace(partial, self.folder / f"batch-{start:08d}.json")


def _explainer() -> MakeExplain:
    from ..attribution.explainer import Explainer

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
    """The model's class, and digests of its modules as they print and of what they hold."""
    printed = re.sub(r" at 0x[0-9a-f]+", "", str(model))  # addresses change from run to run
    modules = hashlib.sha256(printed.encode()).hexdigest()[:8]
    held = _digest([*model.parameters(), *model.buffers()])
    return f"{type(model).__name__} {modules} {held}"


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
