"""Prune: one edge carries no gradient."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..operators.record import Operator
from .base import Edit, Stage
from .costs import Policy
from .writing import Writing

detach = torch.ops.aten.detach.default


@dataclass(frozen=True, order=True)
class Prune(Edit):
    """The edge (node, argument) carries no gradient; other consumers of the value keep theirs."""

    argument: str

    kind = "prune"
    stage = Stage.EDGE

    @staticmethod
    def price(policy: Policy, value: Operator | None, modules: Collection[str]) -> int | None:
        """The cost of holding a value fixed that `value` computes (None: an input) in `modules`."""
        if any(policy.keeps(module) for module in modules):
            return None
        return policy.prune if value is None else policy.prune_of_operator(value)

    def words(self, node: str) -> str:
        return f"prune {node}.{self.argument}"

    @property
    def place(self) -> tuple[str, str]:
        return self.kind, self.argument

    @property
    def held(self) -> str:
        return self.argument

    def write(self, writing: Writing) -> None:
        node = writing.nodes[self.node]
        if node.target is operator.getitem:  # what it picks from may be no tensor
            writing.behind(node, detach)
        else:
            writing.on_edge(node, self.argument, detach)
