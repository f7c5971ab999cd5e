"""What is not imported before it is needed, and what is said where it is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import start_cost
from fullgrad_theory.errors import FullgradError, MissingExtraError
from fullgrad_theory.extras import require

ROOT = Path(__file__).resolve().parent.parent
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
IMPORTED = {"pillow": "PIL", "scikit-learn": "sklearn"}
MODULES = {
    IMPORTED.get(name, name): (name, extra)
    for extra in ("vision", "plots", "methods", "measure", "fuzz", "text")
    for name in (re.split(r"[<>=]", line)[0] for line in EXTRAS[extra])
}
LATE = {*MODULES, "ortools", "pandas", "typer", "rich"}
"""what is imported when it is needed, and no earlier"""

HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {hidden!r}:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""no finder finds the hidden packages: they are as if they were not installed"""
COMMAND = "from fullgrad_theory.command.cli import app; app()"


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    alone = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def imported(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a program leaves behind."""
    tail = "print('modules', *{m.partition('.')[0] for m in sys.modules})"
    body = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{tail}"
    done = python(body, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


# --------------------------------------------------------------------------- light


@pytest.mark.parametrize(
    "command", ["", "check", "derive", "explain", "policies", "operators", "zoo"]
)
def test_help_answers_without_torch(command: str) -> None:
    found = imported(COMMAND, *([command] if command else []), "--help")
    assert not found & {"torch", "numpy", "timm", "ortools"}


@pytest.mark.parametrize("arguments", [["policies"], ["--version"], ["check", "x", "--policy=y"]])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    assert "torch" not in imported(COMMAND, *arguments)


def test_importing_the_package_imports_nothing_else() -> None:
    assert not imported("import fullgrad_theory") & (LATE | {"torch", "numpy", "networkx"})


def test_touching_every_public_name_imports_nothing_but_torch() -> None:
    names = "import fullgrad_theory as f; [getattr(f, name) for name in f.__all__]"
    early = (imported(names) - imported("import torch, torch.export")) & LATE
    assert not early


def test_the_bars_of_the_experiment() -> None:
    """The times themselves are measured where nothing else runs: experiments/start_cost.py."""
    found = dict.fromkeys(start_cost.STARTS, 0.4) | {start_cost.TORCH: 0.4}
    assert start_cost.missed(found) == []
    assert len(start_cost.missed(dict.fromkeys(found, 0.6))) == 3
    slow = found | {start_cost.STARTS[1]: 0.5}
    assert start_cost.missed(slow) == ["import fullgrad_theory: 1.25 x torch, more than 1.2"]
    assert len(start_cost.table(found).splitlines()) == 2 + len(found)


# --------------------------------------------------------------------------- extras


@pytest.mark.parametrize("module", MODULES)
def test_a_missing_package_is_one_sentence_that_says_what_to_install(module: str) -> None:
    name, extra = MODULES[module]
    said = f"{name} is not installed: pip install 'fullgrad-theory[{extra}]'"
    done = python(
        HIDE.format(hidden={module})
        + f"from fullgrad_theory.extras import require\nrequire({module!r}, {extra!r})"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"fullgrad_theory.errors.MissingExtraError: {said}"


def test_what_is_there_is_imported() -> None:
    import timm.data

    assert require("timm.data", "vision") is timm.data
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_package.part", "plots")
    assert isinstance(caught.value, FullgradError) and isinstance(caught.value, ImportError)


def test_all_is_every_extra() -> None:
    (all_of_them,) = EXTRAS["all"]
    assert set(re.findall(r"\w+", all_of_them.partition("[")[2])) == {
        e for _, e in MODULES.values()
    }
    assert "fullgrad-theory[all]" in EXTRAS["test"]


SMALL = """
import torch
from torch import nn
import fullgrad_theory as fgt

model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).eval()
x = torch.randn(3, 4)
print(fgt.check_completeness(model, x))
assert fgt.check_completeness(model, x, policy="libra").complete
plan = fgt.derive_rules(model, x, alternatives=1)
print(plan)
balanced = fgt.balance(model, x, policy=plan)
assert torch.equal(balanced(x), model(x))
assert (fgt.fullgrad(balanced, x, target=1).error < 1e-4).all()
"""


def test_checking_and_balancing_need_no_extra() -> None:
    done = python(HIDE.format(hidden=set(MODULES)) + SMALL)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("hidden", "arguments", "extra"),
    [
        ("timm", ["check", "test_vit"], "vision"),
        ("timm", ["explain", "{image}", "--model", "test_vit", "-o", "{out}"], "vision"),
        ("PIL", ["explain", "{image}", "--model", "test_vit", "-o", "{out}"], "vision"),
        ("matplotlib", ["explain", "{image}", "--model", "test_vit", "-o", "{out}"], "plots"),
        ("hypothesis", ["fuzz", "--examples", "1"], "fuzz"),
    ],
)
def test_a_command_says_so_in_one_line(
    hidden: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    places = {"image": ROOT / "docs" / "scenes.jpg", "out": tmp_path / "out.png"}
    done = python(HIDE.format(hidden={hidden}) + COMMAND, *(a.format(**places) for a in arguments))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert done.stderr.endswith(f" is not installed: pip install 'fullgrad-theory[{extra}]'\n")


@pytest.mark.parametrize(
    ("hidden", "code", "extra"),
    [
        ("PIL", "ImageFolder({root!r})[0]", "vision"),
        ("torchvision", "ImageFolder({root!r})", "vision"),
        ("torchvision", "OxfordPets({root!r})", "vision"),
    ],
)
def test_a_data_set_says_so(hidden: str, code: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    (tmp_path / "oxford-iiit-pet" / "images").mkdir(parents=True)
    (tmp_path / "oxford-iiit-pet" / "annotations").mkdir()
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("")
    done = python(
        HIDE.format(hidden={hidden})
        + "from fullgrad_theory.data import ImageFolder, OxfordPets, Scenes\nScenes(2)[0]\n"
        + code.format(root=str(tmp_path))
    )
    assert f"is not installed: pip install 'fullgrad-theory[{extra}]'" in done.stderr
