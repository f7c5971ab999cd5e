"""torch's own operator and module databases before the checker, against autograd alone.

    pip install expecttest  # which torch's databases import
    python -m experiments.operator_database --samples 2

Every sample in float64 is a tiny model of its float tensors. A verdict is wrong where the report
says complete and what the gradient leaves of the output moves with the input (a bias would not), or
says incomplete and the gradient alone adds up to the output. Nothing but a report or an error of
the library's own may come out. Writes operator_database.md beside its state; goes on where it
stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from experiments.sweep import Case, Sweep
from fullgrad_theory import (
    FullgradError,
    Integrate,
    Secant,
    balance,
    check_completeness,
    derive_rules,
)
from fullgrad_theory.testing.independent import evaluate, literal_divisors

CLOSE = 1e-7


class Called(nn.Module):
    """A call as a function of its float tensors, the rest held."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(arguments)
        self.function = function
        self.places = [i for i, v in enumerate(leaves) if is_float(v)]
        self.held = [None if i in self.places else v for i, v in enumerate(leaves)]
        self.given = tuple(leaves[i].detach().clone() for i in self.places)

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.held)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        made = [v for v in pytree.tree_leaves(self.function(*args, **kwargs)) if is_float(v)]
        return made[0] if len(made) == 1 else tuple(made)


