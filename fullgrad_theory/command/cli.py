"""The command line: commands and their arguments; what a command does stands beside this file.

Nothing here imports torch, so that `--help` answers at once: a command imports what it needs.
Exit codes: 0 complete, 1 incomplete, 2 could not be judged (bad arguments included).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    As,
    Constant,
    Device,
    Explain,
    IfUnknown,
    Inputs,
    Name,
    Output,
    Pretrained,
    Quiet,
    Reporting,
    Traceback,
    Unknown,
    Verbose,
    Weights,
    fit_methods,
    fit_policies,
    fits_folder,
    fits_picture,
    fits_policy,
    known_policies,
    writable,
)
from .zoo import app as zoo

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Is a model's gradient FullGrad-complete, what breaks it, and what mends it?",
)
app.add_typer(zoo, name="zoo")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"fullgrad-theory {version('fullgrad-theory')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command(cls=Reporting)
def check(
    name: Name,
    inputs: Inputs = None,
    policy: Annotated[
        str | None,
        typer.Option(
            callback=fits_policy,
            autocompletion=known_policies,
            help="Judge the gradient with this policy's edits.",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(callback=writable, help="Write the report there as JSON.")
    ] = None,
    sarif: Annotated[
        Path | None, typer.Option(callback=writable, help="... as SARIF 2.1.0 (code scanning).")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(callback=writable, help="... as JUnit XML (test reports).")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(callback=writable, help="... as one page for a browser, the graph drawn."),
    ] = None,
    node_data: Annotated[
        Path | None,
        typer.Option(callback=writable, help="... as node data for Model Explorer, JSON."),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write the graph there, for Model Explorer."),
    ] = None,
    alternatives: Annotated[
        int, typer.Option(min=0, help="How many further plans the report shows beside.")
    ] = 0,
    dtype: As = None,
    device: Device = None,
    numeric: Annotated[
        bool, typer.Option("--numeric/--no-numeric", help="Measure, or structure alone.")
    ] = True,
    weights: Weights = None,
    pretrained: Pretrained = False,
    unknown: IfUnknown = Unknown.ERROR,
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    output: Output = None,
    constant: Constant = None,
    explain: Explain = None,
) -> None:
    """Check a model's gradient; exit code 0 complete, 1 incomplete, 2 could not be judged."""
    from . import checking, making

    chosen = making.Chosen(name, inputs, weights, pretrained, device, dtype)
    files = checking.Files(json, sarif, junit, html, node_data, graph)
    asked = checking.Asked(output, constant, explain)
    code = checking.check(chosen, policy, numeric, unknown, files, traceback, asked, alternatives)
    raise typer.Exit(code)


@app.command(cls=Reporting)
def view(
    name: Name,
    inputs: Inputs = None,
    policy: Annotated[
        str | None,
        typer.Option(
            callback=fits_policy,
            autocompletion=known_policies,
            help="Judge the gradient with this policy's edits.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, help="Where Model Explorer is served.")] = 8080,
    weights: Weights = None,
    pretrained: Pretrained = False,
    device: Device = None,
    dtype: As = None,
    numeric: Annotated[
        bool, typer.Option("--numeric/--no-numeric", help="Measure, or structure alone.")
    ] = True,
    unknown: IfUnknown = Unknown.ERROR,
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    output: Output = None,
    constant: Constant = None,
    explain: Explain = None,
) -> None:
    """Show a model's graph in Model Explorer, the verdicts laid over it; ends with Ctrl-C."""
    from . import checking, making, viewing

    chosen = making.Chosen(name, inputs, weights, pretrained, device, dtype)
    asked = checking.Asked(output, constant, explain)
    viewing.view(chosen, policy, numeric, unknown, port, traceback, asked)


@app.command(cls=Reporting)
def derive(
    name: Name,
    inputs: Inputs = None,
    policy: Annotated[
        str,
        typer.Option(
            callback=fits_policy,
            autocompletion=known_policies,
            help="The table of what each edit costs.",
        ),
    ] = "libra",
    save: Annotated[
        Path | None, typer.Option(callback=writable, help="Write the plan there.")
    ] = None,
    alternatives: Annotated[
        int, typer.Option(min=0, help="How many further plans to look for, the next cheapest.")
    ] = 0,
    device: Device = None,
    unknown: IfUnknown = Unknown.ERROR,
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    output: Output = None,
    constant: Constant = None,
    explain: Explain = None,
) -> None:
    """Derive the edits that a policy makes to a model's backward pass, and show why."""
    from . import checking, making

    chosen = making.Chosen(name, inputs, device=device)
    asked = checking.Asked(output, constant, explain)
    checking.derive(chosen, policy, alternatives, unknown, save, traceback, asked)


@app.command(cls=Reporting)
def certify(
    name: Name,
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=writable, help="Write the certificate there.")
    ],
    inputs: Inputs = None,
    policy: Annotated[
        str,
        typer.Option(
            callback=fits_policy,
            autocompletion=known_policies,
            help="The policy whose edits are proved.",
        ),
    ] = "libra",
    coq: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write the theorem for Coq there, a .v file."),
    ] = None,
    device: Device = None,
    unknown: IfUnknown = Unknown.ERROR,
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    output: Output = None,
    constant: Constant = None,
    explain: Explain = None,
) -> None:
    """Write the proof that a gradient is complete as a certificate; exit code as that of check."""
    from . import certifying, checking, making

    chosen = making.Chosen(name, inputs, device=device)
    asked = checking.Asked(output, constant, explain)
    code = certifying.certify(chosen, policy, unknown, out, coq, traceback, asked)
    raise typer.Exit(code)


