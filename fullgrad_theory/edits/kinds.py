"""The edits there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Edit, OwnEdit, Stage
from .freezing import FreezeScale
from .integrating import Integrate
from .pruning import Prune
from .scaling import Scale
from .secants import Secant

KINDS: Mapping[str, type[Edit]] = {
    kind.kind: kind for kind in (Prune, Scale, Secant, FreezeScale, Integrate)
}
OWN: Mapping[str, type[OwnEdit]] = {kind.kind: kind for kind in (Secant, FreezeScale, Integrate)}
"""those that are a mode of a class"""


def edit_of_data(entry: Mapping[str, Any]) -> Edit:
    """The edit that `Edit.data` wrote; KeyError, TypeError or ValueError where it is none."""
    return KINDS[entry["edit"]].of_data(entry)


__all__ = [
    "KINDS",
    "OWN",
    "Edit",
    "FreezeScale",
    "Integrate",
    "OwnEdit",
    "Prune",
    "Scale",
    "Secant",
    "Stage",
    "edit_of_data",
]
