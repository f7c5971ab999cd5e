"""Normalisations with 1/sigma held fixed, their centring linear: the frozen forms of the norms.

The forward is bit for bit the ATen operation's. Every form is a module-level function, so that an
fx graph can call it and pickle. 1/sigma is held fixed in second derivatives too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .calls import as_one_call, bound_once, wide_dtype
from .record import Frozen

aten = torch.ops.aten


def _rstd(x: Tensor, eps: float, centred: bool) -> Tensor:
    x = x.to(wide_dtype(x.dtype))
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
    smallest = torch.finfo(wide_dtype(x.dtype)).eps if eps is None else eps
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


@bound_once
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
            wide = x.to(wide_dtype(x.dtype)).reshape(*rstd.shape, -1)
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
        x = x.to(wide_dtype(x.dtype))
        weight = None if weight is None else weight.to(wide_dtype(weight.dtype))
        bias = None if bias is None else bias.to(wide_dtype(bias.dtype))
    return _Freeze.apply(x, weight, bias, kind, args)[0]


@as_one_call
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


@as_one_call
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


@as_one_call
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


@as_one_call
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """aten.rms_norm with 1/rms frozen: dx = rstd gw."""
    return _freeze("rms_norm", input, weight, None, tuple(normalized_shape), eps)


@as_one_call
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


LAYER_NORM = Frozen(layer_norm, exact=True)
NATIVE_LAYER_NORM = Frozen(native_layer_norm, exact=True)
GROUP_NORM = Frozen(group_norm, exact=True)
RMS_NORM = Frozen(rms_norm, exact=True)
INSTANCE_NORM = Frozen(instance_norm, exact=True)
