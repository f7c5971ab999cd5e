"""A balanced backward is differentiated once: no derivative of a derivative, none forward.

An edited backward is no derivative of anything that runs: what it holds fixed, halves or averages
it would hold, halve and average again on the way to the values it is made of. The second derivative
that autograd makes of it is that of no function, so that it is refused and not wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils import _pytree as pytree

from ..edits.base import Edit
from ..errors import DerivativeError
from ..graph.sources import first_line
from ..operators.calls import is_transformed


class _Anchor(Function):
    """A number that depends on all leaves by name alone, and must not be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(why: str, *leaves: Tensor) -> Tensor:
        return torch.zeros((), device=leaves[0].device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise DerivativeError(ctx.why)


class _Tied(Function):
    """A cotangent, made to depend on the anchor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros((), device=grad.device)


def guarded(
    edits: Sequence[Edit], state: Callable[[], Iterable[Tensor]], run: Run, args: Any
) -> Any:
    """What `run` returns for `args`. Where edits stand in its backward, a derivative of that, and
    one in forward mode, raise `DerivativeError`; `state`: what else may be differentiated by."""
    if not edits or torch.compiler.is_compiling():  # a compiled backward refuses it by itself
        return run(args)
    leaves = [*(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)), *state()]
    more = f" and {len(edits) - 1} more" if len(edits) > 1 else ""
    of = f"this balanced model has edits in its backward ({edits[0]}{more})"
    _refuse_tangents(leaves, f"{of}, which {_FORWARD}")
    leaves = [t for t in leaves if t.requires_grad]
    if not leaves or not torch.is_grad_enabled():
        return _transformed(run, args, of)
    tie = partial(_tie, partial(_Anchor.apply, f"{of}, {_TWICE}", *leaves))

    def watched(tensor: Tensor) -> Tensor:
        """Itself, in a name of its own: hooks are not for a user's tensor."""
        own = tensor.view_as(tensor) if tensor.requires_grad else tensor
        if own.requires_grad:
            own.register_hook(tie)
        return own

    # where gradients leave, so that it is said before anything else fails; and where they begin,
    # for those of parameters
    args = pytree.tree_map_only(Tensor, watched, args)
    result, known = _transformed(run, args, of), {id(t) for t in leaves}
    for tensor in pytree.tree_leaves(result):
        if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in known:
            tensor.register_hook(tie)
    return result


Run = Callable[[Any], Any]
_FORWARD = (
    "differentiation in forward mode (torch.func.jvp, jacfwd, hessian) would pass over; take "
    "torch.func.vjp, jacrev, or torch.autograd.grad"
)
_TWICE = (
    "and a gradient with edits is no function's gradient: what autograd makes of it in a second "
    "differentiation (create_graph=True, torch.func.hessian) is wrong. Differentiate it by finite "
    "differences, or train on the gradient of the model as it is"
)


def _tie(anchor: Callable[[], Tensor], grad: Tensor) -> Tensor | None:
    """Only where the gradient is to be differentiated is there a graph of it."""
    return _Tied.apply(grad, anchor()) if torch.is_grad_enabled() else None


def _refuse_tangents(given: Iterable[Tensor], why: str) -> None:
    if forward_ad._current_level < 0:
        return
    stack = torch._C._functorch.get_interpreter_stack() or ()
    below = any(i.key() == torch._C._functorch.TransformType.Jvp for i in stack[:-1])
    if below or any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise DerivativeError(why)


def _transformed(run: Run, args: Any, of: str) -> Any:
    """Run it; what torch.func does not take of the operations in it is said of the model."""
    if not is_transformed():
        return run(args)
    try:
        return run(args)
    except (RuntimeError, NotImplementedError) as error:
        raise DerivativeError(
            f"{of}, and torch.func does not transform it: {first_line(error)}; loop over the "
            "samples, or use torch.autograd.grad"
        ) from error
