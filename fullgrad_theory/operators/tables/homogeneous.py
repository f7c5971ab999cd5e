"""Positively homogeneous operations: v(t u) = t^k v(u) for t > 0 near 1, so J u = k v (Euler).

A literal that the value meets in a comparison (a clamp's bound) is a bias leaf where it is active.
"""

from collections.abc import Mapping
from typing import Any

from .. import readers
from ..algebra import Algebra, Role
from .row import Table, rows

homogeneous = rows(Algebra.HOMOGENEOUS)


def _random(arguments: Mapping[str, Any]) -> str | None:
    return "rrelu in training mode is random" if arguments["training"] else None


def _refuse_order_zero(arguments: Mapping[str, Any]) -> str | None:
    """A norm of order 0 counts the non-zeros: of degree 0, and without a gradient."""
    order = arguments.get("ord", arguments.get("p"))
    return "a norm of order 0 counts, it measures nothing" if order == 0 else None


def _falls_short(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """There is a jump where the value that stands for all below the threshold is another."""
    return ("self", "value") if arguments["threshold"] != arguments["value"] else ()


TABLE: Table = (
    *homogeneous(
        """
        relu leaky_relu abs max min median msort max_pool1d max_pool3d hardshrink std
        std.dim std.correction linalg_matrix_norm.str_ord
        """
    ),
    *homogeneous("prelu absolute", roles=(Role.POINTWISE,)),
    *homogeneous("sgn angle", "self^0"),
    *homogeneous("polar", "abs"),
    *homogeneous("maximum minimum fmax fmin max.other min.other hypot", "self + other"),
    *homogeneous("max.dim", "self ; -", roles=(Role.REDUCTION,)),
    *homogeneous(
        "min.dim median.dim mode cummax cummin sort sort.stable topk kthvalue adaptive_max_pool1d",
        "self ; -",
    ),
    *homogeneous("amax amin", roles=(Role.REDUCTION,)),
    *homogeneous("max_pool2d", roles=(Role.WINDOW,)),
    *homogeneous("max_pool2d_with_indices adaptive_max_pool2d", "self ; -", roles=(Role.WINDOW,)),
    *homogeneous("softshrink", "self + lambd", reader=readers.shrunk),
    *homogeneous("threshold", "self + value", jumps=_falls_short),
    *homogeneous("clamp clamp.Tensor clip", "self + min + max"),
    *homogeneous("clamp_min clamp_min.Tensor", "self + min"),
    *homogeneous("clamp_max clamp_max.Tensor", "self + max"),
    *homogeneous("hardtanh", "self + min_val + max_val"),
    *homogeneous("nan_to_num", "self + nan + posinf + neginf"),
    *homogeneous(
        "remainder.Scalar remainder.Tensor fmod.Scalar fmod.Tensor",
        "self + other",
        reader=readers.remaining,
        jumps=lambda arguments: ("other",),
    ),
    *homogeneous("frac", jumps=lambda arguments: ("1",)),
    *homogeneous("square var var.dim var.correction", "self^2"),
    *homogeneous("sqrt", "self^1/2"),
    *homogeneous("rsqrt", "self^-1/2"),
    *homogeneous("pow.Tensor_Scalar float_power.Tensor_Scalar", "self^exponent"),
    *homogeneous("var_mean var_mean.dim var_mean.correction", "self^2 ; self"),
    *homogeneous("std_mean std_mean.dim std_mean.correction", "self ; self"),
    *homogeneous("linalg_inv", "A^-1"),
    *homogeneous("linalg_solve", "B/A"),
    *homogeneous("rrelu", refuses=_random),
    *homogeneous(
        "norm.Scalar norm.ScalarOpt_dim linalg_vector_norm linalg_norm",
        refuses=_refuse_order_zero,
    ),
    *homogeneous("dist", "self + other", refuses=_refuse_order_zero),
    *homogeneous("cdist", "x1 + x2", reader=readers.of_distances, refuses=_refuse_order_zero),
)
