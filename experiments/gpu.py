"""Everything that only a GPU can show, in ten minutes.

    python -m experiments.gpu [--out experiments/results] [--models 7] [--only WORD ...]

Forwards bit for bit in three dtypes, completeness with TF32 on and off, autocast, compile, two
processes, the Triton kernels against their slow forms, and what a balanced gradient costs there.
Writes gpu.json and gpu.md, the card named; the exit code is 1 where a line does not hold. Without a
GPU it says so and ends with 2.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import fullgrad_theory as fgt
from experiments.speed import Case, measured
from fullgrad_theory.bars import progress
from fullgrad_theory.operators import attention_form, fused, gates

RESULTS = Path(__file__).parent / "results"
MODELS = (
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "eva02_tiny_patch14_224",
    "resnet18",
    "gmixer_24_224",
    "beit_base_patch16_224",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Line:
    """What was seen: a figure and its bar ("" where there is none), and whether it holds."""

    check: str
    of: str
    seen: str
    bar: str
    holds: bool


def _model(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval().requires_grad_(False)
    size = model.pretrained_cfg["input_size"]
    return model.to("cuda", dtype), torch.randn(2, *size, device="cuda").to(dtype)


def _gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = model(leaf)
    (g,) = torch.autograd.grad(out[:, 0].float().sum(), leaf)
    return out.detach(), g


def _apart(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|, in float64."""
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --------------------------------------------------------------------------- the checks


def forwards(names: tuple[str, ...]) -> Iterator[Line]:
    """The balanced forward has the model's bits, with a graph and without, TF32 on and off."""
    for name in names:
        for dtype in DTYPES:
            model, x = _model(name, dtype)
            balanced = fgt.balance(model, x)
            same = []
            for on in (False, True):
                with _tf32(on):
                    theirs = model(x.clone().requires_grad_())
                    same.append(torch.equal(balanced(x.clone().requires_grad_()), theirs))
                    with torch.no_grad():
                        same.append(torch.equal(balanced(x), model(x)))
                        same.append(torch.equal(balanced(x[:1]), model(x[:1])))
            words = f"{sum(same)} of {len(same)} equal"
            yield Line("forward, bit for bit", f"{name} {dtype}", words, "all", all(same))


def completeness(names: tuple[str, ...]) -> Iterator[Line]:
    """The verdict in float64 on the GPU; and what float32 leaves of it, TF32 on and off."""
    for name in names:
        model, x = _model(name, torch.float32)
        report = fgt.check_completeness(model, x, policy="libra")
        error = report.error if report.error is not None else math.nan
        yield Line(
            "completeness in float64", name, f"{report.complete}, error {error:.1e}",
            "complete, 1e-9", report.complete is True and error < 1e-9,
        )  # fmt: skip
        balanced = fgt.balance(model, x)
        for on, bar in ((False, 1e-4), (True, 3e-2)):
            with _tf32(on):
                parts = fgt.fullgrad(balanced, x, target=0)
            apart = _apart(parts.total, parts.output)
            said = f"{name}, TF32 {'on' if on else 'off'}"
            yield Line("completeness in float32", said, f"{apart:.1e}", f"{bar:g}", apart < bar)


def gradients(names: tuple[str, ...]) -> Iterator[Line]:
    """The balanced gradient against the CPU's in float64, by dtype and under autocast."""
    bars = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
    for name in names:
        model, x = _model(name, torch.float32)
        exact = fgt.balance(model.cpu().double(), x.cpu().double())
        _, expected = _gradient(exact, x.cpu().double())
        with _tf32(False):
            for dtype, bar in bars.items():
                model, x = _model(name, dtype)
                _, g = _gradient(fgt.balance(model, x), x)
                apart = _apart(g.cpu(), expected)
                seen = f"{apart:.1e}"
                yield Line("gradient", f"{name} {dtype}", seen, f"{bar:g}", apart < bar)
            model, x = _model(name, torch.float32)
            balanced = fgt.balance(model, x)
            with torch.autocast("cuda", torch.bfloat16):
                ours, g = _gradient(balanced, x)
                theirs, _ = _gradient(model, x)
            apart, same = _apart(g.cpu(), expected), torch.equal(ours, theirs)
            seen = f"{apart:.1e}, bits {'equal' if same else 'DIFFER'}"
            yield Line("gradient under autocast", name, seen, "0.2, equal", same and apart < 0.2)


