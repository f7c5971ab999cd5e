"""Campaigns: many random architectures, their properties checked in several processes, resumable.

An example is the number of its seed; numbers are worked off in chunks, and the folder of a campaign
holds which chunks are done, what came of them, and every failure as a shrunk program.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..bars import Tick
from ..errors import InputError
from ..files import write_whole
from .coverage import CONTEXTS, contexts, run_values
from .independent import is_real
from .properties import PropertyError, check_properties
from .strategies import (
    Architecture,
    Value,
    drawable,
    from_data,
    random_architecture,
    to_data,
    without_the_unread,
)

_SPAWN = multiprocessing.get_context("spawn")
CHUNK = 20
SPAN = 1_000_000
"""seeds of two campaigns do not meet below this many examples"""
AGAIN = 8
"""one architecture in so many is traced a second time"""


_COUNTERS = ("outcomes", "edits", "unwitnessed", "reasons")


def _often(counter: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first, by name where they are equal: whichever process came first."""
    return sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))


@dataclass
class Tally:
    """What came of some examples. `coverage` counts (operation, context); `seconds` are of CPU."""

    examples: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    edits: Counter[str] = field(default_factory=Counter)
    unwitnessed: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.examples += other.examples
        self.seconds += other.seconds
        for name in (*_COUNTERS, "coverage"):
            getattr(self, name).update(getattr(other, name))
        self.failures += other.failures

    def to_data(self) -> dict[str, Any]:
        """As what JSON can hold."""
        table: dict[str, dict[str, int]] = {}
        for (name, context), count in sorted(self.coverage.items()):
            table.setdefault(name, {})[context] = count
        counters = {n: dict(_often(getattr(self, n))) for n in _COUNTERS}
        failures = sorted(self.failures, key=lambda f: f["seed"])
        return vars(self) | counters | {"coverage": table, "failures": failures}

    @staticmethod
    def from_data(data: dict[str, Any]) -> Tally:
        counters = {k: Counter(data[k]) for k in _COUNTERS}
        coverage = Counter(
            {(n, c): count for n, row in data["coverage"].items() for c, count in row.items()}
        )
        return Tally(
            data["examples"], data["seconds"], **counters, coverage=coverage,
            failures=data["failures"],
        )  # fmt: skip


# --------------------------------------------------------------------------- one example


def run_example(seed: int, check: Callable[..., Any] = check_properties) -> Tally:
    """Draw and check the architecture of one seed."""
    tally = Tally(1)
    architecture = random_architecture(seed)
    if architecture is None:
        tally.outcomes["nothing drawn"] += 1
        return tally
    tally.coverage.update(contexts(architecture))
    try:
        outcome = check(architecture, seed % AGAIN == 0)
    except PropertyError as error:
        tally.outcomes["failed"] += 1
        small = shrink(architecture, partial(_fails_alike, check, error.property))
        try:
            check(small, True)
            message = str(error)
        except PropertyError as again:
            message = str(again)
        tally.failures.append(
            {
                "seed": seed,
                "property": error.property,
                "message": message,
                "program": to_data(small),
                "source": small.source().splitlines(),
            }
        )
        return tally
    tally.outcomes[outcome.kind] += 1
    tally.edits.update(outcome.edits)
    tally.unwitnessed.update(outcome.unwitnessed)
    if outcome.kind in ("refused", "unjudged"):
        tally.reasons[outcome.reason[:100]] += 1
    return tally


def _fails_alike(check: Callable[..., Any], name: str, architecture: Architecture) -> bool:
    try:
        check(architecture, True)
    except PropertyError as error:
        return error.property == name
    return False


def shrink(
    architecture: Architecture, fails: Callable[[Architecture], bool], seconds: float = 20.0
) -> Architecture:
    """A smaller program that fails as well: an earlier output, statements bypassed."""
    end = monotonic() + seconds
    smaller = True
    while smaller and monotonic() < end:
        smaller = False
        for candidate in _smaller(architecture):
            if monotonic() > end:
                break
            if _runs(candidate) and fails(candidate):
                architecture, smaller = candidate, True
                break
    return architecture


def _smaller(architecture: Architecture) -> Iterator[Architecture]:
    """Programs of fewer statements, the boldest first."""
    count = len(architecture.inputs)
    size = len(architecture.statements)
    ends = [(i,) for i in range(count, count + size)]
    cut = [without_the_unread(replace(architecture, outputs=end)) for end in ends]
    bypassed = [
        without_the_unread(_bypass(architecture, place + count, read))
        for place, s in reversed(list(enumerate(architecture.statements)))
        for read in dict.fromkeys(s.reads)
    ]
    known = {architecture}
    for candidate in (*cut, *bypassed):
        if candidate and candidate not in known and len(candidate.statements) < size:
            known.add(candidate)
            yield candidate


