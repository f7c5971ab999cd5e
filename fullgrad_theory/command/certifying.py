"""`certify` and `verify`."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from ..bars import progress
from ..check.certificate import Certificate, verify
from ..check.completeness import check_completeness
from ..check.coq import to_coq
from ..errors import CertificateError
from ..files import write_whole
from ..graph.tracing import trace
from .checking import Asked
from .making import Chosen, create, inputs_of
from .options import Unknown
from .page import error_line, judging, show
from .writing import withdraw


def certify(
    chosen: Chosen,
    policy: str,
    unknown: Unknown,
    out: Path,
    coq: Path | None,
    traceback: bool,
    asked: Asked,
) -> int:
    """Judge by structure, write the certificate; the exit code of the verdict."""
    with judging(traceback=traceback):
        withdraw(out)
        withdraw(coq)
        model = create(chosen, otherwise="meta")
        given = inputs_of(model, chosen)
        report = check_completeness(
            model, given, policy=policy, numeric=False, unknown=unknown, **asked.keywords
        )
        if not report.complete:
            show(Text(str(report)))
            return report.exit_code
        with progress("writing the certificate"):
            certificate = report.certificate()
            certificate.save(out)
            if coq is not None:
                write_whole(coq, to_coq(certificate))
    show(Text(said(certificate)))
    return 0


def check_certificate(file: Path, chosen: Chosen | None, traceback: bool, asked: Asked) -> int:
    """Verify a certificate, against a model where one is named: 0 where its theorem holds, 1 where
    it does not."""
    with judging(traceback=traceback):
        certificate, graph = Certificate.load(file), None
        if chosen is not None:
            model = create(chosen, otherwise="meta")
            given = inputs_of(model, chosen)
            with progress("tracing"):
                graph = trace(model, given, **asked.keywords)
        try:
            with progress("verifying"):
                verify(certificate, graph)
        except CertificateError as error:
            error_line(f"{file} does not hold: {error}")
            return 1
    about = "" if graph else "\nNo model is named: it is about any graph that has these steps."
    show(Text(said(certificate) + about))
    return 0


def said(certificate: Certificate) -> str:
    """The theorem of a certificate in a sentence, and what it rests on."""
    is_source = " is a source"
    sources = [s.removesuffix(is_source) for s in certificate.supposing if s.endswith(is_source)]
    besides = [s for s in certificate.supposing if not s.endswith(is_source)]
    under = f"under {certificate.policy}" if certificate.policy else "as it is"
    named = ", ".join(certificate.outputs)
    holds = "HOLDS, SUPPOSING what stands below" if besides else "PROVED"
    lines = [
        f"{holds}: {named} of {certificate.model} is the sum of what its gradient {under} gives "
        f"{', '.join(sources)} and the bias leaves, for every input and every parameter.",
        f"{len(certificate.steps)} steps, {len(certificate.claim['edits'])} edits.",
    ]
    if held := certificate.claim["held"]:
        lines.append(f"Held constant: {', '.join(held)}.")
    if besides:
        lines += ["Supposing, as this was measured or declared, not proved:"]
        lines += [f"  {one}" for one in besides]
    return "\n".join(lines)
