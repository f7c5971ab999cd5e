"""Elementwise functions that are not homogeneous: consistent at degree 0, or under a secant.

Those with f(0) = 0 keep their operand's degree under the secant; the others add the bias leaf f(0).
"""

import math

from .base import Algebra
from .registry import register

for _name in """
gelu silu mish tanh erf erfinv hardswish relu6 elu selu celu expm1 log1p sin tan sinh asinh atan
arctan asin atanh
""".split():
    register(f"aten.{_name}.default", Algebra.ZERO_ORIGIN)

for _name, _origin in {
    "sigmoid": 0.5,
    "special_expit": 0.5,
    "hardsigmoid": 0.5,
    "log_sigmoid": -math.log(2.0),
    "exp": 1.0,
    "exp2": 1.0,
    "cos": 1.0,
    "cosh": 1.0,
    "sinc": 1.0,
    "erfc": 1.0,
    "acos": math.pi / 2,
}.items():
    register(f"aten.{_name}.default", Algebra.ELEMENTWISE, origin=_origin)

# f(0) depends on an argument; the one given here is that of the default beta = 1
register("aten.softplus.default", Algebra.ELEMENTWISE, origin=math.log(2.0))
