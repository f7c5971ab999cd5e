"""The gradient of the whole traced graph under one cotangent, and what it attributes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backward.running import finite_products, inner
from ..errors import NonConvergenceWarning, NonFiniteError
from . import words
from .listening import Listening, Sleep
from .local import node_by_node
from .numeric import aligned, float_leaves, gradients, paired
from .subject import Subject


@dataclass(frozen=True)
class Shares:
    """<c, f>, and what of it a gradient attributes: <x, G_x>, and <b, G_b> for each bias node."""

    value: float
    through_input: float
    through_biases: Mapping[str, float]


@dataclass(frozen=True)
class Gradient:
    """A gradient by the graph's sources under `cotangents`, one an output.

    `by_leaf`: by its parameters and tensors, under their names. `magnitude`: sum |c f|; `parts`:
    the sum of the contributions' magnitudes relative to it. `taken`: values that were outputs as
    well, and `by_value`: the gradient by some; `sleep`: what no gradient reached, where that was
    listened to; `unconverged`: what integrals said that missed their tolerance.
    """

    outputs: list[Tensor]
    cotangents: list[Tensor]
    by_source: dict[str, Tensor]
    by_leaf: dict[str, Tensor]
    shares: Shares
    magnitude: float
    parts: float
    dtype: torch.dtype
    taken: Sequence[str] = ()
    by_value: Mapping[str, Tensor] = field(default_factory=dict)
    sleep: Sleep = field(default_factory=Sleep)
    unconverged: tuple[str, ...] = ()


def traced_gradient(
    subject: Subject,
    inputs: list[Any],
    cotangents: list[Tensor] | None = None,
    taken: Sequence[str] = (),
    watched: Collection[str] = (),
    listens: bool = False,
    loud: float = 1.0,
) -> Gradient | None:
    """The gradient of the subject at flat inputs; None where the output is zero.

    `cotangents`: left out, random ones with the signs of the outputs. `taken`: names of values that
    are the first outputs. `watched`: of those by which the gradient is asked for, too. `listens`:
    to what no gradient reaches. `loud`: the size of random cotangents.
    Raises `NonFiniteError` where the output is not finite, and names the first such node.
    """
    biases: dict[str, float] = {}
    parts: list[float] = []

    def on_bias(name: str, g: Tensor, added: Tensor) -> None:
        biases[name] = biases.get(name, 0.0) + inner(g, added)
        parts.append(_size(g, added))

    run = Listening(subject, on_bias, listens, {*taken, *watched})
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # theirs are shown where the model runs as it is
        warnings.simplefilter("always", NonConvergenceWarning)
        outputs = float_leaves(run.run(*inputs, enable_io_processing=False))
        outputs = [*(_finite(run.taken[name]) for name in taken), *outputs]
        if cotangents is None:
            cotangents = [loud * aligned(o, subject.seed) for o in outputs]
        pairs = zip(cotangents, outputs, strict=True)
        magnitude = sum(float((c * o.detach()).abs().sum()) for c, o in pairs)
        if magnitude == 0.0 and not taken:
            return None
        value = paired(cotangents, outputs)
        if not torch.isfinite(value.detach()):
            node_by_node(subject, inputs)  # names the first node
            raise NonFiniteError(words.INFINITE_OUTPUT)
        sources = list(run.sources.values())
        named = (*subject.module.named_parameters(), *subject.module.named_buffers())
        leaves = {n: p for n, p in named if p.requires_grad}
        values = {name: run.taken[name] for name in watched}
        found = iter(gradients(value, [*sources, *leaves.values(), *values.values()]))
        grads = [next(found) for _ in sources]
    through_input = sum(inner(g, x) for g, x in zip(grads, sources, strict=True))
    parts += [_size(g, x) for g, x in zip(grads, sources, strict=True)]
    shares = Shares(float(value.detach()), through_input, biases)
    return Gradient(
        [o.detach() for o in outputs],
        cotangents,
        dict(zip(run.sources, grads, strict=True)),
        dict(zip(leaves, found, strict=False)),
        shares,
        magnitude,
        sum(parts) / magnitude if magnitude else 0.0,
        value.dtype,
        taken,
        dict(zip(values, found, strict=True)),
        run.asleep,
        tuple(dict.fromkeys(str(warning.message) for warning in caught)),
    )


def _finite(value: Tensor) -> Tensor:
    """0 where it is infinite, as a mask is: nothing is attributed to that."""
    finite = value.detach().isfinite()
    return value if bool(finite.all()) else value.where(finite, 0.0)


def _size(g: Tensor, value: Tensor) -> float:
    return float(finite_products(g.detach(), value.detach()).abs().sum())
