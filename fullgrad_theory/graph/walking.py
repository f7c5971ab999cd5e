"""Running a graph node by node."""

from __future__ import annotations

from typing import Any

from torch import fx


class Walker(fx.Interpreter):
    """An interpreter that leaves errors as they are: torch's own writes the graph behind them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call returns; of one that saves work in the backward, what it stands for: every
        node that the cotangent passes is looked at."""
        watched = getattr(target, "watched", None)
        return super().call_function(target, args, kwargs) if watched is None else args[watched]
