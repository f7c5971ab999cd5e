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
from .making import Chosen, create, inputs_of
from .page import judging, show, table
from .picture import class_name, draw, read, see
from .writing import withdraw


def explain(
    chosen: Chosen,
    image: Path,
    methods: list[str],
    policies: list[str],
    target: int | None,
    out: Path,
    traceback: bool = False,
) -> None:
    """Draw the maps of an image into one picture, and print what they leave over."""
    with judging(traceback=traceback):
        if out.resolve() == image.resolve():
            raise InputError(f"{str(out)!r} is the image itself; name another file to write to")
        place = withdraw(out) or out
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
                explainer = Explainer(model, example, edits)
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


def _errors(maps: Mapping[str, Mapping[str, Map]]) -> Table:
    made = table("method", "policy", "grid", "completeness error")
    for method, by_policy in maps.items():
        for policy, found in by_policy.items():
            error = "-" if found.error is None else f"{float(found.error[0]):.2g}"
            made.add_row(method, policy, " x ".join(map(str, found.values.shape[1:])), error)
    return made
