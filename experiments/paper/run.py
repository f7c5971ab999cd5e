"""The paper's evaluation: one command that measures, and writes data, tables and figures.

    python -m experiments.paper.run [--out FOLDER] [--cache FOLDER] [--smoke] [--images N]
                                    [--only TABLE ...] [--models NAME ...] [--render]
                                    [--weights FOLDER --data NAME:FOLDER,... [--files]]

Models that are not in the cache are trained first. What was measured is kept there as well, so that
a run that was interrupted goes on; `--render` measures nothing, and writes the tables and figures
again from the data in --out. With --weights and --data the paper's own models are measured on its
own data sets, which are read from disk, and --files says which of their files are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fullgrad_theory.errors import FullgradError
from fullgrad_theory.measure.results import Results

from . import figures, full, measure, pictures, tables
from .clip import train_clip
from .fit import Trained
from .models import ARCHITECTURES, SIZES, train
from .prompted import Prompted
from .ready import Ready
from .setup import DEFINITIONS, SMALL, WHOLE, Setup
from .summary import Claim, Table, cells, claims, read_cells, write_cells

RESULTS = Path(__file__).parent / "results"
CACHE = Path("cache") / "paper"
TOWERS = "clip-towers"
TABLES: dict[str, tuple[str, ...]] = {
    "models": (),
    "completeness": ("completeness",),
    "faithfulness": ("faithfulness",),
    "sizes": ("faithfulness",),
    "mixers": ("faithfulness",),
    "ablation": ("ablation",),
    "discrimination": ("discrimination",),
    "definitions": ("definitions",),
    "heatmaps": ("heatmaps",),
    "text": ("text",),
    "orderings": ("completeness", "faithfulness", "ablation"),
}
"""Table -> what has to be measured for it."""
SIZES_HERE = ["vit" if name == "vit-base" else name for name in SIZES]
"""The base size is the architecture `vit`, trained once."""
STUDIES: dict[str, measure.Study] = {
    "completeness": measure.completeness,
    "faithfulness": measure.faithfulness,
    "discrimination": measure.discrimination,
    "definitions": measure.definitions,
}
"""Measured of every model."""


def run(
    setup: Setup, out: Path, cache: Path, only: Sequence[str] = tuple(TABLES), say: Any = None
) -> list[str]:
    """Measure what `only` needs, write the data into `out`, and the tables and figures.

    Returns the models and precisions on which Libra FullGrad's completeness breaks its bound.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    wanted = {study for table in only for study in TABLES[table]}
    out.mkdir(parents=True, exist_ok=True)
    folder = cache / f"rows-{setup.images}-{setup.objects}-{setup.recipe.steps}"
    trained: dict[str, Trained] = {}
    if {*only} - {"text"}:
        trained = {name: train(name, cache, setup.recipe) for name in setup.models}
    towers = {TOWERS: train_clip(cache, setup.recipe)} if "text" in only else {}
    _keep_models(out / "models.json", {**trained, **towers})
    ready = {name: Ready(name, t.model) for name, t in trained.items()}
    found: dict[str, dict[str, Results]] = {}
    spent: dict[str, float] = {}

    def take(study: str, model: Ready, how: measure.Study) -> None:
        say(f"{model.name}: {study}")
        rows, seconds = _timed(how, model, setup, folder / study / model.name)
        found.setdefault(study, {})[model.name] = rows
        spent[study] = spent.get(study, 0.0) + seconds

    for name, model in ready.items():
        for study, how in STUDIES.items():
            if study in wanted:
                take(study, model, how)
        if name == setup.ablated and "ablation" in wanted:
            take("ablation", model, measure.ablation)
    for name, pair in towers.items():
        prompted = Ready(name, Prompted(pair.model))  # type: ignore[arg-type]
        take("text", prompted, measure.text)
        _save(out / "text.npz", pictures.highlights(prompted, setup))
    start = time.monotonic()
    if "heatmaps" in wanted:
        drawn = {name: ready[name] for name in setup.drawn if name in ready}
        _save(out / "heatmaps.npz", pictures.heatmaps(drawn, setup))
    say("intervals")
    for study, results in found.items():
        write_cells(out / f"{study}.csv", cells(results))
    if "orderings" in only:
        exact, faithful, ablated = (
            found.get(study, {}) for study in ("completeness", "faithfulness", "ablation")
        )
        made = claims(exact, faithful, ablated)
        _json(out / "orderings.json", [asdict(c) for c in made])
    spent["intervals and pictures"] = time.monotonic() - start
    held = _read(out / "run.json") if (out / "run.json").exists() else {"models": [], "seconds": {}}
    models = [*dict.fromkeys((*held["models"], *ready, *towers))]
    fresh = not held["models"] or {*only} >= {*TABLES}  # else older tables stay beside the new ones
    _json(out / "run.json", {
        "definitions": DEFINITIONS if fresh else held.get("definitions"),
        "images": setup.images,
        "images with several objects": setup.objects,
        "models": [m for m in models if m != TOWERS],
        "missing": [m for m in (*WHOLE.models, TOWERS) if m not in models],
        "seconds": held["seconds"] | {k: round(v, 1) for k, v in spent.items()},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
    })  # fmt: skip
    render(out)
    errors = out / "completeness.csv"
    return tables.broken(Table(read_cells(errors))) if errors.exists() else []


