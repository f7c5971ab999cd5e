"""From a model to its computation graph: torch.export's ATen graph and a networkx view of it."""

from __future__ import annotations

import inspect
import re
import site
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .errors import FullgradError, InputError, TraceError, TrainingModeError
from .functionalise import (
    drop_assertions,
    fake_call,
    fake_mode,
    functionalise,
    inline_regions,
    mutates,
    unroll,
)
from .leaves import LeafSpec, Leaves
from .operators import Operator, bind, target_name
from .operators.base import operands

Model = nn.Module | Callable[..., Any]
Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class ComputationGraph:
    """A traced model. `fx`: a GraphModule over pure ATen calls that shares the model's parameters.

    `args`, `kwargs` are the example inputs; `dynamic` says whether the batch size was left open.
    `measured`: node -> what `blackbox.measure` found of an operation that nobody registered.
    """

    fx: GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    dynamic: bool
    model: Model
    measured: Mapping[str, Operator] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """The fx nodes by name, in topological order."""
        return {node.name: node for node in self.fx.graph.nodes}

    @cached_property
    def placeholders(self) -> tuple[Node, ...]:
        return tuple(n for n in self.fx.graph.nodes if n.op == "placeholder")

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """The floating-point tensors among the outputs, in order, each once."""
        flat = pytree.tree_leaves(self.fx.graph.output_node().args)
        return tuple(dict.fromkeys(n for n in flat if isinstance(n, Node) and is_float(n)))

    @cached_property
    def nx(self) -> nx.DiGraph:
        """Nodes carry op, kind, shape, dtype, module_path, source; an edge its `arguments`."""
        graph = nx.DiGraph(name=self.name)
        for node in self.fx.graph.nodes:
            value = tensor_value(node)
            graph.add_node(
                node.name,
                op=target_name(node.target) if node.op == "call_function" else node.op,
                kind=node.op,
                shape=tuple(value.shape) if value is not None else None,
                dtype=value.dtype if value is not None else None,
                module_path=module_path(node),
                source=source_line(node),
            )
            if node.op == "call_function":
                pairs = [(o.name, o.node) for o in operands(bind(node)) if o.node is not None]
            else:
                pairs = [(f"output[{i}]", n) for i, n in enumerate(node.all_input_nodes)]
            for argument, operand in pairs:
                if graph.has_edge(operand.name, node.name):
                    graph.edges[operand.name, node.name]["arguments"] += (argument,)
                else:
                    graph.add_edge(operand.name, node.name, arguments=(argument,))
        return graph

    def describe(self, name: str) -> str:
        """`'gelu_3 (aten.gelu.default) in blocks.3.mlp.act, timm/layers/mlp.py:49'`."""
        node = self.nodes[name]
        what = target_name(node.target) if node.op == "call_function" else node.op
        where = ", ".join(p for p in (module_path(node), source_line(node)) if p)
        return f"{name} ({what})" + (f" in {where}" if where else "")

    @property
    def is_meta(self) -> bool:
        """Whether the model has no values, only shapes."""
        tensors = [*self.fx.parameters(), *self.fx.buffers()]
        tensors += [
            a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Tensor)
        ]
        return any(t.is_meta for t in tensors)


def tensor_value(node: Node) -> Tensor | None:
    """The fake tensor that stands for a node's value, None where it is no tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_float(node: Node) -> bool:
    """Whether a node's value is a floating-point or complex tensor (or a tuple holding one)."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def holds_tensor(node: Node) -> bool:
    """Whether a node's value is a tensor or holds one; sizes and flags do not."""
    return any(isinstance(v, Tensor) for v in pytree.tree_leaves(node.meta.get("val")))


