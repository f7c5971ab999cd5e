"""Operations that carry no gradient, and factories that depend on nothing live.

An operation with an integer or boolean result is frozen whatever its class; the analysis sees to it
"""

from collections.abc import Mapping
from typing import Any

from .. import views
from ..algebra import Algebra, Role
from .row import Table, rows

freezing = rows(Algebra.FREEZING)
factory = rows(Algebra.FACTORY)


def _only_divides(arguments: Mapping[str, Any]) -> str | None:
    return None if arguments["rounding_mode"] else "without a rounding mode use a / b"


TABLE: Table = (
    *freezing(
        """
        detach detach_copy sign floor ceil round round.decimals trunc heaviside
        ne.Tensor ne.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar lt.Tensor
        lt.Scalar le.Tensor le.Scalar equal logical_not logical_and logical_or logical_xor
        bitwise_not bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor
        bitwise_or.Scalar bitwise_xor.Tensor isnan isinf isposinf isneginf isfinite signbit
        argmax argmin argsort argsort.stable histc bucketize.Tensor searchsorted.Tensor
        nonzero argwhere count_nonzero any any.dim all all.dim item _local_scalar_dense
        """
    ),
    *freezing("eq.Tensor eq.Scalar one_hot", roles=(Role.INDICATOR,)),
    *freezing(
        """
        __and__.Tensor __or__.Tensor greater.Tensor less.Tensor isclose fix floor_divide
        floor_divide.Scalar
        """,
        roles=(Role.POINTWISE,),
    ),
    *freezing("view.dtype", view=views.OF_MEMORY),
    *freezing("div.Tensor_mode div.Scalar_mode", refuses=_only_divides),
    # Numbers in, numbers out. Sizes are constants and never come here; a number read off a value
    # (`item`) is frozen, and so is all that is made of it: frozen is not constant.
    *freezing("add sub mul truediv floordiv mod pow neg eq ne lt le gt ge and_ or_", python=True),
    *freezing("arange arange.start arange.start_step linspace full scalar_tensor"),
    *factory(
        """
        zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty zeros ones
        empty.memory_format eye eye.m fill.Scalar sym_size.int sym_numel sym_stride.int
        """
    ),
)
