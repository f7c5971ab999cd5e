"""`zoo audit`: which architectures, in which processes, and where their rows go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import nn

from ..bars import progress
from ..errors import InputError
from ..extras import require
from ..graph.door import Inputs, Model
from ..zoo import torchvision_models, transformers_models
from ..zoo.audit import audited
from ..zoo.pages import summary
from ..zoo.rows import Architecture, Options, Outcome, Row
from ..zoo.sources import SOURCES, TIMM, TORCHVISION, TRANSFORMERS, Shard, chosen, listed
from ..zoo.store import Store, writing
from ..zoo.workers import Ended, each
from .making import Chosen, create, inputs_of
from .options import Shape
from .page import judging, show

_LARGEST = 512
"""pixels of a side above which an image is made smaller, where the architecture lets it be"""


@dataclass(frozen=True)
class Asked:
    """Which architectures of a source."""

    source: str
    patterns: Sequence[str]
    every: bool
    one_per_family: bool
    shard: Shard


@dataclass(frozen=True)
class Limits:
    """How many processes, and what each of them may take."""

    jobs: int
    seconds: float
    mebibytes: int


def audit(
    asked: Asked, policy: str, numeric: bool, limits: Limits, out: Path, traceback: bool
) -> None:
    """Audit what is not in the file yet, keep each row as it comes, and print the counts."""
    with judging(traceback=traceback):
        architectures = _architectures(asked)
        options = Options(
            policy, numeric, limits.seconds, limits.mebibytes,
            metadata.version("fullgrad-theory"), torch.__version__,
        )  # fmt: skip
        with writing(out) as store:
            blank = {a: Row.of(a, options, Outcome.DIED) for a in architectures}
            known = {a: store.rows.get(row.key) for a, row in blank.items()}
            left = [a for a, row in known.items() if row is None or not row.holds(options)]
            _run(left, options, limits, store)
            rows = [store.rows[row.key] for row in blank.values()]
    before = f", {len(rows) - len(left)} of them before" if len(left) < len(rows) else ""
    show(Text(f"{summary(rows)}{before}. In {out}; fullgrad-theory zoo show {out} lists them."))


def _architectures(asked: Asked) -> list[Architecture]:
    if not (asked.patterns or asked.every or asked.one_per_family):
        raise InputError("name architectures by patterns, or say --one-per-family or --all")
    with progress(f"listing {asked.source}"):
        found = listed(asked.source)
    for architecture in found:  # a shape that is none is met before there is work
        for text in architecture.shapes:
            Shape.parse(text)
    return chosen(found, asked.patterns, asked.one_per_family, asked.shard)


def _run(
    architectures: Sequence[Architecture], options: Options, limits: Limits, store: Store
) -> None:
    work = partial(audited, build, options)
    packages = {a.source for a in architectures if a.source in SOURCES}
    preload = (__name__, "torch.export", *sorted(packages))
    found = each(work, architectures, limits.jobs, limits.seconds, limits.mebibytes, preload)
    with progress("auditing", after=0.0) as tick:
        tick(architectures[0].name if architectures else "", 0, len(architectures))
        for done, (architecture, result) in enumerate(found, 1):
            if isinstance(result, Ended):
                row = Row.of(architecture, options, result.outcome)
                row = replace(row, failure=result.words, memory=result.memory)
                result = row.ended()
            store.keep(result)
            tick(architecture.name, done, len(architectures))


# --------------------------------------------------------------------------- in a worker


def build(architecture: Architecture, meta: bool) -> tuple[Model, Inputs]:
    """A model with random weights and its inputs, of any source."""
    if architecture.source == TORCHVISION:
        return torchvision_models.built(architecture.name, meta)
    if architecture.source == TRANSFORMERS:  # small, and on meta some cannot be made
        return transformers_models.built(architecture.name)
    if architecture.source == TIMM:
        made = replace(_timm(architecture.name), device="meta" if meta else None)
        model = create(made)
        return model, inputs_of(model, made)
    made = Chosen(architecture.target, [Shape.parse(text) for text in architecture.shapes])
    model = create(made)
    given = getattr(model, "example_input_array", None)  # as Lightning's modules say it
    if given is None or made.shapes:
        given = inputs_of(model, made)
    return (
        (model.to("meta"), _on_meta(given))
        if meta and isinstance(model, nn.Module)
        else (model, given)
    )


def _on_meta(inputs: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)


def _timm(name: str) -> Chosen:
    """At its own size, or at the largest half of it that is no larger than `_LARGEST`."""
    config = require("timm", "vision").get_pretrained_cfg(name)
    if config is None or max(config.input_size[1:]) <= _LARGEST:
        return Chosen(name)
    channels, height, width = config.input_size
    while max(height, width) > _LARGEST:
        height, width = height // 2, width // 2
    if config.fixed_input_size:
        return Chosen(name, keywords={"img_size": (height, width)})
    return Chosen(name, [Shape((1, channels, height, width))])
