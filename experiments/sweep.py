"""A sweep over named models: one row a model, kept at once, gone on with where it stopped."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullgrad_theory.bars import progress

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]
Case = tuple[str, Callable[..., Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sweep:
    """`cases(samples)` are judged one by one; the rows are told in `table(rows, command)`.

    Its rows lie in NAME.jsonl, its table in NAME.md; `samples` of each entry by default.
    """

    name: str
    cases: Callable[[int], Iterable[Case]]
    judged: Callable[[str, Any, tuple[Tensor, ...]], Row]
    is_fault: Callable[[Row], bool]
    table: Callable[[list[Row], str], str]
    samples: int = 1

    def main(self, description: str | None) -> int:
        """The command line: 1 where a row is a fault."""
        warnings.filterwarnings("ignore")
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--samples", type=int, default=self.samples, help="of each entry")
        parser.add_argument("--only", default="", help="entries whose name contains this")
        parser.add_argument("--out", type=Path, default=FOLDER)
        given = parser.parse_args()
        rows = self.rows(given.samples, given.only, given.out)
        command = f"python -m experiments.{self.name} --samples {given.samples}"
        (given.out / f"{self.name}.md").write_text(self.table(rows, command))
        faults = [row for row in rows if self.is_fault(row)]
        for row in faults:
            print(row)
        return 1 if faults else 0

    def rows(self, samples: int, only: str, out: Path) -> list[Row]:
        """Every case's row, those of an earlier run as they were."""
        out.mkdir(parents=True, exist_ok=True)
        state = out / f"{self.name}.jsonl"
        kept = state.read_text().splitlines() if state.exists() else []
        rows = [json.loads(line) for line in kept]
        done = {row["name"] for row in rows}
        cases = [case for case in self.cases(samples) if only in case[0]]
        with progress(self.name) as tick, state.open("a") as file:
            for k, (name, model, tensors) in enumerate(cases, 1):
                if name not in done:
                    torch.manual_seed(0)
                    rows.append(self.judged(name, model, tensors))
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
                tick(name, k, len(cases))
        return rows
