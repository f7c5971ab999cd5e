"""What a check says to people: problems, notes, reasons and errors. `where` is a node described."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import torch

from ..graph.sources import first_line, raised_at

# --------------------------------------------------------------------------- the structure

NO_VALUES = "meta tensors have no values: the verdict is structural"


def closed_batch(why: str) -> str:
    return f"the graph is for inputs of this very size, not of any batch size: {why}"


def no_plan(error: Exception) -> str:
    said = str(error)
    return said if said.startswith("no honest plan") else f"no honest plan: {said}"


def no_mend(error: Exception) -> str:
    return f"libra has no plan for this graph: {error}"


def black_box(where: str, note: str) -> str:
    return f"{where} is a black box, {note}"


def contradiction(said: str) -> str:
    return f"its measurement contradicts itself: {said}"


KERNEL_DISAGREES = (
    "the labelling and the kernel give it different degrees: an error of this library, which "
    "should be reported"
)


def not_followed(lemma: str, why: str) -> str:
    return f"{lemma}; measured, not proved: {why}"


def supposed(lemma: str, supposing: Iterable[str]) -> str:
    return f"{lemma}; measured, not proved: {', '.join(supposing)}"


def unreached_output(where: str, constant: bool) -> str:
    what = "is constant" if constant else "carries no gradient"
    return f"the input does not reach output {where}: it {what}"


def probability(where: str, kind: str) -> str:
    return (
        f"the output is a {kind} ({where}): completeness is a statement about logits; check "
        "the model without that head"
    )


def held_input(name: str) -> str:
    return (
        f"input {name!r} is held fixed by the plan, as a gate or a weight is: nothing is "
        "attributed to it"
    )


def beside(judged: Iterable[str], aside: Iterable[str], lost: Iterable[str]) -> str:
    rest = ", ".join([*aside, *lost])
    return (
        f"of what the model returns, {', '.join(judged)} is judged, and not {rest}; "
        "output= (--output on the command line) chooses another"
    )


def held_constant(names: Iterable[str]) -> str:
    return f"held constant: {', '.join(names)}; what they add counts among the biases"


def unreaching_input(name: str) -> str:
    return f"input {name!r} does not reach the output"


# --------------------------------------------------------------------------- node by node

UNCONVERGED = "the integral along its ray from 0 did not converge"
NO_WITNESS = " (no witness at these inputs)"
JUDGED_AS_A_WHOLE = "its backward is modified; judged end to end only"


def unconverged(where: str, error: float) -> str:
    return (
        f"{where}: {UNCONVERGED} (residual {error:.1e}): a kink or a step on the ray; forbid it "
        "with dataclasses.replace(policy, integrate=None), so that something is pruned"
    )


def lemma_missed(where: str, error: float) -> str:
    if isfinite(error):
        missed = f"its lemma says consistent, its backward misses by {error:.1e}"
        return (
            f"{where}: {missed}: where the operation is yours, its backward is not its forward's; "
            "else an error of this library, please report it"
        )
    return (
        f"{where}: its gradient is not finite at these inputs (infinity times zero, as of a square "
        "root at 0), so nothing adds up behind it"
    )


# --------------------------------------------------------------------------- end to end

TAKEN_BACK = (
    "what one operation gets wrong another takes back: the sum comes out right wherever it was "
    "measured, and no rule says that it does elsewhere"
)
ZERO_OUTPUT = "the output is zero even at perturbed parameters: nothing to judge"
ZERO_AT_OWN_PARAMETERS = (
    "the output is zero at the model's own parameters; judged at perturbed ones"
)
UNDETERMINED = (
    "the gradient is not finite (a root of 0, say): infinity times zero is undetermined, and "
    "nothing adds up; clamp the value away from there"
)
UNEXPLAINED = (
    "every node is consistent and the whole is not: an error of this library or a backward that "
    "the trace does not show; please report it"
)
MODIFIED = (
    "the model's own gradient is not that of its traced graph: its backward is modified (an "
    "autograd.Function, a hook, a patch); it was judged as it is, end to end, and the nodes' "
    "verdicts are of the trace"
)
MODIFIED_BEHIND_A_TABLE = (
    "the model's own gradient is not that of its traced graph: its backward is modified (an "
    "autograd.Function, a hook, a patch), and what it sends to the embedding cannot be told from "
    "what it sends to the other uses of that table; pass the embedded values as the input"
)
MODIFIED_ASLEEP = (
    "the model's own backward is modified, and at these inputs no gradient reaches a part of the "
    "model, so that nothing shows what it does there; give inputs at which one does"
)


MODIFIED_ELSEWHERE = (
    "at other inputs and parameters than these, or under a larger cotangent, the model's own "
    "gradient is not that of its traced graph: its backward is modified (an autograd.Function, a "
    "hook that clips, a patch), and only for some values; give inputs at which it is seen"
)


def modified_asleep(where: str) -> str:
    return (
        f"{where}: at these inputs no gradient passes it, or not everywhere, and what the model's "
        "own backward does before it is not what its traced graph does: it is modified there (an "
        "autograd.Function, a hook, a patch), unseen; give inputs at which a gradient passes"
    )


COPY_DIFFERS = (
    "a copy of the model in float64 computes other values than its trace does there: its code asks "
    "for a dtype, or holds what a copy does not, so that it cannot be judged in float64"
)
NOTHING_TO_COMPARE = (
    "the model has neither float inputs nor parameters that its own gradient could be taken by; "
    "pass the module itself, not a function that finds it elsewhere"
)
RANDOM = (
    "two runs of the model on the same inputs have different values: it draws random numbers, "
    "counts its calls or reads a clock, and no verdict holds for both; pass that in as an input"
)


def own_does_not_run(error: BaseException) -> str:
    return (
        f"the model's own backward does not run in float64 ({first_line(error)}), so it could not "
        "be compared with the traced one"
    )


def perturbed_fails(error: Exception) -> str:
    said = str(error).splitlines()[0]
    return f"judged at the model's own parameters and inputs alone; at others near them: {said}"


FAST_PATH = (
    "without gradients the model takes torch's fast path for attention, which rounds differently; "
    "the edited forward is the model's without that path, bit for bit"
)
OWN_NOT_FINITE = (
    "in its own dtype the model's output is not finite at these inputs, so that what is judged in "
    "float64 is not what it computes"
)
FORWARD_DIFFERS = (
    "the traced forward differs from the model's: something in its code is not seen by "
    "torch.export, or this library is in error; a verdict on the trace says nothing of the model"
)


def small_share(share: float) -> str:
    return (
        f"the input gets {share:.1e} of the output, the biases the rest: the sum is right, and the "
        "input's part of it explains next to nothing"
    )


def misses(error: float) -> str:
    return f"end to end the attributed sum misses the output by {error:.2e} of it"


def rounding(parts: float) -> str:
    return (
        f"which is rounding: its parts are {parts:.0e} times the output and cancel, so that too "
        "few digits are left to judge it; choose other inputs"
    )


def layout_fault(where: str) -> str:
    return (
        f"{where}: torch's backward of it gives other numbers where the same cotangent lies in "
        "memory otherwise, as it does here; .contiguous() on its result, or a batch of two, goes "
        "around that fault"
    )


def refused(dtype: torch.dtype, error: Exception) -> str:
    return f"it does not run in {dtype_name(dtype)}: {first_line(error)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------- errors

INFINITE_OUTPUT = "the output is not finite"


def no_copy(model: str, attribute: str, error: BaseException) -> str:
    held = f": it holds {attribute!r}, which refuses" if attribute else ""
    out = "it" if attribute else "what refuses"
    return (
        f"{model} cannot be copied{held} ({first_line(error)}), and it is judged by a copy in "
        f"float64; give its class a __deepcopy__ or a __getstate__ that leaves {out} out"
    )


def infinite_leaf(kind: str, name: str) -> str:
    return (
        f"{kind} {name!r} holds NaN or Inf; completeness is a statement about finite values, so "
        "mend it first (torch.nan_to_num, or load the weights again)"
    )


def infinite_value(where: str) -> str:
    return (
        f"{where} is the first node whose value is not finite; look at what it divides by or takes "
        "the logarithm of at these inputs"
    )


def no_gradient(error: Exception) -> str:
    return f"the model has no gradient: {error}"


def does_not_run(model: str, error: BaseException) -> str:
    place = raised_at(error)
    at = f", at {place}" if place else ""
    return (
        f"{model} does not run in float64 with gradients ({first_line(error)}{at}), which is how "
        "it is judged; numeric=False looks at its structure, and measures nothing"
    )
