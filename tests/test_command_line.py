"""How loud the command line is, its colours, its completion, and what `view` hands over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fullgrad_theory.bars import LOUD, Loud
from fullgrad_theory.command.cli import app

ROOT = Path(__file__).resolve().parent.parent
OWN = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 4), nn.GELU())
"""
EXPLORER = """
import json, pathlib

class Config(dict):
    def add_model_from_path(self, path):
        self["graph"] = json.loads(pathlib.Path(path).read_text())
        return self

    def add_node_data_from_path(self, path):
        self["data"] = json.loads(pathlib.Path(path).read_text())
        return self

config = Config

def visualize_from_config(config, port):
    pathlib.Path("shown.json").write_text(json.dumps(config | {"port": port}))
    raise KeyboardInterrupt  # as it ends
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, without a terminal."""
    code = "from fullgrad_theory.command.cli import app; app(prog_name='fullgrad-theory')"
    alone = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=alone, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


GIVEN = ("check", "own.py:build", "--input", "2,4", "--no-numeric")


@pytest.mark.usefixtures("own")
def test_quiet_is_the_verdict_alone() -> None:
    done = CliRunner().invoke(app, [*GIVEN, "--quiet"])
    assert done.exit_code == 1
    assert done.output == ("INCOMPLETE  Sequential, the gradient as it is: nothing was measured\n")
    assert LOUD.get() is Loud.BAR  # for whoever calls next


@pytest.mark.usefixtures("own")
def test_verbose_says_each_step() -> None:
    done = CliRunner().invoke(app, [*GIVEN, "-v"])
    steps = [line.rpartition(",")[0] for line in done.stderr.splitlines()]
    assert steps == ["creating own.py:build", "checking: tracing", "checking: deriving"]
    assert "\noperations\n" in done.stdout
    assert not CliRunner().invoke(app, [*GIVEN]).stderr


def test_no_color_takes_the_colours_away() -> None:
    coloured = command("view", "own.py", FORCE_COLOR="1")
    plain = command("view", "own.py", FORCE_COLOR="1", NO_COLOR="1")
    assert coloured.stderr.startswith("\x1b[31merror: ")
    assert plain.stderr.startswith("error: ") and "\x1b[3" not in plain.stderr


def test_a_shell_completes_commands_and_policies() -> None:
    def completed(words: str) -> list[str]:
        place = str(len(words.split(" ")) - 1)
        asked = {"COMP_WORDS": words, "COMP_CWORD": place}
        return command(_FULLGRAD_THEORY_COMPLETE="complete_bash", **asked).stdout.split()

    assert {"certify", "check"} <= set(completed("fullgrad-theory c"))
    assert completed("fullgrad-theory check --policy li") == ["libra"]
    assert "libra" in completed("fullgrad-theory explain --policy l")


def test_view_says_what_is_missing() -> None:
    done = command("view", "own.py")
    assert done.returncode == 2
    assert done.stderr == (
        "error: ai-edge-model-explorer is not installed: pip install 'fullgrad-theory[view]'\n"
    )


def test_view_hands_over_graph_and_verdicts(own: Path) -> None:
    (own / "model_explorer.py").write_text(EXPLORER)
    done = command("view", *GIVEN[1:], "--port", "8181", PYTHONPATH=f"{ROOT}{os.pathsep}{own}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("INCOMPLETE")
    shown = json.loads((own / "shown.json").read_text())
    assert shown["port"] == 8181
    (graph,) = shown["graph"]["graphs"]
    assert [node["label"] for node in graph["nodes"]] == ["input_1", "linear", "gelu", "output"]
    assert shown["data"]["Sequential"]["results"]["gelu"]["value"] == "✕ violated"
