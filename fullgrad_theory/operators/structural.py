"""Structural operations: values are moved, copied or selected, never changed. d = e.

Those that put several values side by side (cat, stack, where) demand equal degrees, and a constant
among them is a bias leaf where the others have degree 1.
"""

from .base import Algebra
from .registry import register

# getitem on a tuple is resolved by the degree analysis itself; on a list of tensors it is this line
_SELF = """
getitem
aten.view.default aten._unsafe_view.default aten.reshape.default aten.flatten.using_ints
aten.ravel.default aten.unflatten.int aten.atleast_1d.default aten.atleast_2d.default
aten.transpose.int aten.t.default aten.permute.default aten.movedim.int aten.movedim.intlist
aten.swapaxes.default aten.swapdims.default aten.moveaxis.int aten.moveaxis.intlist
aten.adjoint.default aten.mT.default aten.mH.default aten.numpy_T.default
aten.squeeze.default aten.squeeze.dim aten.squeeze.dims aten.unsqueeze.default
aten.expand.default aten.broadcast_to.default aten.repeat.default
aten.tile.default aten.repeat_interleave.self_int aten.repeat_interleave.self_Tensor
aten.slice.Tensor aten.select.int aten.narrow.default aten.diagonal.default aten.diag.default
aten.diag_embed.default
aten.unbind.int aten.chunk.default aten.split.Tensor aten.split.sizes aten.split_with_sizes.default
aten.hsplit.int aten.vsplit.int aten.tensor_split.sections aten.tensor_split.indices
aten.unsafe_chunk.default aten.unsafe_split.Tensor aten.unsafe_split_with_sizes.default
aten.unfold.default aten.im2col.default aten.as_strided.default
aten.index.Tensor aten.index_select.default aten.gather.default aten.take_along_dim.default
aten.take.default aten.masked_select.default aten.flip.default aten.fliplr.default
aten.flipud.default aten.roll.default aten.rot90.default aten.tril.default aten.triu.default
aten.clone.default aten.contiguous.default aten.alias.default aten.lift_fresh_copy.default
aten.positive.default
aten.to.dtype aten.to.device aten.to.dtype_layout aten.to.prim_Device aten._to_copy.default
aten.pixel_shuffle.default aten.pixel_unshuffle.default aten.channel_shuffle.default
aten.reflection_pad1d.default aten.reflection_pad2d.default aten.replication_pad1d.default
aten.replication_pad2d.default
aten.real.default aten.imag.default aten.view_as_real.default aten.view_as_complex.default
aten.conj.default aten.conj_physical.default aten._conj.default aten.resolve_conj.default
aten.resolve_neg.default
"""
for _name in _SELF.split():
    register(_name, Algebra.STRUCTURAL)

# dropout in eval mode is the identity; in training mode it is random
for _name in """
aten.dropout.default aten.feature_dropout.default aten.alpha_dropout.default
aten.feature_alpha_dropout.default
""".split():
    register(
        _name,
        Algebra.STRUCTURAL,
        "input",
        refuses=lambda a: "dropout in training mode is random" if a["train"] and a["p"] else None,
    )

# the other tensor lends its shape or dtype only
for _name in """
aten.view_as.default aten.reshape_as.default aten.expand_as.default aten.to.other
aten.type_as.default
""".split():
    register(_name, Algebra.STRUCTURAL, "self*other^0")

for _name, _signature in {
    "aten.embedding.default": "weight",
    "aten.cat.default": "tensors",
    "aten.concat.default": "tensors",
    "aten.concatenate.default": "tensors",
    "aten.stack.default": "tensors",
    "aten.hstack.default": "tensors",
    "aten.vstack.default": "tensors",
    "aten.dstack.default": "tensors",
    "aten.column_stack.default": "tensors",
    "aten.block_diag.default": "tensors",
    "aten.complex.default": "real + imag",
    "aten.where.self": "self + other",
    "aten.where.ScalarOther": "self + other",
    "aten.where.ScalarSelf": "self + other",
    "aten.where.Scalar": "self + other",
    "aten.masked_fill.Scalar": "self + value",
    "aten.masked_fill.Tensor": "self + value",
    "aten.constant_pad_nd.default": "self + value",
    "aten.pad.default": "self + value",
    "aten.slice_scatter.default": "self + src",
    "aten.select_scatter.default": "self + src",
    "aten.diagonal_scatter.default": "self + src",
    "aten.scatter.src": "self + src",
    "aten.scatter.value": "self + value",
    "aten.masked_scatter.default": "self + source",
    "aten.index_copy.default": "self + source",
    "aten.index_fill.int_Scalar": "self + value",
    "aten.index_fill.int_Tensor": "self + value",
    # what stood there before is overwritten, it lends its shape only
    "aten.fill.Tensor": "value*self^0",
}.items():
    register(_name, Algebra.STRUCTURAL, _signature)
