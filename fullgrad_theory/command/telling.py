"""`explain --text`: words with what they contribute, in a terminal, as a page and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..extras import require
from ..files import whole, write_whole
from ..pages import filled
from .making import Wanted
from .options import PAGE
from .page import judging, show, table
from .passage import Passage, entry, reader, tokenised
from .tokenmaps import TokenMap, token_maps
from .writing import withdraw

_FOR, _AGAINST = (178, 24, 43), (33, 102, 172)
"""the ends of the diverging scale RdBu, which all kinds of colour vision tell apart"""


def tell(
    text: str,
    folder: Path,
    image: Path | None,
    methods: list[str],
    policies: list[str],
    wanted: Wanted,
    out: Path | None,
    traceback: bool = False,
    special: bool = True,
) -> None:
    """Print the words' contributions under each method and policy, and write them down.

    `special`: show the tokens that are the tokenizer's own, [CLS] and its kind, beside the words.
    """
    with judging(traceback=traceback):
        if image is not None:
            raise InputError("name an image or a --text, not both")
        drawn = out is not None and out.suffix.lower() != PAGE
        if drawn:
            require("matplotlib", "plots")  # before there is work to be lost
        out = withdraw(out)
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is no folder of a transformers model: it has no config.json"
            )
        read = reader(folder)
        words = tokenised(text, read.tokenizer)
        at = entry(wanted, read, words)
        maps = token_maps(read, words, at, methods, policies)
        words = words if special else words.without_special()
        weights = " (random weights)" if read.untrained else ""
        title = f"{folder.resolve().name}{weights}: {at.words}, value {maps[0].output:.4g}"
        if out is not None and drawn:
            draw(words, maps, title, out)
        elif out is not None:
            write_whole(out, to_html(title, words, maps))
    lines = [Text(f"written to {out}")] if out is not None else []
    show(Text(title), _table(words, maps), *lines)


def _table(words: Passage, maps: Sequence[TokenMap]) -> Table:
    made = table("word", *(f"{one.method}, {one.policy}" for one in maps), unbroken="word")
    for column in made.columns[1:]:
        column.justify = "right"
    reach = [_reach(words, one) for one in maps]
    for piece in words.pieces:
        cells = [
            Text(f"{one.of(piece):+.3g}", style=_style(one.of(piece) / most))
            for one, most in zip(maps, reach, strict=True)
        ]
        made.add_row(Text(piece.text, style="dim" if piece.special else ""), *cells)
    made.add_section()
    for name, figures in _ends(words, maps):
        made.add_row(Text(name, style="dim"), *figures)
    return made


def _ends(words: Passage, maps: Sequence[TokenMap]) -> Iterator[tuple[str, Sequence[str]]]:
    """What is no shown word's, and how much of the output all of it misses."""
    rest, error = zip(*(_sums(words, one) for one in maps), strict=True)
    if any(error):
        yield "beside the words", rest
        yield "completeness error", error


def _sums(words: Passage, one: TokenMap) -> tuple[str, str]:
    """Both of one map, in figures; nothing for a method without a sum to keep."""
    rest = one.beside(words)
    return ("", "") if rest is None else (f"{rest:+.3g}", f"{one.error:.2g}")


def _reach(words: Passage, one: TokenMap) -> float:
    """The most that a word has; a special token, which may have far more, is as strong as that."""
    own = words.without_special().pieces or words.pieces
    return max((abs(one.of(piece)) for piece in own), default=0.0) or 1.0


def _colour(strength: float) -> tuple[int, int, int]:
    """White at 0, red for the target, blue against it; pale enough for black letters."""
    end, share = (_FOR if strength > 0 else _AGAINST), 0.6 * min(1.0, abs(strength))
    red, green, blue = (round(255 + (c - 255) * share) for c in end)
    return red, green, blue


def _style(strength: float) -> str:
    return "black on rgb({},{},{})".format(*_colour(strength))


def to_html(title: str, words: Passage, maps: Sequence[TokenMap]) -> str:
    """A page with the text once for each map; a word has its contribution beneath it."""
    shown: list[dict[str, Any]] = []
    for one in maps:
        reach = _reach(words, one)
        rest, error = _sums(words, one)
        shown.append(
            {
                "name": f"{one.method}, {one.policy}",
                "rest": rest,
                "error": error,
                "words": [
                    {
                        "text": piece.text,
                        "special": piece.special,
                        "value": f"{one.of(piece):+.3g}",
                        "colour": "rgb({},{},{})".format(*_colour(one.of(piece) / reach)),
                        "tokens": len(piece.places),
                    }
                    for piece in words.pieces
                ],
            }
        )
    return filled("text.html", title=title, maps=shown)


def draw(words: Passage, maps: Sequence[TokenMap], title: str, path: Path) -> Any:
    """A picture with a bar a word, read from above, and a panel a map; returns the figure."""
    agg = require("matplotlib.backends.backend_agg", "plots")
    figures = require("matplotlib.figure", "plots")
    size = (1.6 + 2.4 * len(maps), 1.1 + 0.24 * len(words.pieces))
    figure = figures.Figure(figsize=size, layout="constrained")
    agg.FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"), fontsize=9, wrap=True)
    (panels,) = figure.subplots(1, len(maps), sharey=True, squeeze=False)
    rows = range(len(words.pieces))
    for axis, one in zip(panels, maps, strict=True):
        values = [one.of(piece) for piece in words.pieces]
        reach = max(map(abs, values), default=0.0) or 1.0
        colours = [tuple(c / 255 for c in (_FOR if value > 0 else _AGAINST)) for value in values]
        axis.barh(rows, values, color=colours)
        axis.set_xlim(-1.1 * reach if min(values, default=0.0) < 0 else 0.0, 1.1 * reach)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.ticklabel_format(axis="x", scilimits=(-2, 3))
        axis.tick_params(labelsize=7)
        axis.xaxis.get_offset_text().set_fontsize(6)
        error = "" if one.error is None else f"\ncompleteness error {one.error:.2g}"
        axis.set_title(f"{one.method}, {one.policy}{error}", fontsize=7)
    panels[0].set_yticks(rows, [piece.text.replace("$", r"\$") for piece in words.pieces])
    panels[0].invert_yaxis()
    whole(path, lambda beside: figure.savefig(beside, dpi=150))
    return figure
