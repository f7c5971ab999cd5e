"""What an evaluation costs, against the passes that it cannot do without.

    python experiments/evaluation_cost.py [--images 8] [--rounds 3] [--depth 6] [--width 192]
                                          [--save]

The floor is bare passes of timm's ViT: a forward for every batch of the deletion curves, of its
very shape (rows and tokens), one for the whole images, and one forward and backward with respect to
the images for each policy. The evaluation is all of `evaluate`: gradients, maps, orders, curves,
every metric. Floor and evaluation take turns; what is printed is the ratio of medians of processor
time, which does not depend on what else runs. Making the model ready (tracing, deriving plans)
happens once, whatever the number of images, and is printed apart.
`--save` writes experiments/results/evaluation_cost.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor

from fullgrad_theory.attribution import Explainer
from fullgrad_theory.data import Sample
from fullgrad_theory.measure.evaluation import evaluate
from fullgrad_theory.metrics import Deletion

METHODS = (
    "input-x-gradient",
    "fullgrad+",
    "gradcam+",
    "hirescam",
    "xgradcam+",
    "attcat",
    "genatt",
    "legrad",
    "random",
)
POLICIES = ("plain", "libra")
SHAPES = list[tuple[int, int]]


def samples(count: int) -> list[Sample]:
    """Noise, with a square as the object: what a pass costs does not depend on what it sees."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:40, 20:50] = True
    return [
        Sample(torch.randn((3, 64, 64), generator=generator), i % 10, mask) for i in range(count)
    ]


def vit(depth: int, width: int) -> VisionTransformer:
    torch.manual_seed(0)
    model: Any = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        depth=depth,
        embed_dim=width,
        num_classes=10,
    )
    return model.eval()


def shapes_of(model: VisionTransformer, run: Callable[[], object]) -> SHAPES:
    """(rows, tokens) of every forward of the model while `run` runs."""
    found: SHAPES = []
    handle = model.blocks[0].register_forward_pre_hook(lambda m, a: found.append(a[0].shape[:2]))
    run()
    handle.remove()
    return [(int(rows), int(tokens)) for rows, tokens in found]


def floor(model: VisionTransformer, x: Tensor, shapes: SHAPES) -> None:
    """The bare passes."""
    with torch.no_grad():
        for rows, tokens in shapes:
            images = x[torch.arange(rows) % len(x)]
            sequence = model.norm_pre(model._pos_embed(model.patch_embed(images)))
            model.forward_head(model.norm(model.blocks(sequence[:, :tokens])))
    for _ in POLICIES:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)


def seconds(run: Callable[[], object]) -> float:
    """Processor time of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(images: int, rounds: int, depth: int, width: int) -> dict[str, float]:
    """Medians in seconds, their ratio, and the numbers of images and of passes."""
    model = vit(depth, width).requires_grad_(False)
    given = samples(images)
    x = torch.stack([s.image for s in given])
    ready: dict[str, Explainer] = {}
    setup = seconds(lambda: ready.update({p: Explainer(model, x[:1], p) for p in POLICIES}))

    def run() -> None:
        made = lambda model, example, policy: ready[policy]  # noqa: E731
        evaluate(model, given, METHODS, POLICIES, batch_size=images, explainer=made)

    trial = shapes_of(model, lambda: Deletion(model, x[:1]))
    shapes = shapes_of(model, run)[len(trial) :]
    times: dict[str, list[float]] = {"floor": [], "evaluate": []}
    for _ in range(rounds):
        times["floor"].append(seconds(lambda: floor(model, x, shapes)))
        times["evaluate"].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    lows = {name: min(values) for name, values in times.items()}
    return {
        "setup": setup,
        **medians,
        "ratio": medians["evaluate"] / medians["floor"],
        "ratio of minima": lows["evaluate"] / lows["floor"],
        "images": images,
        "methods": len(METHODS),
        "rows": sum(rows for rows, _ in shapes),
        "most": images * (1 + len(METHODS) * len(POLICIES) * 2 * 9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found = measure(given.images, given.rounds, given.depth, given.width)
    threads = torch.get_num_threads()
    text = f"""Written by `{command(given)}`
({platform.machine()}, threads: {threads}, torch {torch.__version__.split("+")[0]}).

| what | value |
|---|---|
| images, methods, policies | {found["images"]}, {found["methods"]}, {len(POLICIES)} |
| forward passes of single images, run | {found["rows"]} |
| the most that is allowed, n (1 + methods x policies x 2 orders x 9 fractions) | {found["most"]} |
| the bare passes, median s | {found["floor"]:.2f} |
| the evaluation with all metrics, median s | {found["evaluate"]:.2f} |
| **ratio of medians** | **{found["ratio"]:.2f}** |
| ratio of minima | {found["ratio of minima"]:.2f} |
| making the model ready under both policies, once, s | {found["setup"]:.2f} |
"""
    print(text)
    if given.save:
        (Path(__file__).parent / "results" / "evaluation_cost.md").write_text(text)


def command(given: argparse.Namespace) -> str:
    options = " ".join(f"--{k} {v}" for k, v in vars(given).items() if k != "save")
    return f"python experiments/evaluation_cost.py {options} --save"


if __name__ == "__main__":
    main()
