"""What comes in: a module, a layer or a function, and the inputs it is traced with."""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, TrainingModeError, unknown_name
from .forms import Form, form_of, is_cache, leaves_of, plain, same_form
from .modes import acts_in_training
from .sources import is_users, shorten

Model = nn.Module | Callable[..., Any]
Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | None


class _Function(nn.Module):
    """A function as a module, so that torch.export takes it; its signature stays the function's.

    Modules that it is bound to, closes over or reads are submodules here, so that their parameters
    have names.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.training = False  # not eval(), which would change the user's modules
        self.function = function
        self.forward = _as_forward(function)
        own = {id(module): name for name, module in _modules_of(function)}
        self.beside: set[str] = set()
        """modules that stand beside the function, whose modes are not its matter"""
        for k, module in enumerate(modules_of(function)):
            name = own.get(id(module), f"beside{k}")
            name = f"{name}_" if hasattr(self, name) else name
            self.add_module(name, module)
            if id(module) not in own:
                self.beside.add(name)


def _modules_of(function: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    found = [("model", getattr(function, "__self__", None)), *_closed_over(function).items()]
    return ((name, value) for name, value in found if isinstance(value, nn.Module))


def _closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function closes over, by name."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    found = {}
    for name, cell in zip(code.co_freevars if code else (), cells, strict=False):
        with suppress(ValueError):  # an empty cell
            found[name] = cell.cell_contents
    return found


def _read_globals(function: Callable[..., Any]) -> dict[str, Any]:
    """The modules, tensors and functions beside a function that it reads, by name."""
    if not isinstance(function, FunctionType):
        return {}
    space, codes = function.__globals__, [function.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    reads = (i for code in codes for i in dis.get_instructions(code))
    names = dict.fromkeys(i.argval for i in reads if i.opname == "LOAD_GLOBAL")
    return {n: space[n] for n in names if n in space and _is_part(space[n], space)}


def _is_part(value: Any, space: dict[str, Any]) -> bool:
    own = isinstance(value, FunctionType) and value.__globals__ is space
    return own or isinstance(value, (nn.Module, Tensor))


def modules_of(model: Model | None, seen: Collection[int] = ()) -> list[nn.Module]:
    """The modules that a model is, is bound to, closes over or reads, outermost ones."""
    if model is None or isinstance(model, nn.Module):
        return [] if model is None else [model]
    if isinstance(model, partial):
        parts = [model.func, *model.args, *model.keywords.values()]
    else:
        reads = {**_closed_over(model), **_read_globals(model)}
        parts = [getattr(model, "__self__", None), *reads.values()]
    kinds = (nn.Module, FunctionType, MethodType, partial)
    seen = {*seen, id(model)}
    known = [part for part in parts if isinstance(part, kinds) and id(part) not in seen]
    return [m for part in known for m in modules_of(part, seen)]


def copied(model: Model, memo: dict[int, Any]) -> Model:
    """A deep copy of a model; of a function with all that it reads. Shared by `memo`."""
    if isinstance(model, partial):
        args = [_copied_value(v, memo) for v in model.args]
        keywords = {n: _copied_value(v, memo) for n, v in model.keywords.items()}
        return partial(copied(model.func, memo), *args, **keywords)
    if isinstance(model, MethodType):
        return MethodType(model.__func__, copy.deepcopy(model.__self__, memo))
    if not isinstance(model, FunctionType):
        return copy.deepcopy(model, memo)
    if id(model) in memo:
        return memo[id(model)]  # type: ignore[no-any-return]
    space, cells = dict(model.__globals__), tuple(CellType() for _ in model.__code__.co_freevars)
    function = FunctionType(model.__code__, space, model.__name__, model.__defaults__, cells)
    function.__kwdefaults__ = model.__kwdefaults__
    function.__dict__.update(model.__dict__)
    memo[id(model)] = function  # which it may call itself
    referred = _closed_over(model)
    space |= {n: _copied_value(v, memo) for n, v in _read_globals(model).items()}
    for name, cell in zip(model.__code__.co_freevars, cells, strict=True):
        if name in referred:
            cell.cell_contents = _copied_value(referred[name], memo)
    return function


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (FunctionType, MethodType, partial)):
        return copied(value, memo)
    return copy.deepcopy(value, memo) if isinstance(value, (nn.Module, Tensor)) else value


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
    beside = wrapped.beside if isinstance(wrapped, _Function) else set()
    for path, module in wrapped.named_modules():
        if module.training and path.split(".")[0] not in beside and acts_in_training(module):
            parent = path.rpartition(".")[0]
            what = f"its submodule {path!r}" + (f" in {parent!r}" if parent else "")
            what = what if path else "it"
            raise TrainingModeError(
                f"{name_of(model)} is in training mode ({what} has training=True, and its code "
                "asks for that): dropout and batch norm then depend on chance or on the batch; "
                "call model.eval() first"
            )
    return wrapped


def name_of(model: Model) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    own = getattr(model, "__name__", None)
    return own or (name_of(model.func) if isinstance(model, partial) else type(model).__name__)


def default_inputs(model: Model, batch: int = 1) -> tuple[Tensor, ...]:
    """Seeded random inputs where the model says what it takes (timm's `pretrained_cfg`)."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, Mapping) else None
    sized = isinstance(size, (tuple, list)) and all(isinstance(s, int) and s > 0 for s in size)
    if size is None or not sized:
        raise InputError(
            f"{name_of(model)} does not say what it takes; pass inputs, for example "
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
    """`inputs` as (args, kwargs): a tensor, a tuple of arguments, or a mapping of keywords.

    A mapping goes in as one argument where forward() takes one, and not these keywords. Containers
    that torch.export does not know are plain ones here; `input_form` has what they were.
    """
    args, kwargs = _given(model, inputs)
    _refuse_caches(args, kwargs)
    return plain(args, any_leaf=True), plain(kwargs, any_leaf=True)


def input_form(model: Model, inputs: Inputs) -> Form | None:
    """How to make the inputs again of what `split_inputs` returns; None where they are that."""
    given = _given(model, inputs)
    form = form_of(given)
    return None if form is None or same_form(form) else form


def _given(model: Model, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None:
        return default_inputs(model), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return ((inputs,), {}) if _takes_whole(model, inputs) else ((), dict(inputs))
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    if any(isinstance(leaf, Tensor) for _, leaf in leaves_of(inputs)):  # a batch of one's own
        return (inputs,), {}
    raise InputError(
        f"inputs must be a tensor, a tuple of arguments or a dict of keywords, not "
        f"{type(inputs).__name__}"
    )


def _place_of(model: Model) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of the first floating-point parameter that a model has; None without one."""
    for module in modules_of(model):
        if any(p.is_floating_point() for p in module.parameters()):
            return home(module)
    return None


def mixes_dtypes(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a floating-point input has another dtype than the model's first parameter."""
    place = _place_of(model)
    given = {t.dtype for t in tensors_of(args, kwargs) if t.is_floating_point()}
    return place is not None and bool(given - {place[1]})


def misfit(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What of device and dtype does not fit, and the way out; "" where both do."""
    place = _place_of(model)
    if place is None:
        return ""
    tensors = list(tensors_of(args, kwargs))
    elsewhere = {str(t.device) for t in tensors} - {str(place[0])}
    if elsewhere:
        there = ", ".join(sorted(elsewhere))
        return f"the model is on {place[0]} and an input on {there}: move one with .to()"
    dtypes = {t.dtype for t in tensors if t.is_floating_point()} - {place[1]}
    if dtypes:
        own, *others = (str(d).removeprefix("torch.") for d in (place[1], *dtypes))
        return f"the model is {own} and an input {', '.join(others)}: pass x.to(torch.{own})"
    return ""


def _takes_whole(model: Model, inputs: Mapping[str, Any]) -> bool:
    """Whether forward() takes a mapping as its one argument: these keywords it does not take."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin
        return False
    if _binds(signature, (), {str(name): part for name, part in inputs.items()}):
        return False
    first = next(iter(signature.parameters.values()), None)
    tensor = first is not None and first.annotation in (Tensor, "Tensor", "torch.Tensor")
    return not tensor and _binds(signature, (inputs,), {})


def _binds(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _refuse_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for path, leaf in leaves_of((args, kwargs)):
        if is_cache(leaf):
            raise InputError(
                f"input {path[-1]!r} is a cache ({type(leaf).__name__}), what earlier calls left: "
                "leave it out, and pass the whole sequence at once"
            )


def input_names(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The path of each leaf of the inputs, by forward()'s own names: `x`, `batch.mask`."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin
        parameters = []
    single = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    several = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    before = single.index(several) if several in single else len(single)
    named = {
        (single[i] if i < before else f"{several}.{i - before}"): a for i, a in enumerate(args)
    }
    return [".".join(map(str, path)) for path, _ in leaves_of(named | kwargs)]


Names = str | Collection[str]
"""inputs by name: a parameter of forward(), or a key or path inside of one"""


def held_constant(names: Sequence[str], constant: Names, explain: Names | None) -> frozenset[int]:
    """The places among the inputs' leaves that are held constant: those named in `constant`, and
    all that are not named in `explain`. Raises `UnknownNameError` for a name that is no input."""
    held = {i for name in _listed(constant) for i in _named(names, name, "constant")}
    if explain is None:
        return frozenset(held)
    chosen = {i for name in _listed(explain) for i in _named(names, name, "explain")}
    if chosen & held:
        both = ", ".join(sorted(names[i] for i in chosen & held))
        raise InputError(f"{both}: an input is explained or held constant, not both")
    return frozenset(held | (set(range(len(names))) - chosen))


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _named(names: Sequence[str], name: str, keyword: str) -> list[int]:
    found = [i for i, path in enumerate(names) if f"{path}.".startswith(f"{name}.")]
    found = found or [i for i, path in enumerate(names) if name in path.split(".")]
    found = found or [i for i, path in enumerate(names) if name == path.replace(".", "_")]
    if not found:
        raise unknown_name(f"input in {keyword}=", str(name), names)
    return found


def tensors_of(*trees: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor))


def own_copy() -> Callable[[Tensor], Tensor]:
    """Export merges arguments that are the same tensor: give the later ones a copy of their own.

    Tensors made in inference mode take no gradient; their copies do.
    """
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again or tensor.is_inference() else tensor

    return own


def check_arguments(
    module: nn.Module, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise where the inputs do not fit the signature of forward()."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit {name_of(model)}: {error}; its forward takes {signature}, pass "
            "a tuple of arguments in that order or a dict of keywords"
        ) from error


def definition(model: Model) -> str:
    """Where a model's class, or a function, is written, as `source_line`; "" if in torch."""
    while isinstance(model, partial):
        model = model.func
    what = model if isinstance(model, (FunctionType, MethodType)) else type(model)
    try:
        file, line = inspect.getsourcefile(what), inspect.getsourcelines(what)[1]
    except (OSError, TypeError):  # a builtin, or code without a file
        return ""
    return f"{shorten(file)}:{line}" if file and is_users(file) else ""
