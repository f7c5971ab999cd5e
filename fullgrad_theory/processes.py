"""Work shared by several processes (torchrun), or done by one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


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
        dist.init_process_group("gloo")
    if not dist.is_initialized():
        yield Processes()
        return
    group = dist.group.WORLD if own else dist.new_group(backend="gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(None if own else group)
