"""What the steps of a check run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..bars import Tick
from ..graph.computation import ComputationGraph
from ..plan.labelling import Degrees


@dataclass(frozen=True)
class Subject:
    """A graph written as a module that runs, and the labels of the graph under what was written.

    `seed`: of all random cotangents.
    """

    module: fx.GraphModule
    graph: ComputationGraph
    labels: Degrees
    seed: int
    tick: Tick

    def where(self, name: str) -> str:
        """A node of the module for a reader; what was written in has its name alone."""
        return self.graph.describe(name) if name in self.graph.nodes else name
