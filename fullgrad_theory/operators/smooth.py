"""Smooth operations without a degree: integrated along the ray from 0, where that ray is regular.

On the ray t u, 0 <= t <= 1, a *smooth* operation is absolutely continuous, and f(0) is finite. A
*singular* one is not: it is infinite or undetermined at 0, or it jumps. That one has no edit; what
it reads is pruned, or held at degree 0 by freezing a normaliser before it.
"""

from .base import Algebra
from .registry import register

for _name in """
aten.softmax.int aten._softmax.default aten._safe_softmax.default
aten.log_softmax.int aten._log_softmax.default
aten.logsumexp.default aten.logaddexp.default aten.logcumsumexp.default
aten.pow.Scalar
""".split():
    register(_name, Algebra.SMOOTH)

for _name in """
aten.lstm.input aten.gru.input aten.rnn_tanh.input aten.rnn_relu.input
""".split():
    register(
        _name,
        Algebra.SMOOTH,
        refuses=lambda a: "dropout between its layers is random" if a["train"] else None,
    )
for _name in "aten.lstm_cell.default aten.gru_cell.default".split():
    register(_name, Algebra.SMOOTH)

for _name in """
aten.glu.default aten.prod.default aten.prod.dim_int aten.cumprod.default
""".split():
    register(_name, Algebra.SMOOTH, vanishes="self")
register("aten.linalg_det.default", Algebra.SMOOTH, vanishes="A")

register(
    "aten.scaled_dot_product_attention.default",
    Algebra.ATTENTION,
    "value",
    refuses=lambda a: "attention with dropout is random" if a["dropout_p"] else None,
    vanishes="value",
)

# infinite at 0; undetermined at (0, 0), where atan2 and x^y depend on the direction; a sawtooth
for _name in """
aten.log.default aten.log2.default aten.log10.default aten.logit.default aten.xlogy.Tensor
aten.pow.Tensor_Tensor aten.atan2.default aten.frac.default
""".split():
    register(_name, Algebra.SINGULAR)
