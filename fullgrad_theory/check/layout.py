"""Whether a kernel's backward depends on how its cotangent lies in memory: a fault of torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph.walking import Walker
from ..operators.calls import is_ray
from .numeric import aligned, float_leaves, gradients, paired
from .subject import Subject


def layout_faults(subject: Subject, inputs: list[Any]) -> tuple[str, ...]:
    """The nodes whose backward gives other numbers for the same cotangent laid out in memory
    otherwise, which no residual under fresh cotangents can see."""
    run = _Cotangents(subject.module)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if is_ray(x) else x for x in inputs]
        outputs = float_leaves(run.run(*leaves, enable_io_processing=False))
        value = paired([aligned(o, subject.seed) for o in outputs], outputs)
        learned = [p for p in subject.module.parameters() if p.requires_grad]
        if wanted := [*float_leaves(leaves), *learned]:
            gradients(value, wanted)
    found = [n for n, g in run.cotangents.items() if not _same_backward(n, run.calls[n], g)]
    return tuple(n.name for n in found)


class _Cotangents(Walker):
    """Runs a module with gradients; keeps every call's arguments and, later, its cotangent."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: dict[fx.Node, tuple[Any, Any]] = {}
        self.cotangents: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.requires_grad:
            self.calls[n] = self.fetch_args_kwargs_from_env(n)
            value.register_hook(lambda g: self._keep(n, g))
        return value

    def _keep(self, n: fx.Node, cotangent: Tensor | None) -> None:
        if cotangent is not None:  # None: of a value that nobody reads
            self.cotangents[n] = cotangent


def _as(value: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent laid out as the value is: whatever a kernel takes it for, it reads that."""
    return torch.empty_strided(
        value.shape, value.stride(), dtype=cotangent.dtype, device=cotangent.device
    ).copy_(cotangent)


def _same_backward(n: fx.Node, call: tuple[Any, Any], cotangent: Tensor) -> bool:
    found = []
    for given in (cotangent, None):
        fresh = pytree.tree_map_only(
            Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), call
        )
        args, kwargs = fresh
        leaves = [t for t in pytree.tree_leaves(fresh) if isinstance(t, Tensor) and t.requires_grad]
        try:
            with torch.enable_grad():
                out = n.target(*args, **kwargs)  # type: ignore[operator]
                c = _as(out, cotangent) if given is None else given
                found.append(torch.autograd.grad(out, leaves, c, allow_unused=True))
        except RuntimeError:  # a call that runs in its graph alone accuses nobody
            return True
    return all(
        a is None or b is None or torch.allclose(a, b, rtol=1e-6, atol=1e-12)
        for a, b in zip(*found, strict=True)
    )
