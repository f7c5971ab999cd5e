"""Runs a rewritten graph with gradients, and tells what every bias leaf contributes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.computation import ComputationGraph
from ..graph.walking import Walker
from ..operators.calls import Call, Running, operation_args
from ..plan.labelling import Degrees

OnBias = Callable[[str, Tensor, Tensor], None]


class Run(Walker):
    """Runs a (rewritten) graph with gradients, its sources being leaves of their own.

    `on_bias(node, g, B)` is called during the backward with the cotangent g at every node where
    bias leaves enter and what they add there, B = J_b b; `node[i]` where output i of several is.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        graph: ComputationGraph,
        labels: Degrees,
        on_bias: OnBias | None = None,
    ) -> None:
        super().__init__(module)
        self.original, self.labels, self.on_bias = graph.nodes, labels, on_bias
        self.sources: dict[str, Tensor] = {}

    def hear(self, key: str, g: Tensor, added: Tensor) -> None:
        """Of a bias leaf, in the backward."""
        if self.on_bias is not None:
            self.on_bias(key, g, added)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.labels.live.sources:
            value = value.clone() if value.is_inference() else value
            if n.op == "placeholder" or not value.requires_grad:  # a table keeps its own gradient
                value = value.detach().requires_grad_()
            self.sources[n.name] = value
        elif n.name in self.labels.biases and n.name in self.labels.alive:
            self._watch(n, value)
        return value

    def _watch(self, n: fx.Node, value: Any) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        outputs = list(value) if isinstance(value, (tuple, list)) else [value]
        if not any(output.requires_grad for output in outputs):
            return
        call = self.labels.live.calls[n.name]
        known = [output.detach() for output in outputs]
        maps = bias_maps(self.original[n.name], call, operation_args(n.target, args), kwargs, known)
        for index, (output, added) in enumerate(zip(outputs, maps, strict=False)):
            if output.requires_grad:
                key = n.name if len(maps) == 1 else f"{n.name}[{index}]"
                # the outputs hold their hooks: were these to hold the run, nothing could be freed
                output.register_hook(partial(_tell, weakref.ref(self), key, added))


def _tell(run: weakref.ref[Run], key: str, added: Tensor, g: Tensor | None) -> None:
    listening = run()
    if listening is not None and g is not None:  # None: of an output that nobody reads
        listening.hear(key, g.detach(), added)


def bias_maps(
    node: fx.Node, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
) -> list[Tensor]:
    """J_b b of every output of a call that has bias leaves, the first ones; `args`, `kwargs` as the
    unedited operation takes them."""
    with torch.no_grad():
        running = Running(call, node.target, args, kwargs)  # type: ignore[arg-type]
        return call.operator.bias_maps(running, outputs)


def finite_products(g: Tensor, value: Tensor) -> Tensor:
    """g * value (its real part where they are complex, as autograd pairs them), where a mask's
    infinite constant counts nothing: it restricts, it adds nothing."""
    products = (g.conj() * value).real
    if bool(torch.isfinite(products.sum())):
        return products
    return products.masked_fill(~torch.isfinite(value).expand_as(products), 0.0)


def inner(g: Tensor, value: Tensor) -> float:
    """<g, value> over all elements, `value` broadcast to the shape of g; infinities as above.

    Of complex numbers the real part: their cotangents are conjugate, as autograd has them.
    """
    g, value = g.detach(), value.detach()
    if g.shape == value.shape and not (g.is_complex() or value.is_complex()):
        total = torch.dot(g.reshape(-1), value.reshape(-1).to(g))
    else:
        total = (g.conj() * value).real.sum()
    return float(total if bool(torch.isfinite(total)) else finite_products(g, value).sum())
