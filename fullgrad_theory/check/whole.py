"""End to end: <c, f> against what is attributed to the input and to the biases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..backward.balanced import rewrite
from ..edits.kinds import Edit
from ..errors import NonFiniteError
from . import words
from .copies import cast, cast_copy
from .gradient import traced_gradient
from .own import Own, compared
from .report import EndToEnd
from .subject import Subject

OWN = "own parameters"
PERTURBED = "perturbed parameters"


@dataclass(frozen=True)
class Whole:
    """One measurement of the whole.

    `parts`: the sum of the contributions' magnitudes relative to the output's. `own`: the user's
    own gradient beside the traced one; what it attributes is what was measured if it is another.
    `unconverged`: what integrals said that missed their tolerance.
    """

    found: EndToEnd
    parts: float
    own: Own
    unconverged: tuple[str, ...] = ()


def end_to_end(
    where: str, subject: Subject, inputs: list[Any], model: Any = None, listens: bool = False
) -> Whole | None:
    """The residual of the whole at flat inputs; None where the output is zero.

    `model`: whose own gradient counts where it is not the traced one; `listens`: it is looked at
    where no gradient reaches, too. Raises `NonFiniteError`.
    """
    subject.tick(f"end to end, {where}", 0, 1)
    traced = traced_gradient(subject, inputs, listens=listens and model is not None)
    if traced is None:
        return None
    own = compared(model, subject, inputs, traced)
    shares = own.shares or traced.shares
    through_biases = sum(shares.through_biases.values())
    absolute = abs(shares.value - shares.through_input - through_biases)
    found = EndToEnd(
        where,
        words.dtype_name(traced.dtype),
        absolute,
        absolute / traced.magnitude,
        shares.through_input / shares.value if shares.value else float("nan"),
        through_biases / shares.value if shares.value else float("nan"),
    )
    return Whole(found, traced.parts, own, traced.unconverged)


def in_precisions(
    dtypes: Iterable[torch.dtype],
    subject: Subject,
    edits: tuple[Edit, ...],
    root: fx.GraphModule,
    inputs: list[Any],
) -> tuple[tuple[EndToEnd, ...], tuple[str, ...]]:
    """The whole measured in lower precisions; and, in words, in which of them it does not run.

    `root` is what `edits` are written over: each precision has a copy cast from the last one.
    """
    found: list[EndToEnd] = []
    refusals: list[str] = []
    for dtype in dtypes:
        root = cast_copy(root, dtype)
        low = replace(subject, module=rewrite(subject.graph, edits, root))
        try:
            whole = end_to_end(PERTURBED, low, [cast(t, dtype) for t in inputs])
        except (RuntimeError, NonFiniteError) as error:
            refusals.append(words.refused(dtype, error))
        else:
            found += [whole.found] if whole else []
    return tuple(found), tuple(refusals)