def module_path(node: Node) -> str:
    """The innermost submodule a node was traced in, `'blocks.3.attn'`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values()][-1:] or [""]
    return "" if path[0].startswith("_empty_nn") else re.sub(r"@\d+$", "", path[0])


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.*)')
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def source_frame(node: Node) -> tuple[str, int] | None:
    """File and line of the user's code (not torch's) that made a node."""
    frames = [
        (m["file"], int(m["line"])) for m in _FRAME.finditer(node.meta.get("stack_trace") or "")
    ]
    own = [f for f in frames if not f[0].startswith((_TORCH, _HERE))]
    best = own or frames
    return best[-1] if best else None


def source_line(node: Node) -> str:
    """`'timm/layers/mlp.py:49'`, relative to site-packages or to the working folder."""
    frame = source_frame(node)
    return f"{shorten(frame[0])}:{frame[1]}" if frame else ""


def shorten(file: str) -> str:
    """A path relative to site-packages, else to the working folder, else to an entry of sys.path.

    The working folder goes before a longer entry (`src`): an editor or a CI finds the file again.
    """
    for roots in (site.getsitepackages(), [str(Path.cwd())], sys.path):
        fitting = [r.rstrip("/") for r in roots if r and file.startswith(r.rstrip("/") + "/")]
        if fitting:
            return file[len(max(fitting, key=len)) + 1 :]
    return file


def definition(model: Model) -> str:
    """Where a model's class, or a function, is written, as `source_line`; "" if in torch."""
    while isinstance(model, partial):
        model = model.func
    what = model if isinstance(model, (FunctionType, MethodType)) else type(model)
    try:
        file, line = inspect.getsourcefile(what), inspect.getsourcelines(what)[1]
    except (OSError, TypeError):  # a builtin, or code without a file
        return ""
    return f"{shorten(file)}:{line}" if file and not file.startswith(_TORCH) else ""


# --------------------------------------------------------------------------- the door


class _Function(nn.Module):
    """A function as a module, so that torch.export takes it; its signature stays the function's.

    Modules it is bound to or closes over are submodules here, so that their parameters have names.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.training = False  # not eval(), which would change the user's modules
        for name, module in _modules_of(function):
            self.add_module(name, module)
        self.function = function
        self.forward = _as_forward(function)


def _modules_of(function: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    found: list[tuple[str, Any]] = [("model", getattr(function, "__self__", None))]
    for name, cell in zip(code.co_freevars if code else (), cells, strict=False):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # an empty cell
            continue
    return ((name, value) for name, value in found if isinstance(value, nn.Module))


def _as_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that export takes, and whose lines it records: those of frames called forward."""
    if isinstance(function, FunctionType):
        code = function.__code__.replace(co_name="forward")
        renamed = FunctionType(
            code,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        renamed.__kwdefaults__ = function.__kwdefaults__
        return wraps(function)(renamed)
    if isinstance(function, MethodType):
        return function

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    try:
        forward.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    except ValueError:  # a builtin, torch.sin
        return lambda *args: function(*args)
    return forward


def as_module(model: Model) -> nn.Module:
    """The model itself, or a function wrapped into a module; refuses a model in training mode."""
    if not callable(model):
        raise InputError(f"expected a torch.nn.Module or a function, got {type(model).__name__}")
    wrapped = model if isinstance(model, nn.Module) else _Function(model)
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # of torch.compile
    for path, module in wrapped.named_modules():
        if module.training:
            what = f"its submodule {path!r}" if path else "it"
            raise TrainingModeError(
                f"{_name(model)} is in training mode ({what} has training=True): dropout "
                "and batch norm then depend on chance or on the batch; call model.eval() first"
            )
    return wrapped


def _name(model: Model) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    own = getattr(model, "__name__", None)
    return own or (_name(model.func) if isinstance(model, partial) else type(model).__name__)


def default_inputs(model: Model, batch: int = 1) -> tuple[Tensor, ...]:
    """Seeded random inputs where the model says what it takes (timm's `pretrained_cfg`)."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None:
        raise InputError(
            f"{_name(model)} does not say what it takes; pass inputs, for example "
            "inputs=torch.randn(1, 3, 224, 224), or a tuple of tensors in the order of forward()"
        )
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(own, (tuple, list)) and len(own) == 2:
        size = (size[0], *own)
    device, dtype = home(model)
    if device.type == "meta":
        return (torch.zeros((batch, *size), device=device, dtype=dtype),)
    generator = torch.Generator().manual_seed(0)
    return (torch.randn((batch, *size), generator=generator).to(device, dtype),)


def home(model: Model) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's first floating-point tensor; cpu and float32 if it has none."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def split_inputs(model: Model, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as (args, kwargs): a tensor, a tuple of arguments, or a mapping of keywords."""
    if inputs is None:
        return default_inputs(model), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise InputError(
        f"inputs must be a tensor, a tuple of arguments or a dict of keywords, not "
        f"{type(inputs).__name__}"
    )


def _tensors(*trees: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor))


