"""The model that a command is about, and its inputs: timm's by name, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bars import progress
from ..errors import InputError, unknown_name
from ..extras import require
from ..graph.door import Model, default_inputs, home
from ..graph.sources import said
from .options import Dtype, Shape, draw
from .target import is_target, load


@dataclass(frozen=True)
class Chosen:
    """What the command line says of a model."""

    name: str
    shapes: list[Shape] | None = None
    weights: Path | None = None
    pretrained: bool = False
    device: str | None = None
    dtype: Dtype | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """what timm makes the model with besides"""

    @property
    def untrained(self) -> bool:
        """Whether the weights are random; what a user's own code makes of them is not known."""
        return not (is_target(self.name) or self.pretrained or self.weights)


@dataclass(frozen=True)
class Wanted:
    """What of an output is explained, as the command line says it; None is the prediction.

    `target` rather than `against`, of the output of that name. `position`: of a token, where each
    has scores, counted from the end if negative.
    """

    output: str | None = None
    target: str | None = None
    against: str | None = None
    position: int | None = None


def create(chosen: Chosen, otherwise: str = "cpu") -> Model:
    """A model in eval mode: timm's with seeded random weights or loaded ones, or the user's own.

    `otherwise`: the device where none is named.
    """
    with progress(f"creating {chosen.name}"):
        torch.manual_seed(0)
        return _own(chosen) if is_target(chosen.name) else _timm(chosen, otherwise)


def _timm(chosen: Chosen, otherwise: str) -> nn.Module:
    device = chosen.device or otherwise
    meta = torch.device(device).type == "meta"
    if chosen.pretrained + (chosen.weights is not None) + meta > 1:
        raise InputError("choose one of --weights, --pretrained and --device meta")
    timm = require("timm", "vision")
    if not timm.is_model(chosen.name):
        error = unknown_name("model", chosen.name, timm.list_models())
        raise type(error)(f"{error}; one of your own is package.module:attribute")
    with torch.device("meta" if meta else "cpu"):
        more = {"pretrained": chosen.pretrained, **chosen.keywords}
        model = loaded(timm.create_model, chosen.name, **more)
    _weights(model, chosen.weights)
    created: nn.Module = model.to(device, getattr(torch, chosen.dtype or Dtype.FLOAT32))
    return created.eval()


def _own(chosen: Chosen) -> Model:
    """The user's model as their code makes it, then moved and cast where an option says so."""
    name = chosen.name
    if chosen.pretrained:
        raise InputError(f"--pretrained is for timm models; let {name} load its own weights")
    model = load(name)
    if not isinstance(model, nn.Module):
        if chosen.weights is not None:
            raise InputError(f"{name} is a function, which --weights cannot be loaded into")
        return model
    _weights(model, chosen.weights)
    cast = getattr(torch, chosen.dtype) if chosen.dtype else None
    return loaded(lambda moved, _: moved.to(chosen.device, cast), model, name)


def _weights(model: nn.Module, file: Path | None) -> None:
    """By timm's loader, which knows safetensors and nested checkpoints."""
    if file is not None:
        timm = require("timm.models", "vision")
        loaded(timm.load_checkpoint, model, str(file), weights_only=True)


def loaded(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Whatever timm, its download or a checkpoint raises is the user's error, in one line."""
    try:
        return load(*args, **kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        words = " ".join(line.strip() for line in said(error).strip().splitlines()[:2])
        raise InputError(f"cannot load {args[-1]}: {type(error).__name__}: {words}") from error


def inputs_of(model: Model, chosen: Chosen) -> tuple[Tensor, ...]:
    """What --input says, else what the model itself says it takes."""
    at, kind = home(model)
    if chosen.shapes:
        if not isinstance(model, nn.Module):
            at = torch.device(chosen.device or at)
            kind = getattr(torch, chosen.dtype) if chosen.dtype else kind
        return draw(chosen.shapes, at, kind)
    try:
        return default_inputs(model)
    except InputError:
        raise InputError(
            "the model does not say what it takes: give each argument of its forward() a shape, "
            "for example --input 1,3,224,224"
        ) from None
