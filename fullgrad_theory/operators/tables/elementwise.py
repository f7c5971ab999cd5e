"""Elementwise functions that are not homogeneous: consistent at degree 0, or under a secant.

Those with f(0) = 0 keep their operand's degree under the secant; the others add the bias leaf f(0).
"""

import math

from .. import gates
from ..algebra import Algebra, Role
from .rows import Table, rows

zero_origin = rows(Algebra.ZERO_ORIGIN)
elementwise = rows(Algebra.ELEMENTWISE)

TABLE: Table = (
    *zero_origin("aten.gelu.default", gate=gates.gelu),
    *zero_origin("aten.silu.default", gate=gates.silu),
    *zero_origin("aten.mish.default", gate=gates.mish),
    *zero_origin("aten.tanh.default", gate=gates.tanh),
    *zero_origin("aten.erf.default", gate=gates.erf),
    *zero_origin("aten.erfinv.default", gate=gates.erfinv),
    *zero_origin("aten.hardswish.default", gate=gates.hardswish),
    *zero_origin("aten.relu6.default", gate=gates.relu6),
    *zero_origin("aten.elu.default", gate=gates.elu),
    *zero_origin("aten.selu.default", gate=gates.selu),
    *zero_origin("aten.celu.default", gate=gates.celu),
    *zero_origin("aten.expm1.default", gate=gates.expm1),
    *zero_origin("aten.log1p.default", gate=gates.log1p),
    *zero_origin("aten.sin.default", gate=gates.sin),
    *zero_origin("aten.tan.default", gate=gates.tan),
    *zero_origin("aten.sinh.default", gate=gates.sinh),
    *zero_origin("aten.asinh.default", gate=gates.asinh),
    *zero_origin("aten.atan.default", gate=gates.atan),
    *zero_origin("aten.arctan.default", gate=gates.atan),
    *zero_origin("aten.asin.default", gate=gates.asin),
    *zero_origin("aten.atanh.default", gate=gates.atanh),
    *elementwise("aten.sigmoid.default", origin=0.5, gate=gates.sigmoid, roles=(Role.PROBABILITY,)),
    *elementwise("aten.special_expit.default", origin=0.5, gate=gates.sigmoid),
    *elementwise("aten.hardsigmoid.default", origin=0.5, gate=gates.hardsigmoid),
    *elementwise("aten.log_sigmoid.default", origin=-math.log(2.0), gate=gates.log_sigmoid),
    *elementwise("aten.exp.default", origin=1.0, gate=gates.expm1),
    *elementwise("aten.exp2.default", origin=1.0, gate=gates.exp2),
    *elementwise("aten.cos.default", origin=1.0, gate=gates.cos),
    *elementwise("aten.cosh.default", origin=1.0, gate=gates.cosh),
    *elementwise("aten.sinc.default", origin=1.0, gate=gates.sinc),
    *elementwise("aten.erfc.default", origin=1.0, gate=gates.erfc),
    *elementwise("aten.acos.default", origin=math.pi / 2, gate=gates.acos),
    # f(0) depends on an argument; the one given here is that of the default beta = 1
    *elementwise("aten.softplus.default", origin=math.log(2.0), gate=gates.softplus),
)
