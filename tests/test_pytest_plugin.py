"""The pytest plugin as others have it: a process of its own, found by its entry point."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.fixture
def installed(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder whose pytest finds what pyproject.toml declares, as after an installation."""
    info = pytester.mkdir("site") / "fullgrad_theory_here-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fullgrad-theory-here\nVersion: 0\n"
    )
    lines = [f"[{group}]" for group in PLUGINS]
    lines += [f"{name} = {value}" for name, value in PLUGINS["pytest11"].items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{info.parent}")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return pytester


def test_it_costs_nothing_until_it_is_used(installed: pytest.Pytester) -> None:
    installed.makepyfile(
        """
        import sys

        def test_no_torch(request):
            assert request.config.pluginmanager.has_plugin("pytest_fullgrad_theory")
            assert not {"torch", "fullgrad_theory"} & set(sys.modules)
        """
    )
    result = installed.runpytest_subprocess("--strict-config", "--strict-markers")
    result.assert_outcomes(passed=1)
    result = installed.runpytest_subprocess("--fixtures")
    result.stdout.fnmatch_lines(["*fgt_complete*", "*fail unless it is FullGrad-complete*"])


def test_what_the_fixture_says(installed: pytest.Pytester) -> None:
    """One process for all of it: torch's import is most of what a process costs."""
    installed.makepyfile(
        my_models="""
        import torch
        from torch import nn

        class Gate(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.a(x) * torch.sigmoid(self.b(x))
        """,
        test_mine="""
        import pytest
        import torch
        from my_models import Gate
        from torch import nn

        import fullgrad_theory as fgt

        x = torch.linspace(-1, 1, 8).reshape(2, 4)

        def test_complete(fgt_complete):
            report = fgt_complete(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), x)
            assert isinstance(report, fgt.Report) and report.complete
            assert fgt_complete(Gate().eval(), x, policy="libra", seed=1).policy == "libra"

        def test_incomplete(fgt_complete):
            fgt_complete(Gate().eval(), x)

        def test_unjudged(fgt_complete):
            fgt_complete(nn.Dropout(), x)

        def test_no_gradient(fgt_complete):
            fgt_complete(lambda x: x * 0, x)

        def test_assert_complete():
            report = fgt.assert_complete(Gate().eval(), x, policy="libra")
            assert report.complete
            with pytest.raises(AssertionError, match="stands in the way") as caught:
                fgt.assert_complete(Gate().eval(), x)
            assert "end to end\\n" not in str(caught.value)
            with pytest.raises(fgt.FullgradError, match="training mode"):
                fgt.assert_complete(nn.Dropout(), x)
            with pytest.raises(AssertionError, match="COULD NOT BE JUDGED"):
                fgt.assert_complete(lambda x: x * 0, x)
        """,
    )
    result = installed.runpytest_subprocess("--fgt-report", "out", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*test_incomplete*",
            ">*fgt_complete(Gate().eval(), x)",
            "E*Failed: INCOMPLETE  Gate, the gradient as it is: relative error *",
            "E*aten.sigmoid.default  1 violated, error up to *",
            "E*where (top level) (my_models.py:10)",
            "*test_unjudged*",
            "E*Failed: COULD NOT BE JUDGED  Dropout*",
            "E*training mode*",
            "*test_no_gradient*",
            "E*Failed: COULD NOT BE JUDGED *",
        ]
    )
    said = result.stdout.str()
    assert "torch.__trace" not in said and "check.py" not in said
    out = installed.path / "out"
    tests = ["complete", "complete-2", "incomplete", "no_gradient", "unjudged"]
    names = {f"test_mine.py.test_{test}.{kind}" for test in tests for kind in ("json", "sarif")}
    assert {path.name for path in out.iterdir()} == names
    report = json.loads((out / "test_mine.py.test_incomplete.json").read_text())
    assert report["verdict"] == "INCOMPLETE"
    runs = {
        path.name: json.loads(path.read_text())["runs"][0] for path in sorted(out.glob("*.sarif"))
    }
    assert len({run["automationDetails"]["id"] for run in runs.values()}) == len(tests)
    first = runs["test_mine.py.test_incomplete.sarif"]["results"][0]
    where = first["locations"][0]["physicalLocation"]
    assert where["artifactLocation"]["uri"] == "my_models.py" and where["region"]["startLine"] == 10
    assert runs["test_mine.py.test_complete.sarif"]["results"] == []
    assert runs["test_mine.py.test_unjudged.sarif"]["results"][0]["ruleId"] == "problem"
