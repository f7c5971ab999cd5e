"""`explain`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from ..attribution.explainer import Explainer
from ..attribution.map import Map
from ..bars import progress
from ..errors import InputError
from ..extras import require
from .checking import Asked
from .making import Chosen, Wanted, create, inputs_of
from .options import PAGE
from .page import judging, show, table
from .picture import class_name, draw, read, see
from .writing import withdraw


def explain(
    chosen: Chosen,
    image: Path | None,
    methods: list[str],
    policies: list[str],
    wanted: Wanted,
    out: Path | None,
    traceback: bool = False,
) -> None:
    """Draw the maps of an image into one picture, and print what they leave over."""
    with judging(traceback=traceback):
        if image is None or out is None:
            missing = "an image, or --text" if image is None else "--out, the picture to write"
            raise InputError(f"nothing to explain: name {missing}")
        target = _class(wanted)
        if out.suffix == PAGE:
            raise InputError(f"{str(out)!r}: an image's maps are drawn as a picture, not as a page")
        if out.resolve() == image.resolve():
            raise InputError(f"{str(out)!r} is the image itself; name another file to write to")
        place, asked = withdraw(out) or out, Asked(wanted.output)
        for module, extra in (("timm", "vision"), ("matplotlib", "plots")):
            require(module, extra)  # before there is work to be lost
        opened = read(image)
        model = create(chosen)
        (example, *more) = inputs_of(model, chosen)
        if more or example.dim() != 4:
            raise InputError("maps are of models that take one image tensor (1, 3, H, W)")
        seen = see(opened, model, example)
        maps: dict[str, dict[str, Map]] = {m: {} for m in methods}
        with progress("explaining") as tick:
            for done, edits in enumerate(policies):
                tick(edits, done, len(policies))
                explainer = Explainer(model, example, edits, output=asked.keywords["output"])
                for method, found in explainer(seen.pixels, methods, target).items():
                    maps[method][edits] = found
        with torch.no_grad():
            likely = explainer.scores(seen.pixels).softmax(-1)
        one = next(iter(maps[methods[0]].values()))
        meant = "the output" if one.target is None else class_name(model, int(one.target[0]))
        share = "" if one.target is None else f", probability {float(likely[0, one.target[0]]):.3g}"
        weights = " (random weights)" if chosen.untrained else ""
        title = f"{chosen.name}{weights}: {meant}, value {float(one.output[0]):.4g}{share}"
        draw(seen, maps, title, place)
    show(Text(title), _errors(maps), Text(f"written to {out}"))


def _class(wanted: Wanted) -> int | None:
    """An image's target, a number; the rest of what may be asked is for texts."""
    for name in ("against", "position"):
        if getattr(wanted, name) is not None:
            raise InputError(f"--{name} is for --text")
    if wanted.target is None or wanted.target.isdecimal():
        return None if wanted.target is None else int(wanted.target)
    raise InputError(f"--target {wanted.target!r}: name an image's class by its number")


def _errors(maps: Mapping[str, Mapping[str, Map]]) -> Table:
    made = table("method", "policy", "grid", "completeness error")
    for method, by_policy in maps.items():
        for policy, found in by_policy.items():
            error = "-" if found.error is None else f"{float(found.error[0]):.2g}"
            made.add_row(method, policy, " x ".join(map(str, found.values.shape[1:])), error)
    return made