def _bypass(architecture: Architecture, value: int, instead: int) -> Architecture:
    """The program with one value replaced by one that its statement reads."""

    def swap(leaf: Any) -> Any:
        return Value(instead) if leaf == Value(value) else leaf

    statements = tuple(s.mapped(swap) for s in architecture.statements)
    outputs = tuple(instead if o == value else o for o in architecture.outputs)
    return replace(architecture, statements=statements, outputs=tuple(dict.fromkeys(outputs)))


def _runs(architecture: Architecture) -> bool:
    """Whether torch runs the program and its outputs are live floating-point tensors."""
    try:
        values = run_values(architecture)
    except Exception:  # noqa: BLE001  a statement bypassed may leave anything behind
        return False
    outputs = [values[o] for o in architecture.outputs]
    grown = [t for t in pytree.tree_leaves(values) if is_real(t) and t.grad_fn is not None]
    return all("NotImplemented" not in t.grad_fn.name() for t in grown) and all(
        is_real(v) and v.requires_grad and not v.is_complex() for v in outputs
    )


# --------------------------------------------------------------------------- many


@contextmanager
def rarely_collected() -> Iterator[None]:
    """An export makes many objects that live on, and looking for cycles among them is a fifth of
    the time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run_chunk(first: int, count: int) -> Tally:
    """The examples of some consecutive seeds, in this process, on one thread."""
    torch.set_num_threads(1)
    total = Tally()
    start = process_time()
    with warnings.catch_warnings(), rarely_collected():
        warnings.simplefilter("ignore")
        for seed in range(first, first + count):
            total.add(run_example(seed))
    total.seconds = process_time() - start
    return total


def _ended(seed: int) -> Tally:
    """What is known of an example that ends its process: a crash of native code, or of memory."""
    failure = {
        "seed": seed,
        "property": "the process lives",
        "message": f"the process that checks random_architecture({seed}) ends without a word",
        "program": None,
        "source": [],
    }
    return Tally(1, outcomes=Counter(failed=1), failures=[failure])


@dataclass
class Campaign:
    """`examples` random architectures from `seed` on, in `jobs` processes.

    With a folder `out` its state is kept there after every chunk and taken up again; failures are
    written to `failures/`, and judged anew where it is taken up. An example that ends its process
    is a failure too, unless `jobs` is 1. Raises `InputError` where the folder holds another seed's
    campaign.
    """

    examples: int
    jobs: int = 1
    seed: int = 0
    out: Path | None = None
    tally: Tally = field(default_factory=Tally)
    done: set[int] = field(default_factory=set)
    wall: float = 0.0
    work: Callable[[int, int], Tally] = run_chunk

    def run(self, tick: Tick) -> Tally:
        """Work off what is not done; returns the tally of all that is."""
        self._load()
        self._judge_failures_anew()
        whole = self.examples // CHUNK
        chunks = [(i, CHUNK) for i in range(whole) if i not in self.done]
        if self.examples % CHUNK and whole not in self.done:
            chunks.append((whole, self.examples % CHUNK))
        start = monotonic()
        tick("architectures", self.tally.examples, self.examples)
        for index, count, found in self._results(chunks):
            self.tally.add(found)
            if count == CHUNK:
                self.done.add(index)
            self.wall += monotonic() - start
            start = monotonic()
            self._save(found, whole=count == CHUNK)
            tick("architectures", self.tally.examples, self.examples)
        return self.tally

    def _judge_failures_anew(self) -> None:
        """What failed under an earlier state of the code counts as what it is under this one."""
        failures, self.tally.failures = self.tally.failures, []
        for failure in failures:
            judge = self._alone if self.jobs > 1 else self.work
            again = judge(failure["seed"], 1)
            self.tally.outcomes["failed"] -= 1
            self.tally.outcomes += again.outcomes
            self.tally.failures += again.failures
            if self.out is not None and not again.failures:
                (self.out / "failures" / _file_name(failure)).unlink(missing_ok=True)

    def _results(self, chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Tally]]:
        first = self.seed * SPAN
        if self.jobs == 1:
            for index, count in chunks:
                yield index, count, self.work(first + index * CHUNK, count)
            return
        left = dict(chunks)
        while left:
            try:
                for index, found in self._in_pool(first, left):
                    yield index, left.pop(index), found
            except BrokenProcessPool:  # by one of those at work, which are the earliest
                for index in list(left)[: 2 * self.jobs]:
                    yield index, left[index], self._alone(first + index * CHUNK, left[index])
                    del left[index]

    def _in_pool(self, first: int, left: Mapping[int, int]) -> Iterator[tuple[int, Tally]]:
        with ProcessPoolExecutor(self.jobs, mp_context=_SPAWN) as pool:
            running: dict[Future[Tally], int] = {
                pool.submit(self.work, first + i * CHUNK, n): i for i, n in left.items()
            }
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()

    def _alone(self, first: int, count: int) -> Tally:
        """Some examples in a process of their own; halved until the one that ends it is alone."""
        try:
            with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
                return pool.submit(self.work, first, count).result()
        except BrokenProcessPool:
            if count == 1:
                return _ended(first)
        total = self._alone(first, count // 2)
        total.add(self._alone(first + count // 2, count - count // 2))
        return total

    # ------------------------------------------------------------------ the folder

    @property
    def _state(self) -> Path | None:
        return self.out / "state.json" if self.out else None

    def _load(self) -> None:
        path = self._state
        if path is None or not path.exists():
            return
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["seed"] != self.seed:
            raise InputError(
                f"{path.parent} holds the campaign of seed {data['seed']}, not {self.seed}; name "
                "another folder, or that seed to go on with it"
            )
        self.done, self.wall = set(data["done"]), data["wall"]
        self.tally = Tally.from_data(data["tally"])

    def _save(self, found: Tally, whole: bool) -> None:
        path = self._state
        if path is None or self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for failure in found.failures:
            save_failure(self.out / "failures", failure)
        if whole:  # the rest of a campaign is done anew where it is taken up with more examples
            state = {"seed": self.seed, "done": sorted(self.done), "wall": self.wall}
            text = json.dumps(state | {"tally": self.tally.to_data()})
            write_whole(path, text)

    def write_summary(self) -> None:
        """`summary.json` and `summary.md` in the campaign's folder."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        data = self.tally.to_data()
        failures = [{k: f[k] for k in ("seed", "property", "message")} for f in data["failures"]]
        data |= {"seed": self.seed, "wall": self.wall, "failures": failures}
        write_whole(self.out / "summary.json", json.dumps(data, indent=1) + "\n")
        write_whole(self.out / "summary.md", summary(self) + "\n")


