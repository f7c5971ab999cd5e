"""Options that several commands share, and what is refused at the door. Needs no torch by itself.

What only torch can tell (a device, a dtype, a method's name) is asked of it when the option is
given, never for a `--help`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..bars import LOUD, Loud
from ..errors import FullgradError, InputError, unknown_name
from .writing import named_by, withdraw

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
"""of pictures, by the end of the file's name"""
PAGE = ".html"
"""the same of a page"""


class Unknown(StrEnum):
    """What becomes of an operation that nobody registered."""

    ERROR = "error"
    MEASURE = "measure"


class Dtype(StrEnum):
    """The dtypes a model may be cast to."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Shape:
    """One argument of a model: sizes, and its dtype where it is not the model's."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`'1,3,224,224'` or `'2,16:int64'`; raises `InputError`."""
        sizes, _, kind = text.partition(":")
        numbers = [part.strip() for part in sizes.split(",")]
        known = all(n.isdecimal() and len(n) < 19 and int(n) > 0 for n in numbers)
        if not known or text.endswith(":"):
            raise InputError(f"{text[:80]!r} is no shape; write sizes above 0 like 1,3,224,224")
        shape = cls(tuple(map(int, numbers)), _dtype(kind) if kind else None)
        if prod(shape.sizes) >= 2**48:
            raise InputError(f"{text[:80]!r} has more elements than any memory holds")
        return shape


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"{name!r} is no dtype of torch; try float32, int64 or bool")
    return found


