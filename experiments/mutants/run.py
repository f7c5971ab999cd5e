"""Plants one fault at a time in a copy of the library and sees whether the tests notice.

    python experiments/mutants/run.py [NAME ...] [--jobs 2] [--again]

A mutant is caught when its suspects (the tests that ought to notice) fail. Once all suspects were
asked, those that noticed nothing go to the whole test suite, then to a short fuzzing campaign. What
nobody notices is a survivor. Each answer goes to results.json as soon as it is known, so an
interrupted run goes on where it stopped; results.md is the table. Exit code 1 for survivors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

from table import MUTANTS, Mutant  # noqa: E402

STORE = HERE / "results.json"
COPIED = ("fullgrad_theory", "tests", "proofs", "docs", "experiments")
LIMIT = 1200
"""seconds of processor time for one pytest: the whole suite takes half of it"""
CAMPAIGN = ("-c", "from fullgrad_theory.command.cli import app; app()", "fuzz", "--examples", "200")


def plant(mutant: Mutant, root: Path) -> None:
    """Write the fault into a copy; raises ValueError where its text does not stand there once."""
    path = root / "fullgrad_theory" / mutant.file
    text = path.read_text()
    if text.count(mutant.find) != 1:
        raise ValueError(f"{mutant.name}: found {text.count(mutant.find)} times in {mutant.file}")
    path.write_text(text.replace(mutant.find, mutant.put))


def copy(root: Path) -> None:
    """The repository as the tests need it."""
    for folder in COPIED:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.md")):
        shutil.copy(file, root)


def run(root: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of Python in the copy."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT)),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def pytest(root: Path, *arguments: str) -> str | None:
    """The first test that fails or cannot be loaded, None where all pass."""
    options = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk")
    code, output = run(root, "-m", "pytest", *options, *arguments)
    if code == 0:
        return None
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return f"no end within {LIMIT} s of processor time"
    if code not in (1, 2):  # 5: no test was selected, 4: wrong arguments
        raise RuntimeError(f"pytest {' '.join(arguments)} ended with {code}:\n{output[-2000:]}")
    named = re.search(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.M)
    return named[1] if named else "while loading"


def ask_suspects(mutant: Mutant) -> dict[str, Any]:
    """Which of its suspects notices, or nobody."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        plant(mutant, root)
        found = pytest(root, *mutant.suspects)
    return {"asked": "suspects", "by": found}


def ask_all(mutant: Mutant) -> dict[str, Any]:
    """Which test of the whole suite notices, or the campaign, or nobody."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        plant(mutant, root)
        found = pytest(root, "--deselect", "tests/test_house.py")
        if found is None:
            code, output = run(root, *CAMPAIGN)
            found = f"campaign: {' '.join(output.split()[-12:])}" if code else None
    return {"asked": "all", "by": found}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    caught = sum(row["by"] is not None for row in results.values())
    lines = [
        "# Who checks the checker",
        "",
        f"`python experiments/mutants/run.py`: {caught} of {len(results)} faults are caught.",
        "",
        "| fault | where | kind | caught by |",
        "|---|---|---|---|",
    ]
    for mutant in MUTANTS:
        row = results.get(mutant.name)
        if row:
            missed = "not by its suspects; the suite was not asked yet"
            if row["asked"] == "all":
                missed = f"**survives**: {mutant.excuse or 'no reason known'}"
            by = row["by"] or missed
            lines.append(f"| {mutant.name} | {mutant.file} | {mutant.kind} | {by} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="judge what has a result already")
    options = parser.parse_args()
    results = json.loads(STORE.read_text()) if STORE.exists() else {}
    unknown = sorted({*options.names} - {m.name for m in MUTANTS})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    chosen = [m for m in MUTANTS if not options.names or m.name in options.names]
    if options.again:
        results = {
            name: row for name, row in results.items() if name not in {m.name for m in chosen}
        }
    for ask in (ask_suspects, ask_all):
        unseen: dict[str, Any] = {"asked": "", "by": None}
        rows = {m.name: results.get(m.name, unseen) for m in chosen}
        last = "" if ask is ask_suspects else "suspects"
        waiting = [m for m in chosen if not rows[m.name]["by"] and rows[m.name]["asked"] == last]
        with ThreadPoolExecutor(options.jobs) as pool:
            answers = zip(waiting, pool.map(ask, waiting), strict=True)
            for mutant, answer in track(answers, ask.__name__, total=len(waiting)):
                print(f"{mutant.name}: {answer['by'] or 'nobody'}", flush=True)
                results[mutant.name] = answer
                ordered = {m.name: results[m.name] for m in MUTANTS if m.name in results}
                STORE.write_text(json.dumps(ordered, indent=1) + "\n")
                (HERE / "results.md").write_text(table(ordered))
    return any(results[m.name]["by"] is None for m in chosen)


if __name__ == "__main__":
    sys.exit(main())
