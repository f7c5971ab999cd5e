"""Train the small models on scenes, from nothing, and print how well they do.

    python -m experiments.paper.train FOLDER [NAME ...] [--smoke] [--steps N]

What is in FOLDER already is not trained again; what was interrupted goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .clip import train_clip
from .fit import FULL, SMOKE, Trained
from .models import BUILDERS, train


def table(rows: Sequence[tuple[str, Trained]]) -> str:
    """A line a model: parameters, seconds, held-out figures in percent."""
    lines = ["model        parameters  seconds  held out (%)"]
    for name, trained in rows:
        size = sum(p.numel() for p in trained.model.parameters())
        figures = "  ".join(f"{k} {100 * v:.1f}" for k, v in trained.scores.items())
        lines.append(f"{name:12} {size:10}  {trained.seconds:7.0f}  {figures}")
    return "\n".join(lines)


def main() -> None:
    """Train what is named, or everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where trained models are kept")
    parser.add_argument("names", nargs="*", default=[*BUILDERS, "clip-towers"], metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="a few steps: whether it runs")
    parser.add_argument("--steps", type=int, help="instead of the recipe's own")
    args = parser.parse_args()
    recipe = SMOKE if args.smoke else FULL
    recipe = replace(recipe, steps=args.steps or recipe.steps)
    rows = []
    for name in args.names:
        if name == "clip-towers":
            trained = train_clip(args.folder, recipe)
        elif name in BUILDERS:
            trained = train(name, args.folder, recipe)
        else:
            parser.error(f"no model {name!r}; there are {', '.join([*BUILDERS, 'clip-towers'])}")
        rows.append((name, trained))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