def draw(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Seeded tensors of these shapes: normal in `dtype`, integers and bools from {0, 1}.

    0 and 1 are valid as token ids, as classes and as a mask, whatever the vocabulary.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def one(shape: Shape) -> Tensor:
        kind = shape.dtype or dtype
        if device.type == "meta":
            return torch.zeros(shape.sizes, dtype=kind, device=device)
        if kind.is_floating_point or kind.is_complex:
            wide = torch.complex64 if kind.is_complex else torch.float32
            tensor = torch.randn(shape.sizes, generator=generator, dtype=wide)
        else:
            tensor = torch.randint(0, 2, shape.sizes, generator=generator)
        return tensor.to(device, kind)

    def checked(shape: Shape) -> Tensor:
        need, there = prod(shape.sizes) * (shape.dtype or dtype).itemsize, _memory()
        words = ",".join(map(str, shape.sizes))
        if device.type == "cpu" and there and need > there:
            raise InputError(
                f"--input {words} takes {need / 2**30:.3g} GiB, and this machine has "
                f"{there / 2**30:.3g}: make it smaller, or choose --device meta"
            )
        try:
            return one(shape)
        except (RuntimeError, TypeError) as error:  # a quantised dtype, or one without kernels
            if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
                raise
            raise InputError(
                f"--input {words}: no values of {shape.dtype or dtype} can be drawn; try float32, "
                "int64 or bool"
            ) from error

    return tuple(map(checked, shapes))


def _memory() -> int:
    """Bytes of memory that the machine has; 0 where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


# --------------------------------------------------------------------------- the door


def fits_policy(name: str | None) -> str | None:
    """A policy's name."""
    if name is not None:
        from ..edits.costs import policy

        try:
            policy(name)
        except FullgradError as error:
            raise typer.BadParameter(str(error)) from None
    return name


def known_policies(begun: str) -> Iterator[tuple[str, str]]:
    """For a shell that completes: policies' names, each with what it does."""
    from ..edits.costs import policies

    return ((p.name, p.description) for p in policies() if p.name.startswith(begun))


def fit_policies(names: list[str]) -> list[str]:
    """Names of policies, each once."""
    return [name for name in dict.fromkeys(names) if fits_policy(name)]


def fit_methods(names: list[str] | None) -> list[str] | None:
    """Names of methods, each once."""
    if not names:
        return None
    from ..attribution.methods import METHODS

    for name in names:
        if name not in METHODS:
            raise typer.BadParameter(str(unknown_name("method", name, METHODS)))
    return list(dict.fromkeys(names))


def fits_device(name: str | None) -> str | None:
    """A device that torch sees here."""
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is no device; try cpu, cuda or meta") from None
    if device.type in ("cpu", "meta"):
        return name
    backend = getattr(torch, device.type, None)
    count = backend.device_count() if backend and backend.is_available() else 0
    if (device.index or 0) >= count:
        raise typer.BadParameter(f"torch sees {count} {device.type} devices here; try --device cpu")
    return name


def writable(path: Path | None) -> Path | None:
    """A file that can be written."""
    if path is None:
        return None
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {str(path.parent)!r} does not exist; make it first")
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{str(path)!r} cannot be written")
    return path


def fits_picture(path: Path | None) -> Path | None:
    """A file that can be written, in one of `FORMATS`, or a page."""
    endings = (*FORMATS, PAGE)
    if path is not None and path.suffix.lower() not in endings:
        raise typer.BadParameter(f"{path.name!r}: name a file that ends in {', '.join(endings)}")
    return writable(path)


def fits_folder(path: Path | None) -> Path | None:
    """A folder, or what may become one."""
    if path is not None and path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a file; name a folder")
    return path


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


_WRITTEN = ("--json", "--sarif", "--junit", "--html", "--node-data", "--graph")
"""the options that name a file of a report"""


class Reporting(TyperCommand):
    """A command whose mistakes in the options are one line, as all else that goes wrong; no report
    of an earlier run outlives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.Exit:  # --help
            raise
        except Exception as error:
            for path in named_by(_WRITTEN, given):
                withdraw(path)
            if not hasattr(error, "format_message"):
                raise
            from .page import error_line

            error_line(
                f"{' '.join(error.format_message().split())} (see {ctx.command_path} --help)"
            )
            raise typer.Exit(2) from None


# --------------------------------------------------------------------------- options


def _loudness(loud: Loud) -> Callable[[typer.Context, bool], bool]:
    """What a flag does: as long as the command runs, that much is shown of its work."""

    def choose(ctx: typer.Context, asked: bool) -> bool:
        if asked:
            before = LOUD.set(loud)
            ctx.call_on_close(lambda: LOUD.reset(before))
        return asked

    return choose


Name = Annotated[
    str,
    typer.Argument(
        help="A timm model (vit_tiny_patch16_224), or one of your own: package.module:attribute or "
        "path/to/file.py:attribute. The attribute is an nn.Module, or a class or a function that "
        "makes one without arguments; eval() is called on it. Any other function is itself what "
        "is traced, and needs --input."
    ),
]
Inputs = Annotated[
    list[Shape] | None,
    typer.Option(
        "--input",
        parser=_shape,
        metavar="SHAPE[:DTYPE]",
        help="The shape of an argument of forward(), 1,3,224,224; once for each of them. Values "
        "are seeded: normal, or, where a dtype says integers or bool (2,16:int64), from {0, 1}.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A local checkpoint; else random weights."),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm download its weights.")]
Device = Annotated[
    str | None,
    typer.Option(
        callback=fits_device,
        help="cpu, cuda, ...; meta for structure alone. Your own model stays where it is by default"
        " and is moved there after it is made.",
    ),
]
As = Annotated[
    Dtype | None,
    typer.Option(help="Cast the model; residuals are taken in float64 anyway."),
]
Traceback = Annotated[
    bool, typer.Option("--traceback", help="Show the Python traceback behind an error, too.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_loudness(Loud.QUIET),
        help="No progress; of a report its first line alone.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_loudness(Loud.LINES),
        help="Say each step on stderr, and how long it took.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What of the model's output is judged, by name (logits, aux.logits) or position (0); "
        "left out, its logits where it has some, else all of it.",
    ),
]
Constant = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="An input that is held constant, once for each."),
]
Explain = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="An input to explain, the rest being held constant."),
]
IfUnknown = Annotated[
    Unknown, typer.Option(help="Operations nobody registered: an error, or measured.")
]
