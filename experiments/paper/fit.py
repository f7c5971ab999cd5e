"""Train a model on scenes, from nothing, and keep it.

A trained model is found again by what made it: its recipe, its structure and the images. A training
that was interrupted goes on where it stood, and ends with the weights it would have had.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from fullgrad_theory.bars import progress
from fullgrad_theory.data import Scenes


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: one cycle of the learning rate, no augmentation, and AdaMuon, whose
    steps for matrices are orthogonal: fewer of them than AdamW needs here.

    `images` and `held_out`: how many scenes, of seeds `seed` and `seed` + 1000003; `every`: seconds
    between two checkpoints.
    """

    images: int = 40000
    held_out: int = 2000
    steps: int = 1600
    batch: int = 32
    rate: float = 4e-3
    decay: float = 0.05
    smoothing: float = 0.05
    seed: int = 0
    every: float = 20.0


FULL = Recipe()
SMOKE = Recipe(images=256, held_out=64, steps=8, batch=16, every=1e9)


@dataclass(frozen=True)
class Data:
    """`images`: (N, 3, 64, 64) uint8; `classes`: (N, 3) int64 of the objects, -1 for none, the
    first being the label."""

    images: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor | slice) -> Data:
        return Data(self.images[rows], self.classes[rows])

    @property
    def inputs(self) -> Tensor:
        """The images as a model takes them, float32 in [-1, 1]."""
        return self.images.float() / 127.5 - 1


@dataclass(frozen=True)
class Task:
    """`loss(model, data, smoothing)`, a scalar; `score(model, recipe)`: figures in [0, 1] on the
    scenes that were held out."""

    loss: Callable[[nn.Module, Data, float], Tensor]
    score: Callable[[nn.Module, Recipe], dict[str, float]]


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, its held-out figures, the seconds its training took and its file."""

    model: nn.Module
    scores: dict[str, float]
    seconds: float
    file: Path


# --------------------------------------------------------------------------- the data and the task


@lru_cache(maxsize=6)
def scenes(n: int, seed: int, keep: str = "all") -> Data:
    """Rendered once a process and shared by all models."""
    made = Scenes(n, seed, keep=keep).render()
    return Data(torch.from_numpy(made.images), torch.from_numpy(made.classes))


def held_out(recipe: Recipe, keep: str = "all") -> Data:
    """Scenes that no training with this recipe sees."""
    return scenes(recipe.held_out, recipe.seed + 1000003, keep)


def _class_loss(model: nn.Module, data: Data, smoothing: float) -> Tensor:
    return F.cross_entropy(model(data.inputs), data.classes[:, 0], label_smoothing=smoothing)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of images whose largest object the model (in eval mode) names."""
    parts = [data[i : i + 250] for i in range(0, len(data), 250)]
    right = sum(int((model(p.inputs).argmax(1) == p.classes[:, 0]).sum()) for p in parts)
    return right / len(data)


def _looks(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Accuracy, and what is left of it without the labelled object, and without any object."""
    kept = {"accuracy": "all", "without it": "others", "without any": "none"}
    return {name: accuracy(model, held_out(recipe, keep)) for name, keep in kept.items()}


classify = Task(_class_loss, _looks)


# --------------------------------------------------------------------------- training


def fit(
    name: str,
    build: Callable[[], nn.Module],
    task: Task,
    recipe: Recipe,
    folder: Path,
    stop_after: int | None = None,
) -> Trained:
    """The trained model, from `folder` or trained now. The global random state is left alone.

    `stop_after`: as many steps, and then a `KeyboardInterrupt`, as if somebody had pressed Ctrl-C.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build()
        file = folder / f"{name}-{_hash(model, recipe)}.pt"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _train(name, model, task, recipe, file, stop_after)
    kept = torch.load(file, weights_only=True)
    model.load_state_dict(kept["model"])
    return Trained(model.eval(), kept["scores"], kept["seconds"], file)


def _hash(model: nn.Module, recipe: Recipe) -> str:
    """Of what the weights follow from; the images stand for the generator."""
    digest = hashlib.sha256(scenes(16, recipe.seed).images.numpy().tobytes())
    made = {k: v for k, v in asdict(recipe).items() if k not in ("held_out", "every")}
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    digest.update(json.dumps([made, shapes, repr(model)], sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _train(
    name: str, model: nn.Module, task: Task, recipe: Recipe, file: Path, stop_after: int | None
) -> None:
    data = scenes(recipe.images, recipe.seed)
    optimiser = create_optimizer_v2(model, opt="adamuon", lr=recipe.rate, weight_decay=recipe.decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.rate, total_steps=recipe.steps, pct_start=0.15
    )
    parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "cycle": cycle}
    part, done, seconds = file.with_suffix(".part"), 0, 0.0
    if part.exists():
        kept = torch.load(part, weights_only=True)
        done, seconds = kept["done"], kept["seconds"]
        for key, value in parts.items():
            value.load_state_dict(kept[key])

    def keep(to: Path, **more: Any) -> None:
        _save({k: v.state_dict() for k, v in parts.items()} | more, to)

    start = saved = time.monotonic()
    with progress(f"train {name}") as tick:
        for step in range(done, recipe.steps):
            if step == stop_after or time.monotonic() - saved > recipe.every:
                saved = time.monotonic()
                keep(part, done=step, seconds=seconds + saved - start)
                if step == stop_after:
                    raise KeyboardInterrupt
            model.train()
            loss = task.loss(model, data[_rows(recipe, step)], recipe.smoothing)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            cycle.step()
            tick(f"loss {loss.item():.2f}", step + 1, recipe.steps)
    seconds += time.monotonic() - start
    scores = task.score(model.eval(), recipe)
    _save({"model": model.state_dict(), "scores": scores, "seconds": seconds}, file)
    part.unlink(missing_ok=True)


def _rows(recipe: Recipe, step: int) -> Tensor:
    """The images of a step: a new order every time all were seen, known from the step alone."""
    a_round = recipe.images // recipe.batch
    at, place = divmod(step, a_round)
    order = _order(recipe.images, recipe.seed + at)
    return order[place * recipe.batch : (place + 1) * recipe.batch]


@lru_cache(maxsize=2)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _save(what: dict[str, Any], to: Path) -> None:
    """All or nothing: an interrupted write leaves the old file."""
    beside = to.with_name(f"{to.name}.{os.getpid()}")
    torch.save(what, beside)
    beside.replace(to)
