"""Structural operations: values are moved, copied or selected, never changed. d = e.

Those that put several values side by side (cat, stack, where) demand equal degrees, and a constant
among them is a bias leaf where the others have degree 1.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from .. import views
from ..algebra import Algebra, Role
from .rows import Table, rows

structural = rows(Algebra.STRUCTURAL)


def _reaches_out(arguments: Mapping[str, Any]) -> str | None:
    """A view by strides is of memory: it may hold more than the operand, or that in other order."""
    value = arguments["self"].meta["val"]
    sizes, strides = arguments["size"], arguments["stride"]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    start = arguments["storage_offset"] or 0
    whole = all(isinstance(n, int) for n in (last, start, *value.shape))
    if whole and not start and last < prod(value.shape) and value.is_contiguous():
        return None
    return (
        "as_strided reads memory by its own strides, not the values of its operand alone; use "
        "reshape, select or unfold"
    )


def _random(arguments: Mapping[str, Any]) -> str | None:
    """Dropout is the identity in eval mode."""
    drops = arguments["train"] and arguments["p"]
    return "dropout in training mode is random" if drops else None


# getitem on a tuple is resolved by the analyses themselves; on a list of tensors it is this line
TABLE: Table = (
    *structural(
        """
        getitem aten._unsafe_view.default aten.atleast_1d.default aten.atleast_2d.default
        aten.adjoint.default aten.mH.default aten.expand.default aten.broadcast_to.default
        aten.repeat.default aten.tile.default aten.repeat_interleave.self_int
        aten.repeat_interleave.self_Tensor aten.diag.default aten.diag_embed.default aten.hsplit.int
        aten.vsplit.int aten.unsafe_chunk.default aten.unsafe_split.Tensor
        aten.unsafe_split_with_sizes.default aten.unfold.default aten.im2col.default
        aten.index.Tensor aten.index_select.default aten.gather.default aten.take_along_dim.default
        aten.take.default aten.masked_select.default aten.flip.default aten.fliplr.default
        aten.flipud.default aten.roll.default aten.rot90.default aten.tril.default aten.triu.default
        aten.alias.default aten.lift_fresh_copy.default aten.positive.default aten.to.prim_Device
        aten.pixel_shuffle.default aten.pixel_unshuffle.default aten.channel_shuffle.default
        aten.reflection_pad1d.default aten.reflection_pad2d.default aten.replication_pad1d.default
        aten.replication_pad2d.default aten.real.default aten.imag.default aten.view_as_real.default
        aten.view_as_complex.default aten.conj.default aten.conj_physical.default aten._conj.default
        aten.resolve_conj.default aten.resolve_neg.default
        """,
    ),
    *structural("aten.view.default", view=views.VIEWED),
    *structural(
        """
        aten.reshape.default aten.flatten.using_ints aten.ravel.default aten.unflatten.int
        aten.squeeze.default aten.squeeze.dim aten.squeeze.dims aten.unsqueeze.default
        """,
        view=views.RESHAPED,
    ),
    *structural(
        """
        aten.transpose.int aten.swapaxes.default aten.swapdims.default
        """,
        view=views.SWAPPED,
    ),
    *structural("aten.t.default", view=views.TRANSPOSED),
    *structural("aten.permute.default", view=views.PERMUTED),
    *structural(
        """
        aten.movedim.int aten.movedim.intlist aten.moveaxis.int aten.moveaxis.intlist
        """,
        view=views.MOVED,
    ),
    *structural("aten.mT.default", view=views.LAST_TRANSPOSED),
    *structural("aten.numpy_T.default", view=views.REVERSED),
    *structural("aten.slice.Tensor", view=views.SLICED),
    *structural("aten.select.int", view=views.SELECTED),
    *structural("aten.narrow.default", view=views.NARROWED),
    *structural("aten.diagonal.default", view=views.DIAGONAL),
    *structural("aten.unbind.int", view=views.UNBOUND),
    *structural(
        """
        aten.chunk.default aten.split.Tensor aten.split.sizes aten.split_with_sizes.default
        aten.tensor_split.sections aten.tensor_split.indices
        """,
        view=views.SPLIT,
    ),
    *structural(
        """
        aten.clone.default aten.contiguous.default aten.to.dtype aten.to.device aten.to.dtype_layout
        aten._to_copy.default
        """,
        roles=(Role.CAST,),
    ),
    *structural("aten.as_strided.default", view=views.OF_MEMORY, refuses=_reaches_out),
    *structural("aten.dropout.default", "input", roles=(Role.CAST,), refuses=_random),
    *structural(
        """
        aten.feature_dropout.default aten.alpha_dropout.default
        aten.feature_alpha_dropout.default
        """,
        "input",
        refuses=_random,
    ),
    # the other tensor lends its shape or dtype only
    *structural("aten.view_as.default", "self*other^0", view=views.VIEWED_AS),
    *structural("aten.reshape_as.default", "self*other^0", view=views.RESHAPED),
    *structural("aten.expand_as.default", "self*other^0"),
    *structural("aten.to.other aten.type_as.default", "self*other^0", roles=(Role.CAST,)),
    *structural("aten.embedding.default", "weight", roles=(Role.LOOKUP,)),
    *structural(
        """
        aten.cat.default aten.concat.default aten.concatenate.default aten.stack.default
        aten.hstack.default aten.vstack.default aten.dstack.default aten.column_stack.default
        aten.block_diag.default
        """,
        "tensors",
    ),
    *structural("aten.complex.default", "real + imag"),
    *structural("aten.where.self", "self + other"),
    *structural("aten.where.ScalarOther", "self + other"),
    *structural("aten.where.ScalarSelf", "self + other"),
    *structural("aten.where.Scalar", "self + other"),
    *structural("aten.masked_fill.Scalar", "self + value"),
    *structural("aten.masked_fill.Tensor", "self + value"),
    *structural("aten.constant_pad_nd.default", "self + value"),
    *structural("aten.pad.default", "self + value"),
    *structural("aten.slice_scatter.default", "self + src"),
    *structural("aten.select_scatter.default", "self + src"),
    *structural("aten.diagonal_scatter.default", "self + src"),
    *structural("aten.scatter.src", "self + src"),
    *structural("aten.scatter.value", "self + value"),
    *structural("aten.masked_scatter.default", "self + source"),
    *structural("aten.index_copy.default", "self + source"),
    *structural("aten.index_fill.int_Scalar", "self + value"),
    *structural("aten.index_fill.int_Tensor", "self + value"),
    # what stood there before is overwritten, it lends its shape only
    *structural("aten.fill.Tensor", "value*self^0"),
)
