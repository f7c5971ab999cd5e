"""The command line: arguments, progress, exit codes.

Exit codes: 0 complete, 1 incomplete, 2 could not be judged (bad arguments included).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
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

from ..attribution.explainer import Explainer
from ..attribution.methods import METHODS
from ..bars import progress
from ..check.completeness import check_completeness
from ..check.formats import to_junit, to_sarif
from ..check.report import WIDTH, Report
from ..edits.published import policies as known_policies
from ..edits.published import policy as find_policy
from ..errors import FullgradError, InputError, unknown_name
from ..graph.door import Model, default_inputs, definition, home
from ..operators.classes import CLASSES
from ..operators.registry import registered
from ..plan.derivation import derive_rules
from .picture import FORMATS, class_name, draw, read, see
from .target import Shape, file_of, is_target, load
from .target import draw as draw_inputs

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Is a model's gradient FullGrad-complete, what breaks it, and what mends it?",
)


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


# --------------------------------------------------------------------------- the door


def _fits_policy(name: str | None) -> str | None:
    if name is not None:
        try:
            find_policy(name)
        except FullgradError as error:
            raise typer.BadParameter(str(error)) from None
    return name


def _fit_policies(names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if _fits_policy(name)]


def _fit_methods(names: list[str]) -> list[str]:
    for name in names:
        if name not in METHODS:
            raise typer.BadParameter(str(unknown_name("method", name, METHODS)))
    return list(dict.fromkeys(names))


def _picture(path: Path) -> Path:
    if path.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"{path.name!r}: name a file that ends in {', '.join(FORMATS)}")
    return _writable(path) or path


def _fits_device(name: str | None) -> str | None:
    if name is None:
        return None
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


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


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
        callback=_fits_device,
        help="cpu, cuda, ...; meta for structure alone. Your own model stays where it is by default"
        " and is moved there after it is made.",
    ),
]
As = Annotated[
    Dtype | None,
    typer.Option(help="Cast the model; residuals are taken in float64 anyway."),
]
IfUnknown = Annotated[
    Unknown, typer.Option(help="Operations nobody registered: an error, or measured.")
]


@contextmanager
def _judging(record: Callable[[str], None] = lambda why: None) -> Iterator[None]:
    """Anything that keeps a model from being judged is one message, recorded, and exit code 2."""
    try:
        yield
        return
    except (FullgradError, OSError) as error:
        why = str(error)
    except (MemoryError, torch.OutOfMemoryError):
        why = "out of memory; --no-numeric needs less, and --device meta next to none"
    record(why)
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {why}", style="red"))
    raise typer.Exit(2)


def _create(
    name: str,
    weights: Path | None,
    pretrained: bool,
    device: str | None,
    dtype: Dtype | None,
    otherwise: str = "cpu",
) -> Model:
    """A model in eval mode: timm's with seeded random weights or loaded ones, or the user's own."""
    if is_target(name):
        return _own(name, weights, pretrained, device, dtype)
    device = device or otherwise
    meta = torch.device(device).type == "meta"
    if pretrained + (weights is not None) + meta > 1:
        raise InputError("choose one of --weights, --pretrained and --device meta")
    with progress(f"creating {name}"):
        import timm  # not at the top: it takes seconds, and only models need it

        if not timm.is_model(name):
            error = unknown_name("model", name, timm.list_models())
            raise type(error)(f"{error}; one of your own is package.module:attribute")
        torch.manual_seed(0)
        with torch.device("meta" if meta else "cpu"):
            model = _loaded(timm.create_model, name, pretrained=pretrained)
        if weights is not None:
            _loaded(timm.models.load_checkpoint, model, str(weights), weights_only=True)
        created: torch.nn.Module = model.to(device, getattr(torch, dtype or Dtype.FLOAT32))
        return created.eval()


def _own(
    name: str, weights: Path | None, pretrained: bool, device: str | None, dtype: Dtype | None
) -> Model:
    """The user's model as their code makes it, then moved and cast where an option says so."""
    if pretrained:
        raise InputError(f"--pretrained is for timm models; let {name} load its own weights")
    with progress(f"creating {name}"):
        torch.manual_seed(0)
        model = load(name)
        if not isinstance(model, torch.nn.Module):
            if weights is not None:
                raise InputError(f"{name} is a function, which --weights cannot be loaded into")
            return model
        if weights is not None:
            import timm  # its loader knows safetensors and nested checkpoints

            _loaded(timm.models.load_checkpoint, model, str(weights), weights_only=True)
        cast = getattr(torch, dtype) if dtype else None
        return _loaded(lambda moved, _: moved.to(device, cast), model, name)


