"""Sample calls of every registered operation, for tests and proofs: small shapes, dyadic numbers.

Every real number drawn is an odd multiple of 1/16, all of different magnitude within a call: no
ties, no kinks (0, 1/2, 1, 3, 6), and exact as a rational.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..operators.algebra import Algebra
from ..operators.calls import Call, Operand, bind, operands
from ..operators.registry import lookup
from ..operators.relations import parse_signature


@dataclass(frozen=True)
class Sample:
    """A call. `live` names the operands that carry the input, as `Operand.name` does."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    live: tuple[str, ...]


@dataclass(frozen=True)
class _Draw:
    """A tensor yet to be drawn: `kind` is real, positive, unit (in (-1, 1)), complex or mask."""

    shape: tuple[int, ...]
    kind: str = "real"


def _real(*shape: int) -> _Draw:
    return _Draw(shape)


def _positive(*shape: int) -> _Draw:
    return _Draw(shape, "positive")


def _unit(*shape: int) -> _Draw:
    return _Draw(shape, "unit")


def _complex(*shape: int) -> _Draw:
    return _Draw(shape, "complex")


def _mask(*shape: int) -> _Draw:
    return _Draw(shape, "mask")


_Case = tuple[tuple[Any, ...], dict[str, Any]]


def _case(*args: Any, **kwargs: Any) -> _Case:
    return args, kwargs


_X = _real(2, 3)
_PLANE = _real(1, 1, 4, 4)
_IMAGE = _real(1, 2, 3, 3)
_INT = torch.tensor
_F64 = torch.float64


def _rnn(gates: int, states: Any) -> _Case:
    weights = [_real(gates, 2), _real(gates, 1), _real(gates), _real(gates)]
    return _case(_real(2, 1, 2), states, weights, True, 1, 0.0, False, False, False)


def _cell(gates: int, states: Any) -> _Case:
    shapes = [(2 * gates, 2), (2 * gates, 2), (2 * gates,), (2 * gates,)]
    return _case(_real(1, 2), states, *(_real(*s) for s in shapes))


