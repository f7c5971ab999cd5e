"""Work shared by several processes (torchrun), or done by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import FullgradError
from ..graph.sources import first_line

T = TypeVar("T")
_CALLS = count()
_PATIENCE = timedelta(days=30)  # others may have longer batches


@dataclass(frozen=True)
class Processes:
    """This process's `rank` of `count`. Objects travel by gloo, whatever device computes."""

    rank: int = 0
    count: int = 1
    group: Any = None

    def from_all(self, value: Any) -> list[Any]:
        """What every process has, by rank, in all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started, or those of a group that is there already, or just one.

    A group that was made here is gone afterwards.
    """
    if not dist.is_available():
        yield Processes()
        return
    own = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if own:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
        # a group's addresses stay in the store: a second group under one prefix would read them
        store = dist.PrefixStore(f"fullgrad_theory/{next(_CALLS)}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    if not dist.is_initialized():
        yield Processes()
        return
    group = None if own else dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)


def together(here: Processes, work: Callable[[], T]) -> list[T]:
    """What `work` returns in every process, by rank; if it fails in one, all of them raise."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  first the others are told, who wait for the result
        failure = error
    told = here.from_all((result, None if failure is None else first_line(failure)))
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise FullgradError(f"process {rank} of {here.count} failed: {text}")
    return [found for found, _ in told]
