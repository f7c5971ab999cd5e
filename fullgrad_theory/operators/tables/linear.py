"""Sums of products: affine and multilinear operations, one monomial a product, one sum a line.

A factor that is constant is a coefficient; a monomial that is constant is a bias leaf. An argument
in no monomial (a sampling grid, an interpolation weight) must be seen at degree 0.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import readers, steps
from ..algebra import Algebra, Role
from ..relations import signature_names
from .row import Table, aten_name, rows

affine = rows(Algebra.AFFINE)
multilinear = rows(Algebra.MULTILINEAR)


def _mixes_the_batch(arguments: Mapping[str, Any]) -> str | None:
    return "batch norm in training mode mixes the batch" if arguments["training"] else None


def _added(
    name: str, signature: str, product: Callable[..., Tensor], roles: Collection[Role] = ()
) -> Table:
    """A product of the first two operands that the signature names, added to something."""
    together = signature_names(signature)[:2]
    made = steps.added_to(product)
    return multilinear(name, signature, roles=roles, steps=made, together=together)


def _convolutions(names: str, *roles: Role) -> Table:
    rows_of = (
        multilinear(
            name,
            "input*weight + bias",
            roles=roles,
            reader=readers.bias_of_kernel,
            steps=steps.and_bias(aten_name(name)),
            together=("weight", "input"),
        )
        for name in names.split()
    )
    return tuple(row for rows in rows_of for row in rows)


TABLE: Table = (
    *affine("add.Tensor", "self + other*alpha", roles=(Role.ADDITION,)),
    *affine("add.Scalar sub.Tensor sub.Scalar", "self + other*alpha"),
    *affine("subtract.Tensor", "self + other*alpha", roles=(Role.POINTWISE,)),
    *affine("rsub.Scalar rsub.Tensor", "self*alpha + other", roles=(Role.POINTWISE,)),
    *affine(
        """
        neg deg2rad sum mean cumsum trace col2im avg_pool1d avg_pool3d adaptive_avg_pool1d
        adaptive_avg_pool3d fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2
        fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift
        """
    ),
    *affine("negative", roles=(Role.POINTWISE,)),
    *affine("sum.dim_IntList", roles=(Role.SUM, Role.REDUCTION)),
    *affine("mean.dim", roles=(Role.REDUCTION,)),
    *affine("diff", "self + prepend + append"),
    *affine("scatter_add", "self + src"),
    *affine("index_add", "self + source*alpha"),
    *affine("index_put _unsafe_index_put", "self + values"),
    *affine(
        """
        avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d
        upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d
        _upsample_bicubic2d_aa
        """,
        roles=(Role.WINDOW,),
    ),
    *affine(
        """
        upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec
        _upsample_nearest_exact2d.vec upsample_linear1d.vec upsample_bilinear2d.vec
        _upsample_bilinear2d_aa.vec upsample_bicubic2d.vec _upsample_bicubic2d_aa.vec
        """,
        "input",
        roles=(Role.WINDOW,),
    ),
    *affine(
        "xlogy.Scalar_Other special_xlogy.other_scalar special_xlog1py.other_scalar",
        roles=(Role.POINTWISE,),
    ),
    *affine("grid_sampler grid_sampler_2d", "input"),
    *affine("affine_grid_generator", "theta"),
    *affine("lerp.Scalar", "self + end"),
    *affine("lerp.Tensor", "self + end", steps=steps.lerp, together=("weight",)),
    *affine(
        "batch_norm",
        "input*weight + running_mean*weight + bias",
        refuses=_mixes_the_batch,
        misreads=True,
    ),
    *affine(
        "_native_batch_norm_legit_no_training",
        "input*weight + running_mean*weight + bias ; - ; -",
        misreads=True,
    ),
    *multilinear(
        "mul.Tensor mul.Scalar vdot inner tensordot linalg_cross kron",
        "self*other",
    ),
    *multilinear("div.Tensor", "self/other", roles=(Role.QUOTIENT,)),
    *multilinear("multiply.Tensor", "self*other", roles=(Role.POINTWISE,)),
    *multilinear("divide.Tensor", "self/other", roles=(Role.POINTWISE,)),
    *multilinear("div.Scalar true_divide.Tensor", "self/other"),
    *multilinear("reciprocal", "self^-1"),
    *multilinear("matmul", "self*other", roles=(Role.CONTRACTION, Role.TOKEN_PRODUCT)),
    *multilinear("mm", "self*mat2", roles=(Role.CONTRACTION,)),
    *multilinear("bmm", "self*mat2", roles=(Role.CONTRACTION, Role.TOKEN_PRODUCT)),
    *multilinear("mv", "self*vec"),
    *multilinear("dot", "self*tensor"),
    *multilinear("outer", "self*vec2"),
    *multilinear("einsum", "*tensors", roles=(Role.EQUATION, Role.TOKEN_PRODUCT)),
    *multilinear("linalg_multi_dot", "*tensors"),
    *multilinear("linalg_vecdot", "x*y"),
    *multilinear(
        "linear",
        "input*weight + bias",
        roles=(Role.LINEAR, Role.WEIGHTED),
        reader=readers.bias_of_last,
        steps=steps.and_bias("aten.linear.default"),
        together=("weight", "input"),
    ),
    *multilinear("bilinear", "input1*input2*weight + bias", roles=(Role.WEIGHTED,)),
    # a product of live values is scaled by itself, not with what it is added to
    *_added("addmm", "mat1*mat2*alpha + self*beta", torch.mm),
    *_added("baddbmm", "batch1*batch2*alpha + self*beta", torch.bmm, roles=(Role.TOKEN_PRODUCT,)),
    *_added("addbmm", "batch1*batch2*alpha + self*beta", lambda a, b: torch.bmm(a, b).sum(0)),
    *_added("addmv", "mat*vec*alpha + self*beta", torch.mv),
    *_added("addr", "vec1*vec2*alpha + self*beta", torch.outer),
    *_added("addcmul", "tensor1*tensor2*value + self", torch.mul),
    *_added("addcdiv", "tensor1/tensor2*value + self", torch.div),
    *_convolutions(
        """
        conv1d conv1d.padding conv3d conv3d.padding conv_transpose1d conv_transpose2d.input
        conv_transpose3d.input
        """,
        Role.WEIGHTED,
    ),
    *_convolutions("conv2d conv2d.padding convolution", Role.WINDOW, Role.WEIGHTED),
)
