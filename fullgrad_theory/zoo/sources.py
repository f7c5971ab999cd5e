"""Where architectures come from: timm, torchvision, transformers, or a file of one's own."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..errors import InputError, unknown_name
from ..extras import require
from . import torchvision_models, transformers_models
from .rows import Architecture, Row

TIMM, TORCHVISION, TRANSFORMERS = SOURCES = ("timm", "torchvision", "transformers")
_SMALL = "atto femto pico nano xxtiny xtiny tiny mini xxsmall xsmall small xxs xs s".split()
"""what small members of a family are called, the smallest first"""


@dataclass(frozen=True)
class Shard:
    """Part `place` of `count`, from 1: what one of several machines does."""

    place: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`'3/16'`; raises `InputError`."""
        place, _, count = text.partition("/")
        if not (place.isdecimal() and count.isdecimal() and 1 <= int(place) <= int(count)):
            raise InputError(f"{text!r} is no shard; write 3/16 for the third of sixteen parts")
        return cls(int(place), int(count))


WHOLE = Shard()


def listed(source: str) -> list[Architecture]:
    """All architectures of a source, in its order. A file is read, not run: that is a worker's."""
    known: dict[str, Callable[[], Iterable[Architecture]]] = {
        TIMM: _timm,
        TORCHVISION: torchvision_models.listed,
        TRANSFORMERS: transformers_models.listed,
    }
    if source in known:
        return list(known[source]())
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"there is no source {source!r}: it is {', '.join(SOURCES)}, a Python file, or a text "
            "file with package.module:attribute on each line"
        )
    return _file(path)


def chosen(
    found: Sequence[Architecture],
    patterns: Sequence[str],
    one_per_family: bool = False,
    shard: Shard = WHOLE,
) -> list[Architecture]:
    """Those whose name or family matches a pattern, all without any; a shard's share of them.

    Raises `UnknownNameError` for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(matches(a, pattern) for a in found):
            raise unknown_name("architecture", pattern, [a.name for a in found])
    kept = [a for a in found if not patterns or any(matches(a, p) for p in patterns)]
    if one_per_family:
        families: dict[str, list[Architecture]] = {}
        for architecture in kept:
            families.setdefault(architecture.family, []).append(architecture)
        kept = [min(members, key=_size) for members in families.values()]
    return kept[shard.place - 1 :: shard.count]


def matches(architecture: Architecture | Row, pattern: str) -> bool:
    """Whether its name or family is as the pattern says, with * and ?."""
    return fnmatch(architecture.name, pattern) or fnmatch(architecture.family, pattern)


def _size(architecture: Architecture) -> int:
    """How large it is as its name tells it; timm's `test_` models stand for nobody."""
    if architecture.name.startswith("test_"):
        return len(_SMALL) + 1
    words = architecture.name.split("_")
    return next((place for place, word in enumerate(_SMALL) if word in words), len(_SMALL))


def _timm() -> Iterable[Architecture]:
    timm = require("timm", "vision")
    for name in timm.list_models():
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        yield Architecture(TIMM, name, family, f"timm {timm.__version__}", name)


# --------------------------------------------------------------------------- files


def _file(path: Path) -> list[Architecture]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text file") from None
    version = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    found = list(
        _python(path, text, version) if path.suffix == ".py" else _lines(path, text, version)
    )
    if not found:
        what = "function without arguments" if path.suffix == ".py" else "line with a name"
        raise InputError(f"{path} has no {what}, so that there is nothing to audit")
    return found


def _python(path: Path, text: str, version: str) -> Iterable[Architecture]:
    """Its public functions without arguments, each of which makes a model."""
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno} is no Python: {error.msg}") from None
    for made in body:
        if isinstance(made, ast.FunctionDef) and _is_factory(made):
            target = f"{path.absolute()}:{made.name}"
            yield Architecture(path.name, made.name, path.stem, version, target)


def _is_factory(made: ast.FunctionDef) -> bool:
    needed = len(made.args.posonlyargs + made.args.args) - len(made.args.defaults)
    return needed == 0 and not made.name.startswith("_")


def _lines(path: Path, text: str, version: str) -> Iterable[Architecture]:
    """`package.module:attribute [SHAPE...]` on each line; # begins a comment."""
    for line in text.splitlines():
        target, *shapes = line.partition("#")[0].split() or [""]
        if target:
            family = target.rpartition(":")[0] or target
            yield Architecture(path.name, target, family, version, target, tuple(shapes))
