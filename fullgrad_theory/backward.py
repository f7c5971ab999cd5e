"""Operations with ATen's forward value and an edited backward: scale, secant, freeze, prune.

The forward is bit for bit the ATen operation's. Every wrapper is a module-level function, so that
an fx graph can call it and pickle. What is held fixed (1/sigma, attention weights) is held fixed in
second derivatives too. Shapes, dtypes and broadcasting are the replaced operation's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

from .gates import GATES, cotangent

aten = torch.ops.aten
P = ParamSpec("P")
R = TypeVar("R")


def _leaf(function: Callable[P, R]) -> Callable[P, R]:
    """Let fx's symbolic tracing record a call, not enter it: unpickling a GraphModule retraces."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        operands = (*args, *kwargs.values())
        if has_torch_function(operands):
            return handle_torch_function(call, operands, *args, **kwargs)
        return function(*args, **kwargs)

    return call


class _Scale(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None


@_leaf
def scale(x: Tensor, factor: float) -> Tensor:
    """The value of `x`; the gradient times `factor`, a Python number. Saves nothing.

    The result is a view of `x`: autograd refuses to write to it in place.
    """
    return _Scale.apply(x, factor)


_OVERLOADS = {op: getattr(getattr(aten, op.split(".")[1]), op.split(".")[2]) for op in GATES}


class _Secant(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return _OVERLOADS[op](x, *args, **kwargs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.op, ctx.args, ctx.kwargs = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return cotangent(ctx.op, grad, x, *ctx.args, **ctx.kwargs), None, None, None


@_leaf
def secant(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Elementwise f(x) with the pseudo-Jacobian (f(x) - f(0)) / x, its limit at x = 0.

    `op` is the overload's name, 'aten.gelu.default'; the rest are its arguments. Saves x alone.
    Raises KeyError for an operation without a gate.
    """
    if op not in GATES:
        raise KeyError(f"no secant gate for {op}; known: {', '.join(sorted(GATES))}")
    return _Secant.apply(x, op, args, kwargs)


class _Gated(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, computed: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return computed.view_as(computed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.f = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return grad * _quotient(ctx.f, x), grad, None


def _quotient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(f(x) - f(0)) / x; f'(x/2) where x is small, which is as near as the quotient is there."""
    bound = torch.finfo(x.dtype).eps ** (1 / 3)
    small = x.abs() < bound
    far = torch.where(small, bound, x)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        half = torch.where(small, x / 2.0, 0.0)
        half = half if half.requires_grad else half.requires_grad_()
        value = f(half)
        (slope,) = torch.autograd.grad(value, half, torch.ones_like(value), create_graph=graph)
    return torch.where(small, slope, (f(far) - f(torch.zeros_like(x))) / far)


class NumericSecant(torch.nn.Module):
    """A measured elementwise operation with the pseudo-Jacobian (f(x) - f(0)) / x, as `secant`.

    `function`: the call's target; `place`: its argument x, a position or a keyword. Other tensors
    keep their own gradient. f is run twice more in the backward; 16-bit dtypes are not widened.
    """

    def __init__(self, function: Callable[..., Tensor], place: int | str) -> None:
        super().__init__()
        self.__module__, self.__name__ = "fullgrad_theory.backward", "numeric_secant"
        self.function, self.place, self.training = function, place, False

    def __getstate__(self) -> dict[str, Any]:
        known = isinstance(self.function, torch._ops.OpOverload)  # does not pickle, its name does
        return self.__dict__ | ({"function": str(self.function)} if known else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.function, str):
            self.function = attrgetter(self.function)(torch.ops)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        def f(x: Tensor, detach: bool = True) -> Tensor:
            given = [
                a.detach() if detach and isinstance(a, Tensor) and i != self.place else a
                for i, a in enumerate(args)
            ]
            named = dict(kwargs)
            if isinstance(self.place, int):
                given[self.place] = x
            else:
                named[self.place] = x
            return self.function(*given, **named)

        x = args[self.place] if isinstance(self.place, int) else kwargs[self.place]
        return _Gated.apply(x, f(x.detach(), False), f)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _rstd(x: Tensor, eps: float, centred: bool) -> Tensor:
    x = x.to(_wide(x.dtype))
    power = x.var(-1, correction=0) if centred else x.square().mean(-1)
    return (power + eps).rsqrt()


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    value, _, rstd = aten.native_layer_norm.default(x, shape, weight, bias, eps)
    return value, rstd.reshape(x.shape[: x.dim() - len(shape)])


def _rms_norm(
    x: Tensor, weight: Tensor | None, bias: None, shape: Sequence[int], eps: float | None
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(*x.shape[: x.dim() - len(shape)], -1)
    smallest = torch.finfo(_wide(x.dtype)).eps if eps is None else eps
    return aten.rms_norm.default(x, shape, weight, eps), _rstd(rows, smallest, False)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    sizes = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    value, _, rstd = aten.native_group_norm.default(x, weight, bias, *sizes, groups, eps)
    return value, rstd


def _instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    rstd = _rstd(x.reshape(*x.shape[:2], -1), args[4], True)
    return aten.instance_norm.default(x, weight, bias, *args), rstd


_NORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
}
"""Each returns the value and 1/sigma, of the shape of x before the normalised dimensions."""


class _Freeze(Function):
    """A normalisation whose 1/sigma is frozen; the second output, not differentiable, is 1/sigma.

    weight and bias span the last dimensions of x (layer, rms) or dimension 1 (group, instance).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        return _NORMS[kind](x, weight, bias, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, ctx.kind, ctx.args = inputs
        ctx.mark_non_differentiable(output[1])
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        channels = ctx.kind in ("group_norm", "instance_norm")
        others = (
            [d for d in range(grad.dim()) if d != 1]
            if channels
            else list(range(grad.dim() - len(ctx.args[0])))
        )
        if needs_x:
            dx = _frozen_gradient(ctx.kind, grad, weight, rstd, ctx.args)
        if needs_weight:
            wide = x.to(_wide(x.dtype)).reshape(*rstd.shape, -1)
            if ctx.kind != "rms_norm":
                wide = wide - wide.mean(-1, keepdim=True)
            normal = (wide * rstd.unsqueeze(-1)).reshape(grad.shape)
            dw = _total(grad * normal, others)
        if needs_bias:
            db = _total(grad, others)
        return dx, dw, db, None, None


def _total(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims) if dims else x


def _frozen_gradient(
    kind: str, grad: Tensor, weight: Tensor | None, rstd: Tensor, args: tuple[Any, ...]
) -> Tensor:
    """rstd (gw - mean gw), gw = grad weight, by ATen's fused kernels (rms: rstd gw).

    Their formula is rstd (gw - mean gw - xhat mean(gw xhat)): with a zero for x, xhat is zero.
    """
    if kind == "rms_norm":
        frozen = rstd.reshape(*rstd.shape, *[1] * len(args[0]))
        return (grad * frozen if weight is None else grad * weight * frozen).to(grad.dtype)
    zero, only_x = torch.zeros_like(grad), [True, False, False]
    if kind == "layer_norm":
        frozen = rstd.reshape(*rstd.shape, *[1] * len(args[0]))
        return aten.native_layer_norm_backward.default(
            grad, zero, args[0], torch.zeros_like(frozen), frozen, weight, None, only_x
        )[0]
    sizes = grad.shape[0], grad.shape[1], math.prod(grad.shape[2:]), rstd.shape[1]
    rstd = rstd.to(grad.dtype if weight is None else weight.dtype)
    return aten.native_group_norm_backward.default(
        grad, zero, torch.zeros_like(rstd), rstd, weight, *sizes, only_x
    )[0]


_AUTOCAST = {
    (name, device)
    for name in _NORMS
    for device in ("cpu", "cuda")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", f"Autocast{device.upper()}")
}


def _freeze(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any) -> Tensor:
    device = x.device.type
    if (kind, device) in _AUTOCAST and torch.is_autocast_enabled(device):
        x = x.to(_wide(x.dtype))
        weight = None if weight is None else weight.to(_wide(weight.dtype))
        bias = None if bias is None else bias.to(_wide(bias.dtype))
    return _Freeze.apply(x, weight, bias, kind, args)[0]


@_leaf
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """aten.layer_norm with 1/sigma frozen, the centring linear: dx = rstd (gw - mean gw).

    Gradients of weight and bias are the real ones; x is saved only for weight's.
    """
    return _freeze("layer_norm", input, weight, bias, tuple(normalized_shape), eps)


@_leaf
def native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_layer_norm as `layer_norm`; the mean and 1/sigma it also returns are frozen."""
    shape = tuple(normalized_shape)
    value = _Freeze.apply(input, weight, bias, "layer_norm", (shape, eps))[0]
    _, mean, rstd = aten.native_layer_norm.default(input.detach(), shape, None, None, eps)
    return value, mean, rstd


@_leaf
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """aten.group_norm with 1/sigma frozen, as `layer_norm`."""
    return _freeze("group_norm", input, weight, bias, num_groups, eps)


@_leaf
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """aten.rms_norm with 1/rms frozen: dx = rstd gw."""
    return _freeze("rms_norm", input, weight, None, tuple(normalized_shape), eps)


@_leaf
def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """aten.instance_norm with 1/sigma frozen; on running statistics it is affine and unedited."""
    statistics = (running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled)
    if not use_input_stats:
        return aten.instance_norm.default(input, weight, bias, *statistics)
    return _freeze("instance_norm", input, weight, bias, *statistics)


FREEZES: dict[str, Callable[..., Any]] = {
    "aten.layer_norm.default": layer_norm,
    "aten.native_layer_norm.default": native_layer_norm,
    "aten.group_norm.default": group_norm,
    "aten.rms_norm.default": rms_norm,
    "aten.instance_norm.default": instance_norm,
}
"""ATen overload name -> its replacement of the same signature, 1/sigma frozen."""


CHUNK = 2**22
"""Most attention weights held at once in the backward of `attention`, for more than one head."""


class _Attention(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Tensor,
        computed: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        return computed.view_as(computed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, _, query, key, mask, ctx.is_causal, ctx.scale = inputs
        ctx.value_shape = value.shape
        ctx.save_for_backward(query, key, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, mask = ctx.saved_tensors
        dv = _transposed_attention(query, key, mask, grad, ctx.is_causal, ctx.scale)
        if dv.dim() > 2 and ctx.value_shape[-3] != dv.shape[-3]:  # grouped or shared heads
            dv = dv.unflatten(-3, (ctx.value_shape[-3], -1)).sum(-3)
        return dv.sum_to_size(ctx.value_shape), None, None, None, None, None, None


def _transposed_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, grad: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """P^T grad, with P = softmax(query key^T scale + mask) in float32 or wider, head by head."""
    dtype = grad.dtype
    wide = _wide(dtype)
    length, source = query.shape[-2], key.shape[-2]
    lead = grad.shape[:-2]
    if lead and key.dim() > 2 and key.shape[-3] != lead[-1]:
        key = key.repeat_interleave(lead[-1] // key.shape[-3], -3)
    if is_causal:
        mask = torch.ones(length, source, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=wide).masked_fill(mask.logical_not(), -math.inf)
    q = query.expand(*lead, *query.shape[-2:]).reshape(-1, length, query.shape[-1]).to(wide)
    k = key.expand(*lead, *key.shape[-2:]).reshape(-1, source, key.shape[-1]).to(wide)
    g = grad.reshape(-1, length, grad.shape[-1]).to(wide)
    index = None
    if mask is not None:
        mask = mask.to(wide).expand(*mask.shape[:-2], length, source)
        own = mask.shape[:-2]
        index = torch.arange(math.prod(own), device=mask.device).view(own).expand(lead).reshape(-1)
        mask = mask.reshape(-1, length, source)
    step = max(1, CHUNK // max(1, length * source))
    parts = []
    for i in range(0, q.shape[0], step):
        scores = torch.bmm(q[i : i + step] * scale, k[i : i + step].mT)
        if mask is None or index is None:
            weights = scores.softmax(-1)
        else:
            weights = aten._safe_softmax.default(scores + mask[index[i : i + step]], -1)
        parts.append(torch.bmm(weights.mT, g[i : i + step]))
    dv = torch.cat(parts).reshape(*lead, source, grad.shape[-1])
    return dv.to(dtype)


@_leaf
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten.scaled_dot_product_attention with query and key pruned: dV = P^T g alone.

    P is recomputed from query and key (in float32 for 16-bit dtypes), at most CHUNK weights at a
    time; fully masked rows weigh nothing. Saves query, key, mask. A mask that asks for a gradient
    gets ATen's. Raises ValueError for dropout. Autograd refuses in-place writes to the result.
    """
    if dropout_p:
        raise ValueError(f"attention with dropout_p={dropout_p} is random: call model.eval() first")
    if attn_mask is not None and attn_mask.requires_grad:
        held = query.detach(), key.detach(), value, attn_mask, 0.0, is_causal
        return aten.scaled_dot_product_attention.default(*held, scale=scale, enable_gqa=enable_gqa)
    # called here and not in the Function, so that grad mode and requires_grad choose the kernel
    computed = aten.scaled_dot_product_attention.default(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    ).detach()
    if scale is None:
        scale = query.shape[-1] ** -0.5
    # under autocast the weights are those of the rounded query and key
    q, k = query.detach().to(computed.dtype), key.detach().to(computed.dtype)
    return _Attention.apply(value, computed, q, k, attn_mask, is_causal, scale)
