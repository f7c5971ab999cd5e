"""The command line: arguments, progress, exit codes.

Exit codes: 0 complete, 1 incomplete, 2 could not be judged (bad arguments included).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .check import check_completeness
from .derive import derive_rules
from .errors import FullgradError, InputError, unknown_name
from .operators import LEMMAS, registered
from .policies import policies as known_policies
from .policies import policy as find_policy
from .progress import progress
from .report import WIDTH

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Is a model's gradient FullGrad-complete, what breaks it, and what mends it?",
)


class Dtype(StrEnum):
    """The dtypes a model may be cast to."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


# --------------------------------------------------------------------------- the door


def _fits_policy(name: str | None) -> str | None:
    if name is not None:
        try:
            find_policy(name)
        except FullgradError as error:
            raise typer.BadParameter(str(error)) from None
    return name


def _fits_device(name: str) -> str:
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


def _writable(path: Path | None) -> Path | None:
    if path is None:
        return None
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {str(path.parent)!r} does not exist; make it first")
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{str(path)!r} cannot be written")
    return path


Name = Annotated[str, typer.Argument(help="A timm model, for example vit_tiny_patch16_224.")]
Weights = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A local checkpoint; else random weights."),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm download its weights.")]
Device = Annotated[
    str, typer.Option(callback=_fits_device, help="cpu, cuda, ...; meta for structure alone.")
]
As = Annotated[Dtype, typer.Option(help="Cast the model; residuals are taken in float64 anyway.")]


@contextmanager
def _judging() -> Iterator[None]:
    """Anything that keeps a model from being judged is one message and exit code 2."""
    try:
        yield
    except (FullgradError, OSError) as error:
        _fail(str(error))
    except (MemoryError, torch.OutOfMemoryError):
        _fail("out of memory; --no-numeric needs less, and --device meta next to none")


def _fail(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {message}", style="red"))
    raise typer.Exit(2)


def _create(
    name: str, weights: Path | None, pretrained: bool, device: str, dtype: Dtype
) -> torch.nn.Module:
    """A timm model in eval mode: seeded random weights, a local checkpoint, or timm's own."""
    meta = torch.device(device).type == "meta"
    if pretrained + (weights is not None) + meta > 1:
        raise InputError("choose one of --weights, --pretrained and --device meta")
    with progress(f"creating {name}"):
        import timm  # not at the top: it takes seconds, and only models need it

        if not timm.is_model(name):
            raise unknown_name("model", name, timm.list_models())
        torch.manual_seed(0)
        with torch.device("meta" if meta else "cpu"):
            model = _loaded(timm.create_model, name, pretrained=pretrained)
        if weights is not None:
            _loaded(timm.models.load_checkpoint, model, str(weights), weights_only=True)
        created: torch.nn.Module = model.to(device, getattr(torch, dtype))
        return created.eval()


def _loaded(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Whatever timm, its download or a checkpoint raises is the user's error, in one line."""
    try:
        return load(*args, **kwargs)
    except Exception as error:
        said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise InputError(f"cannot load {args[-1]}: {type(error).__name__}: {said}") from error


def _print(*parts: Any) -> None:
    console = Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    for part in parts:
        console.print(part)


# --------------------------------------------------------------------------- commands


@app.command()
def check(
    name: Name,
    policy: Annotated[
        str | None,
        typer.Option(callback=_fits_policy, help="Judge the gradient with this policy's edits."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(callback=_writable, help="Write the report there as JSON.")
    ] = None,
    dtype: As = Dtype.FLOAT32,
    device: Device = "cpu",
    numeric: Annotated[
        bool, typer.Option("--numeric/--no-numeric", help="Measure, or structure alone.")
    ] = True,
    weights: Weights = None,
    pretrained: Pretrained = False,
) -> None:
    """Check a timm model's gradient; exit code 0 complete, 1 incomplete, 2 could not be judged."""
    with _judging():
        model = _create(name, weights, pretrained, device, dtype)
        report = check_completeness(model, policy=policy, numeric=numeric)
        if json is not None:
            json.write_text(report.to_json() + "\n", encoding="utf-8")
    _print(report if sys.stdout.isatty() else Text(str(report)))
    raise typer.Exit(report.exit_code)


@app.command()
def derive(
    name: Name,
    policy: Annotated[
        str, typer.Option(callback=_fits_policy, help="The table of what each edit costs.")
    ] = "libra",
    save: Annotated[
        Path | None, typer.Option(callback=_writable, help="Write the plan there.")
    ] = None,
    alternatives: Annotated[
        int, typer.Option(min=0, help="How many further plans to look for, the next cheapest.")
    ] = 0,
    device: Device = "meta",
) -> None:
    """Derive the edits that a policy makes to a timm model's backward pass, and show why."""
    with _judging():
        model = _create(name, None, False, device, Dtype.FLOAT32)
        with progress("deriving"):
            plan = derive_rules(model, policy=policy, alternatives=alternatives)
        if save is not None:
            plan.save(save)
    _print(Text(str(plan)))


@app.command()
def policies() -> None:
    """List the policies: what each edits, and whether it makes a model complete."""
    table = Table(box=SIMPLE, pad_edge=False)
    for title in ("policy", "complete", "what it does", "source"):
        table.add_column(title, overflow="fold")
    for entry in known_policies():
        words = "yes" if entry.complete else "no"
        table.add_row(entry.name, words, Text(entry.description), Text(entry.source))
    _print(table)


@app.command()
def operators() -> None:
    """List the operations that are known: class, degree rule, edits, and each class's lemma.

    Besides an edit of its own, any edge may be pruned and any node of a degree above 0 scaled.
    """
    lemmas = Table(box=SIMPLE, pad_edge=False)
    for title in ("class", "lemma"):
        lemmas.add_column(title, overflow="fold")
    for algebra, lemma in LEMMAS.items():
        lemmas.add_row(str(algebra), Text(lemma))
    table = Table(box=SIMPLE, pad_edge=False)
    for title in ("operation", "class", "degree rule", "edit of its own"):
        table.add_column(title, overflow="fold", no_wrap=title == "operation")
    for entry in sorted(registered(), key=lambda o: (list(LEMMAS).index(o.algebra), o.name)):
        cells = (entry.name, str(entry.algebra), entry.signature, ", ".join(entry.edits))
        table.add_row(*map(Text, cells))
    _print(table, lemmas)
