"""From a model to its computation graph, by torch.export.

The batch dimension is left open where the model allows it; nothing that an export does stays.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import FullgradError, InputError, TraceError
from .causes import never_traced, why
from .computation import ComputationGraph, holds_tensor, tensor_value
from .door import (
    Inputs,
    Model,
    Names,
    as_module,
    check_arguments,
    held_constant,
    input_form,
    input_names,
    misfit,
    mixes_dtypes,
    name_of,
    own_copy,
    split_inputs,
    tensors_of,
)
from .fakes import fake_mode, fill_fake_values
from .foreign import ours, without_page
from .forms import Form
from .functional import functionalise
from .keeping import alone, eagerly, kept, muted, untouched, without_fast_path
from .leaves import LeafSpec, Leaves
from .normal import drop_assertions, inline_regions, is_effect, mutates, unroll
from .outputs import Selection, Watch
from .passing import leaving_none
from .sources import first_line, is_written_outside, shorten


@ours
@alone()
@leaving_none()
def trace(
    model: Model,
    inputs: Inputs = None,
    *,
    leaves: Collection[LeafSpec] = (),
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> ComputationGraph:
    """The computation graph of a model, a layer or a function, in eval mode.

    `inputs`: a tensor, a tuple of positional arguments or a dict of keywords; left out where the
    model has a `pretrained_cfg`. Works on the meta device. The batch dimension is left open where
    the model allows it. `leaves`: module classes, autograd.Functions and module paths whose calls
    become one node each, backward kept. `output`: a name, a position or a function of what the
    model returns, where not all of it (or its logits) is meant. `constant`: inputs that are held
    fixed, by name; `explain`: those that are not, all others are.
    Raises `TrainingModeError`, `InputError`, `TraceError`, `UnknownNameError`.
    """
    module = as_module(model)
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"{name_of(model)} is a ScriptModule, which torch.export does not take; pass the "
            "module or function it was made from"
        )
    with torch.inference_mode(False):
        args, kwargs = pytree.tree_map_only(Tensor, own_copy(), split_inputs(model, inputs))
    if not any(t.numel() for t in tensors_of(args, kwargs)):
        raise InputError("inputs hold no tensor with elements; pass what the model's forward takes")
    check_arguments(module, model, args, kwargs)
    _look_at(module, model, args, kwargs)
    names = input_names(module, args, kwargs)
    held = held_constant(names, constant, explain)
    kept_whole = Leaves(module, leaves)
    door = Door(module, Watch(name_of(model), output), input_form(model, inputs))
    with muted(), torch.inference_mode(False):
        program, closed = _export(door, model, args, kwargs, kept_whole)
    name = name_of(model)
    with _told_of(module, name):
        unlifted = program.module()
        inline_regions(unlifted)
        kept_whole.write(unlifted)
        unroll(unlifted)
        drop_assertions(unlifted)
        kept_whole.check_writes(any(mutates(n) for n in unlifted.graph.nodes))
        functionalise(unlifted)
        fill_fake_values(unlifted)
    graph = GraphModule(unlifted, unlifted.graph, name)
    graph.eval()
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    model = getattr(model, "_torchdynamo_orig_callable", model)
    reading = door.watch.reading
    alone = judged_alone(graph, reading.judged, name) if reading.aside else None
    traced = ComputationGraph(alone or graph, args, kwargs, name, not closed, model)
    traced = replace(
        traced,
        closed=closed,
        held=frozenset(traced.placeholders[i].name for i in held),
        reading=reading,
        whole=graph if alone else None,
        form=door.form,
    )
    if held and all(n.name in traced.held for n in traced.placeholders if holds_tensor(n)):
        raise InputError("every input is held constant: there is nothing left to explain")
    shapes = (v.shape for v in map(tensor_value, traced.outputs) if v is not None)
    if any(isinstance(s, int) and s == 0 for shape in shapes for s in shape):
        raise InputError(f"{name} returns an empty tensor for these inputs; pass larger ones")
    return traced


@contextmanager
def _told_of(module: nn.Module, name: str) -> Iterator[None]:
    """What torch says of a size that values decide is an error of ours."""
    try:
        yield
    except GuardOnDataDependentSymNode as error:
        raise TraceError(f"the graph of {name} cannot be judged: {why(error, module)}") from error


def _look_at(
    module: nn.Module, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse before any trace what none would survive, and inputs of a dtype that does not fit."""
    refused = never_traced(module)
    if refused:
        raise TraceError(f"{name_of(model)} cannot be traced: {refused}")
    if mixes_dtypes(model, args, kwargs):  # a fake tensor would not mind
        need_to_run(module, model, args, kwargs)


