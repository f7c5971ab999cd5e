"""Evaluate attribution methods, under several policies, on a set of images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..backward.targets import Target
from ..bars import Tick, progress
from ..errors import InputError
from ..graph.door import as_module, home
from ..metrics.curves import FRACTIONS
from ..metrics.deletion import Deletion
from ..metrics.table import METRICS
from .batches import Reader, Samples
from .results import Interval, Results, Row
from .settings import AnyPolicy, Request, distinct_names, one_each
from .store import KeptBatches
from .task import BatchTask, MakeExplain
from .workers import Processes, processes, together

__all__ = ["Interval", "Results", "Row", "evaluate"]


def evaluate(
    model: nn.Module,
    samples: Samples,
    methods: str | Sequence[str],
    policies: str | Sequence[str] | Mapping[str, AnyPolicy] = ("plain", "libra"),
    metrics: str | Sequence[str] = tuple(METRICS),
    *,
    target: Target = "prediction",
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
    images at a time. `target`: "label", or a `Target` that names a class, or one for each of the
    samples; deletion curves follow that class. `grid`, `drop`: see `Deletion`. With a `folder`,
    batches are kept as they are done; called again, it reads their samples and compares them, and
    computes the rest. Under torchrun, processes share the batches, and all return the results of
    one process. A metric that is not defined for a method or an image is NaN.
    Raises `InputError` for a `folder` with other results and for samples that do not fit,
    `NonFiniteError` for NaN, and what `Explainer` raises.
    """
    if len(samples) == 0:
        raise InputError("there are no samples to evaluate on")
    names = distinct_names("policies", policies)
    request = Request(
        distinct_names("methods", methods),
        policies if isinstance(policies, Mapping) else {name: name for name in names},
        distinct_names("metrics", metrics),
        target,
        tuple(fractions),
        batch_size,
        forward_batch,
    )
    if one_each(target) and len(target) != len(samples):  # type: ignore[arg-type]
        raise InputError(f"{len(target)} targets for {len(samples)} samples")  # type: ignore[arg-type]
    module, reader = as_module(model), Reader(samples, batch_size)
    example = reader.first[None].to(*home(module))
    deletion = Deletion(module, example, grid, drop)
    settings = request.settings(module, len(samples), deletion)
    with processes() as here:
        kept = None
        if folder is not None:
            output = deletion.predict(example)[0]
            kept = KeptBatches(Path(folder), settings, output, here.rank)
        done = together(here, kept.read if kept and here.rank == 0 else dict)[0]
        together(here, lambda: _need_same(done, reader, here))
        mine = [start for start in reader.starts if start not in done][here.rank :: here.count]

        def work() -> dict[int, Results]:
            if not mine:
                return {}
            make = explainer or _explainer()
            explains = {n: make(module, example, p) for n, p in request.policies.items()}
            return _measured(BatchTask(request, deletion, explains), reader, mine, kept, here)

        for made in together(here, work):
            done |= made
    return _joined([done[start] for start in sorted(done)], settings)


def _explainer() -> MakeExplain:
    from ..attribution.explainer import Explainer

    return Explainer


def _need_same(done: Mapping[int, Results], reader: Reader, here: Processes) -> None:
    """Batches that were kept are of the very samples given now; each process reads its share.

    Reading them again is cheap beside what made them, and nothing less tells: labels and masks may
    have changed, or any image.
    """
    mine = sorted(done)[here.rank :: here.count]
    with _shown(here) as tick:
        for count, start in enumerate(mine):
            tick("comparing what was kept", count, len(mine))
            batch = reader.read(start)
            if batch.digest != done[start].settings["data"]:
                raise InputError(
                    f"the folder's batch-{start:08d}.json was made of other images, labels or "
                    f"masks than samples {start} to {batch.indices[-1]} have now: choose another "
                    "folder, or remove this one; samples drawn anew at each reading cannot be kept"
                )


def _measured(
    task: BatchTask,
    reader: Reader,
    starts: Sequence[int],
    kept: KeptBatches | None,
    here: Processes,
) -> dict[int, Results]:
    """Results by batch, each kept as soon as it is there."""
    found = {}
    with _shown(here) as tick:
        for count, start in enumerate(starts):
            tick("batches", count, len(starts))
            found[start] = task.results(reader.read(start))
            if kept is not None:
                kept.write(start, found[start])
    return found


def _joined(parts: Sequence[Results], settings: Mapping[str, Any]) -> Results:
    """All batches in order, with one digest of their samples."""
    data = hashlib.sha256("".join(p.settings["data"] for p in parts).encode()).hexdigest()[:16]
    return Results.of((row for part in parts for row in part), {**settings, "data": data})


@contextmanager
def _shown(here: Processes) -> Iterator[Tick]:
    """The first process shows its progress, which is that of all."""
    if here.rank:
        yield lambda stage, done, total: None
        return
    with progress("evaluate") as tick:
        yield tick