def _file_name(failure: dict[str, Any]) -> str:
    return f"{failure['property'].replace(' ', '-')}-{failure['seed']}.json"


def save_failure(folder: Path, failure: dict[str, Any]) -> Path:
    """Write a failure where the tests replay it; one file a program."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _file_name(failure)
    write_whole(path, json.dumps(failure, indent=1) + "\n")
    return path


def load_failure(path: Path) -> tuple[Architecture, dict[str, Any]]:
    """The program of a failure, and all that was written with it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return from_data(data["program"]), data


# --------------------------------------------------------------------------- what is said


def coverage_lines(tally: Tally) -> tuple[list[str], list[str]]:
    """Per context how many operations were met in it; and the operations never met."""
    met = {name for name, _ in tally.coverage}
    names = drawable()
    lines = [
        f"| {context} | {len({n for n, c in tally.coverage if c == context})} "
        f"| {sum(k for (_, c), k in tally.coverage.items() if c == context)} |"
        for context in CONTEXTS
    ]
    return lines, [n for n in names if n not in met and n != "getitem"]


def summary(campaign: Campaign) -> str:
    """A campaign as Markdown: outcomes, edits, coverage, failures."""
    tally = campaign.tally
    speed = tally.examples / campaign.wall if campaign.wall else 0.0
    alone = tally.examples / tally.seconds if tally.seconds else 0.0
    lines = [
        f"# {tally.examples} random architectures, seed {campaign.seed}",
        "",
        f"{speed:.1f} a second in {campaign.jobs} process(es); {alone:.1f} a second of CPU time.",
        "",
        "| outcome | architectures |",
        "|---|---:|",
        *(f"| {k} | {n} |" for k, n in _often(tally.outcomes)),
        "",
        "Edits: " + (", ".join(f"{n} {k}" for k, n in _often(tally.edits)) or "none") + ".",
    ]
    if tally.unwitnessed:
        text = ", ".join(f"{k} ({n})" for k, n in _often(tally.unwitnessed))
        lines += ["", f"Objected to without a witness: {text}."]
    if tally.reasons:
        lines += ["", "Refused or unjudged:", ""]
        lines += [f"- {n} x {reason}" for reason, n in _often(tally.reasons)[:12]]
    rows, missing = coverage_lines(tally)
    total = len(drawable())
    lines += [
        "",
        f"Operations met: {total - len(missing)} of {total}.",
        "",
        "| context | operations | calls |",
        "|---|---:|---:|",
        *rows,
    ]
    if missing:
        lines += ["", "Never met: " + ", ".join(missing) + "."]
    if tally.failures:
        lines += ["", "Failures:", ""]
        lines += [f"- seed {f['seed']}: {f['message'][:300]}" for f in tally.failures]
    return "\n".join(lines)
