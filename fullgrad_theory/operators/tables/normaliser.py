"""Normalisation layers: of no degree in their input with eps > 0; under `freeze`, linear in it."""

from collections.abc import Mapping
from typing import Any

from .. import norms, readers
from ..algebra import Algebra
from .row import Table, rows

normaliser = rows(Algebra.NORMALISER)


def _runs_on_statistics(arguments: Mapping[str, Any]) -> str | None:
    """It would be affine then, with running_mean a bias leaf."""
    own = arguments["use_input_stats"]
    return None if own else "instance norm with running statistics is a batch norm"


TABLE: Table = (
    *normaliser(
        "layer_norm",
        "input*weight + bias",
        reader=readers.bias_of_last,
        frozen=norms.LAYER_NORM,
    ),
    *normaliser("native_layer_norm", "input*weight + bias ; - ; -", frozen=norms.NATIVE_LAYER_NORM),
    *normaliser(
        "group_norm",
        "input*weight + bias",
        reader=readers.bias_of_second,
        frozen=norms.GROUP_NORM,
    ),
    *normaliser("rms_norm", "input*weight", frozen=norms.RMS_NORM),
    *normaliser(
        "instance_norm",
        "input*weight + bias",
        reader=readers.bias_of_second,
        frozen=norms.INSTANCE_NORM,
        misreads=True,
        refuses=_runs_on_statistics,
    ),
)
