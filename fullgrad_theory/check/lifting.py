"""Runs a model in float64 whatever dtypes its own code asks for: casts are lifted on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.keeping import eagerly, without_fast_path

WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64) | dict.fromkeys(
    (torch.complex32, torch.complex64), torch.complex128
)


def wide(value: Any) -> Any:
    """A dtype, or a tensor, in double precision; anything else as it is."""
    if isinstance(value, torch.dtype):
        return WIDE.get(value, value)
    narrow = isinstance(value, Tensor) and value.dtype in WIDE
    return value.to(WIDE[value.dtype]) if narrow else value


class _Lifted(TorchDispatchMode):
    """Widens the dtypes that operations are asked for, and the tensors that code makes or holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if not func._schema.is_mutable:  # what is written to is the caller's
            given = pytree.tree_map(wide, given)
        result = func(*given[0], **given[1])
        if _is_made(given, result) and any(a.name == "dtype" for a in func._schema.arguments):
            result = func(*given[0], **given[1] | {"dtype": WIDE[result.dtype]})
        known = {id(leaf) for leaf in pytree.tree_leaves(given)}
        return pytree.tree_map(lambda r: r if id(r) in known else wide(r), result)


def _is_made(given: Any, result: Any) -> bool:
    """Whether a factory made a narrow tensor of numbers alone."""
    made = not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(given))
    return made and isinstance(result, Tensor) and result.dtype in WIDE


@contextmanager
def lifted() -> Iterator[None]:
    """Within it the caller's thread computes in float64, eagerly, with gradients."""
    with eagerly(), without_fast_path(), torch.enable_grad(), _Lifted():
        yield
