"""Operations that carry no gradient, and factories that depend on nothing live.

An operation with an integer or boolean result is frozen whatever its class; the analysis sees to it
"""

from collections.abc import Mapping
from typing import Any

from .. import views
from ..algebra import Algebra
from .rows import Table, rows

freezing = rows(Algebra.FREEZING)
factory = rows(Algebra.FACTORY)


def _only_divides(arguments: Mapping[str, Any]) -> str | None:
    return None if arguments["rounding_mode"] else "without a rounding mode use a / b"


TABLE: Table = (
    *freezing(
        """
        aten.detach.default aten.detach_copy.default aten.sign.default aten.floor.default
        aten.ceil.default aten.round.default aten.round.decimals aten.trunc.default aten.fix.default
        aten.heaviside.default aten.floor_divide.default aten.floor_divide.Scalar aten.eq.Tensor
        aten.eq.Scalar aten.ne.Tensor aten.ne.Scalar aten.gt.Tensor aten.gt.Scalar aten.ge.Tensor
        aten.ge.Scalar aten.lt.Tensor aten.lt.Scalar aten.le.Tensor aten.le.Scalar
        aten.greater.Tensor aten.less.Tensor aten.isclose.default aten.equal.default
        aten.logical_not.default aten.logical_and.default aten.logical_or.default
        aten.logical_xor.default aten.bitwise_not.default aten.bitwise_and.Tensor
        aten.bitwise_and.Scalar aten.bitwise_or.Tensor aten.bitwise_or.Scalar
        aten.bitwise_xor.Tensor aten.__and__.Tensor aten.__or__.Tensor aten.isnan.default
        aten.isinf.default aten.isfinite.default aten.signbit.default aten.argmax.default
        aten.argmin.default aten.argsort.default aten.argsort.stable aten.one_hot.default
        aten.bucketize.Tensor aten.searchsorted.Tensor aten.nonzero.default aten.argwhere.default
        aten.count_nonzero.default aten.any.default aten.any.dim aten.all.default aten.all.dim
        aten.item.default aten._local_scalar_dense.default
        """
    ),
    # Numbers in, numbers out. Sizes are constants and never come here; a number read off a value
    # (`item`) is frozen, and so is all that is made of it: frozen is not constant.
    *freezing(
        """
        add sub mul truediv floordiv mod pow neg eq ne lt le gt ge and_ or_
        aten.arange.default aten.arange.start aten.arange.start_step aten.linspace.default
        aten.full.default aten.scalar_tensor.default
        """
    ),
    *freezing("aten.view.dtype", view=views.OF_MEMORY),
    *freezing("aten.div.Tensor_mode aten.div.Scalar_mode", refuses=_only_divides),
    *factory(
        """
        aten.zeros_like.default aten.ones_like.default aten.full_like.default
        aten.empty_like.default aten.new_zeros.default aten.new_ones.default aten.new_full.default
        aten.new_empty.default aten.zeros.default aten.ones.default aten.empty.memory_format
        aten.eye.default aten.eye.m aten.fill.Scalar aten.sym_size.int aten.sym_numel.default
        aten.sym_stride.int
        """,
    ),
)
