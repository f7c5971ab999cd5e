"""Positively homogeneous operations: v(t u) = t^k v(u) for t > 0 near 1, so J u = k v (Euler).

A literal that the value meets in a comparison (a clamp's bound) is a bias leaf where it is active.
"""

from collections.abc import Mapping
from typing import Any

from .. import readers
from ..algebra import Algebra, Role
from .rows import Table, rows

homogeneous = rows(Algebra.HOMOGENEOUS)


def _random(arguments: Mapping[str, Any]) -> str | None:
    return "rrelu in training mode is random" if arguments["training"] else None


def _refuse_order_zero(arguments: Mapping[str, Any]) -> str | None:
    """A norm of order 0 counts the non-zeros: of degree 0, and without a gradient."""
    order = arguments.get("ord", arguments.get("p"))
    return "a norm of order 0 counts, it measures nothing" if order == 0 else None


TABLE: Table = (
    *homogeneous("aten.relu.default"),
    *homogeneous("aten.leaky_relu.default"),
    *homogeneous("aten.prelu.default"),
    *homogeneous("aten.abs.default"),
    *homogeneous("aten.absolute.default"),
    *homogeneous("aten.sgn.default", "self^0"),
    *homogeneous("aten.angle.default", "self^0"),
    *homogeneous("aten.cosine_similarity.default", "x1^0*x2^0"),
    *homogeneous("aten.polar.default", "abs"),
    *homogeneous("aten.maximum.default", "self + other"),
    *homogeneous("aten.minimum.default", "self + other"),
    *homogeneous("aten.fmax.default", "self + other"),
    *homogeneous("aten.fmin.default", "self + other"),
    *homogeneous("aten.max.other", "self + other"),
    *homogeneous("aten.min.other", "self + other"),
    *homogeneous("aten.max.default"),
    *homogeneous("aten.min.default"),
    *homogeneous("aten.max.dim", "self ; -", roles=(Role.REDUCTION,)),
    *homogeneous("aten.min.dim", "self ; -"),
    *homogeneous("aten.amax.default", roles=(Role.REDUCTION,)),
    *homogeneous("aten.amin.default", roles=(Role.REDUCTION,)),
    *homogeneous("aten.median.default"),
    *homogeneous("aten.median.dim", "self ; -"),
    *homogeneous("aten.mode.default", "self ; -"),
    *homogeneous("aten.cummax.default", "self ; -"),
    *homogeneous("aten.cummin.default", "self ; -"),
    *homogeneous("aten.sort.default", "self ; -"),
    *homogeneous("aten.sort.stable", "self ; -"),
    *homogeneous("aten.msort.default"),
    *homogeneous("aten.topk.default", "self ; -"),
    *homogeneous("aten.kthvalue.default", "self ; -"),
    *homogeneous("aten.max_pool1d.default"),
    *homogeneous("aten.max_pool2d.default", roles=(Role.WINDOW,)),
    *homogeneous("aten.max_pool3d.default"),
    *homogeneous("aten.max_pool2d_with_indices.default", "self ; -", roles=(Role.WINDOW,)),
    *homogeneous("aten.adaptive_max_pool1d.default", "self ; -"),
    *homogeneous("aten.adaptive_max_pool2d.default", "self ; -", roles=(Role.WINDOW,)),
    *homogeneous("aten.hardshrink.default"),
    *homogeneous("aten.softshrink.default", "self + lambd", reader=readers.shrunk),
    *homogeneous("aten.threshold.default", "self + value"),
    *homogeneous("aten.clamp.default", "self + min + max"),
    *homogeneous("aten.clamp.Tensor", "self + min + max"),
    *homogeneous("aten.clip.default", "self + min + max"),
    *homogeneous("aten.clamp_min.default", "self + min"),
    *homogeneous("aten.clamp_min.Tensor", "self + min"),
    *homogeneous("aten.clamp_max.default", "self + max"),
    *homogeneous("aten.clamp_max.Tensor", "self + max"),
    *homogeneous("aten.hardtanh.default", "self + min_val + max_val"),
    *homogeneous("aten.nan_to_num.default", "self + nan + posinf + neginf"),
    *homogeneous("aten.remainder.Scalar", "self + other", reader=readers.remaining),
    *homogeneous("aten.remainder.Tensor", "self + other", reader=readers.remaining),
    *homogeneous("aten.fmod.Scalar", "self + other", reader=readers.remaining),
    *homogeneous("aten.fmod.Tensor", "self + other", reader=readers.remaining),
    *homogeneous("aten.square.default", "self^2"),
    *homogeneous("aten.sqrt.default", "self^1/2"),
    *homogeneous("aten.rsqrt.default", "self^-1/2"),
    *homogeneous("aten.pow.Tensor_Scalar", "self^exponent"),
    *homogeneous("aten.float_power.Tensor_Scalar", "self^exponent"),
    *homogeneous("aten.var.default", "self^2"),
    *homogeneous("aten.var.dim", "self^2"),
    *homogeneous("aten.var.correction", "self^2"),
    *homogeneous("aten.std.default"),
    *homogeneous("aten.std.dim"),
    *homogeneous("aten.std.correction"),
    *homogeneous("aten.var_mean.default", "self^2 ; self"),
    *homogeneous("aten.var_mean.dim", "self^2 ; self"),
    *homogeneous("aten.var_mean.correction", "self^2 ; self"),
    *homogeneous("aten.std_mean.default", "self ; self"),
    *homogeneous("aten.std_mean.dim", "self ; self"),
    *homogeneous("aten.std_mean.correction", "self ; self"),
    *homogeneous("aten.hypot.default", "self + other"),
    *homogeneous("aten.linalg_inv.default", "A^-1"),
    *homogeneous("aten.linalg_solve.default", "B/A"),
    *homogeneous("aten.rrelu.default", refuses=_random),
    *homogeneous("aten.norm.Scalar", refuses=_refuse_order_zero),
    *homogeneous("aten.norm.ScalarOpt_dim", refuses=_refuse_order_zero),
    *homogeneous("aten.linalg_vector_norm.default", refuses=_refuse_order_zero),
    *homogeneous("aten.linalg_norm.default", refuses=_refuse_order_zero),
    *homogeneous("aten.dist.default", "self + other", refuses=_refuse_order_zero),
    *homogeneous(
        "aten.cdist.default", "x1 + x2", reader=readers.of_distances, refuses=_refuse_order_zero
    ),
    *homogeneous("aten.linalg_matrix_norm.str_ord"),
)
