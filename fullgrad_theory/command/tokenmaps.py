"""What each token of a text contributes to an output, by methods and under policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..attribution.explainer import Explainer
from ..attribution.map import Map
from ..backward.targets import contrast
from ..bars import progress
from ..errors import InputError
from ..graph.tracing import trace
from .passage import Entry, Passage, Piece, Reader


@dataclass(frozen=True)
class TokenMap:
    """A map of one text, by a method under a policy."""

    method: str
    policy: str
    found: Map

    @property
    def output(self) -> float:
        """The value that is explained."""
        return float(self.found.output[0])

    @property
    def error(self) -> float | None:
        """|output - all parts| / |output|, None for a method without a sum to keep."""
        return None if self.found.error is None else float(self.found.error[0])

    def of(self, piece: Piece) -> float:
        """What a word contributes: the sum over its tokens."""
        return float(self.found.values[0, list(piece.places)].double().sum())

    def beside(self, words: Passage) -> float | None:
        """What the sum has besides these words: biases that belong to no token (a head's), and the
        words that are not shown; None for a method without a sum to keep."""
        if self.found.total is None:
            return None
        rest = float(self.found.total[0]) - sum(map(self.of, words.pieces))
        return rest if abs(rest) > 1e-5 * abs(self.output) else 0.0


def token_maps(
    read: Reader, text: Passage, at: Entry, methods: Sequence[str], policies: Sequence[str]
) -> list[TokenMap]:
    """A map for each method under each policy; one trace, and one forward and backward a policy."""
    with progress("tracing"):
        graph = trace(read.model, text.given, constant=text.held, output=at.name)
    target = at.index if at.against is None else contrast(at.index, at.against)
    maps: dict[tuple[str, str], Map] = {}
    with progress("explaining") as tick:
        for done, policy in enumerate(policies):
            tick(policy, done, len(policies))
            explainer = Explainer(graph, policy=policy)
            if explainer.anatomy.size != (1, text.length):
                raise InputError("this model does not embed each token of the text once")
            for method, found in explainer(text.given, methods, target).items():
                maps[method, policy] = found
    return [TokenMap(m, p, maps[m, p]) for m in methods for p in policies]