def _inputs(
    model: Model, shapes: list[Shape] | None, device: str | None, dtype: Dtype | None
) -> tuple[torch.Tensor, ...]:
    """What --input says, else what the model itself says it takes."""
    at, kind = home(model)
    if shapes:
        if not isinstance(model, torch.nn.Module):
            at, kind = torch.device(device or at), getattr(torch, dtype) if dtype else kind
        return draw_inputs(shapes, at, kind)
    try:
        return default_inputs(model)
    except InputError:
        raise InputError(
            "the model does not say what it takes: give each argument of its forward() a shape, "
            "for example --input 1,3,224,224"
        ) from None


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
    inputs: Inputs = None,
    policy: Annotated[
        str | None,
        typer.Option(callback=_fits_policy, help="Judge the gradient with this policy's edits."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(callback=_writable, help="Write the report there as JSON.")
    ] = None,
    sarif: Annotated[
        Path | None, typer.Option(callback=_writable, help="... as SARIF 2.1.0 (code scanning).")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(callback=_writable, help="... as JUnit XML (test reports).")
    ] = None,
    dtype: As = None,
    device: Device = None,
    numeric: Annotated[
        bool, typer.Option("--numeric/--no-numeric", help="Measure, or structure alone.")
    ] = True,
    weights: Weights = None,
    pretrained: Pretrained = False,
    unknown: IfUnknown = Unknown.ERROR,
) -> None:
    """Check a model's gradient; exit code 0 complete, 1 incomplete, 2 could not be judged."""

    category = f"{name}/{policy or 'plain'}"  # the same whether it could be judged or not

    def write(report: Report, defined: str) -> None:
        if json is not None:
            json.write_text(report.to_json() + "\n", encoding="utf-8")
        if sarif is not None:
            text = to_sarif(report, defined=defined, category=category)
            sarif.write_text(text + "\n", encoding="utf-8")
        if junit is not None:
            junit.write_text(to_junit(report) + "\n", encoding="utf-8")

    def unjudged(why: str) -> None:  # or the files of an earlier run would speak for this one
        write(Report.unjudged(name, policy, why), file_of(name))

    with _judging(unjudged):
        model = _create(name, weights, pretrained, device, dtype)
        given = _inputs(model, inputs, device, dtype)
        report = check_completeness(model, given, policy=policy, numeric=numeric, unknown=unknown)
    with _judging():
        write(report, definition(model) or file_of(name))
    _print(report if sys.stdout.isatty() else Text(str(report)))
    raise typer.Exit(report.exit_code)