def _timed(how: measure.Study, model: Ready, setup: Setup, folder: Path) -> tuple[Results, float]:
    """Rows, and the seconds that they took when they were measured (the last part of them, where
    that was interrupted)."""
    file, start = folder / "seconds.json", time.monotonic()
    rows = how(model, setup, folder)
    if not file.exists():
        _json(file, time.monotonic() - start)
    return rows, _read(file)


def _keep_models(file: Path, trained: Mapping[str, Trained]) -> None:
    """Beside those that are in the file already."""
    held = {m["name"]: m for m in _read(file)} if file.exists() else {}
    for name, t in trained.items():
        size = sum(p.numel() for p in t.model.parameters())
        held[name] = {"name": name, "parameters": size, "seconds": round(t.seconds),
                      "scores": t.scores}  # fmt: skip
    _json(file, list(held.values()))


def _json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez_compressed(path, **arrays)


# --------------------------------------------------------------------------- tables and figures


def render(out: Path) -> None:
    """Write every table and figure that the data in `out` have what it takes for."""
    made: dict[str, str] = {}
    sheets = {
        study: Table(read_cells(out / f"{study}.csv"))
        for study in (*STUDIES, "ablation", "text")
        if (out / f"{study}.csv").exists()
    }
    families = tuple(ARCHITECTURES)
    trained = _read(out / "models.json") if (out / "models.json").exists() else []
    if trained:
        made["models"] = tables.models(trained)
    if exact := sheets.get("completeness"):
        made["completeness"] = tables.completeness(exact)
        figures.completeness(exact, out / "completeness.png")
    if found := sheets.get("faithfulness"):
        made["faithfulness"] = tables.faithfulness(found, families)
        if {*families} & {*found.models}:
            figures.gains(found, families, out / "faithfulness.png")
        sizes = [m for m in SIZES_HERE if m in found.models]
        if sizes:
            about = "The same model in four sizes, smallest first; `vit` is the base size."
            made["sizes"] = tables.subset("Sizes of ViT", about, found, sizes)
            figures.sizes(found, sizes, out / "sizes.png")
        mixers = [m for m in ("gmixer", "mixer") if m in found.models]
        if mixers:
            about = "MLP-Mixer with gates, as in the paper, and without. Tokens are zeroed."
            made["mixers"] = tables.subset("Mixers", about, found, mixers)
            figures.paired(found, mixers, "mif-accuracy-drop", out / "mixers.png")
    if found := sheets.get("ablation"):
        made["ablation"] = tables.ablation(found)
        figures.ablation(found, out / "ablation.png")
    if found := sheets.get("discrimination"):
        made["discrimination"] = tables.discrimination(found, families)
        if {*families} & {*found.models}:
            figures.paired(found, families, "AP gap", out / "discrimination.png")
    if found := sheets.get("definitions"):
        made["definitions"] = tables.definitions(found, families)
    if found := sheets.get("text"):
        scores = {m["name"]: m["scores"] for m in trained}
        made["text"] = tables.text(found, scores[TOWERS])
    for name, draw in _drawn().items():
        source = out / ("text.npz" if name == "text" else "heatmaps.npz")
        if source.exists():
            with np.load(source) as arrays:
                draw(dict(arrays), out / f"{name}.png")
    if (out / "orderings.json").exists():
        orderings = [Claim(**c) for c in _read(out / "orderings.json")]
        made["orderings"] = tables.orderings(orderings, sheets.get("faithfulness"))
    for name, text in made.items():
        picture = f"\n\n![{name}]({name}.png)" if name not in ("text",) and (
            out / f"{name}.png").exists() else ""  # fmt: skip
        (out / f"{name}.md").write_text(f"{text}{picture}\n")
    (out / "README.md").write_text(
        tables.index(_read(out / "run.json"), trained, sheets, made, out) + "\n"
    )


