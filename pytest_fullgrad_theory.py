"""The pytest plugin of fullgrad_theory: the fixture `fgt_complete` and the option `--fgt-report`.

It imports the package, and so torch, in the first test that uses it: whoever has the plugin
installed pays for nothing before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    from fullgrad_theory import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fgt-report DIR`."""
    parser.getgroup("fullgrad_theory").addoption(
        "--fgt-report",
        metavar="DIR",
        help="write a JSON and a SARIF file there for each model that fgt_complete checks",
    )


@pytest.fixture
def fgt_complete(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """`fgt_complete(model, inputs=None, *, policy=None, ...)`: fail unless it is FullGrad-complete.

    Takes what `fullgrad_theory.check_completeness` takes and returns its report. A model that is
    incomplete, or that cannot be judged, fails the test with what stands in the way.
    """
    folder = request.config.getoption("--fgt-report")
    checked: list[str] = []

    def check(model: Any, inputs: Any = None, **options: Any) -> Report:
        __tracebackhide__ = True
        from fullgrad_theory import FullgradError, Report, check_completeness

        try:
            with _no_structured_trace():
                report = check_completeness(model, inputs, **options)
        except FullgradError as error:
            name = getattr(model, "__name__", None) or type(model).__name__
            policy = options.get("policy")
            report = Report.unjudged(name, policy and str(policy), str(error))
        if folder is not None:
            checked.append(request.node.nodeid)
            _write(report, model, request.config.invocation_params.dir / folder, checked)
        if not report.complete:
            pytest.fail(report.brief())
        return report

    return check


@contextmanager
def _no_structured_trace() -> Iterator[None]:
    """Keep torch's structured trace out of the captured log, whose length would hide the report.

    pytest 9.2 captures loggers that do not propagate as well.
    """
    logger = logging.getLogger("torch.__trace")
    captured = [h for h in logger.handlers if type(h).__module__.startswith("_pytest.")]
    for handler in captured:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        for handler in captured:
            logger.addHandler(handler)


def _write(report: Report, model: Any, folder: Path, checked: list[str]) -> None:
    """`tests.test_model.py.test_mine.json` and `.sarif`, the second check of a test `...-2`."""
    from fullgrad_theory.check.formats import to_sarif
    from fullgrad_theory.graph.door import definition

    test = checked[-1] + (f"-{len(checked)}" if len(checked) > 1 else "")
    name = quote(test.replace("/", ".").replace("::", "."), safe="[]-+=, ")
    if len(name) > 200:  # of the 255 that file systems take
        name = name[:180] + sha256(test.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(report.to_json() + "\n", encoding="utf-8")
    sarif = to_sarif(report, defined=definition(model), category=test)
    (folder / f"{name}.sarif").write_text(sarif + "\n", encoding="utf-8")