# --------------------------------------------------------------------------- the export


@dataclass(frozen=True)
class Door:
    """A model's outermost call while it is exported: plain containers come in and go out."""

    module: nn.Module
    watch: Watch
    form: Form | None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hooks outside of the user's own: their code sees what it always sees."""

        def restore(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return self.form.restored((args, kwargs)) if self.form else (args, kwargs)

        hooks = [self.module.register_forward_hook(self.watch)]
        if self.form:
            hooks += [
                self.module.register_forward_pre_hook(restore, prepend=True, with_kwargs=True)
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def judged_alone(whole: GraphModule, places: Collection[int], name: str) -> GraphModule:
    """The graph of some of its outputs, over the same parameters; node names stay."""
    graph = copy.deepcopy(whole.graph)
    (flat,) = graph.output_node().args
    chosen = [flat[place] for place in places]  # type: ignore[index]
    codegen: Any = graph._codegen
    spec = pytree.tree_structure(None if len(chosen) == 1 else tuple(chosen))
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    graph.output_node().args = (tuple(chosen),)
    graph.eliminate_dead_code(is_impure_node=is_effect)
    return GraphModule(whole, graph, name).eval()


def _export(
    door: Door,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Leaves,
) -> tuple[torch.export.ExportedProgram, str]:
    """Export with an open batch dimension, or with the shapes as they are and why it is so."""
    program, closed = _open_export(door, args, kwargs, leaves)
    if program is not None and not closed:
        return program, ""
    try:
        return _callexport(door, args, kwargs, None, leaves), closed
    except (FullgradError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  sys.exit(0) in a forward included
        args, kwargs = door.form.restored((args, kwargs)) if door.form else (args, kwargs)
        raise _explain(door.module, model, args, kwargs, error) from without_page(error)


def _open_export(
    door: Door, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Leaves
) -> tuple[torch.export.ExportedProgram | None, str]:
    """An export whose first dimension is open, and why it cannot be used, "" where it can."""
    sizes = sorted({t.shape[0] for t in tensors_of(args, kwargs) if t.dim() > 0})
    if len(sizes) != 1:
        sizes_differ = f"its inputs have {' and '.join(map(str, sizes))} entries in dimension 0"
        return None, sizes_differ if sizes else "its inputs have no dimension"

    def two(leaf: Any) -> Any:
        few = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] < 2
        return torch.cat([leaf, leaf]) if few else leaf  # batch size 1 would be specialised

    def mark(leaf: Any) -> Any:
        tensor = isinstance(leaf, Tensor) and leaf.dim() > 0
        return {0: torch.export.Dim.AUTO} if tensor else None

    bound = inspect.signature(door.module.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(mark, dict(bound))
    try:
        more, named = pytree.tree_map(two, (args, kwargs))
        program = _callexport(door, more, named, shapes, leaves)
        assumed = _assumed(program)
        if assumed:
            return program, f"its code holds for some batch sizes alone ({assumed})"
        if _same_calls(door, more, named) or _same_values(door, program, args, kwargs):
            return program, ""
        return program, "a single sample takes another way through its code than a batch"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  the plain export reports what is really wrong
        return None, f"torch.export refuses it open ({first_line(error)})"


def _callexport(
    door: Door, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, leaves: Leaves
) -> torch.export.ExportedProgram:
    quiet, grad = warnings.catch_warnings(), torch.enable_grad()
    with quiet, grad, without_fast_path(), kept(door.module), leaves.installed(), door.open():
        warnings.simplefilter("ignore")
        return torch.export.export(door.module, args, kwargs, dynamic_shapes=shapes, strict=False)


_BATCHES = (1, 2, 3, 4, 5, 7, 8, 16, 30, 128)


def _assumed(program: torch.export.ExportedProgram) -> str:
    """What the export assumed of the batch size that does not hold for any (`s0 <= 4`)."""
    guards = getattr(getattr(fake_mode(program.graph), "shape_env", None), "guards", ())
    for guard in guards:
        free = guard.expr.free_symbols
        if not all(bool(guard.expr.subs(dict.fromkeys(free, size))) for size in _BATCHES):
            return str(guard.expr)
    return ""


class _Calls(TorchFunctionMode):
    """Records the torch functions that are called, and the numbers they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []
        self.numbers: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.functions.append(func)
        leaves = pytree.tree_leaves((args, kwargs))
        self.numbers += [leaf for leaf in leaves if isinstance(leaf, (int, float))]
        return func(*args, **kwargs)


def _calls(door: Door, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> _Calls:
    """What the model's code calls for a batch of `size`, in fake tensors, parameters included."""
    module = door.module
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    given = pytree.tree_map_only(Tensor, lambda t: t[:size] if t.dim() else t, (args, kwargs))
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held, given = pytree.tree_map_only(Tensor, fake.from_tensor, (held, given))
    # what is compiled would run real kernels on fakes
    with kept(module), eagerly(), fake, torch.no_grad(), door.open(), _Calls() as calls:
        torch.func.functional_call(module, held, *given)
    return calls


def _same_calls(door: Door, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a single sample takes the same way through the model's code as a batch of two.

    Export assumes that a batch size it left open is never 1, and no guard tells. Numbers are sizes
    that grow with the batch, or the same.
    """
    one, two = (_calls(door, args, kwargs, size) for size in (1, 2))
    return (
        one.functions == two.functions
        and len(one.numbers) == len(two.numbers)
        and all(b in (a, 2 * a) for a, b in zip(one.numbers, two.numbers, strict=True))
    )


def _same_values(
    door: Door,
    program: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    """Whether the program of two samples gives a single one what the model gives it, bit for bit:
    where one more `expand` is called for two, that is no other way."""
    if any(t.is_meta for t in (*door.module.parameters(), *tensors_of(args, kwargs))):
        return False
    one, named = pytree.tree_map_only(Tensor, lambda t: t[:1] if t.dim() else t, (args, kwargs))
    with torch.no_grad(), without_fast_path(), door.open():
        theirs = pytree.tree_leaves(untouched(door.module, one, named))
    ours = pytree.tree_leaves(program.module()(*one, **named))
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def _explain(
    module: nn.Module,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: BaseException,
) -> TraceError:
    """The user's error behind an export failure; raises where the model itself does not run."""
    need_to_run(module, model, args, kwargs)
    return TraceError(
        f"torch.export refuses {name_of(model)}{_place(module, error)}: {why(error, module)}"
    )


def need_to_run(module: Model, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `InputError` where the model itself, without any trace, refuses the inputs."""
    try:
        with torch.no_grad():
            untouched(module, args, kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as own:  # noqa: BLE001  it is the user's code that runs
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of(args, kwargs))
        place = _place(module, own) if isinstance(module, nn.Module) else ""
        raise InputError(
            f"{name_of(model)} does not run on inputs of shape {shapes}: {first_line(own)}{place}; "
            f"{misfit(model, args, kwargs) or 'pass inputs that model(*inputs) accepts'}"
        ) from without_page(own)


def _place(module: nn.Module, error: BaseException) -> str:
    """`' (in blocks.3.attn, at timm/layers/attention.py:80)'`, the innermost of the user's."""
    paths = {id(m): name for name, m in module.named_modules() if name}
    path = line = ""
    trace_back = error.__traceback__
    while trace_back is not None:
        frame = trace_back.tb_frame
        path = paths.get(id(frame.f_locals.get("self")), path)
        file = frame.f_code.co_filename
        if is_written_outside(file):
            line = f"{shorten(file)}:{trace_back.tb_lineno}"
        trace_back = trace_back.tb_next
    where = ", ".join(filter(None, (path and f"in {path}", line and f"at {line}")))
    return f" ({where})" if where else ""