def _own_copy() -> Callable[[Tensor], Tensor]:
    """Export merges arguments that are the same tensor: give the later ones a copy of their own.

    Tensors made in inference mode take no gradient; their copies do.
    """
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again or tensor.is_inference() else tensor

    return own


def trace(
    model: Model, inputs: Inputs = None, *, leaves: Collection[LeafSpec] = ()
) -> ComputationGraph:
    """The computation graph of a model, a layer or a function, in eval mode.

    `inputs`: a tensor, a tuple of positional arguments or a dict of keywords; left out where the
    model has a `pretrained_cfg`. Works on the meta device. The batch dimension is left open where
    the model allows it. `leaves`: module classes, autograd.Functions and module paths whose calls
    become one node each, backward kept. Raises `TrainingModeError`, `InputError`, `TraceError`.
    """
    module = as_module(model)
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"{_name(model)} is a ScriptModule, which torch.export does not take; pass the module "
            "or function it was made from"
        )
    with torch.inference_mode(False):
        args, kwargs = pytree.tree_map_only(Tensor, _own_copy(), split_inputs(model, inputs))
    if not any(t.numel() for t in _tensors(args, kwargs)):
        raise InputError("inputs hold no tensor with elements; pass what the model's forward takes")
    _check_arguments(module, model, args, kwargs)
    kept_whole = Leaves(module, leaves)
    with _kept(module), _muted(), torch.inference_mode(False):
        program, dynamic = _export(module, model, args, kwargs, kept_whole)
    unlifted = program.module()
    inline_regions(unlifted)
    kept_whole.write(unlifted)
    unroll(unlifted)
    drop_assertions(unlifted)
    kept_whole.check_writes(any(mutates(n) for n in unlifted.graph.nodes))
    functionalise(unlifted)
    _fake_values(unlifted)
    name = _name(model)
    graph = GraphModule(unlifted, unlifted.graph, name)
    graph.eval()
    model = module if isinstance(model, MethodType) else model  # a method's module, to be copied
    traced = ComputationGraph(graph, args, kwargs, name, dynamic, model)
    if not traced.outputs:
        raise InputError(f"{name} returns no floating-point tensor; there is nothing to attribute")
    shapes = (v.shape for v in map(tensor_value, traced.outputs) if v is not None)
    if any(isinstance(s, int) and s == 0 for shape in shapes for s in shape):
        raise InputError(f"{name} returns an empty tensor for these inputs; pass larger ones")
    return traced


def _check_arguments(
    module: nn.Module, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise where the inputs do not fit the signature of forward()."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit {_name(model)}: {error}; its forward takes {signature}, pass a "
            "tuple of arguments in that order or a dict of keywords"
        ) from error


