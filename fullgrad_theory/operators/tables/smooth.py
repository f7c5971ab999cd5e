"""Smooth operations without a degree: integrated along the ray from 0, where that ray is regular.

On the ray t u, 0 <= t <= 1, a *smooth* operation is absolutely continuous, and f(0) is finite. A
*singular* one is not: it is infinite or undetermined at 0, or it jumps. That one has no edit; what
it reads is pruned, or held at degree 0 by freezing a normaliser before it.
"""

from collections.abc import Mapping
from typing import Any

from .. import attention_form
from ..algebra import Algebra, Role
from .rows import Table, rows

smooth = rows(Algebra.SMOOTH)
attention = rows(Algebra.ATTENTION)
singular = rows(Algebra.SINGULAR)


def _drops_out(arguments: Mapping[str, Any]) -> str | None:
    return "dropout between its layers is random" if arguments["train"] else None


def _is_random(arguments: Mapping[str, Any]) -> str | None:
    return "attention with dropout is random" if arguments["dropout_p"] else None


TABLE: Table = (
    *smooth("aten.softmax.int aten._softmax.default", roles=(Role.SOFTMAX, Role.PROBABILITY)),
    *smooth("aten._safe_softmax.default", roles=(Role.SOFTMAX,)),
    *smooth("aten.log_softmax.int aten._log_softmax.default", roles=(Role.PROBABILITY,)),
    *smooth(
        """
        aten.logsumexp.default aten.logaddexp.default aten.logcumsumexp.default aten.pow.Scalar
        aten.lstm_cell.default aten.gru_cell.default
        """,
    ),
    *smooth(
        """
        aten.lstm.input aten.gru.input
        """,
        refuses=_drops_out,
    ),
    # steps on the CPU; elsewhere kernels with other bits
    *smooth("aten.rnn_tanh.input aten.rnn_relu.input", opened=("cpu", "meta"), refuses=_drops_out),
    *smooth(
        """
        aten.glu.default aten.prod.default aten.prod.dim_int aten.cumprod.default
        """,
        vanishes="self",
    ),
    *smooth("aten.linalg_det.default", vanishes="A"),
    *attention(
        "aten.scaled_dot_product_attention.default",
        "value",
        vanishes="value",
        frozen=attention_form.HELD_WEIGHTS,
        refuses=_is_random,
    ),
    # infinite at 0; undetermined at (0, 0), where atan2 and x^y depend on the direction; a sawtooth
    *singular(
        """
        aten.log.default aten.log2.default aten.log10.default aten.logit.default aten.xlogy.Tensor
        aten.pow.Tensor_Tensor aten.atan2.default aten.frac.default
        """,
    ),
)