@app.command()
def derive(
    name: Name,
    inputs: Inputs = None,
    policy: Annotated[
        str, typer.Option(callback=_fits_policy, help="The table of what each edit costs.")
    ] = "libra",
    save: Annotated[
        Path | None, typer.Option(callback=_writable, help="Write the plan there.")
    ] = None,
    alternatives: Annotated[
        int, typer.Option(min=0, help="How many further plans to look for, the next cheapest.")
    ] = 0,
    device: Device = None,
    unknown: IfUnknown = Unknown.ERROR,
) -> None:
    """Derive the edits that a policy makes to a model's backward pass, and show why."""
    with _judging():
        model = _create(name, None, False, device, None, otherwise="meta")
        given = _inputs(model, inputs, device, None)
        with progress("deriving"):
            plan = derive_rules(
                model, given, policy=policy, alternatives=alternatives, unknown=unknown
            )
        if save is not None:
            plan.save(save)
    _print(Text(str(plan)))


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An image file.")],
    name: Annotated[
        str,
        typer.Option("--model", metavar="NAME", help="The model, as the other commands take it."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=_picture, help="Write the picture there.")
    ],
    method: Annotated[
        list[str], typer.Option(callback=_fit_methods, help="A method, once for each.")
    ] = ["fullgrad+"],  # noqa: B006
    policy: Annotated[
        list[str],
        typer.Option(callback=_fit_policies, help="Edits of the backward, or plain; repeatable."),
    ] = ["libra"],  # noqa: B006
    target: Annotated[
        int | None, typer.Option(help="The class to explain; the prediction where left out.")
    ] = None,
    inputs: Inputs = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    device: Device = None,
) -> None:
    """Draw what an image's places contribute to a class: methods x policies in one picture."""
    with _judging():
        opened = read(image)
        model = _create(name, weights, pretrained, device, None)
        (example, *more) = _inputs(model, inputs, device, None)
        if more or example.dim() != 4:
            raise InputError("maps are of models that take one image tensor (1, 3, H, W)")
        seen = see(opened, model, example)
        maps: dict[str, dict[str, Any]] = {m: {} for m in method}
        with progress("explaining") as tick:
            for done, edits in enumerate(policy):
                tick(edits, done, len(policy))
                explainer = Explainer(model, example, edits)
                for m, found in explainer(seen.pixels, method, target).items():
                    maps[m][edits] = found
        with torch.no_grad():
            likely = explainer.scores(seen.pixels).softmax(-1)
        one = next(iter(maps[method[0]].values()))
        chosen = "the output" if one.target is None else class_name(model, int(one.target[0]))
        share = "" if one.target is None else f", probability {float(likely[0, one.target[0]]):.3g}"
        title = f"{name}: {chosen}, value {float(one.output[0]):.4g}{share}"
        draw(seen, maps, title, out)
    _print(Text(title), _explained(maps), Text(f"written to {out}"))


def _explained(maps: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("method", "policy", "grid", "completeness error"):
        table.add_column(heading)
    for method, by_policy in maps.items():
        for policy, found in by_policy.items():
            error = "-" if found.error is None else f"{float(found.error[0]):.2g}"
            table.add_row(method, policy, " x ".join(map(str, found.values.shape[1:])), error)
    return table


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
    for algebra, kind in CLASSES.items():
        lemmas.add_row(str(algebra), Text(kind.lemma))
    table = Table(box=SIMPLE, pad_edge=False)
    for title in ("operation", "class", "degree rule", "edit of its own"):
        table.add_column(title, overflow="fold", no_wrap=title == "operation")
    for entry in sorted(registered(), key=lambda o: (list(CLASSES).index(o.algebra), o.name)):
        cells = (entry.name, str(entry.algebra), entry.signature, ", ".join(entry.edits))
        table.add_row(*map(Text, cells))
    _print(table, lemmas)


def _folder(path: Path | None) -> Path | None:
    if path is not None and path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a file; name a folder")
    return path


@app.command()
def fuzz(
    examples: Annotated[int, typer.Option(min=1, help="How many architectures.")] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="How many processes.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same ones.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(callback=_folder, help="Keep state, failures and a summary there; resumes."),
    ] = None,
) -> None:
    """Check this library on random architectures; exit code 0 where every property holds."""
    from ..testing.campaign import Campaign, summary  # hypothesis is needed here alone

    campaign = Campaign(examples, jobs, seed, out)
    with _judging(), progress("fuzzing", after=0.0) as tick:
        campaign.run(tick)
        campaign.write_summary()
    _print(Text(summary(campaign)))
    raise typer.Exit(1 if campaign.tally.failures else 0)