@app.command(cls=Reporting)
def verify(
    certificate: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="What certify wrote.")
    ],
    name: Annotated[
        str | None,
        typer.Argument(help="The model it is about, as certify takes it; traced afresh."),
    ] = None,
    inputs: Inputs = None,
    device: Device = None,
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    output: Output = None,
    constant: Constant = None,
    explain: Explain = None,
) -> None:
    """Have the kernel check a certificate: exit code 0 where it proves what it says, else 1."""
    from . import certifying, checking, making

    chosen = making.Chosen(name, inputs, device=device) if name else None
    asked = checking.Asked(output, constant, explain)
    raise typer.Exit(certifying.check_certificate(certificate, chosen, traceback, asked))


@app.command(cls=Reporting)
def explain(
    name: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="The model, as the other commands take it; of text a transformers folder on disk, "
            "whose weights are random where it has none.",
        ),
    ],
    image: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="An image file.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A text, in place of an image.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", callback=fits_picture, help="Write the picture, or the page, there."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(callback=fit_methods, help="A method, once for each."),
    ] = None,
    policy: Annotated[
        list[str],
        typer.Option(
            callback=fit_policies,
            autocompletion=known_policies,
            help="Edits of the backward, or plain; repeatable.",
        ),
    ] = ["libra"],  # noqa: B006
    target: Annotated[
        str | None,
        typer.Option(
            help="The class to explain, of text also by its label, or the token; the prediction "
            "where left out."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Of text: why the target rather than this one.")
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(
            help="Of text: at which token, where each has scores; else at the mask, or the last."
        ),
    ] = None,
    special: Annotated[
        bool,
        typer.Option("--special/--no-special", help="Of text: show [CLS] and its kind, or not."),
    ] = True,
    inputs: Inputs = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    device: Device = None,
    output: Output = None,
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what an image's places or a text's words contribute, methods and policies beside."""
    from . import making

    asked = making.Wanted(output, target, against, position)
    if text is None:
        from . import explaining

        chosen = making.Chosen(name, inputs, weights, pretrained, device)
        methods = method or ["fullgrad+"]
        explaining.explain(chosen, image, methods, policy, asked, out, traceback)
    else:
        from . import telling

        methods = method or ["fullgrad"]
        telling.tell(text, Path(name), image, methods, policy, asked, out, traceback, special)


@app.command()
def policies() -> None:
    """List the policies: what each edits, and whether it makes a model complete."""
    from . import page

    page.policies()


@app.command()
def operators() -> None:
    """List the operations that are known: class, degree rule, edits, and each class's lemma.

    Besides an edit of its own, any edge may be pruned and any node of a degree above 0 scaled.
    """
    from . import page

    page.operators()


@app.command(cls=Reporting)
def fuzz(
    examples: Annotated[int, typer.Option(min=1, help="How many architectures.")] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="How many processes.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same ones.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=fits_folder, help="Keep state, failures and a summary there; resumes."
        ),
    ] = None,
    traceback: Traceback = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check this library on random architectures; exit code 0 where every property holds."""
    from . import checking

    raise typer.Exit(checking.campaign(examples, jobs, seed, out, traceback))
