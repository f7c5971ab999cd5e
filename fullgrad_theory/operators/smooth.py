"""Composites without a degree: consistent only where all they see has degree 0; and attention."""

from .base import Algebra
from .registry import register

for _name in """
aten.softmax.int aten._softmax.default aten._safe_softmax.default
aten.log_softmax.int aten._log_softmax.default
aten.logsumexp.default aten.logaddexp.default aten.logcumsumexp.default aten.glu.default
aten.lstm.input aten.gru.input aten.rnn_tanh.input aten.rnn_relu.input
aten.lstm_cell.default aten.gru_cell.default
aten.log.default aten.log2.default aten.log10.default aten.logit.default aten.xlogy.Tensor
aten.pow.Scalar aten.pow.Tensor_Tensor aten.atan2.default
aten.prod.default aten.prod.dim_int aten.cumprod.default aten.linalg_det.default
aten.frac.default
""".split():
    register(_name, Algebra.SMOOTH)

register(
    "aten.scaled_dot_product_attention.default",
    Algebra.ATTENTION,
    "value",
    refuses=lambda a: "attention with dropout is random" if a["dropout_p"] else None,
)
