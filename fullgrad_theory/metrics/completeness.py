"""Completeness: does the attribution add up to the output?"""

from __future__ import annotations

from torch import Tensor


def completeness_error(output: Tensor, total: Tensor) -> Tensor:
    """|f(x) - sum of all contributions| for each image, (B,), in the units of the output.

    Lower is better. Sundararajan et al. 2017 (completeness, arXiv:1703.01365, there against a
    baseline's output), Srinivas & Fleuret 2019 (FullGrad, arXiv:1905.00780: the output itself).
    """
    return (output.detach().double() - total.detach().double()).abs()


def relative_completeness_error(output: Tensor, total: Tensor) -> Tensor:
    """`completeness_error` over |f(x)|, (B,); infinite where the output is 0 and the sum is not."""
    return completeness_error(output, total) / output.detach().double().abs()
