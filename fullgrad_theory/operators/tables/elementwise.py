"""Elementwise functions that are not homogeneous: consistent at degree 0, or under a secant.

Those with f(0) = 0 keep their operand's degree under the secant; the others add the bias leaf f(0).
Those of linear pieces are consistent as they are, with the intercept of a piece as a bias leaf.
"""

import math

from .. import gates
from ..algebra import Algebra, Role
from .row import Table, rows

zero_origin = rows(Algebra.ZERO_ORIGIN)
elementwise = rows(Algebra.ELEMENTWISE)
piecewise = rows(Algebra.PIECEWISE)

TABLE: Table = (
    *piecewise("relu6 hardsigmoid"),
    *zero_origin("gelu", gate=gates.gelu),
    *zero_origin("silu", gate=gates.silu),
    *zero_origin("mish", gate=gates.mish),
    *zero_origin("tanh", gate=gates.tanh),
    *zero_origin("erf", gate=gates.erf),
    *zero_origin("erfinv", gate=gates.erfinv),
    *zero_origin("hardswish", gate=gates.hardswish),
    *zero_origin("elu", gate=gates.elu),
    *zero_origin("selu", gate=gates.selu),
    *zero_origin("celu", gate=gates.celu),
    *zero_origin("expm1", gate=gates.expm1),
    *zero_origin("log1p", gate=gates.log1p),
    *zero_origin("sin", gate=gates.sin),
    *zero_origin("tan", gate=gates.tan),
    *zero_origin("sinh", gate=gates.sinh),
    *zero_origin("asinh", gate=gates.asinh),
    *zero_origin("atan", gate=gates.atan),
    *zero_origin("arctan", gate=gates.atan),
    *zero_origin("asin", gate=gates.asin),
    *zero_origin("atanh", gate=gates.atanh),
    *elementwise("sigmoid", origin=0.5, gate=gates.sigmoid, roles=(Role.PROBABILITY,)),
    *elementwise("special_expit", origin=0.5, gate=gates.sigmoid, roles=(Role.PROBABILITY,)),
    *elementwise(
        "log_sigmoid",
        origin=-math.log(2.0),
        gate=gates.log_sigmoid,
        roles=(Role.PROBABILITY,),
    ),
    *elementwise("exp", origin=1.0, gate=gates.expm1),
    *elementwise("exp2", origin=1.0, gate=gates.exp2),
    *elementwise("cos", origin=1.0, gate=gates.cos),
    *elementwise("cosh", origin=1.0, gate=gates.cosh),
    *elementwise("sinc", origin=1.0, gate=gates.sinc),
    *elementwise("erfc", origin=1.0, gate=gates.erfc),
    *elementwise("acos", origin=math.pi / 2, gate=gates.acos),
    # f(0) depends on an argument; the one given here is that of the default beta = 1
    *elementwise("softplus", origin=math.log(2.0), gate=gates.softplus),
)
