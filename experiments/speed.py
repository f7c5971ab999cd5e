"""What a balanced gradient costs, against the plain forward and the plain gradient.

    python -m experiments.speed [--model vit_base_patch16_224] [--tokens 1024] [--batch 8]
                                [--dtype bfloat16] [--device cuda] [--compile] [--others]
    python -m experiments.speed --grid cpu --save cpu

The candidates take turns in one process; what is printed are ratios of medians. Gradients are with
respect to the input; parameters ask for none, as in attribution. `--others`: captum, and LXT on
torchvision's ViT or zennit on a CNN where they are installed. `--grid` runs a list of cases, each
in a process of its own; `--save NAME` writes experiments/results/speed-NAME.json, .md and .png;
with `--against FILE` the ratios are compared with those kept: 10 % more is printed, and exits with
1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.bars import progress

RESULTS = Path(__file__).parent / "results"
VIT = "vit_base_patch16_224"
TORCHVISION = "torchvision:vit_b_16"
MORE = 1.10
"""a ratio that grew by more is printed"""


@dataclass(frozen=True)
class Case:
    """What is measured. `tokens`: patches of the image, 0 for the model's own size."""

    model: str = VIT
    tokens: int = 0
    batch: int = 8
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    others: bool = False
    threads: int = 2
    depth: int = 0
    width: int = 0

    def words(self) -> str:
        shape = [f"{self.tokens} tokens"] if self.tokens else []
        shape += [f"depth {self.depth}"] if self.depth else []
        shape += [f"width {self.width}"] if self.width else []
        where = f"batch {self.batch}, {self.dtype}, {self.device}"
        return ", ".join([self.model, *shape, where, *["compiled"] * self.compile])


def _made(case: Case) -> tuple[Any, Tensor]:
    """A model that asks for no gradient of its parameters, and its input."""
    torch.manual_seed(0)
    if case.model == TORCHVISION:
        import torchvision

        model: Any = torchvision.models.vit_b_16()
        side = 224
    else:
        sizes: dict[str, Any] = {}
        plain: Any = timm.create_model(case.model, num_classes=0)
        side = plain.pretrained_cfg["input_size"][-1]
        if case.tokens:
            side = sizes["img_size"] = plain.patch_embed.patch_size[0] * math.isqrt(case.tokens)
        sizes |= {"depth": case.depth} if case.depth else {}
        sizes |= {"embed_dim": case.width, "num_heads": case.width // 64} if case.width else {}
        model = timm.create_model(case.model, **sizes)
    model = model.eval().requires_grad_(False).to(case.device, getattr(torch, case.dtype))
    x = torch.randn(case.batch, 3, side, side).to(case.device, getattr(torch, case.dtype))
    return model, x


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """One forward and backward with respect to the input."""
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)


def forward(model: nn.Module, x: Tensor) -> None:
    """One forward without a graph."""
    with torch.no_grad():
        model(x)


def _candidates(case: Case) -> dict[str, Callable[[], None]]:
    model, x = _made(case)
    balanced: Any = fgt.balance(model, x)
    if case.compile:
        model, balanced = torch.compile(model), torch.compile(balanced, fullgraph=True)
    runs: dict[str, Callable[[], None]] = {
        "forward": lambda: forward(model, x),
        "plain": lambda: gradient(model, x),
        "balanced": lambda: gradient(balanced, x),
    }
    if case.others:
        runs |= _others(case, model, x)
    return runs


