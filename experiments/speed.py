"""What a balanced gradient costs, against the plain forward and the plain gradient.

    python experiments/speed.py [--model vit_base_patch16_224] [--batch 8] [--rounds 12]
                                [--device cuda] [--dtype bfloat16] [--save NAME]

The candidates take turns in one process; what is printed are ratios of medians (and of minima).
Gradients are with respect to the input; parameters ask for none, as in attribution. `--save NAME`
writes experiments/results/speed-NAME.json with the machine named.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import fullgrad_theory as fgt

RESULTS = Path(__file__).parent / "results"


def gradient(model: torch.nn.Module, x: torch.Tensor) -> None:
    """One forward and backward with respect to the input."""
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)


def forward(model: torch.nn.Module, x: torch.Tensor) -> None:
    """One forward without a graph."""
    with torch.no_grad():
        model(x)


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
    alive = peak = 0
    for event in _allocations(profile):
        alive += event
        peak = max(peak, alive)
    return peak


def _allocations(profile: torch.profiler.profile) -> list[int]:
    """Signed allocation sizes in order of time."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    every: list[Any] = profile.profiler.kineto_results.events()
    events = [e for e in every if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cuda = options.device.startswith("cuda")
    dtype = getattr(torch, options.dtype)
    model: Any = timm.create_model(options.model).eval().requires_grad_(False)
    model = model.to(options.device, dtype)
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(options.batch, *size).to(options.device, dtype)
    balanced = fgt.balance(model, x)
    runs = {
        "forward": lambda: forward(model, x),
        "plain": lambda: gradient(model, x),
        "balanced": lambda: gradient(balanced, x),
    }
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, cuda))
    memory = {name: peak_bytes(run, cuda) for name, run in runs.items()}
    median = {n: statistics.median(t) for n, t in times.items()}
    least = {n: min(t) for n, t in times.items()}
    machine = torch.cuda.get_device_name() if cuda else f"{_processor()}, {options.threads} threads"
    row = {
        "machine": machine,
        "torch": torch.__version__,
        "model": options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "forward_seconds": round(median["forward"], 4),
        "balanced_to_forward": round(median["balanced"] / median["forward"], 3),
        "plain_to_forward": round(median["plain"] / median["forward"], 3),
        "balanced_to_plain": round(median["balanced"] / median["plain"], 3),
        "balanced_to_forward_of_minima": round(least["balanced"] / least["forward"], 3),
        "balanced_to_plain_of_minima": round(least["balanced"] / least["plain"], 3),
        "peak_memory_balanced_to_plain": round(memory["balanced"] / memory["plain"], 3),
        "peak_mebibytes": {n: round(b / 2**20, 1) for n, b in memory.items()},
    }
    print(json.dumps(row, indent=1))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"speed-{options.save}.json").write_text(json.dumps(row, indent=1) + "\n")


def _processor() -> str:
    names = (
        [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        if (Path("/proc/cpuinfo").exists())
        else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