def _export(
    module: nn.Module,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Leaves,
) -> tuple[torch.export.ExportedProgram, bool]:
    """Export with an open batch dimension, or with the shapes as they are where that fails."""
    batched = [t for t in _tensors(args, kwargs) if t.dim() > 0]
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
            program = _call_export(module, more, named, shapes, leaves)
            if _any_batch(program) and _same_calls(module, more, named):
                return program, True
        except Exception:  # noqa: BLE001  the plain export below reports what is really wrong
            pass
    try:
        return _call_export(module, args, kwargs, None, leaves), False
    except FullgradError:
        raise
    except Exception as error:
        raise _explain(module, model, args, kwargs, error) from error


def _call_export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, leaves: Leaves
) -> torch.export.ExportedProgram:
    quiet, grad = warnings.catch_warnings(), torch.enable_grad()
    with quiet, grad, without_fast_path(), leaves.installed():
        warnings.simplefilter("ignore")
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


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


def _calls(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> _Calls:
    """What the model's code calls for a batch of `size`, in fake tensors, parameters included."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    given = pytree.tree_map_only(Tensor, lambda t: t[:size] if t.dim() else t, (args, kwargs))
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held, given = pytree.tree_map_only(Tensor, fake.from_tensor, (held, given))
    eager = torch.compiler.set_stance("force_eager")  # dynamo would run real kernels on fakes
    with eager, fake, torch.no_grad(), _Calls() as calls:
        torch.func.functional_call(module, held, *given)
    return calls


def _same_calls(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a single sample takes the same way through the model's code as a batch of two.

    Export assumes that a batch size it left open is never 1, and no guard tells. Numbers are sizes
    that grow with the batch, or the same.
    """
    one, two = (_calls(module, args, kwargs, size) for size in (1, 2))
    return (
        one.functions == two.functions
        and len(one.numbers) == len(two.numbers)
        and all(b in (a, 2 * a) for a, b in zip(one.numbers, two.numbers, strict=True))
    )


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
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


def _muted() -> redirect_stderr[Any]:
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
    module = model if isinstance(model, nn.Module) else nn.Module()
    held = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    given, named = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    try:
        with _kept(module):
            return model(*given, **named)
    finally:
        for tensor, value in held:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)


def _explain(
    module: nn.Module, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> Exception:
    """The user's error behind an export failure: wrong inputs, or control flow on data."""
    shapes = ", ".join(str(tuple(t.shape)) for t in _tensors(args, kwargs))
    try:
        with torch.no_grad():
            untouched(module, args, kwargs)
    except Exception as own:  # noqa: BLE001  the model itself refuses the inputs
        return InputError(
            f"{_name(model)} does not run on inputs of shape {shapes}: {first_line(own)}"
            f"{_place(module, own)}; pass inputs that model(*inputs) accepts"
        )
    return TraceError(
        f"torch.export refuses {_name(model)}: {first_line(error)}{_place(module, error)}; the "
        "usual cause is Python control flow that depends on a tensor's values: make the branch a "
        "torch.where, or trace the layers on either side of it"
    )


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _place(module: nn.Module, error: BaseException) -> str:
    """`' (in blocks.3.attn, at timm/layers/attention.py:80)'`, the innermost of the user's."""
    paths = {id(m): name for name, m in module.named_modules() if name}
    path = line = ""
    trace_back = error.__traceback__
    while trace_back is not None:
        frame = trace_back.tb_frame
        path = paths.get(id(frame.f_locals.get("self")), path)
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)) and not file.startswith("<"):
            line = f"{shorten(file)}:{trace_back.tb_lineno}"
        trace_back = trace_back.tb_next
    where = ", ".join(filter(None, (path and f"in {path}", line and f"at {line}")))
    return f" ({where})" if where else ""


def _fake_values(module: GraphModule) -> None:
    """Give a fake value to every node that the normalisation made."""
    mode = fake_mode(module.graph)
    for node in module.graph.nodes:
        new = node.op == "call_function" and "val" not in node.meta and node.all_input_nodes
        if new and mode is not None and all("val" in n.meta for n in node.all_input_nodes):
            node.meta["val"] = fake_call(mode, node)[1]