def _others(case: Case, model: nn.Module, x: Tensor) -> dict[str, Callable[[], None]]:
    """What other libraries offer for the same model, as far as they are installed."""
    import captum.attr

    runs: dict[str, Callable[[], None]] = {
        "captum, input x gradient": lambda: captum.attr.InputXGradient(model).attribute(
            x, target=0
        ),
        "captum, integrated gradients (8)": lambda: captum.attr.IntegratedGradients(
            model
        ).attribute(x, target=0, n_steps=8, internal_batch_size=x.shape[0]),
    }
    if case.model == TORCHVISION:
        rules = _lxt_rules()

        def lxt() -> None:
            with _patched(rules):
                gradient(model, x)

        runs["LXT"] = lxt
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if sum(isinstance(m, nn.Conv2d) for m in layers) > len(layers) / 2 and find_spec("zennit"):
        from zennit.composites import EpsilonPlusFlat

        def zennit() -> None:
            with EpsilonPlusFlat().context(model) as modified:
                gradient(modified, x)

        runs["zennit, epsilon-plus-flat"] = zennit
    return runs


def _lxt_rules() -> Any:
    """LXT's rules for torchvision's ViT alone: the rest of it wants another transformers."""
    found = find_spec("lxt")
    assert found is not None and found.submodule_search_locations is not None
    folder = Path(found.submodule_search_locations[0])
    for name in ("lxt.efficient", "lxt.efficient.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    return importlib.import_module("lxt.efficient.models.vit_torch").cp_LRP


@contextmanager
def _patched(rules: dict[Any, Callable[[Any], bool]]) -> Iterator[None]:
    """LXT writes its rules into torch's own classes: for the time of one run."""
    before = {kind: kind.forward for kind in rules}
    try:
        for kind, patch in rules.items():
            patch(kind)
        yield
    finally:
        for kind, function in before.items():
            kind.forward = function


# --------------------------------------------------------------------------- measuring


def seconds(run: Callable[[], None], cuda: bool) -> float:
    """Wall time of one call."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], None], cuda: bool) -> int:
    """Most bytes of tensors alive at once beyond those alive before the call."""
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    every: list[Any] = profile.profiler.kineto_results.events()
    alive = peak = 0
    for event in sorted((e for e in every if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measured(case: Case, rounds: int = 12) -> dict[str, Any]:
    """Ratios of medians over `rounds` in which the candidates take turns."""
    torch.set_num_threads(case.threads)
    cuda = case.device.startswith("cuda")
    runs = _candidates(case)
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, cuda))
    memory = {name: peak_bytes(run, cuda) for name, run in runs.items()}
    median = {n: statistics.median(t) for n, t in times.items()}
    to_forward = {n: round(t / median["forward"], 3) for n, t in median.items()}
    machine = torch.cuda.get_device_name() if cuda else f"{_processor()}, {case.threads} threads"
    return {
        "case": case.words(),
        "machine": machine,
        "torch": torch.__version__,
        "rounds": rounds,
        "forward_seconds": round(median["forward"], 4),
        "balanced_to_forward": to_forward["balanced"],
        "plain_to_forward": to_forward["plain"],
        "balanced_to_plain": round(median["balanced"] / median["plain"], 3),
        "of_minima": round(min(times["balanced"]) / min(times["plain"]), 3),
        "peak_memory_balanced_to_plain": round(memory["balanced"] / memory["plain"], 3),
        "to_forward": to_forward,
        "peak_mebibytes": {n: round(b / 2**20, 1) for n, b in memory.items()},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


# --------------------------------------------------------------------------- many cases


def grid(name: str) -> list[Case]:
    """The cases of a named list: over the batch, the tokens, depth and width, and other tools."""
    cuda = name.startswith("gpu")
    base = Case(device="cuda" if cuda else "cpu", dtype="bfloat16" if cuda else "float32")
    if name == "ci":
        return [replace(base, model="vit_tiny_patch16_224", batch=4, tokens=n) for n in (196, 1024)]
    batches = (1, 8, 64) if cuda else (1, 8)
    tokens = {196: 64, 1024: 16, 2304: 8, 4096: 4} if cuda else {1024: 2, 4096: 1}
    cases = [replace(base, batch=n) for n in batches]
    deep = {} if cuda else {4096: 2}  # a minute a gradient, else
    cases += [replace(base, tokens=n, batch=b, depth=deep.get(n, 0)) for n, b in tokens.items()]
    cases += [replace(base, depth=n) for n in (3, 6)] + [replace(base, width=n) for n in (192, 384)]
    cases += [replace(base, model=m, others=True) for m in (TORCHVISION, "resnet18")]
    if cuda:
        cases += [replace(base, dtype="float32"), *(replace(c, compile=True) for c in cases[:7])]
    return cases


KEYS = (
    "case",
    "forward_seconds",
    "plain_to_forward",
    "balanced_to_forward",
    "balanced_to_plain",
    "peak_memory_balanced_to_plain",
)


def _written(rows: list[dict[str, Any]], name: str, command: str) -> None:
    stem = RESULTS / f"speed-{name}"
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    columns = [
        "plain / forward",
        "balanced / forward",
        "balanced / plain",
        "memory",
        "others / forward",
    ]
    lines = [
        f"# What a balanced gradient costs ({rows[0]['machine']}, torch {rows[0]['torch']})",
        "",
        f"`{command}`; medians of interleaved runs; memory: the peak against the plain gradient's.",
        "",
        f"| case | forward, s | {' | '.join(columns)} |",
        f"|---|---:|{'---:|' * len(columns)}",
    ]
    for row in rows:
        others = {
            n: r for n, r in row["to_forward"].items() if n not in ("forward", "plain", "balanced")
        }
        cells = [row[key] for key in KEYS] + ["; ".join(f"{n} {r}" for n, r in others.items())]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    stem.with_suffix(".md").write_text("\n".join([*lines, ""]))
    _drawn(rows, stem.with_suffix(".png"))


def _drawn(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory of a balanced gradient, as parts of the plain one's."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.42 * len(rows)), layout="constrained")
    places = range(len(rows))
    for key, name, colour, shift in (
        ("balanced_to_plain", "time", "#0072b2", 0.2),
        ("peak_memory_balanced_to_plain", "peak memory", "#e69f00", -0.2),
    ):
        bars = axes.barh([p - shift for p in places], [r[key] for r in rows], 0.38, color=colour)
        bars.set_label(name)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="#57606a", linewidth=1)
    axes.set_yticks(places, [r["case"] for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"balanced gradient / plain gradient ({rows[0]['machine']})")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _grown(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[str]:
    """What a ratio has grown to, where that is by more than a tenth."""
    before = {row["case"]: row for row in kept}
    said = []
    for row in rows:
        for key in ("balanced_to_plain", "peak_memory_balanced_to_plain"):
            old = before.get(row["case"], {}).get(key)
            if old is not None and row[key] > MORE * old:
                said.append(f"{row['case']}: {key} {old} -> {row[key]}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=VIT)
    for option, kind, default in (
        ("--tokens", int, 0), ("--batch", int, 8), ("--dtype", str, "float32"),
        ("--device", str, "cpu"), ("--threads", int, 2), ("--depth", int, 0), ("--width", int, 0),
    ):  # fmt: skip
        parser.add_argument(option, type=kind, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--grid", choices=["cpu", "gpu", "ci"])
    parser.add_argument("--save")
    parser.add_argument("--against", type=Path)
    given = vars(parser.parse_args())
    rounds, save, named = given.pop("rounds"), given.pop("save"), given.pop("grid")
    against = given.pop("against")
    cases = grid(named) if named else [Case(**given)]
    rows = []
    with progress("speed", 0) as tick:
        for done, case in enumerate(cases):
            tick(case.words(), done, len(cases))
            if not named:
                rows.append(measured(case, rounds))
            else:  # what one leaves behind in the allocator is not the next one's
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(measured, (case, rounds)))
            print(json.dumps(rows[-1], indent=None if named else 1), flush=True)
    if save:
        words = f" --grid {named}" if named else ""
        _written(rows, save, f"python -m experiments.speed{words} --save {save}")
    grown = _grown(rows, json.loads(against.read_text())) if against else []
    for line in grown:
        print(f"costs more than it did: {line}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
