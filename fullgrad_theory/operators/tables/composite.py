"""Composites: a trace holds what torch makes of them, and that is judged.

meshgrid and its like return a view of each of their operands, which have nothing to do with each
other. A cosine similarity normalises both of its operands, and each norm can be held fixed in its
place. Recurrent cells are steps on the CPU; elsewhere they are kernels with other bits. Those of
LSTM and GRU write in place, in strides of their own, and a functional copy of them has other bits:
they stay whole.
"""

from collections.abc import Mapping
from typing import Any

from ..algebra import Algebra
from .row import Table, rows

composite = rows(Algebra.COMPOSITE)


def _one_kernel(arguments: Mapping[str, Any]) -> str | None:
    return "on this device it is one kernel, whose steps nobody sees; trace it on the CPU"


TABLE: Table = (
    *composite(
        "meshgrid meshgrid.indexing broadcast_tensors",
        "tensors",
        opened=None,
        proved=False,
    ),
    *composite("cosine_similarity", "x1", opened=None, proved=False),
    *composite(
        "rnn_tanh_cell rnn_relu_cell",
        "input",
        opened=("cpu", "meta"),
        refuses=_one_kernel,
        proved=False,
    ),
)