# calls of operations that need more than tensors of shape (2, 3); the rest follows from the schema
_CASES: dict[str, list[_Case]] = {
    # structural
    "getitem": [_case([_X, _X], 1)],
    "view _unsafe_view reshape": [_case(_X, [3, 2])],
    "flatten.using_ints": [_case(_real(2, 1, 3), 1, 2)],
    "unflatten.int": [_case(_real(2, 4), 1, [2, 2])],
    "transpose.int swapaxes swapdims": [_case(_X, 0, 1)],
    "movedim.int moveaxis.int": [_case(_X, 0, 1)],
    "movedim.intlist moveaxis.intlist": [_case(_real(2, 1, 3), [0, 2], [2, 1])],
    "permute": [_case(_real(2, 1, 3), [0, 2, 1])],
    "squeeze": [_case(_real(2, 1))],
    "squeeze.dim": [_case(_real(2, 1), 1)],
    "squeeze.dims": [_case(_real(2, 1), [1])],
    "unsqueeze": [_case(_X, 1)],
    "expand broadcast_to": [_case(_real(1, 3), [2, 3])],
    "repeat tile": [_case(_X, [2, 1])],
    "repeat_interleave.self_int": [_case(_X, 2, 1)],
    "repeat_interleave.self_Tensor": [_case(_X, _INT([1, 2]), 0)],
    "slice.Tensor": [_case(_X, 1, 0, 3, 2)],
    "select.int": [_case(_X, 1, 2)],
    "narrow": [_case(_X, 1, 1, 2)],
    "diagonal trace diag": [_case(_real(3, 3))],
    "unbind.int": [_case(_X, 0)],
    "chunk unsafe_chunk hsplit.int vsplit.int tensor_split.sections": [_case(_real(2, 4), 2)],
    "split.Tensor unsafe_split.Tensor": [_case(_real(3, 2), 2)],
    "split.sizes split_with_sizes unsafe_split_with_sizes": [_case(_real(3, 2), [1, 2])],
    "tensor_split.indices": [_case(_real(3, 2), [1])],
    "unfold": [_case(_real(5), 0, 3, 1)],
    "im2col": [_case(_PLANE, [2, 2], [1, 1], [0, 0], [2, 2])],
    "as_strided": [_case(_X, [2, 2], [1, 2])],
    "index.Tensor": [_case(_X, [_INT([1, 0]), _INT([2, 2])])],
    "index_select": [_case(_X, 1, _INT([2, 0]))],
    "gather": [_case(_X, 1, _INT([[2, 0], [1, 1]]))],
    "take_along_dim": [_case(_X, _INT([[2], [1]]), 1)],
    "take": [_case(_X, _INT([5, 0]))],
    "masked_select": [_case(_X, _mask(2, 3))],
    "flip": [_case(_X, [1])],
    "roll": [_case(_X, [1], [1])],
    "to.dtype": [_case(_X, _F64)],
    "to.device": [_case(_X, torch.device("cpu"), _F64)],
    "to.dtype_layout _to_copy": [_case(_X, dtype=_F64)],
    "to.prim_Device": [_case(_X, torch.device("cpu"), _F64)],
    "pixel_shuffle channel_shuffle": [_case(_real(1, 4, 1, 2), 2)],
    "pixel_unshuffle": [_case(_real(1, 1, 2, 4), 2)],
    "reflection_pad1d replication_pad1d": [_case(_real(1, 3), [1, 2])],
    "reflection_pad2d replication_pad2d": [_case(_PLANE, [1, 0, 0, 1])],
    "real imag view_as_real conj _conj resolve_conj conj_physical mH": [_case(_complex(2, 2))],
    "view_as_complex": [_case(_real(3, 2))],
    "dropout feature_dropout alpha_dropout feature_alpha_dropout": [_case(_X, 0.5, False)],
    "embedding": [_case(_X, _INT([1, 0, 1]))],
    "embedding_bag.padding_idx": [
        _case(_X, _INT([1, 0, 1]), _INT([0, 2]), False, 0, False, None, False, None)],
    "meshgrid": [_case([_real(2), _real(3)])],
    "meshgrid.indexing": [_case([_real(2), _real(3)], indexing="xy")],
    "broadcast_tensors": [_case([_X, _real(3)])],
    "where.self": [_case(_mask(2, 3), _X, _real(3))],
    "where.ScalarOther": [_case(_mask(2, 3), _X, 0.25)],
    "where.ScalarSelf": [_case(_mask(2, 3), 0.25, _X)],
    "where.Scalar": [_case(_mask(2, 3), 0.25, 0.75)],
    "masked_fill.Scalar": [_case(_X, _mask(2, 3), 0.25)],
    "masked_fill.Tensor": [_case(_X, _mask(2, 3), _real())],
    "constant_pad_nd": [_case(_X, [1, 0], 0.25), _case(_X, [0, 1])],
    "pad": [_case(_X, [1, 0], "constant", 0.25), _case(_X, [1, 1], "reflect"), _case(_X, [0, 1])],
    "slice_scatter": [_case(_X, _real(2, 2), 1, 0, 2)],
    "select_scatter": [_case(_X, _real(3), 0, 1)],
    "diagonal_scatter": [_case(_X, _real(2))],
    "scatter.src scatter_add": [_case(_X, 1, _INT([[2, 0], [1, 2]]), _real(2, 2))],
    "scatter.value": [_case(_X, 1, _INT([[2], [1]]), 0.25)],
    "masked_scatter": [_case(_X, _mask(2, 3), _real(6))],
    "index_add index_copy": [_case(_X, 1, _INT([2, 0]), _real(2, 2))],
    "index_put _unsafe_index_put": [_case(_X, [_INT([0, 1]), _INT([2, 0])], _real(2)),
                  _case(_X, [_INT([0, 0]), _INT([2, 2])], _real(2), True)],
    "index_fill.int_Scalar": [_case(_X, 1, _INT([2]), 0.25)],
    "index_fill.int_Tensor": [_case(_X, 1, _INT([2]), _real())],
    "fill.Tensor": [_case(_X, _real())],
    # affine
    "add.Tensor sub.Tensor subtract.Tensor": [_case(_X, _real(3), alpha=2), _case(_X, 0.25)],
    "rsub.Tensor": [_case(_X, _real(3), alpha=2)],
    "add.Scalar sub.Scalar rsub.Scalar": [_case(_X, 0.25, 2), _case(_X, 0)],
    "sum.dim_IntList mean.dim": [_case(_X, [1], True)],
    "cumsum cumprod logcumsumexp cummax cummin": [_case(_X, 1)],
    "diff": [_case(_X), _case(_X, 1, 1, _real(2, 1), _real(2, 1))],
    "col2im": [_case(_real(1, 4, 4), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1])],
    "avg_pool1d max_pool1d": [_case(_real(1, 2, 5), [2], [1])],
    "avg_pool2d max_pool2d max_pool2d_with_indices": [_case(_PLANE, [2, 2], [2, 2], [1, 1])],
    "avg_pool3d max_pool3d": [_case(_real(1, 2, 2, 3), [2, 2, 2], [1, 1, 1])],
    "adaptive_avg_pool1d adaptive_max_pool1d": [_case(_real(1, 2, 5), [2])],
    "adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d": [_case(_PLANE, [2, 3])],
    "adaptive_avg_pool3d": [_case(_real(1, 2, 3, 2), [1, 2, 1])],
    "upsample_nearest1d.vec": [_case(_real(1, 2, 3), [6], None)],
    "upsample_nearest1d": [_case(_real(1, 2, 3), [6])],
    "upsample_nearest2d.vec _upsample_nearest_exact2d.vec": [_case(_IMAGE, [6, 4], None)],
    "upsample_nearest2d": [_case(_IMAGE, [6, 4])],
    "upsample_nearest3d.vec": [_case(_real(1, 1, 2, 2, 2), [2, 3, 4], None)],
    "upsample_linear1d.vec": [_case(_real(1, 2, 3), [4], False, None)],
    "upsample_linear1d": [_case(_real(1, 2, 3), [4], False)],
    "upsample_bilinear2d.vec upsample_bicubic2d.vec": [_case(_IMAGE, [4, 6], False, None)],
    "_upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec": [_case(_PLANE, [2, 2], False, None)],
    "upsample_bilinear2d upsample_bicubic2d": [_case(_IMAGE, [4, 6], False)],
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa": [_case(_PLANE, [2, 2], False)],
    "grid_sampler grid_sampler_2d": [_case(_PLANE, _unit(1, 2, 2, 2), 0, 0, False)],
    "affine_grid_generator": [_case(_real(1, 2, 3), [1, 1, 2, 2], False)],
    "fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn": [_case(_complex(2, 2))],
    "fft_rfft fft_rfft2 fft_rfftn": [_case(_real(2, 4)), _case(_real(2, 2), norm="ortho")],
    "fft_irfft fft_irfft2 fft_irfftn": [_case(_complex(2, 3))],
    "lerp.Scalar": [_case(_X, _X, 0.25)],
    "batch_norm": [
        _case(_X, _real(3), _real(3), _real(3), _positive(3), False, 0.1, 0.125, False),
        _case(_X, None, None, _real(3), _positive(3), False, 0.1, 0.125, False)],
    "_native_batch_norm_legit_no_training": [
        _case(_X, _real(3), _real(3), _real(3), _positive(3), 0.1, 0.125)],
    # multilinear
    "mul.Tensor div.Tensor multiply.Tensor divide.Tensor true_divide.Tensor": [
        _case(_X, _real(3)), _case(_X, 0.25)],
    "mul.Scalar div.Scalar": [_case(_X, 0.25)],
    "matmul": [_case(_X, _real(3, 2)), _case(_X, _real(3)), _case(_real(2, 1, 2), _real(2, 2))],
    "mm": [_case(_X, _real(3, 2))],
    "bmm": [_case(_real(2, 1, 2), _real(2, 2, 1))],
    "mv": [_case(_X, _real(3))],
    "dot vdot": [_case(_real(3), _real(3))],
    "outer": [_case(_real(2), _real(3))],
    "tensordot": [_case(_X, _real(3, 2), [1], [0])],
    "einsum": [_case("ij,jk->ik", [_X, _real(3, 2)]), _case("i,ij,j", [_real(2), _X, _real(3)])],
    "linalg_multi_dot": [_case([_X, _real(3, 2), _real(2, 1)])],
    "linear": [_case(_X, _real(2, 3), _real(2)), _case(_X, _real(2, 3))],
    "bilinear": [_case(_real(2, 2), _real(2, 1), _real(2, 2, 1), _real(2))],
    "addmm": [_case(_real(2), _X, _real(3, 2), beta=2, alpha=3)],
    "baddbmm addbmm": [_case(_real(1, 2), _real(1, 1, 2), _real(1, 2, 2))],
    "addmv": [_case(_real(2), _X, _real(3))],
    "addr": [_case(_X, _real(2), _real(3))],
    "addcmul addcdiv": [_case(_X, _real(3), _X, value=2)],
    "conv1d": [_case(_real(1, 2, 4), _real(2, 1, 2), _real(2), [2], [1], [1], 2)],
    "conv1d.padding": [_case(_real(1, 1, 4), _real(2, 1, 3), _real(2), [1], "same")],
    "conv2d": [_case(_IMAGE, _real(1, 2, 2, 2), _real(1), [1, 1], [1, 0], [1, 2]),
               _case(_IMAGE, _real(2, 1, 2, 2), None, [1, 1], [0, 0], [1, 1], 2)],
    "conv2d.padding": [_case(_IMAGE, _real(1, 2, 2, 2), _real(1), [1, 1], "valid")],
    "conv3d": [_case(_real(1, 1, 2, 2, 2), _real(1, 1, 1, 2, 2), _real(1))],
    "conv3d.padding": [
        _case(_real(1, 1, 2, 2, 2), _real(1, 1, 1, 1, 3), _real(1), [1, 1, 1], "same")],
    "convolution": [
        _case(_IMAGE, _real(1, 2, 2, 2), _real(1), [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        _case(_IMAGE, _real(2, 1, 2, 2), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1)],
    "conv_transpose1d": [_case(_real(1, 2, 3), _real(2, 1, 2), _real(2), [2], [0], [1], 2)],
    "conv_transpose2d.input": [_case(_real(1, 1, 2, 2), _real(1, 1, 2, 2), _real(1), [2, 1])],
    "conv_transpose3d.input": [_case(_real(1, 1, 1, 2, 2), _real(1, 1, 1, 2, 2), _real(1))],
    # homogeneous
    "prelu": [_case(_X, _real(1))],
    "angle": [_case(_complex(2))],
    "polar": [_case(_positive(2, 3), _X)],
    "max.dim min.dim median.dim mode sort msort": [_case(_X, 1)],
    "sort.stable": [_case(_X, stable=True, dim=1)],
    "msort": [_case(_X)],
    "amax amin": [_case(_X, [1])],
    "topk kthvalue": [_case(_X, 2, 1)],
    "hardshrink softshrink": [_case(_X, 0.5)],
    "hardtanh": [_case(_X, -0.25, 0.5)],
    "threshold": [_case(_X, 0.5, 0.25)],
    "clamp clip": [_case(_X, -0.5, 0.5), _case(_X, 0.0)],
    "clamp.Tensor": [_case(_X, _real(3), None)],
    "clamp_min clamp_max remainder.Scalar fmod.Scalar": [_case(_X, 0.5)],
    "pow.Tensor_Scalar float_power.Tensor_Scalar": [
        _case(_positive(2, 3), k) for k in (2, 3, 0.5, -0.5, -1, 0, Fraction(1, 3))],
    "sqrt rsqrt log log2 log10": [_case(_positive(2, 3))],
    "var std var_mean std_mean": [_case(_X), _case(_X, False)],
    "var.dim std.dim var_mean.dim std_mean.dim": [_case(_X, [1], False)],
    "var.correction std.correction var_mean.correction std_mean.correction": [
        _case(_X, [1], correction=1, keepdim=True)],
    "norm.Scalar": [_case(_X, 2), _case(_X, 3)],
    "norm.ScalarOpt_dim": [_case(_X, 2, [1])],
    "linalg_vector_norm": [_case(_X, k, [1]) for k in (2, 1, 3, float("inf"))],
    "linalg_matrix_norm.str_ord": [_case(_X, "fro")],
    "dist": [_case(_X, _X)],
    "cdist": [_case(_X, _real(2, 3))],
    "linalg_inv linalg_det": [_case(_real(2, 2))],
    "linalg_solve": [_case(_real(2, 2), _real(2, 1))],
    # elementwise
    "gelu": [_case(_X), _case(_X, approximate="tanh")],
    "elu celu": [_case(_X), _case(_X, 2)],
    "softplus": [_case(_X)],
    "asin acos atanh erfinv log1p tan": [_case(_unit(2, 3))],
    # normalisers
    "layer_norm": [_case(_X, [3], _real(3), _real(3), 0.125), _case(_X, [3], None, None, 0.125),
                   _case(_X, [3], _real(3), _real(3), 0.0)],
    "native_layer_norm": [_case(_X, [3], _real(3), _real(3), 0.125)],
    "group_norm": [_case(_real(1, 4, 2), 2, _real(4), _real(4), 0.125)],
    "rms_norm": [_case(_X, [3], _real(3), 0.125), _case(_X, [3])],
    "instance_norm": [
        _case(_real(1, 2, 3), _real(2), _real(2), None, None, True, 0.1, 0.125, False)],
    # composites
    "softmax.int log_softmax.int": [_case(_X, 1)],
    "_softmax _log_softmax": [_case(_X, 1, False)],
    "_safe_softmax": [_case(_X, 1)],
    "logsumexp": [_case(_X, [1])],
    "glu": [_case(_real(2, 4))],
    "lstm.input": [_rnn(4, [_real(1, 1, 1), _real(1, 1, 1)])],
    "gru.input": [_rnn(3, _real(1, 1, 1))],
    "rnn_tanh.input rnn_relu.input": [_rnn(1, _real(1, 1, 1))],
    "lstm_cell": [_cell(4, [_real(1, 2), _real(1, 2)])],
    "gru_cell": [_cell(3, _real(1, 2))],
    "rnn_tanh_cell rnn_relu_cell": [_cell(1, _real(1, 2))],
    "logit": [_case(_positive(2), 0.25)],
    "xlogy.Tensor pow.Tensor_Tensor float_power.Tensor_Tensor special_xlogy special_xlog1py": [
        _case(_positive(2, 3), _positive(2, 3))],
    "xlogy.Scalar_Other special_xlogy.other_scalar special_xlog1py.other_scalar": [
        _case(_X, 0.5)],
    "pow.Scalar": [_case(2, _X)],
    "prod.dim_int": [_case(_X, 1)],
    "scaled_dot_product_attention": [
        _case(_real(1, 2, 2), _real(1, 3, 2), _real(1, 3, 2)),
        _case(_real(1, 2, 2), _real(1, 2, 2), _real(1, 2, 1), None, 0.0, True, scale=0.5),
        _case(_real(1, 2, 2), _real(1, 2, 2), _real(1, 2, 1), _real(2, 2))],
    # freezing
    "round.decimals": [_case(_X, decimals=1)],
    "view.dtype": [_case(_X, torch.int64)],
    "floor_divide.Scalar": [_case(_X, 0.25)],
    "div.Tensor_mode": [_case(_X, _X, rounding_mode="floor")],
    "div.Scalar_mode": [_case(_X, 0.25, rounding_mode="trunc")],
    "eq.Scalar ne.Scalar gt.Scalar ge.Scalar lt.Scalar le.Scalar": [_case(_X, 0.25)],
    "logical_and logical_or logical_xor __and__.Tensor __or__.Tensor bitwise_and.Tensor": [
        _case(_mask(3), _mask(3))],
    "bitwise_or.Tensor bitwise_xor.Tensor": [_case(_mask(3), _mask(3))],
    "bitwise_not": [_case(_mask(3))],
    "bitwise_and.Scalar bitwise_or.Scalar": [_case(_INT([3, 1]), 2)],
    "argsort.stable": [_case(_X, stable=True)],
    "one_hot": [_case(_INT([1, 0, 2]))],
    "bucketize.Tensor": [_case(_X, _INT([-1.0, 1.0], dtype=_F64))],
    "searchsorted.Tensor": [_case(_INT([-1.0, 1.0], dtype=_F64), _X)],
    "any.dim all.dim": [_case(_X, 1)],
    "item _local_scalar_dense": [_case(_real())],
    "arange": [_case(3)],
    "arange.start": [_case(1, 3)],
    "arange.start_step": [_case(1, 5, 2)],
    "linspace": [_case(0, 1, 3)],
    "full": [_case([2], 0.5)],
    "scalar_tensor": [_case(0.5)],
    # factories
    "full_like fill.Scalar": [_case(_X, 0.25)],
    "new_zeros new_ones new_empty": [_case(_X, [2])],
    "new_full": [_case(_X, [2], 0.25)],
    "zeros ones empty.memory_format": [_case([2])],
    "eye": [_case(2)],
    "eye.m": [_case(2, 3)],
    "sym_size.int sym_stride.int": [_case(_X, 1)],
}  # fmt: skip


def _full_name(short: str) -> str:
    if short == "getitem":
        return short
    return f"aten.{short}" if "." in short else f"aten.{short}.default"


_BY_NAME = {_full_name(s): cases for key, cases in _CASES.items() for s in key.split()}


def overload(name: str) -> Callable[..., Any]:
    """The function a registered name stands for: an ATen overload, or a Python operator.

    Raises AttributeError where this torch has none of that name.
    """
    if name.startswith("aten."):
        _, packet, variant = name.split(".")
        return getattr(getattr(torch.ops.aten, packet), variant)  # type: ignore[no-any-return]
    return getattr(operator, name)  # type: ignore[no-any-return]


def cases(name: str) -> list[_Case]:
    """The calls of an operation, tensors not yet drawn."""
    schema = getattr(overload(name), "_schema", None)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if schema is None:
        return [_case(7) if name == "neg" else _case(7, 3)]
    required = [a for a in schema.arguments if not a.has_default_value()]
    kinds = [str(a.type) for a in required]
    if kinds == ["List[Tensor]"]:
        return [_case([_X, _X])]
    if set(kinds) != {"Tensor"}:
        raise LookupError(f"no sample call for {schema}; add a line to the table")
    return [_case(*([_X] * len(kinds)))]


def _numbers(draw: _Draw, generator: torch.Generator, dtype: torch.dtype, used: int) -> Tensor:
    """Odd multiples of 1/16 (1/128 in the unit interval), magnitudes above the `used` ones."""
    if draw.kind == "mask":
        flat = torch.arange(torch.Size(draw.shape).numel()) % 3 != 1
        return flat.reshape(draw.shape)
    size = torch.Size((*draw.shape, 2) if draw.kind == "complex" else draw.shape)
    count = size.numel()
    order = used + torch.randperm(count, generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    if draw.kind == "positive":
        signs = torch.ones(count)
    values = signs * (2 * order + 1) / (128 if draw.kind == "unit" else 16)
    values = values.to(dtype).reshape(size)
    return torch.view_as_complex(values) if draw.kind == "complex" else values


def _drawn(case: _Case, generator: torch.Generator, dtype: torch.dtype) -> _Case:
    used = 0

    def draw(leaf: Any) -> Any:
        nonlocal used
        if isinstance(leaf, Fraction):
            return float(leaf)
        if not isinstance(leaf, _Draw):
            return leaf
        tensor = _numbers(leaf, generator, dtype, used)
        used += tensor.numel() if leaf.kind != "complex" else 2 * tensor.numel()
        return tensor

    return pytree.tree_map(draw, case)  # type: ignore[no-any-return]


def _live_sets(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, ...]]:
    """All float operands together, and each alone where the degree rule tells them apart."""
    found = lookup(name)
    assert found is not None
    floats = [
        operand
        for operand, value in values(name, Sample(args, kwargs, ())).items()
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    ]
    if found.algebra in _BY_SIGNATURE:
        words = {
            w
            for out in parse_signature(found.signature)
            for t in out
            for w in re.findall(r"[A-Za-z_]\w*", t)
        }
        floats = [f for f in floats if f.split("[")[0] in words]
    alone = [] if found.algebra in _JOINTLY or len(floats) < 2 else [(f,) for f in floats]
    return [tuple(floats), *alone] if floats else []


_JOINTLY = {Algebra.SMOOTH, Algebra.SINGULAR}
_BY_SIGNATURE = {
    Algebra.STRUCTURAL,
    Algebra.AFFINE,
    Algebra.MULTILINEAR,
    Algebra.HOMOGENEOUS,
    Algebra.NORMALISER,
}


def samples(
    name: str, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> list[Sample]:
    """Sample calls of a registered operation, away from kinks, in every pattern of live operands.

    An operation without a float operand has one sample, with nothing live. Raises LookupError where
    the tables above lack a line.
    """
    result = []
    for case in cases(name):
        args, kwargs = _drawn(case, generator, dtype)
        sets = _live_sets(name, args, kwargs) or [()]
        result += [Sample(args, kwargs, live) for live in sets]
    return result


KINKS = (0.0, 0.5, -0.5, 1.0, -3.0, 3.0, 6.0)
_SINGULAR = ("aten.linalg_inv", "aten.linalg_solve")
_KINKED = {Algebra.HOMOGENEOUS, Algebra.ZERO_ORIGIN, Algebra.ELEMENTWISE, Algebra.PIECEWISE}


def kinks(name: str, dtype: torch.dtype = torch.float64) -> Iterator[Sample]:
    """The same calls, every real tensor constant at 0 or at a usual kink (so all values tie)."""
    found = lookup(name)
    if found is None or found.algebra not in _KINKED or name.startswith(_SINGULAR):
        return  # a constant matrix has no inverse
    for value in KINKS:
        for args, kwargs in cases(name):
            filled = partial(_filled, value, dtype)
            held = pytree.tree_map_only(_Draw, filled, (args, kwargs))
            fixed, named = pytree.tree_map_only(Fraction, float, held)
            sets = _live_sets(name, fixed, named)
            yield Sample(fixed, named, sets[0] if sets else ())


def _filled(value: float, dtype: torch.dtype, draw: _Draw) -> Tensor:
    return torch.full(draw.shape, value, dtype=dtype)


# --------------------------------------------------------------------------- calls


def _node(name: str, sample: Sample) -> tuple[fx.Node, Mapping[str, Tensor]]:
    """The call as a node of a graph of its own, and the tensors its placeholders stand for."""
    graph = fx.Graph()
    given: dict[str, Tensor] = {}

    def placeholder(tensor: Tensor) -> fx.Node:
        node = graph.placeholder(f"x{len(given)}")
        given[node.name] = node.meta["val"] = tensor
        return node

    args, kwargs = pytree.tree_map_only(Tensor, placeholder, (sample.args, sample.kwargs))
    return graph.call_function(overload(name), args, kwargs), given


def values(name: str, sample: Sample) -> dict[str, Tensor | float]:
    """Operand name -> tensor or number, as the sample has it."""
    node, given = _node(name, sample)
    return {
        o.name: given[o.node.name] if o.node is not None else o.literal  # type: ignore[misc]
        for o in operands(bind(node))
    }


def call(name: str, sample: Sample) -> Call:
    """The sample as the degree analysis sees it, its `live` operands moving."""
    found = lookup(name)
    assert found is not None
    arguments = bind(_node(name, sample)[0])
    every: tuple[Operand, ...] = tuple(operands(arguments))
    return Call(found, every, arguments, frozenset(sample.live))
