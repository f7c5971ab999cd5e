"""Smooth operations without a degree: integrated along the ray from 0, where that ray is regular.

On the ray t u, 0 <= t <= 1, a *smooth* operation is absolutely continuous, and f(0) is finite. A
*singular* one is not: it is infinite or undetermined at 0, or it jumps. That one has no edit; what
it reads is pruned, or held at degree 0 by freezing a normaliser before it.
"""

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

from .. import attention_form, steps
from ..algebra import Algebra, Role
from ..record import Operator
from .row import Table, rows

smooth = rows(Algebra.SMOOTH)
attention = rows(Algebra.ATTENTION)
singular = rows(Algebra.SINGULAR)


def _drops_out(arguments: Mapping[str, Any]) -> str | None:
    drops = arguments["train"] and arguments["dropout"]
    return "dropout between its layers is random" if drops else None


def _is_random(arguments: Mapping[str, Any]) -> str | None:
    return "attention with dropout is random" if arguments["dropout_p"] else None


def _of_degree(name: str, operand: str, count: Any) -> Operator | None:
    """A product of so many entries of its operand, where that is known."""
    known = isinstance(count, int) and count > 0
    return Operator(name, Algebra.HOMOGENEOUS, f"{operand}^{count}", proved=True) if known else None


def _product_of_all(arguments: Mapping[str, Any], moving: Collection[str]) -> Operator | None:
    sizes = arguments["self"].meta["val"].shape
    return _of_degree("aten.prod.default", "self", prod(sizes) if sizes else 1)


def _product(arguments: Mapping[str, Any], moving: Collection[str]) -> Operator | None:
    value = arguments["self"].meta["val"]
    count = value.shape[arguments["dim"]] if value.dim() else 1
    return _of_degree("aten.prod.dim_int", "self", count)


def _determinant(arguments: Mapping[str, Any], moving: Collection[str]) -> Operator | None:
    return _of_degree("aten.linalg_det.default", "A", arguments["A"].meta["val"].shape[-1])


def _angle(arguments: Mapping[str, Any], moving: Collection[str]) -> Operator | None:
    """Of degree 0, where the two degrees are one."""
    both, rule = len(moving) == 2, "self/other + self^0"
    return Operator("aten.atan2.default", Algebra.HOMOGENEOUS, rule, proved=True) if both else None


def _power(arguments: Mapping[str, Any], moving: Collection[str]) -> Operator | None:
    """x^c has a degree, and c^x is an exponential function."""
    if moving == {"self"}:
        return Operator("aten.pow.Tensor_Scalar", Algebra.HOMOGENEOUS, "self^exponent", proved=True)
    return Operator("aten.pow.Scalar", Algebra.SMOOTH, proved=True) if len(moving) == 1 else None


def _weighed(name: str) -> Callable[[Mapping[str, Any], Collection[str]], Operator | None]:
    """x log(y) is linear in x: y weighs it, and must be seen at degree 0, as a grid is."""
    linear = Operator(name, Algebra.STRUCTURAL, proved=True)
    return lambda arguments, moving: linear if "self" in moving else None


TABLE: Table = (
    *smooth("softmax.int _softmax", roles=(Role.SOFTMAX, Role.PROBABILITY)),
    *smooth("_safe_softmax", roles=(Role.SOFTMAX,)),
    *smooth("log_softmax.int _log_softmax", roles=(Role.PROBABILITY,)),
    *smooth("logsumexp logaddexp logcumsumexp pow.Scalar"),
    *smooth("lstm.input", refuses=_drops_out, steps=steps.lstm),
    *smooth("lstm_cell", steps=steps.lstm_cell),
    *smooth("gru_cell", steps=steps.gru_cell),
    # not opened: what the kernels write in place has other strides than the steps, and so, on some
    # processors, other last bits
    *smooth("gru.input", refuses=_drops_out, steps=steps.gru),
    *smooth("rnn_tanh.input", refuses=_drops_out, steps=steps.rnn_tanh),
    *smooth("rnn_relu.input", refuses=_drops_out, steps=steps.rnn_relu),
    *smooth("glu", vanishes="self", steps=steps.glu),
    *smooth("cumprod", vanishes="self"),
    *smooth(
        "special_xlog1py",
        vanishes="self",
        becomes=_weighed("aten.special_xlog1py.default"),
        roles=(Role.POINTWISE,),
    ),
    *smooth("prod", vanishes="self", becomes=_product_of_all),
    *smooth("prod.dim_int", vanishes="self", becomes=_product),
    *smooth("linalg_det", vanishes="A", becomes=_determinant),
    *attention(
        "scaled_dot_product_attention",
        "value",
        vanishes="value",
        frozen=attention_form.HELD_WEIGHTS,
        refuses=_is_random,
    ),
    # infinite at 0; undetermined at (0, 0), where angle and x^y depend on the direction
    *singular("log log2 log10 logit"),
    *singular("atan2", becomes=_angle),
    *singular("pow.Tensor_Tensor float_power.Tensor_Tensor", becomes=_power),
    *singular("xlogy.Tensor", becomes=_weighed("aten.xlogy.Tensor")),
    *singular(
        "special_xlogy", becomes=_weighed("aten.special_xlogy.default"), roles=(Role.POINTWISE,)
    ),
)
