"""Work in processes of their own, one a task, each within a time and a memory limit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any, Generic, TypeVar

from ..bars import LOUD, Loud
from .rows import Outcome

Task = TypeVar("Task")
Result = TypeVar("Result")
_LOOK = 0.1
"""seconds between two looks at what the workers hold"""


@dataclass(frozen=True)
class Ended:
    """How a worker ended that gave no result; `memory` is the most that was seen of it, MiB."""

    outcome: Outcome
    words: str
    memory: float | None


@dataclass
class _Running(Generic[Task]):
    task: Task
    process: BaseProcess
    seconds: float
    mebibytes: int
    began: float = field(default_factory=monotonic)
    memory: float = 0.0

    def over(self) -> Ended | None:
        """The limit that it is over, in words."""
        self.memory = max(self.memory, _resident(self.process.pid))
        held = self.memory or None
        if monotonic() - self.began > self.seconds:
            return Ended(Outcome.OUT_OF_TIME, f"not ended after {self.seconds:g} s", held)
        if self.memory > self.mebibytes:
            return Ended(Outcome.OUT_OF_MEMORY, f"held more than {self.mebibytes} MiB", held)
        return None

    def died(self) -> Ended:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"exit code {code}"
        with suppress(ValueError):
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else how
        return Ended(Outcome.DIED, f"its process ended: {how}", self.memory or None)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def each(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    jobs: int,
    seconds: float,
    mebibytes: int,
    preload: Iterable[str] = (),
) -> Iterator[tuple[Task, Result | Ended]]:
    """What `work` returns for each task, as it ends, `jobs` of them at a time.

    A worker over its limits is killed; that, and one that dies by itself, is an `Ended`. Memory is
    seen on Linux alone. `preload`: modules that are imported once, for all workers.
    """
    context = _context(preload)
    waiting, running = iter(tasks), dict[Connection, _Running[Task]]()
    try:
        while True:
            for task in _some(waiting, jobs - len(running)):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker, args=(writer, work, task, os.getcwd()), daemon=True
                )
                process.start()
                writer.close()  # so that the end of the worker is the end of the pipe
                running[reader] = _Running(task, process, seconds, mebibytes)
            if not running:
                return
            told = wait(list(running), _LOOK)
            for reader, one in list(running.items()):
                found = _result(reader, one) if reader in told else one.over()
                if found is not None:
                    one.end()
                    reader.close()
                    del running[reader]
                    yield one.task, found
    finally:
        for one in running.values():
            one.end()


def _some(waiting: Iterator[Task], most: int) -> Iterator[Task]:
    return (task for _, task in zip(range(most), waiting, strict=False))


def _result(reader: Connection, one: _Running[Any]) -> Any:
    try:
        return reader.recv()
    except (EOFError, OSError):  # nothing was sent, or a part
        return one.died()


def _context(preload: Iterable[str]) -> Any:
    """Workers are forks of one process that has done nothing but import, where that is safe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    _start_tracker()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def _start_tracker() -> None:
    """What a killed worker leaves is cleared away, and no warning of that is the user's matter."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _worker(writer: Connection, work: Callable[[Task], Result], task: Task, folder: str) -> None:
    """In the worker: it is silent, leaves Ctrl-C to the run, and ends with it."""
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    LOUD.set(Loud.QUIET)
    Thread(target=_follow, daemon=True).start()
    writer.send(work(task))
    writer.close()
    os._exit(0)  # what the task left open is no matter of anybody's


def _follow() -> None:
    """A run that was killed leaves nobody working."""
    run = parent_process()
    if run is not None:
        run.join()
        os._exit(1)


def _resident(pid: int | None) -> float:
    """MiB that a process holds; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
