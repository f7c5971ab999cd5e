"""Smooth operations without a degree: integrated along the ray from 0, where that ray is regular.

On the ray t u, 0 <= t <= 1, a *smooth* operation is absolutely continuous, and f(0) is finite. A
*singular* one is not: it is infinite or undetermined at 0, or it jumps. That one has no edit; what
it reads is pruned, or held at degree 0 by freezing a normaliser before it.
"""

from collections.abc import Mapping
from typing import Any

from .. import attention_form
from ..algebra import Algebra, Role
from .row import Table, rows

smooth = rows(Algebra.SMOOTH)
attention = rows(Algebra.ATTENTION)
singular = rows(Algebra.SINGULAR)


def _drops_out(arguments: Mapping[str, Any]) -> str | None:
    return "dropout between its layers is random" if arguments["train"] else None


def _is_random(arguments: Mapping[str, Any]) -> str | None:
    return "attention with dropout is random" if arguments["dropout_p"] else None


TABLE: Table = (
    *smooth("softmax.int _softmax", roles=(Role.SOFTMAX, Role.PROBABILITY)),
    *smooth("_safe_softmax", roles=(Role.SOFTMAX,)),
    *smooth("log_softmax.int _log_softmax", roles=(Role.PROBABILITY,)),
    *smooth("logsumexp logaddexp logcumsumexp pow.Scalar lstm_cell gru_cell"),
    *smooth("lstm.input gru.input", refuses=_drops_out),
    # steps on the CPU; elsewhere kernels with other bits
    *smooth("rnn_tanh.input rnn_relu.input", opened=("cpu", "meta"), refuses=_drops_out),
    *smooth("glu prod prod.dim_int cumprod", vanishes="self"),
    *smooth("linalg_det", vanishes="A"),
    *attention(
        "scaled_dot_product_attention",
        "value",
        vanishes="value",
        frozen=attention_form.HELD_WEIGHTS,
        refuses=_is_random,
    ),
    # infinite at 0; undetermined at (0, 0), where atan2 and x^y depend on the direction; a sawtooth
    *singular("log log2 log10 logit xlogy.Tensor pow.Tensor_Tensor atan2 frac"),
)
