"""From a model to its computation graph, by torch.export.

The batch dimension is left open where the model allows it; nothing that an export does stays.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import FullgradError, InputError, TraceError
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
    modules_of,
    name_of,
    own_copy,
    split_inputs,
    tensors_of,
)
from .fakes import fake_mode, fill_fake_values
from .forms import Form
from .functional import functionalise
from .leaves import LeafSpec, Leaves
from .normal import drop_assertions, inline_regions, is_effect, mutates, unroll
from .outputs import Selection, Watch
from .sources import first_line, is_users, shorten


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
    names = input_names(module, args, kwargs)
    held = held_constant(names, constant, explain)
    kept_whole = Leaves(module, leaves)
    door = Door(module, Watch(name_of(model), output), input_form(model, inputs))
    with kept(module), muted(), torch.inference_mode(False):
        program, dynamic = _export(door, model, args, kwargs, kept_whole)
    unlifted = program.module()
    inline_regions(unlifted)
    kept_whole.write(unlifted)
    unroll(unlifted)
    drop_assertions(unlifted)
    kept_whole.check_writes(any(mutates(n) for n in unlifted.graph.nodes))
    functionalise(unlifted)
    fill_fake_values(unlifted)
    name = name_of(model)
    graph = GraphModule(unlifted, unlifted.graph, name)
    graph.eval()
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    model = getattr(model, "_torchdynamo_orig_callable", model)
    reading = door.watch.reading
    alone = judged_alone(graph, reading.judged, name) if reading.aside else None
    traced = ComputationGraph(alone or graph, args, kwargs, name, dynamic, model)
    traced = replace(
        traced,
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
) -> tuple[torch.export.ExportedProgram, bool]:
    """Export with an open batch dimension, or with the shapes as they are where that fails."""
    module = door.module
    batched = [t for t in tensors_of(args, kwargs) if t.dim() > 0]
    if len({t.shape[0] for t in batched}) == 1:

        def resize(leaf: Any, batch: int) -> Any:
            few = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] < batch
            return torch.cat([leaf, leaf]) if few else leaf  # batch size 1 would be specialised

        def mark(leaf: Any) -> Any:
            tensor = isinstance(leaf, Tensor) and leaf.dim() > 0
            return {0: torch.export.Dim.AUTO} if tensor else None

        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        shapes = pytree.tree_map(mark, dict(bound))
        try:
            more, named = pytree.tree_map(lambda t: resize(t, 2), (args, kwargs))
            program = _callexport(door, more, named, shapes, leaves)
            if _any_batch(program) and _same_calls(door, more, named):
                return program, True
        except Exception:  # noqa: BLE001  the plain export below reports what is really wrong
            pass
    try:
        return _callexport(door, args, kwargs, None, leaves), False
    except FullgradError:
        raise
    except Exception as error:
        args, kwargs = door.form.restored((args, kwargs)) if door.form else (args, kwargs)
        raise _explain(module, model, args, kwargs, error) from error


def _callexport(
    door: Door, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, leaves: Leaves
) -> torch.export.ExportedProgram:
    quiet, grad = warnings.catch_warnings(), torch.enable_grad()
    with quiet, grad, without_fast_path(), leaves.installed(), door.open():
        warnings.simplefilter("ignore")
        return torch.export.export(door.module, args, kwargs, dynamic_shapes=shapes, strict=False)


_BATCHES = (1, 2, 3, 4, 5, 7, 8, 16, 30, 128)


def _any_batch(program: torch.export.ExportedProgram) -> bool:
    """Whether what the export assumed of the batch size (`x.shape[0] <= 4`) holds for any."""
    guards = getattr(getattr(fake_mode(program.graph), "shape_env", None), "guards", ())
    return all(
        bool(guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, size)))
        for guard in guards
        for size in _BATCHES
    )


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
    eager = torch.compiler.set_stance("force_eager")  # dynamo would run real kernels on fakes
    with eager, fake, torch.no_grad(), door.open(), _Calls() as calls:
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


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Undo what running the model's code sets on it (`self.cache = x`), which would be a fake."""
    dicts = [m.__dict__ for m in module.modules()]
    values = [v for d in dicts for v in d.values()]
    dicts += [v for v in values if isinstance(v, dict)]
    dicts_before = [(d, d.copy()) for d in dicts]
    lists_before = [(v, v.copy()) for v in values if isinstance(v, list)]
    try:
        yield
    finally:
        for now, old in dicts_before:
            for key in now.keys() - old.keys():
                del now[key]
            now.update({k: v for k, v in old.items() if k not in now or now[k] is not v})
        for listed, was in lists_before:
            if [*map(id, listed)] != [*map(id, was)]:
                listed[:] = was


class _Mute:
    """A stream that drops what one thread writes; others (a progress bar) go on."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        quiet = threading.get_ident() == self.thread
        return len(text) if quiet else int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def muted() -> redirect_stderr[Any]:
    """torch.export writes pages to stderr when it fails; the error raised says what matters."""
    return redirect_stderr(_Mute(sys.stderr))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """torch's own layers leave their kernels for inference alone, which round differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def untouched(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model returns; whatever its code writes to itself or to its inputs is undone."""
    module = nn.ModuleList(modules_of(model))
    held = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    given, named = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    eager = torch.compiler.set_stance("force_eager")
    try:
        with kept(module), eager:
            return model(*given, **named)
    finally:
        for tensor, value in held:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)


def _explain(
    module: nn.Module, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> Exception:
    """The user's error behind an export failure: wrong inputs, or control flow on data."""
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of(args, kwargs))
    try:
        with torch.no_grad():
            untouched(module, args, kwargs)
    except Exception as own:  # noqa: BLE001  the model itself refuses the inputs
        return InputError(
            f"{name_of(model)} does not run on inputs of shape {shapes}: {first_line(own)}"
            f"{_place(module, own)}; pass inputs that model(*inputs) accepts"
        )
    return TraceError(
        f"torch.export refuses {name_of(model)}: {first_line(error)}{_place(module, error)}; the "
        "usual cause is Python control flow that depends on a tensor's values: make the branch a "
        "torch.where, or trace the layers on either side of it"
    )


def _place(module: nn.Module, error: BaseException) -> str:
    """`' (in blocks.3.attn, at timm/layers/attention.py:80)'`, the innermost of the user's."""
    paths = {id(m): name for name, m in module.named_modules() if name}
    path = line = ""
    trace_back = error.__traceback__
    while trace_back is not None:
        frame = trace_back.tb_frame
        path = paths.get(id(frame.f_locals.get("self")), path)
        file = frame.f_code.co_filename
        if is_users(file) and not file.startswith("<"):
            line = f"{shorten(file)}:{trace_back.tb_lineno}"
        trace_back = trace_back.tb_next
    where = ", ".join(filter(None, (path and f"in {path}", line and f"at {line}")))
    return f" ({where})" if where else ""
