"""Fake values: what a call returns, in shapes and dtypes, without running it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def fake_mode(graph: fx.Graph) -> Any:
    """The fake tensor mode under which a graph was exported, None where it holds no tensor."""
    values = (leaf for n in graph.nodes for leaf in pytree.tree_leaves(n.meta.get("val")))
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next((mode for mode in modes if mode is not None), None)


def fake_call(mode: Any, node: fx.Node) -> tuple[list[Any], Any]:
    """The fake values of a call's operands, and what the call returns for them.

    What the call asks of sizes is no condition on the model, it would pin an open batch.
    """
    given = {n: n.meta["val"] for n in node.all_input_nodes}
    given = pytree.tree_map_only(
        Tensor, lambda t: t if hasattr(t, "fake_mode") else mode.from_tensor(t), given
    )
    args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
    sizes = getattr(mode, "shape_env", None)
    with nullcontext() if sizes is None else sizes.suppress_guards(), mode, torch.no_grad():
        return list(given.values()), node.target(*args, **kwargs)  # type: ignore[operator]


def fill_fake_values(module: fx.GraphModule) -> None:
    """Give a fake value to every node that the normalisation made."""
    mode = fake_mode(module.graph)
    for node in module.graph.nodes:
        new = node.op == "call_function" and "val" not in node.meta and node.all_input_nodes
        if new and mode is not None and all("val" in n.meta for n in node.all_input_nodes):
            node.meta["val"] = fake_call(mode, node)[1]
