"""Why a model is not traced: a table from what is seen in a failure to its cause and the way out.

A cause is named where it is seen, and only there: what no row knows is said to be unknown.
"""

from __future__ import annotations

import dis
import linecache
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.utils.rnn import PackedSequence

from .sources import first_line, frames_of, is_written_outside, said


@dataclass(frozen=True)
class Failure:
    """What was raised while a module was exported."""

    error: BaseException
    module: nn.Module

    @property
    def text(self) -> str:
        return said(self.error)

    @property
    def frames(self) -> list[FrameType]:
        return [frame for frame, _, _ in frames_of(self.error)]

    @property
    def data_dependent(self) -> bool:
        """Whether torch was asked for something that only values tell."""
        return isinstance(self.error, GuardOnDataDependentSymNode)

    @property
    def code(self) -> str:
        """The line of the user's code that failed, in backticks; "" where it is not known."""
        place = self._place()
        if place is None:
            return ""
        frame, number, _ = place
        text = linecache.getline(frame.f_code.co_filename, number, frame.f_globals).strip()
        return f" (`{text}`)" if text and len(text) <= 80 else ""

    @property
    def instruction(self) -> str:
        """What Python was about to do in the innermost line of the user's code."""
        place = self._place()
        if place is None:
            return ""
        frame, _, last = place
        return next((i.opname for i in dis.get_instructions(frame.f_code) if i.offset == last), "")

    def _place(self) -> tuple[FrameType, int, int] | None:
        steps = [s for s in frames_of(self.error) if is_written_outside(s[0].f_code.co_filename)]
        return steps[-1] if steps else None

    def passes(self, *functions: str) -> bool:
        """Whether a function of that name was being run."""
        return any(frame.f_code.co_name in functions for frame in self.frames)


@dataclass(frozen=True)
class Cause:
    """A row: what is `seen` (something true), the cause in words, and the way out.

    `{found}` in the words is what was seen.
    """

    seen: Callable[[Failure], Any]
    words: str
    way_out: str

    def told(self, found: Any) -> str:
        """The cause and the way out as one sentence."""
        return f"{self.words}; {self.way_out}".replace("{found}", str(found))


def why(error: BaseException, module: nn.Module) -> str:
    """Why torch.export failed, and the way out; torch's own first line where nobody knows."""
    failure = Failure(error, module)
    for cause in (*_HELD, *_SEEN):
        found = cause.seen(failure)
        if found:
            return cause.told(found)
    return (
        f"the cause is none that is known here, torch says {first_line(error)}; trace the parts of "
        "the model one by one to find the one that it refuses"
    )


def never_traced(module: nn.Module) -> str:
    """Why a module cannot be traced whatever its inputs, and the way out; "" where it may be.

    Told before anything runs: an export of such a module leaves it changed.
    """
    nothing = Failure(RuntimeError(), module)
    found = ((cause, cause.seen(nothing)) for cause in _HELD)
    return next((cause.told(seen) for cause, seen in found if seen), "")


# --------------------------------------------------------------------------- what a module holds


def _holding(test: Callable[[nn.Module], bool]) -> Callable[[Failure], str]:
    """The first module that passes a test, as `'LazyLinear (head)'`."""

    def seen(failure: Failure) -> str:
        held = ((p, m) for p, m in failure.module.named_modules() if test(m))
        return next((f"{type(m).__name__}{f' ({p})' if p else ''}" for p, m in held), "")

    return seen


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _is_from(value: object, *packages: str) -> bool:
    """Whether a class, or one that it is derived from, is of these packages."""
    kinds = type(value).__mro__
    return any(f"{kind.__module__}.".startswith(packages) for kind in kinds)


def _is_lazy(module: nn.Module) -> bool:
    return any(torch.nn.parameter.is_lazy(t) for t in _own_tensors(module))


