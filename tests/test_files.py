"""What is written is there whole or not at all; what was killed goes on with the same figures."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fullgrad_theory as fgt
from fullgrad_theory.files import whole, write_whole
from fullgrad_theory.measure.results import Results

ROOT = Path(__file__).parent.parent
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""


def full(path: Path) -> None:
    """Half of it, and then the disk is full."""
    path.write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_whole(file, "first")
    file.chmod(0o640)
    with pytest.raises(OSError, match="No space left"):
        whole(file, full)
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
    write_whole(file, "second")
    assert file.read_text() == "second" and file.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_link_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "plan.json", tmp_path / "plan.json"
    link.symlink_to(target)
    write_whole(link, "text")
    assert link.is_symlink() and target.read_text() == "text"


def test_results_and_plans_are_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fgt.derive_rules(nn.GELU().eval(), torch.randn(2, 3))
    results = Results.of([], {})
    plan.save(tmp_path / "plan.json")
    results.save(tmp_path / "results.json")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "write_text", lambda path, *args, **kwargs: full_at(path))
    for save in (plan.save, results.save):
        for file in ("plan.json", "results.json"):
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path / file)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def full_at(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def command(folder: Path, *arguments: object, setup: Callable[[], None] | None = None) -> object:
    (folder / "mine.py").write_text(MODEL)
    start = "from fullgrad_theory.command.cli import app; app()"
    return subprocess.run(
        [sys.executable, "-c", start, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, preexec_fn=setup,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def limited() -> None:
    """Files of 512 bytes at most: what a quota is, or a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "sarif", "junit"])
def test_a_full_disk_leaves_no_report_at_all(tmp_path: Path, kind: str) -> None:
    report = tmp_path / f"report.{kind}"
    report.write_text("the old one")
    arguments = ("check", "mine.py:build", "--input", "2,4", f"--{kind}", report)
    found = command(tmp_path, *arguments, setup=limited)
    assert found.returncode == 2, found.stderr
    assert found.stderr.strip().startswith("error:") and len(found.stderr.splitlines()) == 1
    # neither half of a new one, nor that of an earlier run, which would speak for this one
    assert {p.name for p in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


@pytest.mark.slow
def test_a_full_device_and_a_folder_for_reading_are_one_line(tmp_path: Path) -> None:
    for place in ("/dev/full", "/sys/report.json"):
        if not Path(place).parent.is_dir() or (place == "/dev/full" and not Path(place).exists()):
            continue
        for arguments in (
            ("check", "mine.py:build", "--input", "2,4", "--json", place),
            ("derive", "mine.py:build", "--input", "2,4", "--save", place),
        ):
            found = command(tmp_path, *arguments)
            assert found.returncode == 2, found.stderr
            assert "Traceback" not in found.stderr and found.stderr.strip()


@pytest.mark.slow
def test_a_pipe_that_closes_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    for words, code in (("operators", 0), ("check mine.py:build --input 2,4", 0)):
        start = "from fullgrad_theory.command.cli import app; app()"
        process = subprocess.Popen(
            [sys.executable, "-c", start, *words.split()],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before anything is written
        said = process.stderr.read().decode()
        assert process.wait() == code and not said, said


# --------------------------------------------------------------------------- killed

EVALUATING = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_evaluate import Vit, samples
from fullgrad_theory import Explainer, evaluate

METHODS = ("fullgrad+", "random")

class Slow(list):
    def __getitem__(self, index):
        time.sleep({pause})
        return super().__getitem__(index)

torch.manual_seed(0)
torch.set_num_threads(1)
model = Vit().eval()
made = Slow(samples(4))
found = evaluate(model, made, METHODS, "plain", "srg", batch_size=1, folder={folder!r})
found.save({out!r})
"""

FUZZING = """
import time
from collections import Counter
from pathlib import Path
from fullgrad_theory.testing import campaign
from fullgrad_theory.testing.campaign import Campaign, Tally

def work(first, count):
    time.sleep({pause})
    total = Tally()
    for seed in range(first, first + count):
        kind = "judged" if seed % 7 else "refused"
        total.add(Tally(1, 0.0, Counter({{kind: 1}}), Counter({{f"edit{{seed % 3}}": 1}})))
    return total

campaign.monotonic = lambda: 0.0
run = Campaign(200, 1, 3, Path({folder!r}), work=work)
run.run(lambda *args: None)
run.write_summary()
Path({out!r}).write_bytes((Path({folder!r}) / "summary.json").read_bytes())
"""


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "pattern"), [(EVALUATING, "batch-*.json"), (FUZZING, "state.json")]
)
def test_killed_and_resumed_the_figures_are_the_same(
    code: str, pattern: str, tmp_path: Path
) -> None:
    """Killed wherever it was, after something was kept; byte for byte."""

    def made(name: str, pause: float) -> tuple[str, Path, Path]:
        folder, out = tmp_path / name, tmp_path / f"{name}.json"
        tests = str(Path(__file__).parent)
        return (
            code.format(tests=tests, folder=str(folder), out=str(out), pause=pause), folder, out
        )  # fmt: skip

    text, _, expected = made("whole", 0.0)
    assert start(text).wait() == 0
    text, folder, out = made("killed", 0.3)
    process = start(text)
    while process.poll() is None and not any(folder.glob(pattern)):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    for kept in folder.glob("*.json"):
        json.loads(kept.read_text())
    assert start(text).wait() == 0
    assert out.read_bytes() == expected.read_bytes()