def compiled(names: tuple[str, ...]) -> Iterator[Line]:
    """torch.compile takes the balanced model whole, and its gradient is the eager one."""
    for name in names:
        model, x = _model(name, torch.float32)
        balanced = fgt.balance(model, x)
        with _tf32(False):
            _, expected = _gradient(balanced, x)
            _, g = _gradient(torch.compile(balanced, fullgraph=True), x)
        apart = _apart(g, expected)
        yield Line("compiled, one graph", name, f"{apart:.1e}", "1e-4", apart < 1e-4)
        torch._dynamo.reset()


def _one_process(rank: int, queue: Any) -> None:
    model, x = _model("vit_tiny_patch16_224", torch.float32)
    with _tf32(False):
        _, g = _gradient(fgt.balance(model, x), x)
    queue.put((rank, g.cpu().numpy()))


def processes(names: tuple[str, ...]) -> Iterator[Line]:
    """Two processes beside each other have one gradient."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_one_process, args=(rank, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(queue.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    apart = _apart(torch.from_numpy(found[0]), torch.from_numpy(found[1]))
    yield Line("two processes", "vit_tiny_patch16_224", f"{apart:.1e}", "1e-5", apart < 1e-5)


def _drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def kernels(names: tuple[str, ...]) -> Iterator[Line]:
    """The Triton kernels against their slow forms in float64, on random shapes and masks."""
    torch.manual_seed(0)
    bars = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
    for dtype, bar in bars.items():
        worst, shape = 0.0, ""
        for case in range(12):  # each shape is compiled once more
            size = lambda low, high: int(torch.randint(low, high, ()))  # noqa: E731
            batch, heads = size(1, 4), 2 ** size(0, 3)
            shared = min(2 ** size(0, 2), heads)
            width, depth = ((64, 64), (40, 24), (128, 96), (256, 200))[case // 3]
            length, source = size(1, 400), size(1, 400)
            draw = partial(_drawn, dtype)
            q = draw(batch, length, heads, width).transpose(1, 2)
            k = draw(batch, heads // shared, source, width)
            g = draw(batch, heads, length, depth)
            kind = ("none", "causal", "bool", "float")[case % 4]
            mask = None
            if kind == "bool":
                mask = torch.rand(batch, 1, length, source, device="cuda") > 0.3
                mask[:, :, 0] = False
            if kind == "float":
                mask = draw(1, heads, length, source)
            causal, scale = kind == "causal", width**-0.5
            assert fused.takes(q, k, mask, g)
            ours = fused.transposed_attention(q, k, mask, g, causal, scale)
            wide = mask.double() if mask is not None and mask.is_floating_point() else mask
            slow = attention_form._transposed_attention(
                q.double(), k.double(), wide, g.double(), causal, scale
            )
            apart = _apart(ours, slow)
            if not apart <= worst:
                worst, shape = apart, f"{kind} {tuple(q.shape)} {tuple(k.shape)} {depth}"
        said = f"attention {dtype}, 12 shapes"
        yield Line("kernel", said, f"{worst:.1e} ({shape})", f"{bar:g}", worst < bar)
        u, g = (torch.randn(1000, 1001, device="cuda").to(dtype) for _ in range(2))
        for tanh in (False, True):
            ours = fused.gelu_product(g, 3 * u, tanh)
            slow = g.double() * gates.gelu((3 * u).double(), "tanh" if tanh else "none")
            apart, bar_of = _apart(ours, slow), bar / 3
            said = f"gelu{' tanh' if tanh else ''} {dtype}"
            yield Line("kernel", said, f"{apart:.1e}", f"{bar_of:.1g}", apart < bar_of)
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v.requires_grad_())
    kept = attention_form._log_sum_exp(out, q, k, 1 / 8)
    own = (q.double() @ k.double().mT / 8).logsumexp(-1)
    apart = math.nan if kept is None else _apart(kept, own)
    yield Line(
        "log-sum-exp", f"kept by {out.grad_fn.name() if out.grad_fn else None}",  # type: ignore[attr-defined]
        f"{apart:.1e}", "1e-5", apart < 1e-5,
    )  # fmt: skip


def costs(names: tuple[str, ...]) -> Iterator[Line]:
    """What a gradient costs, against the plain one: at most 0.8 from 1,024 tokens on."""
    for tokens, batch in ((1024, 16), (2304, 8), (4096, 4)):
        for compile in (False, True) if tokens == 1024 else (False,):
            case = Case("vit_base_patch16_224", tokens, batch, "bfloat16", "cuda", compile)
            row = measured(case, rounds=10)
            ratio = row["balanced_to_plain"]
            said = f"ViT-B bf16, {tokens} tokens x {batch}{', compiled' if compile else ''}"
            seen = (
                f"{ratio:.3f} (forward {row['forward_seconds'] * 1e3:.1f} ms, plain "
                f"{row['plain_to_forward']:.2f}, balanced {row['balanced_to_forward']:.2f}, "
                f"memory {row['peak_memory_balanced_to_plain']:.2f})"
            )
            bar = 1.0 if compile else 0.8
            yield Line("balanced / plain", said, seen, f"{bar:g}", ratio <= bar)


CHECKS: dict[str, Callable[[tuple[str, ...]], Iterator[Line]]] = {
    "kernels": kernels,
    "costs": costs,
    "forwards": forwards,
    "gradients": gradients,
    "completeness": completeness,
    "processes": processes,
    "compiled": compiled,
}


def table(lines: list[Line], machine: str) -> str:
    """In Markdown."""
    head = [
        f"# {len(lines)} lines on a GPU, {sum(line.holds for line in lines)} hold",
        "",
        f"`python -m experiments.gpu`, {machine}",
        "",
        "| check | of | seen | bar | holds |",
        "|---|---|---|---|---|",
    ]
    rows = (
        f"| {line.check} | {line.of} | {line.seen} | {line.bar} | {'yes' if line.holds else 'NO'} |"
        for line in lines
    )
    return "\n".join([*head, *rows, ""])


def _lines(check: str, names: tuple[str, ...]) -> list[Line]:
    """What one check sees; what it raises is a line that does not hold."""
    warnings.filterwarnings("ignore")
    seen: list[Line] = []
    try:
        seen.extend(CHECKS[check](names))
    except Exception as error:  # noqa: BLE001  the other checks are still of interest
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"[:200]
        seen.append(Line(check, "raised", said.replace("\n", " "), "", False))
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", type=int, default=len(MODELS), help="how many of them")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was checked", file=sys.stderr)
        return 2
    names = MODELS[: options.models]
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines: list[Line] = []
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(seen: list[Line]) -> None:
        lines.extend(seen)
        for line in seen:
            words = f"{line.check}: {line.of}: {line.seen}"
            print(f"{'ok' if line.holds else 'NO':3} {words}", flush=True)
        data = {"machine": machine, "lines": [asdict(line) for line in lines]}
        (options.out / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
        (options.out / "gpu.md").write_text(table(lines, machine))

    # what is timed has the GPU to itself, the rest shares it
    context = multiprocessing.get_context("spawn")
    with progress("checks", 0) as tick:
        if "costs" in options.only:
            keep(_lines("costs", names))
        others = [check for check in options.only if check != "costs"]
        with ProcessPoolExecutor(len(CHECKS), mp_context=context) as pool:
            waiting = [pool.submit(_lines, check, names) for check in others]
            for done, future in enumerate(as_completed(waiting)):
                tick("checks", done, len(others))
                keep(future.result())
    failed = [line for line in lines if not line.holds]
    print(f"{len(lines)} lines, {len(failed)} do not hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
