"""Running a graph node by node."""

from __future__ import annotations

from torch import fx


class Walker(fx.Interpreter):
    """An interpreter that leaves errors as they are: torch's own writes the graph behind them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
