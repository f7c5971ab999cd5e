"""Models that lie about their gradient, and their honest twins, before the checker.

    python experiments/liars.py --examples 20000 --jobs 2 --out liars

Goes on where it stopped; writes counts, kind by kind, to liars.md in `--out`, beside the state.
Exit code 1 where a liar was called complete, a twin was not, or anything else was raised.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fullgrad_theory.bars import progress
from fullgrad_theory.testing.campaign import rarely_collected
from fullgrad_theory.testing.liars import outcomes, random_liar

FOLDER = Path(__file__).parent / "results"


def judged(seed: int) -> dict[str, Any]:
    """What was said of one liar and of its twin."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    liar = random_liar(seed)
    try:
        with rarely_collected():
            found = {who: (verdict, said) for who, verdict, said in outcomes(liar)}
    except Exception as error:  # noqa: BLE001  whatever is raised here is a fault to be counted
        return {"seed": seed, "kind": liar.kind, "raised": f"{type(error).__name__}: {error}"[:300]}
    (liar_says, _), (twin_says, said) = found["liar"], found["twin"]
    wrong = {"twin": said[:300]} if twin_says is not True else {}
    return {"seed": seed, "kind": liar.kind, "verdicts": [liar_says, twin_says], **wrong}


def is_fault(found: dict[str, Any]) -> bool:
    return (
        "raised" in found
        or found["verdicts"] != [found["verdicts"][0], True]
        or (found["verdicts"][0] is True)
    )


def table(rows: list[dict[str, Any]], command: str) -> str:
    """Kinds by what came of them, in Markdown."""
    names = {False: "incomplete", None: "unknown or refused", True: "CALLED COMPLETE"}
    count: Counter[tuple[str, str]] = Counter()
    for row in rows:
        said = "RAISED" if "raised" in row else names[row["verdicts"][0]]
        count[row["kind"], said] += 1
        count[row["kind"], "twin refused"] += "raised" not in row and row["verdicts"][1] is not True
    columns = ["incomplete", "unknown or refused", "CALLED COMPLETE", "RAISED", "twin refused"]
    lines = [
        f"# {len(rows)} liars and their twins",
        "",
        f"`{command}`, torch {torch.__version__}",
        "",
        f"| kind | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for kind in sorted({row["kind"] for row in rows}):
        lines.append(f"| {kind} | {' | '.join(str(count[kind, c]) for c in columns)} |")
    total = [sum(count[k, c] for k in {row["kind"] for row in rows}) for c in columns]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, total))} |", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the rest follow")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    state = given.out / "liars.jsonl"
    rows = [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []
    done = {row["seed"] for row in rows}
    todo = [s for s in range(given.seed, given.seed + given.examples) if s not in done]
    with (
        progress("liars") as tick,
        state.open("a") as file,
        multiprocessing.get_context("spawn").Pool(given.jobs, maxtasksperchild=500) as pool,
    ):
        for count, row in enumerate(pool.imap_unordered(judged, todo, chunksize=8), 1):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            tick("judged", count, len(todo))
    command = f"python experiments/liars.py --examples {given.examples} --seed {given.seed}"
    (given.out / "liars.md").write_text(table(rows, command))
    faults = [row for row in rows if is_fault(row)]
    for row in faults[:20]:
        print(row)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
