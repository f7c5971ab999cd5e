"""Positively homogeneous operations: v(t u) = t^k v(u) for t > 0 near 1, so J u = k v (Euler).

A literal that the value meets in a comparison (a clamp's bound) is a bias leaf where it is active.
"""

from collections.abc import Mapping
from typing import Any

from .base import Algebra
from .registry import register

_TABLE = {
    "aten.relu.default": "self",
    "aten.leaky_relu.default": "self",
    "aten.prelu.default": "self",
    "aten.abs.default": "self",
    "aten.absolute.default": "self",
    "aten.sgn.default": "self^0",
    "aten.angle.default": "self^0",
    "aten.cosine_similarity.default": "x1^0*x2^0",
    "aten.polar.default": "abs",
    "aten.maximum.default": "self + other",
    "aten.minimum.default": "self + other",
    "aten.fmax.default": "self + other",
    "aten.fmin.default": "self + other",
    "aten.max.other": "self + other",
    "aten.min.other": "self + other",
    "aten.max.default": "self",
    "aten.min.default": "self",
    "aten.max.dim": "self ; -",
    "aten.min.dim": "self ; -",
    "aten.amax.default": "self",
    "aten.amin.default": "self",
    "aten.median.default": "self",
    "aten.median.dim": "self ; -",
    "aten.mode.default": "self ; -",
    "aten.cummax.default": "self ; -",
    "aten.cummin.default": "self ; -",
    "aten.sort.default": "self ; -",
    "aten.sort.stable": "self ; -",
    "aten.msort.default": "self",
    "aten.topk.default": "self ; -",
    "aten.kthvalue.default": "self ; -",
    "aten.max_pool1d.default": "self",
    "aten.max_pool2d.default": "self",
    "aten.max_pool3d.default": "self",
    "aten.max_pool2d_with_indices.default": "self ; -",
    "aten.adaptive_max_pool1d.default": "self ; -",
    "aten.adaptive_max_pool2d.default": "self ; -",
    "aten.hardshrink.default": "self",
    "aten.softshrink.default": "self + lambd",
    "aten.threshold.default": "self + value",
    "aten.clamp.default": "self + min + max",
    "aten.clamp.Tensor": "self + min + max",
    "aten.clip.default": "self + min + max",
    "aten.clamp_min.default": "self + min",
    "aten.clamp_min.Tensor": "self + min",
    "aten.clamp_max.default": "self + max",
    "aten.clamp_max.Tensor": "self + max",
    "aten.hardtanh.default": "self + min_val + max_val",
    "aten.nan_to_num.default": "self + nan + posinf + neginf",
    "aten.remainder.Scalar": "self + other",
    "aten.remainder.Tensor": "self + other",
    "aten.fmod.Scalar": "self + other",
    "aten.fmod.Tensor": "self + other",
    "aten.square.default": "self^2",
    "aten.sqrt.default": "self^1/2",
    "aten.rsqrt.default": "self^-1/2",
    "aten.pow.Tensor_Scalar": "self^exponent",
    "aten.float_power.Tensor_Scalar": "self^exponent",
    "aten.var.default": "self^2",
    "aten.var.dim": "self^2",
    "aten.var.correction": "self^2",
    "aten.std.default": "self",
    "aten.std.dim": "self",
    "aten.std.correction": "self",
    "aten.var_mean.default": "self^2 ; self",
    "aten.var_mean.dim": "self^2 ; self",
    "aten.var_mean.correction": "self^2 ; self",
    "aten.std_mean.default": "self ; self",
    "aten.std_mean.dim": "self ; self",
    "aten.std_mean.correction": "self ; self",
    "aten.hypot.default": "self + other",
    "aten.linalg_inv.default": "A^-1",
    "aten.linalg_solve.default": "B/A",
}
for _name, _signature in _TABLE.items():
    register(_name, Algebra.HOMOGENEOUS, _signature)

register(
    "aten.rrelu.default",
    Algebra.HOMOGENEOUS,
    refuses=lambda a: "rrelu in training mode is random" if a["training"] else None,
)


def _refuse_order_zero(arguments: Mapping[str, Any]) -> str | None:
    """A norm of order 0 counts the non-zeros: of degree 0, and without a gradient."""
    order = arguments.get("ord", arguments.get("p"))
    return "a norm of order 0 counts, it measures nothing" if order == 0 else None


for _name, _signature in {
    "aten.norm.Scalar": "self",
    "aten.norm.ScalarOpt_dim": "self",
    "aten.linalg_vector_norm.default": "self",
    "aten.linalg_norm.default": "self",
    "aten.dist.default": "self + other",
    "aten.cdist.default": "x1 + x2",
}.items():
    register(_name, Algebra.HOMOGENEOUS, _signature, refuses=_refuse_order_zero)
register("aten.linalg_matrix_norm.str_ord", Algebra.HOMOGENEOUS)