def _is_sharded(module: nn.Module) -> bool:
    tensors = _own_tensors(module)
    return _is_from(module, "torch.distributed.fsdp.") or any(
        _is_from(t, "torch.distributed.") for t in tensors
    )


def _is_quantised(module: nn.Module) -> bool:
    packed = _is_from(module, "torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
    foreign = _is_from(module, "bitsandbytes.", "auto_gptq.", "gptqmodel.", "awq.")
    return packed or foreign or any(_is_from(t, "torchao.") for t in _own_tensors(module))


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


_HELD = (
    Cause(
        _holding(_is_lazy),
        "its lazy module {found} has no parameters before its first call",
        "call the model once on inputs of this shape (a dry run), then pass it",
    ),
    Cause(
        _holding(lambda m: isinstance(m, nn.parallel.DistributedDataParallel)),
        "it is, or holds, a {found}, which talks to other processes",
        "pass the module that it wraps, its .module",
    ),
    Cause(
        _holding(_is_sharded),
        "the parameters of {found} are shards of tensors that lie in several processes (FSDP, or "
        "tensor parallelism)",
        "load the full state dict into a plain model, and pass that",
    ),
)
"""what no export survives"""


# --------------------------------------------------------------------------- what is seen to fail

_TAKES_A_BRANCH = ("JUMP", "UNARY_NOT", "TO_BOOL", "CONTAINS_OP")
_GOES_ON = ("GET_ITER", "FOR_ITER", "UNPACK_SEQUENCE", "UNPACK_EX")


_BATCHED = 'call model.set_experts_implementation("batched_mm") first'


def other_experts(model: object, paths: Collection[str]) -> str:
    """How a mixture of experts of transformers is run so that it can be judged; "" where no module
    at these paths is one of its experts, or the model has no choice."""
    inside = any("experts" in path.split(".") for path in paths)
    modules = model.modules() if inside and isinstance(model, nn.Module) else ()
    offered = any(hasattr(module, "set_experts_implementation") for module in modules)
    return _BATCHED if offered else ""


def _is_in_experts(failure: Failure) -> bool:
    """Whether experts were being run, each on as many tokens as values send to it."""
    paths = {id(m): path for path, m in failure.module.named_modules()}
    run = [paths.get(id(frame.f_locals.get("self")), "") for frame in failure.frames]
    return failure.data_dependent and bool(other_experts(failure.module, run))


def _branches(failure: Failure) -> str:
    truth = re.search(r"expression Eq\(u\d+, 1\)", failure.text)
    jumps = any(part in failure.instruction for part in _TAKES_A_BRANCH)
    sizes = re.search(r"\(Size-like symbols: u", failure.text)
    branch = failure.data_dependent and (jumps or (truth and not sizes))
    return (failure.code or " here") if branch else ""


def _loops(failure: Failure) -> str:
    loop = failure.data_dependent and failure.instruction.startswith(_GOES_ON)
    return (failure.code or " here") if loop else ""


def _takes_a_number(failure: Failure) -> str:
    if type(failure.error).__name__ == "DataDependentOutputException":
        return failure.code or " here"
    number = "zuf" in failure.text or "Could not extract specialized" in failure.text
    taken = failure.data_dependent and number
    return (failure.code or " here") if taken else ""


def _packs(failure: Failure) -> bool:
    if failure.passes("pack_padded_sequence", "pad_packed_sequence", "pack_sequence"):
        return True
    return any(isinstance(v, PackedSequence) for f in failure.frames for v in f.f_locals.values())


_OPERATOR = re.compile(r"CustomOpDef\(([^)]+)\)|([a-zA-Z_]\w*::\w+)|\b([a-zA-Z_]\w*\.\w+)\.\w+")


def _no_fake_kernel(failure: Failure) -> str:
    name = type(failure.error).__name__
    unsupported = name in ("UnsupportedOperatorException", "DynamicOutputShapeException")
    if not unsupported and "no fake impl" not in failure.text:
        return ""
    found = _OPERATOR.search(failure.text)
    return next(filter(None, found.groups()), "") if found else ""


def _own_operator(failure: Failure) -> str:
    name = _no_fake_kernel(failure).replace(".", "::", 1)
    return "" if name.startswith("aten::") else name


def _contains(*parts: str) -> Callable[[Failure], bool]:
    return lambda failure: any(part in failure.text for part in parts)


_SEEN = (
    Cause(
        lambda f: f.passes("_detect_is_causal_mask"),
        "torch.nn's transformer looks at the values of a mask to see whether it is causal",
        "say so in the call: tgt_is_causal=True (src_is_causal, memory_is_causal, is_causal "
        "alike), or False where the mask is another one",
    ),
    Cause(
        _is_in_experts,
        "its mixture of experts runs each expert on as many tokens as are sent to it",
        _BATCHED,
    ),
    Cause(
        _branches,
        "it has Python control flow that depends on a tensor's values{found}, and one graph holds "
        "one way",
        "make the branch a torch.where, or trace the layers on either side of it",
    ),
    Cause(
        _loops,
        "it has a loop whose length depends on a tensor's values{found}, and one graph holds one",
        "loop over a fixed range and mask, or trace the layers on either side of it",
    ),
    Cause(
        _takes_a_number,
        "a tensor's value becomes a Python number{found}, which a trace does not know",
        "keep it a tensor: torch's functions instead of float(), int(), math and slices by it",
    ),
    Cause(
        lambda f: f.data_dependent and (f.code or " here"),
        "a size{found} depends on a tensor's values, and what is asked of it here holds for some "
        "of them alone",
        "keep the full size and mask what is left out",
    ),
    Cause(
        _packs,
        "it packs sequences, whose lengths only values tell",
        "pass padded sequences to the RNN, and mask its result",
    ),
    Cause(
        _contains(".numpy() is not supported", "Can't call numpy()", "to numpy"),
        "it takes values out of torch into numpy",
        "write that step with torch's functions, or compute it before and pass it in",
    ),
    Cause(
        _contains("__format__", "__round__", "__index__"),
        "it uses a tensor as a Python number, to print, format or round it",
        "take that line out, or keep it a tensor",
    ),
    Cause(
        _own_operator,
        "operator {found} has no fake kernel, by which a trace knows the shape of its result",
        'register one: @torch.library.register_fake("{found}")',
    ),
    Cause(
        _no_fake_kernel,
        "torch cannot trace {found}",
        "write that step with other, dense operations, or trace the layers on either side of it",
    ),
    Cause(
        _contains("Cannot access data pointer", "data pointer of Tensor"),
        "it reads a tensor's memory itself (data_ptr(), a copy of a module, a kernel of its own), "
        "which a trace does not have",
        "take that out of forward(), or make the kernel a torch.library.custom_op with a fake one",
    ),
    Cause(
        _contains("fake tensor in the exported program constant"),
        "its forward() puts a tensor that it computed into a parameter, or keeps it elsewhere",
        "compute it in __init__(), or hand it on as an argument",
    ),
    Cause(
        _holding(lambda m: isinstance(m, nn.DataParallel)),
        "it is, or holds, a {found}, which talks to other devices",
        "pass the module that it wraps, its .module",
    ),
    Cause(
        _holding(_is_quantised),
        "it holds a quantised module, {found}, whose weights are no floating-point tensors",
        "pass the model as it was before it was quantised",
    ),
    Cause(
        _holding(_is_scripted),
        "it holds a scripted module, {found}, whose code Python does not run",
        "put the module there that it was made from",
    ),
    Cause(
        _contains("torch.compiler.disable"),
        "a part of its code is marked with torch.compiler.disable",
        "take the mark off, or trace the layers on either side of it",
    ),
    Cause(
        _contains("different devices", "not on the expected device"),
        "it holds tensors on several devices",
        "move all of it to one: model.to(device), and what forward() makes by itself too",
    ),
)
