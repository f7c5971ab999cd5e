"""Structural operations: values are moved, copied or selected, never changed. d = e.

Those that put several values side by side (cat, stack, where) demand equal degrees, and a constant
among them is a bias leaf where the others have degree 1.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from .. import views
from ..algebra import Algebra, Role
from .row import Table, rows

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


def _shares_memory(arguments: Mapping[str, Any]) -> str | None:
    """torch keeps the strides of what is written into: where its elements share memory one write is
    seen in several, and the gradient knows of one."""
    value, written = arguments["self"].meta["val"], 1
    laid = zip(value.stride(), value.shape, strict=True)
    known = [(d, n) for d, n in laid if isinstance(d, int) and isinstance(n, int) and n != 1]
    for stride, size in sorted(known):
        if stride < written:
            return (
                "it writes to elements that share memory (of an expand or an unfold), and torch's "
                "gradient of that is not its derivative; write to a .contiguous() copy"
            )
        written += (size - 1) * stride
    return None


def _random(arguments: Mapping[str, Any]) -> str | None:
    """Dropout is the identity in eval mode."""
    drops = arguments["train"] and arguments["p"]
    return "dropout in training mode is random" if drops else None


# getitem on a tuple is resolved by the analyses themselves; on a list of tensors it is this line
TABLE: Table = (
    *structural("getitem", python=True),
    *structural("view", view=views.VIEWED),
    *structural(
        """
        _unsafe_view atleast_1d atleast_2d adjoint mH expand broadcast_to repeat tile
        repeat_interleave.self_int repeat_interleave.self_Tensor diag diag_embed hsplit.int
        vsplit.int unsafe_chunk unsafe_split.Tensor unsafe_split_with_sizes unfold im2col
        masked_select flip fliplr flipud roll rot90 tril triu lift_fresh_copy to.prim_Device
        pixel_shuffle pixel_unshuffle
        channel_shuffle reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
        imag view_as_real view_as_complex
        """
    ),
    *structural(
        "alias positive real conj conj_physical _conj resolve_conj resolve_neg",
        roles=(Role.POINTWISE,),
    ),
    *structural(
        "reshape flatten.using_ints ravel unflatten.int squeeze squeeze.dim squeeze.dims unsqueeze",
        view=views.RESHAPED,
    ),
    *structural("transpose.int swapaxes swapdims", view=views.SWAPPED),
    *structural("t", view=views.TRANSPOSED),
    *structural("permute", view=views.PERMUTED),
    *structural("movedim.int movedim.intlist moveaxis.int moveaxis.intlist", view=views.MOVED),
    *structural("mT", view=views.LAST_TRANSPOSED),
    *structural("numpy_T", view=views.REVERSED),
    *structural("slice.Tensor", view=views.SLICED),
    *structural("select.int", view=views.SELECTED),
    *structural("narrow", view=views.NARROWED),
    *structural("diagonal", view=views.DIAGONAL),
    *structural("unbind.int", view=views.UNBOUND),
    *structural(
        """
        chunk split.Tensor split.sizes split_with_sizes tensor_split.sections tensor_split.indices
        """,
        view=views.SPLIT,
    ),
    *structural("clone contiguous to.dtype to.device to.dtype_layout _to_copy", roles=(Role.CAST,)),
    *structural("as_strided", view=views.OF_MEMORY, refuses=_reaches_out),
    *structural("dropout", "input", roles=(Role.CAST,), refuses=_random),
    *structural("feature_dropout alpha_dropout feature_alpha_dropout", "input", refuses=_random),
    # the other tensor lends its shape or dtype only
    *structural("view_as", "self*other^0", view=views.VIEWED_AS),
    *structural("reshape_as", "self*other^0", view=views.RESHAPED),
    *structural("expand_as", "self*other^0"),
    *structural("to.other type_as", "self*other^0", roles=(Role.CAST,)),
    *structural("index.Tensor index_select gather take_along_dim take", roles=(Role.LOOKUP,)),
    *structural("embedding", "weight", roles=(Role.LOOKUP,)),
    *structural("embedding_bag.padding_idx", "weight ; - ; - ; -", roles=(Role.LOOKUP,)),
    *structural(
        "cat concat concatenate stack hstack vstack dstack column_stack block_diag",
        "tensors",
    ),
    *structural("complex", "real + imag"),
    *structural(
        "where.self where.ScalarOther where.ScalarSelf where.Scalar",
        "self + other",
        roles=(Role.POINTWISE,),
    ),
    *structural("masked_fill.Scalar masked_fill.Tensor", "self + value", roles=(Role.POINTWISE,)),
    *structural(
        """
        constant_pad_nd pad
        index_fill.int_Scalar index_fill.int_Tensor
        """,
        "self + value",
    ),
    *structural("scatter.value", "self + value", roles=(Role.INDICATOR,)),
    *structural(
        "slice_scatter select_scatter diagonal_scatter", "self + src", refuses=_shares_memory
    ),
    *structural("scatter.src", "self + src"),
    *structural("masked_scatter index_copy", "self + source"),
    # what stood there before is overwritten, it lends its shape only
    *structural("fill.Tensor", "value*self^0"),
)
