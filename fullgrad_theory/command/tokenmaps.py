"""What each token of a text contributes to an output, from the output split into its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backward.balanced import balance
from ..backward.contributions import FullGrad, fullgrad
from ..backward.targets import contrast
from ..bars import progress
from ..errors import InputError
from ..graph.tracing import trace
from .passage import Entry, Passage, Piece, Reader

METHODS = ("fullgrad", "input-x-gradient")
"""what works on tokens: with the bias maps at each of them, and the embedded words alone"""
_TOKEN_DIM = {3: 1, 4: 2}
"""where a map (1, T, width) or (1, heads, T, width) has the tokens, by its number of dimensions"""


@dataclass(frozen=True)
class TokenMap:
    """`values`: (T,), of each token; `rest`: what biases hold that belong to no token; `error`:
    |output - all parts| / |output|, None for a method without a sum to keep."""

    method: str
    policy: str
    values: Tensor
    output: float
    rest: float | None
    error: float | None

    def of(self, piece: Piece) -> float:
        """What a word contributes: the sum over its tokens."""
        return float(self.values[list(piece.places)].sum())


def token_maps(
    read: Reader, text: Passage, at: Entry, methods: Sequence[str], policies: Sequence[str]
) -> list[TokenMap]:
    """A map for each method under each policy; one trace, and one split a policy."""
    with progress("tracing"):
        graph = trace(read.model, text.given, constant=text.held, output=at.name)
    target = at.index if at.against is None else contrast(at.index, at.against)
    found = []
    with progress("explaining") as tick:
        for done, policy in enumerate(policies):
            tick(policy, done, len(policies))
            split = fullgrad(balance(graph, policy=policy), text.given, target)
            found += [_map(method, policy, split, text.length) for method in methods]
    order = {method: place for place, method in enumerate(methods)}
    return sorted(found, key=lambda one: order[one.method])


def _map(method: str, policy: str, split: FullGrad, length: int) -> TokenMap:
    if isinstance(split.input, tuple):
        raise InputError("this model looks its words up in several tables; it cannot be explained")
    output = float(split.output)
    values = split.input.double().flatten(0, -2).sum(-1)
    if values.shape != (length,):
        raise InputError("this model does not embed each token of the text once")
    if method != "fullgrad":
        return TokenMap(method, policy, values, output, None, None)
    placed, rest = _by_token(split.biases, length)
    return TokenMap(method, policy, values + placed, output, rest, float(split.error))


def _by_token(biases: Mapping[str, Tensor], length: int) -> tuple[Tensor, float]:
    """Bias maps summed at each token, and the sum of those that have no tokens (a head's)."""
    placed, rest = torch.zeros(length, dtype=torch.float64), 0.0
    for part in biases.values():
        dim = _TOKEN_DIM.get(part.dim())
        if dim is not None and part.shape[dim] == length:
            placed += part.double().movedim(dim, 0).flatten(1).sum(1)
        else:
            rest += float(part.double().sum())
    return placed, rest