def _drawn() -> Mapping[str, Callable[[Mapping[str, np.ndarray], Path], None]]:
    return {
        "heatmaps-methods": figures.methods,
        "heatmaps-models": figures.models,
        "text": figures.text,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="for data, tables and figures")
    parser.add_argument("--cache", type=Path, default=CACHE, help="trained models and rows")
    parser.add_argument("--smoke", action="store_true", help="small: whether it runs")
    parser.add_argument("--images", type=int, help="how many scenes each table is of")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[*TABLES], metavar="TABLE")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="instead of all")
    parser.add_argument("--render", action="store_true", help="from the data in --out alone")
    parser.add_argument("--weights", type=Path, help="where the paper's models lie")
    parser.add_argument("--data", help=f"NAME:FOLDER,... of {', '.join(full.DATA)}")
    parser.add_argument("--files", action="store_true", help="list what is there, measure nothing")
    given = parser.parse_args()
    if given.weights or given.data or given.files:
        _full(given, parser)
        return
    if given.render:
        render(given.out)
        return
    setup = SMALL if given.smoke else WHOLE
    if given.images:
        setup = replace(setup, images=given.images, objects=given.images)
    if given.models:
        unknown = {*given.models} - {*WHOLE.models}
        if unknown:
            parser.error(f"no model {', '.join(unknown)}; there are {', '.join(WHOLE.models)}")
        setup = replace(setup, models=tuple(given.models))
    failing = run(setup, given.out, given.cache, given.only)
    if failing:
        sys.exit(f"Libra FullGrad breaks its completeness bound on: {'; '.join(failing)}")


def _full(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The paper's own scale."""
    if not (given.weights and given.data):
        parser.error("--weights and --data belong together")
    models = given.models or [*full.TIMM]
    if unknown := {*models} - {*full.TIMM}:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(full.TIMM)}")
    try:
        data = full.folders(given.data)
    except FullgradError as error:
        parser.error(str(error))
    needed = full.files(given.weights, data, models)
    if given.files or not all(f.there for f in needed):
        print(full.listing(needed))
        sys.exit(0 if all(f.there for f in needed) else 1)
    setup = replace(SMALL if given.smoke else WHOLE, models=tuple(models), ablated="eva2")
    out = RESULTS.parent / "full" if given.out == RESULTS else given.out
    failing = full.run_full(setup, given.weights, data, out, given.cache, given.images)
    if failing:
        sys.exit(f"Libra FullGrad breaks its completeness bound on: {'; '.join(failing)}")


if __name__ == "__main__":
    main()
