"""A user's own model, named as on the command line: `package.module:attribute` or `file.py:...`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import InputError
from ..graph.door import Model
from ..graph.foreign import met, told
from ..graph.sources import shorten


def is_target(name: str) -> bool:
    """Whether a name is one of the user's own, and no timm model's."""
    return ":" in name or name.endswith(".py")


def file_of(name: str) -> str:
    """`'path/to/file.py:1'`, the file that a target names; "" for whatever names none."""
    where = name if name.endswith(".py") else name.rpartition(":")[0]
    path = Path(where if where.endswith(".py") else where.replace(".", "/"))
    tried = (path, path.parent / f"{path.name}.py", path / "__init__.py") if where else ()
    return next((f"{shorten(str(p.absolute()))}:1" for p in tried if p.is_file()), "")


def load(target: str) -> Model:
    """The module (in eval mode) or the function that a target names; imports the user's code.

    A class or a function that takes no arguments is called and must return an nn.Module; a function
    with optional ones that returns anything else, and any other callable, is itself the model. The
    working folder (for a file outside a package, its folder too) becomes importable. Raises
    `InputError`, with the user's file and line where their code raised.
    """
    where, attribute = _split(target)
    _importable(Path.cwd())
    found: Any = _file(Path(where)) if where.endswith(".py") else _module(where)
    if not attribute:
        names = [n for n, v in vars(found).items() if callable(v) and _written_in(v, found)]
        raise InputError(f"name the model in {where}: {_few(f'{where}:{n}' for n in names)}")
    for part in attribute.split("."):
        if not hasattr(found, part):
            owner = getattr(found, "__name__", type(found).__name__)
            raise InputError(f"{owner} has no attribute {part!r}; {_near(part, dir(found))}")
        found = getattr(found, part)
    return _made(found, target)


def _split(target: str) -> tuple[str, str]:
    if target.endswith(".py"):
        return target, ""
    where, _, attribute = target.rpartition(":")
    if not where or not attribute:
        raise InputError(f"{target!r} is no package.module:attribute, nor file.py:attribute")
    return where, attribute


def _made(found: Any, target: str) -> Model:
    """A model from an attribute: itself, or what it returns."""
    if isinstance(found, nn.Module):
        return _in_eval_mode(found, target)
    if not callable(found):
        raise InputError(
            f"{target} is {_kind(found)}; name an nn.Module, or a class or a function that makes "
            "one without arguments"
        )
    if inspect.isclass(found) and not issubclass(found, nn.Module):
        raise InputError(f"{target} is a class, but not one of nn.Module")
    parameters = _parameters(found)
    if parameters is not None and inspect.isclass(found):
        # a class without an __init__ has nn.Module's, which takes *args and needs none
        parameters = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    if parameters is None or any(map(_needed, parameters)):
        if inspect.isclass(found):
            raise InputError(
                f"{target} needs arguments, {found.__name__}{inspect.signature(found)}: name a "
                "function without any that makes it"
            )
        return found
    made = _run(found, f"{target} cannot be called")
    if isinstance(made, nn.Module):
        return _in_eval_mode(made, target)
    if not parameters:
        raise InputError(
            f"{target}() returns {_kind(made)}: a function without arguments must make an nn.Module"
        )
    return found


def _in_eval_mode(model: nn.Module, target: str) -> nn.Module:
    """The user's class may have an eval() of its own, one that returns nothing."""
    with met(f"{target} does not take eval()"):
        model.eval()
    return model


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """What a function takes, None where that is not known (a builtin)."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return None


def _needed(parameter: inspect.Parameter) -> bool:
    """Whether a call has to give it. `*args` counts: a function of tensors has it, no builder."""
    return parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}" if value is not None else "None"


# --------------------------------------------------------------------------- importing


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _module(name: str) -> ModuleType:
    try:
        known = all(name.split(".")) and importlib.util.find_spec(name.split(".")[0])
    except ValueError:  # __main__, and the like
        known = False
    if not known:
        here = [m.name for m in pkgutil.iter_modules([str(Path.cwd())])]
        raise InputError(f"there is no module {name!r} here; {_near(name, here)}")
    try:
        with met(f"cannot import {name}", unless=(ModuleNotFoundError,)):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name + ".").startswith(error.name + "."):
            parent, _, last = error.name.rpartition(".")
            beside = pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []))
            near = _near(last, [m.name for m in beside])
            raise InputError(f"there is no module {error.name!r}; {near}") from None
        raise InputError(told(f"cannot import {name}", error)) from error


def _file(path: Path) -> ModuleType:
    """A file's module: as part of the package it is in, else as `python file.py` would."""
    path = path.absolute()
    if not path.is_file():
        beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise InputError(
            f"there is no file {shorten(str(path))}; {_near(path.name, [p.name for p in beside])}"
        )
    folder, name = path.parent, [] if path.stem == "__init__" else [path.stem]
    while (folder / "__init__.py").is_file():
        folder, name = folder.parent, [folder.name, *name]
    _importable(folder)
    if folder != path.parent:
        return _module(".".join(name))
    free = path.stem if path.stem not in sys.modules else f"_{path.stem}_"
    spec = importlib.util.spec_from_file_location(free, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[free] = module  # dataclasses and pickle look their module up
    _run(partial(spec.loader.exec_module, module), f"cannot import {shorten(str(path))}")
    return module


def _run(call: Callable[[], Any], what: str) -> Any:
    with met(what):
        return call()


def _written_in(value: Any, module: ModuleType) -> bool:
    return isinstance(value, nn.Module) or getattr(value, "__module__", None) == module.__name__


def _near(name: str, known: Sequence[str]) -> str:
    public = [k for k in known if not k.startswith("_")]
    near = difflib.get_close_matches(name, public, n=4, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"there is {_few(public)}"


def _few(names: Iterator[str] | Sequence[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "nothing"