def is_float(value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout is torch.strided
    return dense and (value.is_floating_point() or value.is_complex())


def operators(samples: int) -> Iterator[Case]:
    from torch.testing._internal.common_methods_invocations import op_db

    for entry in op_db:
        if torch.float64 not in entry.supported_dtypes("cpu") or not entry.supports_autograd:
            continue
        name = entry.name + (f".{entry.variant_test_name}" if entry.variant_test_name else "")
        try:
            drawn = list(entry.sample_inputs("cpu", torch.float64, requires_grad=False))
        except Exception:  # noqa: BLE001  a sample that torch itself cannot make
            continue
        step = max(1, len(drawn) // samples)
        for k, sample in enumerate(drawn[::step][:samples]):
            model = Called(entry.op, ((sample.input, *sample.args), sample.kwargs))
            yield f"{name} {k}", model, model.given


def modules(samples: int) -> Iterator[Case]:
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        name = info.module_cls.__name__
        try:
            drawn = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=False, training=False
            )
        except Exception:  # noqa: BLE001
            continue
        step = max(1, len(drawn) // samples)
        for k, sample in enumerate(drawn[::step][:samples]):
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            module = info.module_cls(*args, **kwargs).double().eval()
            forward = sample.forward_input
            if forward is not None:
                model = Called(module, (forward.args, forward.kwargs))
                yield f"nn.{name} {k}", model, model.given


def left(model: Callable[..., Any], given: tuple[Tensor, ...], at: float = 1.0) -> list[float]:
    """What the gradient leaves of <c, f>, for two c, relative, with all inputs times `at`."""
    leaves = [(x * at).requires_grad_() for x in given]
    made = model(*leaves)
    outputs = [v for v in (made if isinstance(made, tuple) else (made,)) if v.requires_grad]
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        c = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, c, allow_unused=True, retain_graph=True)
        pairs = zip(grads, leaves, strict=True)
        through = sum(inner(g, x) for g, x in pairs if g is not None)
        total = sum(inner(a, b) for a, b in zip(c, outputs, strict=True))
        size = sum(float((a * b).abs().sum()) for a, b in zip(c, outputs, strict=True))
        found += [total - through, size]
    return found


def inner(a: Tensor, b: Tensor) -> float:
    return float(torch.real(a.detach().conj() * b.detach()).sum())


def autograd_says(model: Callable[..., Any], given: tuple[Tensor, ...]) -> str:
    """`adds up`; `a constant is left`, the same a little off, as a bias would be; or `misses`."""
    try:
        here, there = left(model, given), left(model, given, 1.0 + 1e-4)
    except Exception:  # noqa: BLE001  torch has no derivative, or no gradient comes out
        return "no gradient"
    rests, sizes = here[::2], here[1::2]
    if max(sizes) < 1e-30:
        return "zero"
    with torch.no_grad():
        made = pytree.tree_leaves(model(*given))
    close = max(CLOSE, *(8 * torch.finfo(v.dtype).eps for v in made if is_float(v)))
    if all(abs(r) <= close * s for r, s in zip(rests, sizes, strict=True)):
        return "adds up"
    same = all(
        abs(r - t) <= 1e-7 * max(abs(r), s)
        for r, t, s in zip(rests, there[::2], sizes, strict=True)
    )
    return "a constant is left" if same else "misses"


def edited_says(model: Any, given: tuple[Tensor, ...]) -> str:
    """The independent verdict on the edited backward: it counts what every leaf contributes."""
    plan = derive_rules(model, given, unknown="measure")
    starts = frozenset(e.node for e in plan.edits if isinstance(e, (Integrate, Secant)))
    module = balance(model, given, plan, unknown="measure").fx
    points = [given, tuple(x * 1.25 for x in given), tuple(x * 0.8 for x in given)]
    try:
        found, tracker = evaluate(module, points, from_zero=starts)
        if divisors := literal_divisors(tracker):
            found, _ = evaluate(module, points, divisors, starts)
    except Exception as error:  # noqa: BLE001  it has no derivative there, or is not finite
        return f"unjudged ({type(error).__name__})"
    # an input that the plan holds fixed is read by nobody, and no fault
    right = all(d is not None and abs(d - 1.0) < CLOSE for d in found.outputs) and not found.wrong
    return "complete" if right or found.flat or found.zero else "misses"


def judged(name: str, model: Any, given: tuple[Tensor, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    row["autograd"] = autograd_says(model, given)
    for policy in ("plain", "libra"):
        try:
            report = check_completeness(
                model.eval(), given, policy=None if policy == "plain" else policy,
                unknown="measure", beside=(),
            )  # fmt: skip
            row[policy] = {True: "complete", False: "incomplete", None: "unknown"}[report.complete]
            head = any("statement about logits" in p for p in report.problems)
            opaque = any(n.verdict.value == "opaque" for n in report.nodes)
            unread = any("does not reach" in p for p in report.problems)
            said = (("head", head), ("opaque", opaque), ("unread input", unread))
            row[f"{policy} because"] = next((word for word, holds in said if holds), "")
        except FullgradError as error:
            row[policy], row[f"{policy} because"] = (
                "refused",
                f"{type(error).__name__}: {error}"[:160],
            )
        except Exception as error:  # noqa: BLE001
            row[policy], row[f"{policy} because"] = (
                "RAISED",
                f"{type(error).__name__}: {error}"[:300],
            )
    if row["libra"] == "complete":
        row["edited"] = edited_says(model.eval(), given)
    return row


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a verdict is not what autograd says."""
    said = row["autograd"]
    plainly = (row["plain"] == "complete" and said == "misses") or (
        row["plain"] == "incomplete" and said == "adds up" and not row["plain because"]
    )
    return plainly or row.get("edited") == "misses"


def table(rows: list[dict[str, Any]], command: str) -> str:
    count = Counter((r["autograd"], r["plain"], r["libra"]) for r in rows)
    lines = [
        f"# {len(rows)} samples of torch's operator and module databases",
        "",
        f"`{command}`, torch {torch.__version__}",
        "",
        "| autograd alone | plain | libra | samples |",
        "|---|---|---|---:|",
        *(f"| {' | '.join(k)} | {n} |" for k, n in sorted(count.items(), key=lambda e: -e[1])),
        "",
    ]
    for title, chosen in (
        ("Verdicts that are not what autograd says", [r for r in rows if is_wrong(r)]),
        ("Raised", [r for r in rows if "RAISED" in (r["plain"], r["libra"])]),
    ):
        lines += [f"## {title}: {len(chosen)}", ""]
        lines += [
            f"- `{r['name']}`: { ({k: v for k, v in r.items() if k != 'name'}) }" for r in chosen
        ]
        lines.append("")
    return "\n".join(lines)


def is_fault(row: dict[str, Any]) -> bool:
    return is_wrong(row) or "RAISED" in (row["plain"], row["libra"])


def cases(samples: int) -> Iterator[Case]:
    """Those with a float tensor to move."""
    return (case for case in (*operators(samples), *modules(samples)) if case[2])


SWEEP = Sweep("operator_database", cases, judged, is_fault, table, samples=2)

if __name__ == "__main__":
    raise SystemExit(SWEEP.main(__doc__))
