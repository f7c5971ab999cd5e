"""A trained model, traced once, with its explainers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fullgrad_theory import ComputationGraph, Explainer, Map, Target, trace

from .models import IMAGE
from .setup import BARE


@dataclass(eq=False)
class Ready:
    """`explain` is what `evaluate` takes as its `explainer`."""

    name: str
    module: nn.Module

    def __post_init__(self) -> None:
        self._made: dict[str, Extended] = {}

    @cached_property
    def graph(self) -> ComputationGraph:
        first = next(self.module.parameters())
        return trace(self.module, torch.zeros(1, 3, IMAGE, IMAGE, dtype=first.dtype))

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        digest = hashlib.sha256()
        for tensor in self.module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def explainer(self, policy: str) -> Extended:
        if policy not in self._made:
            self._made[policy] = Extended(Explainer(self.graph, policy=policy))
        return self._made[policy]

    def explain(self, model: nn.Module, example: Tensor, policy: Any) -> Extended:
        return self.explainer(policy)

    def applying(self, methods: Sequence[str]) -> tuple[str, ...]:
        """Those of `methods` that apply to this model, in their order."""
        able = self.explainer("plain").explainer.applying()
        return tuple(m for m in methods if m in able)

    def double(self) -> Ready:
        """The same in float64."""
        return Ready(self.name, copy.deepcopy(self.module).double())


@dataclass(frozen=True, eq=False)
class Extended:
    """An `Explainer`, and one method more: FullGrad+ without its bias maps.

    The bias maps alone are FullGrad less input x gradient, on the grid of tokens.
    """

    explainer: Explainer

    def __call__(
        self, x: Tensor, methods: Sequence[str], target: Target, *, seed: int = 0
    ) -> Mapping[str, Map]:
        asked = [m for m in methods if m != BARE]
        if BARE not in methods:
            return self.explainer(x, asked, target, seed)
        parts = ("fullgrad+", "fullgrad", "input-x-gradient")
        made = self.explainer(x, [*dict.fromkeys((*asked, *parts))], target, seed)
        whole = made["fullgrad+"]
        rows, columns = whole.values.shape[1:]
        biases = made["fullgrad"].values - made["input-x-gradient"].tokens((rows, columns))
        return made | {BARE: replace(whole, method=BARE, values=whole.values - biases)}
