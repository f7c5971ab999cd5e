"""A trained model, traced once, with its explainers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fullgrad_theory import ComputationGraph, Explainer, trace
from fullgrad_theory.data import Sample

from .models import IMAGE


@dataclass(eq=False)
class Ready:
    """`explain` is what `evaluate` takes as its `explainer`. The model takes images of `size` x
    `size`; `samples`: what it is measured on, None for the scenes."""

    name: str
    module: nn.Module
    size: int = IMAGE
    samples: Sequence[Sample] | None = None

    def __post_init__(self) -> None:
        self._made: dict[str, Explainer] = {}

    @cached_property
    def graph(self) -> ComputationGraph:
        first = next(self.module.parameters())
        return trace(self.module, torch.zeros(1, 3, self.size, self.size).to(first))

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        digest = hashlib.sha256()
        for tensor in self.module.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def explainer(self, policy: str) -> Explainer:
        if policy not in self._made:
            self._made[policy] = Explainer(self.graph, policy=policy)
        return self._made[policy]

    def explain(self, model: nn.Module, example: Tensor, policy: Any) -> Explainer:
        return self.explainer(policy)

    def applying(self, methods: Sequence[str]) -> tuple[str, ...]:
        """Those of `methods` that apply to this model, in their order."""
        able = self.explainer("plain").applying()
        return tuple(m for m in methods if m in able)

    def double(self) -> Ready:
        """The same in float64."""
        return Ready(self.name, copy.deepcopy(self.module).double(), self.size, self.samples)
