"""What an evaluation is asked for: checked, and as the text that tells it from another one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backward.targets import Target
from ..edits.costs import Policy
from ..errors import InputError
from ..metrics.deletion import Deletion
from ..metrics.table import metric
from ..plan.plan import Plan
from .batches import digest

AnyPolicy = str | Policy | Plan


@dataclass(frozen=True)
class Request:
    """What is asked for. Raises `InputError` for what no evaluation can be made of."""

    methods: tuple[str, ...]
    policies: Mapping[str, AnyPolicy]
    metrics: tuple[str, ...]
    target: Target
    fractions: tuple[float, ...]
    batch_size: int
    forward_batch: int

    def __post_init__(self) -> None:
        for name in self.metrics:
            metric(name)
        if isinstance(self.target, str) and self.target not in ("prediction", "label"):
            raise InputError(f"target must be 'prediction' or 'label', got {self.target!r}")
        if callable(self.target) and not isinstance(self.target, Tensor):
            raise InputError("a function names no class, which the deletion curves would follow")
        smallest = min(self.batch_size, self.forward_batch)
        if smallest < 1:
            raise InputError(f"batch sizes must be at least 1, got {smallest}")

    def settings(self, model: nn.Module, samples: int, deletion: Deletion) -> dict[str, Any]:
        """What tells the results of this request from those of another, as JSON holds it."""
        settings = {
            "model": fingerprint(model),
            "samples": samples,
            "methods": self.methods,
            "policies": {name: _text(policy) for name, policy in self.policies.items()},
            "metrics": self.metrics,
            "target": _target_text(self.target),
            "fractions": self.fractions,
            "grid": deletion.grid,
            "removal": deletion.describe,
            "batch_size": self.batch_size,
        }
        return dict(json.loads(json.dumps(settings)))


def one_each(target: Target) -> bool:
    """Whether a target names one class a sample."""
    return isinstance(target, list) or getattr(target, "ndim", 0) > 0


def _target_text(target: Target) -> Any:
    if one_each(target):
        return torch.as_tensor(target).tolist()
    return target if target is None or isinstance(target, (str, int)) else str(target)


def distinct_names(what: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, each once."""
    names = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{what} are given by names, or objects as a dict: {{name: object}}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"{what} must be some names, each once, got {names}")
    return names


def fingerprint(model: nn.Module) -> str:
    """The model's class, and digests of its modules as they print and of what they hold."""
    printed = re.sub(r" at 0x[0-9a-f]+", "", str(model))  # addresses change from run to run
    modules = hashlib.sha256(printed.encode()).hexdigest()[:8]
    held = digest([*model.parameters(), *model.buffers()])
    return f"{type(model).__name__} {modules} {held}"


def _text(policy: AnyPolicy) -> str:
    """A policy by name, or what distinguishes it from others."""
    if isinstance(policy, str):
        return policy
    return "; ".join(map(str, policy)) if isinstance(policy, Plan) else repr(policy)
