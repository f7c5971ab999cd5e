"""At the door: whatever the user's code does, an exit code that is no verdict, one line, the cause.

Each row is a model or a command as people have them. `HOSTILE` fail by their own code, `UNTRACED`
for a cause that is named, `TAKEN` are models that look like those and are right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import fullgrad_theory as fgt
from fullgrad_theory import errors
from fullgrad_theory.command import cli
from fullgrad_theory.command.writing import withdraw
from fullgrad_theory.files import replacing
from fullgrad_theory.graph.modes import acts_in_training


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = seeded(2, 4)

CODE = """
import copy
import sys
import threading
import warnings

import torch
from torch import nn
from torch.nn import functional as F


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)


class Unasked(nn.Module):  # no __init__ of its own
    def forward(self, x):
        return x * 2


class Named(Base):
    def forward(self, x):
        return self.fc(x)


class Asserts(Base):
    def forward(self, x):
        assert x.shape[1] == 5, "five columns\\nor none"
        return self.fc(x)


class Looks(Base):
    def forward(self, x):
        return self.fc({"a": x}["b"])


class Exits(Base):
    def forward(self, x):
        sys.exit(0)


class ExitsLate(Base):  # where it runs for real, behind the trace
    def forward(self, x):
        if type(x) is torch.Tensor and type(self.fc.weight) is nn.Parameter:
            sys.exit(0)
        return self.fc(x)


class ExitsInDouble(Base):
    def forward(self, x):
        if type(x) is torch.Tensor and x.dtype == torch.float64:
            sys.exit(0)
        return self.fc(x)


class Stops(Base):
    def forward(self, x):
        raise GeneratorExit


class Own(BaseException):
    pass


class Raises(Base):
    def forward(self, x):
        raise Own("mine")


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")


class Mutters(Base):
    def forward(self, x):
        raise Unspeakable


class Recurses(Base):
    def forward(self, x):
        return self.forward(x)


class Forgets(Base):
    def forward(self, x):
        raise MemoryError


class Interrupts(Base):
    def forward(self, x):
        raise KeyboardInterrupt


class Ends(Base):
    def forward(self, x):
        raise EOFError("no more")


class Locked(Base):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        return self.fc(x)


class Stubborn(Base):
    def __deepcopy__(self, memo):
        raise SystemExit(0)

    def forward(self, x):
        return self.fc(x)


class Builds(nn.Module):
    def __init__(self):
        super().__init__()
        sys.exit(0)


class Evaluates(Base):
    def eval(self):
        sys.exit(0)


class Hooked(Base):
    def __init__(self):
        super().__init__()
        self.fc.register_forward_hook(self.look)

    def look(self, *given):
        raise KeyError("in a hook")

    def forward(self, x):
        return self.fc(x)


class Moves(Base):
    def _apply(self, *given, **named):
        raise SystemExit(0)


class Branches(Base):
    def forward(self, x):
        if x.sum() > 0:
            return self.fc(x)
        return self.fc(x) ** 2


class Counts(Base):
    def forward(self, x):
        n = int((x > 0).sum())
        return self.fc(x) * torch.arange(n + 1).sum()


class Floats(Base):
    def forward(self, x):
        return self.fc(x) * float(x.sum())


class Loops(Base):
    def forward(self, x):
        y = self.fc(x)
        for i in (x > 0).nonzero():
            y = y + i.sum()
        return y


class Numpy(Base):
    def forward(self, x):
        return self.fc(x) * torch.from_numpy(x.detach().numpy()).sum()


class Prints(Base):
    def forward(self, x):
        f"{x.sum():.3f}"
        return self.fc(x)


class Copies(Base):
    def forward(self, x):
        return copy.deepcopy(self.fc)(x)


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Sparse(Base):
    def forward(self, x):
        return torch.sparse.mm(x.to_sparse(), self.fc.weight.t())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, x, y):
        return self.body(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(3))


@torch.library.custom_op("door::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Custom(Base):
    def forward(self, x):
        return twice(self.fc(x))


class Apart(Base):
    def forward(self, x):
        return self.fc(x) * torch.ones(3, device="meta")


class Closes(Base):
    def forward(self, x):
        sys.stdout = sys.stderr = None
        return self.fc(x)


class Warns(Base):
    def forward(self, x):
        warnings.warn("something of the model's own")
        return self.fc(x)


class WarnsAndFails(Base):
    def forward(self, x):
        warnings.warn("something of the model's own")
        raise KeyError("b")


class Misconfigured(Base):
    pretrained_cfg = {"input_size": (3, -1, "wide")}

    def forward(self, x):
        return self.fc(x)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        sys.exit(0)


class ExitsBackwards(Base):
    def forward(self, x):
        return Backwards.apply(self.fc(x))


class HookedParameter(Base):
    def __init__(self):
        super().__init__()
        self.fc.weight.register_hook(lambda g: sys.exit(0))

    def forward(self, x):
        return self.fc(x)


class Hides(Base):
    def named_modules(self, *given, **named):
        raise KeyError("hidden")

    def forward(self, x):
        return self.fc(x)


class Allocates(Base):
    def forward(self, x):
        return self.fc(x) + torch.empty(10**15).sum()


def lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.ReLU())


def half():
    return nn.Linear(4, 3).bfloat16()


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(4, 3)), nn.ReLU())


def quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})


def embeds():
    return nn.Embedding(3, 2)


def leaves():
    sys.exit(0)


def nothing(x):
    return None


def text(x):
    return "no tensor"


def shorter(x):
    return x[:, 9]
"""

FOUR = ("--input", "2,4")

# name -> options, exit code, words that must appear, words that must not
HOSTILE: dict[str, tuple[str, tuple[str, ...], int, tuple[str, ...]]] = {
    "assertion": ("Asserts", FOUR, 2, ("AssertionError: five columns", "hostile.py:")),
    "key": ("Looks", FOUR, 2, ("KeyError: 'b'", "hostile.py:")),
    "exit": ("Exits", FOUR, 2, ("SystemExit: 0", "hostile.py:")),
    "late exit": ("ExitsLate", FOUR, 2, ("SystemExit: 0",)),
    "generator exit": ("Stops", FOUR, 2, ("GeneratorExit",)),
    "base exception": ("Raises", FOUR, 2, ("Own: mine",)),
    "no words": ("Mutters", FOUR, 2, ("Unspeakable",)),
    "recursion": ("Recurses", FOUR, 2, ("RecursionError", "hostile.py:")),
    "memory": ("Forgets", FOUR, 2, ("out of memory",)),
    "interrupt": ("Interrupts", FOUR, 130, ("interrupted",)),
    "end of file": ("Ends", FOUR, 2, ("EOFError: no more",)),
    "lock": ("Locked", FOUR, 2, ("cannot be copied", "'lock'", "__deepcopy__")),
    "copy exits": ("Stubborn", FOUR, 2, ("cannot be copied", "SystemExit: 0")),
    "builder exits": ("Builds", FOUR, 2, ("SystemExit: 0", "hostile.py:")),
    "eval exits": ("Evaluates", FOUR, 2, ("SystemExit: 0", "eval()")),
    "cast exits": ("Moves", (*FOUR, "--dtype", "float64"), 2, ("SystemExit",)),
    "hook": ("Hooked", FOUR, 2, ("KeyError: 'in a hook'",)),
    "warning": ("WarnsAndFails", FOUR, 2, ("KeyError: 'b'",)),
    "configuration": ("Misconfigured", (), 2, ("--input 1,3,224,224",)),
    "modules hidden": ("Hides", FOUR, 2, ("KeyError: 'hidden'", "hostile.py:")),
    "allocates": ("Allocates", FOUR, 2, ("out of memory",)),
    "function exits": ("leaves", FOUR, 2, ("SystemExit: 0",)),
    "no output": ("nothing", FOUR, 2, ("no floating-point tensor",)),
    "text output": ("text", FOUR, 2, ("no floating-point tensor",)),
    "index": ("shorter", FOUR, 2, ("IndexError", "hostile.py:")),
    "no such class": ("Asert", FOUR, 2, ("did you mean Asserts",)),
    "wrong shape": ("Named", ("--input", "2,5"), 2, ("(2, 5)", "does not run")),
    "no shape": ("Named", ("--input", "2;4"), 2, ("no shape",)),
    "negative": ("Named", ("--input", "-2,4"), 2, ("no shape",)),
    "zero": ("Named", ("--input", "0,4"), 2, ("no shape",)),
    "huge": ("Named", ("--input", "9" * 30 + ",4"), 2, ("no shape",)),
    "too many elements": ("Named", ("--input", "999999999,999999999"), 2, ("memory",)),
    "more than there is": ("Named", ("--input", "99999999,100000"), 2, ("GiB",)),
    "no dtype": ("Named", ("--input", "2,4:int65"), 2, ("no dtype",)),
    "empty dtype": ("Named", ("--input", "2,4:"), 2, ("no shape",)),
    "quantised dtype": ("Named", ("--input", "2,4:qint8"), 2, ("qint8", "try float32")),
    "too many inputs": ("Named", (*FOUR, *FOUR), 2, ("do not fit",)),
    "floats as ids": ("embeds", FOUR, 2, ("does not run", "Long")),
    "integers": ("Named", ("--input", "2,4:int64"), 2, ("does not run", "same dtype")),
}

NO_BRANCH = ("control flow", "usual cause", "torch.where", "While executing")
UNTRACED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "branch": (
        "Branches",
        FOUR,
        ("control flow that depends on a tensor's values", "`if x.sum() > 0:`", "hostile.py:"),
        ("unknown",),
    ),
    "loop": ("Loops", FOUR, ("loop whose length depends", "nonzero()"), NO_BRANCH),
    "float()": ("Floats", FOUR, ("Python number", "float(x.sum())"), NO_BRANCH),
    "int()": ("Counts", FOUR, ("depends on a tensor's values|Python number",), NO_BRANCH),
    "numpy": ("Numpy", FOUR, ("numpy", "hostile.py:"), NO_BRANCH),
    "format": ("Prints", FOUR, ("print", "hostile.py:"), NO_BRANCH),
    "deepcopy": ("Copies", FOUR, ("memory itself", "hostile.py:"), NO_BRANCH),
    "packed": ("Packs", ("--input", "2,3,4"), ("packs sequences", "padded"), NO_BRANCH),
    "sparse": ("Sparse", FOUR, ("_to_sparse", "dense"), NO_BRANCH),
    "mask": (
        "Masked",
        ("--input", "2,3,8", "--input", "2,3,8"),
        ("tgt_is_causal=True",),
        NO_BRANCH,
    ),
    "no fake kernel": ("Custom", FOUR, ("door::twice", "register_fake"), NO_BRANCH),
    "devices": ("Apart", FOUR, ("device",), NO_BRANCH),
    "lazy": ("lazy", FOUR, ("LazyLinear (0)", "dry run"), (*NO_BRANCH, "does not run")),
    "bfloat16": ("half", ("--input", "2,4:float32"), ("bfloat16", "x.to(", "float32"), NO_BRANCH),
    "scripted": ("scripted", FOUR, ("scripted module", "made from"), NO_BRANCH),
    "quantised": ("quantised", FOUR, ("quantised",), NO_BRANCH),
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the user's code, which is left as it was: not imported."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.py").write_text(CODE)
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refused(result: Result, code: int) -> str:
    """What one line says, and that it is one: no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert not result.stdout
    assert "Traceback" not in result.output and "While executing" not in result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.usefixtures("project")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_users_code_raises_is_no_verdict(name: str) -> None:
    target, options, code, words = HOSTILE[name]
    line = refused(invoke("check", f"hostile.py:{target}", *options), code)
    for word in words:
        assert word in line, line
    assert "control flow" not in line and "numeric=False" not in line


@pytest.mark.usefixtures("project")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNTRACED)
def test_each_cause_has_its_own_words(name: str) -> None:
    target, options, words, others = UNTRACED[name]
    line = refused(invoke("check", f"hostile.py:{target}", *options), 2)
    for word in words:
        assert any(part in line for part in word.split("|")), line
    assert not [word for word in others if word in line], line


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("target", ["ExitsInDouble", "ExitsBackwards", "HookedParameter"])
def test_an_exit_in_the_audit_alone_is_no_verdict(target: str) -> None:
    result = invoke("check", f"hostile.py:{target}", *FOUR)
    assert result.exit_code == 2 and "SystemExit: 0" in " ".join(result.output.split())


@pytest.mark.usefixtures("project")
def test_streams_and_warnings() -> None:
    result = invoke("check", "hostile.py:Closes", *FOUR)
    assert result.exit_code == 0 and result.stdout.startswith("COMPLETE")
    with pytest.warns(UserWarning, match="of the model's own"):
        assert invoke("check", "hostile.py:Warns", *FOUR).exit_code == 0
    with warnings.catch_warnings(record=True) as given:
        assert invoke("check", "hostile.py:WarnsAndFails", *FOUR).exit_code == 2
    assert not given


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("command", ["check", "derive"])
def test_a_file_that_exits_and_a_forward_that_does(command: str) -> None:
    for target in ("exits.py:model", "hostile.py:Exits", "hostile.py:leaves"):
        line = refused(invoke(command, target, *FOUR), 2)
        assert "SystemExit: 0" in line


def test_explain_of_a_model_that_exits(project: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(project / "image.png")
    (project / "out.png").write_text("of an earlier run")
    arguments = ("image.png", "--model", "hostile.py:Exits", "--input", "1,3,8,8")
    assert "SystemExit: 0" in refused(invoke("explain", *arguments, "-o", "out.png"), 2)
    assert not (project / "out.png").exists()
    assert "the image itself" in refused(invoke("explain", *arguments, "-o", "image.png"), 2)
    assert (project / "image.png").exists()


@pytest.mark.usefixtures("project")
def test_traceback_shows_where_it_was_raised() -> None:
    result = invoke("check", "hostile.py:Looks", *FOUR, "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and 'return self.fc({"a": x}["b"])' in result.stderr
    assert "While executing" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: Looks does not run")


@pytest.mark.usefixtures("project")
def test_a_model_without_an_init_of_its_own() -> None:
    assert invoke("check", "hostile.py:Unasked", *FOUR).exit_code == 0
    assert invoke("check", "hostile.py:Named", *FOUR).exit_code == 0


# --------------------------------------------------------------------------- reports

REPORTS = ("--json", "r.json", "--sarif", "r.sarif", "--junit", "r.xml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("hostile.py:Exits", *FOUR),
        ("exits.py:model", *FOUR),
        ("hostile.py:Interrupts", *FOUR),
        ("hostile.py:Named", "--input", "0,4"),
        ("hostile.py:Named", *FOUR, "--no-such-option"),
        ("hostile.py:Named", *FOUR, "--policy", "libre"),
    ],
)
def test_no_report_of_an_earlier_run_stands(project: Path, arguments: tuple[str, ...]) -> None:
    assert invoke("check", "hostile.py:Named", *FOUR, *REPORTS).exit_code == 0
    assert invoke("check", *arguments, *REPORTS).exit_code not in (0, 1)
    for name in ("r.json", "r.sarif", "r.xml"):
        file = project / name
        assert not file.exists() or "COMPLETE" not in file.read_text().replace("INCOMPLETE", "")
    assert not list(project.glob(".writing-*"))


def test_a_plan_of_an_earlier_run_does_not_stand(project: Path) -> None:
    (project / "plan.json").write_text("of an earlier run")
    assert invoke("derive", "hostile.py:Exits", *FOUR, "--save", "plan.json").exit_code == 2
    assert not (project / "plan.json").exists()
    assert invoke("derive", "hostile.py:Named", *FOUR, "--save", "plan.json").exit_code == 0
    assert (project / "plan.json").exists()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(file) as beside:
        beside.write_text("half of it")
        raise OSError("the disk is full")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    link = tmp_path / "link.json"
    link.symlink_to(file)
    with replacing(link) as beside:
        beside.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"
    withdraw(file)
    assert not file.exists() and withdraw(None) is None


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    withdraw(tmp_path / "pipe")
    with replacing(tmp_path / "pipe") as place:
        place.write_text("through")
    reader.join(timeout=10)
    assert read == ["through"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "code"),
    [("Exits", 2), ("ExitsInDouble", 2), ("Named", 0), ("Interrupts", 130), ("Locked", 2)],
)
def test_exit_codes_of_the_process(project: Path, target: str, code: int) -> None:
    command = "from fullgrad_theory.command.cli import app; app()"
    home = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", command, "check", f"hostile.py:{target}", *FOUR],
        capture_output=True, text=True, cwd=project, timeout=300,
        env={**os.environ, "PYTHONPATH": home},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    if not done.stdout:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_changes_no_exit_code(project: Path) -> None:
    home = str(Path(__file__).parent.parent)
    line = (
        f"{sys.executable} -c 'from fullgrad_theory.command.cli import app; app()' check "
        f"hostile.py:Named --input 2,4 | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=project, timeout=300,
        env={**os.environ, "PYTHONPATH": home},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- as a library


class Module(nn.Module):
    """A module of one function, with parts."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *given: Any) -> Any:
        return self.function(self, *given)


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("call", [fgt.trace, fgt.check_completeness, fgt.derive_rules, fgt.balance])
@pytest.mark.parametrize(
    "error", [KeyError("boom"), SystemExit(0), AssertionError(), StopIteration()]
)
def test_foreign_errors_come_as_ours(call: Any, error: BaseException) -> None:
    model = Module(lambda m, x: _raise(error)).eval()
    with pytest.raises(errors.InputError, match=type(error).__name__) as caught:
        call(model, X)
    assert "test_door.py:" in str(caught.value)
    assert type(caught.value.__cause__) is type(error)


@pytest.mark.parametrize("call", [fgt.trace, fgt.check_completeness, fgt.derive_rules])
def test_an_interrupt_is_left_alone(call: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        call(Module(lambda m, x: _raise(KeyboardInterrupt())).eval(), X)


class Stop(Exception):
    pass


def test_whom_a_check_tells_may_end_it() -> None:
    def listen(stage: str, done: int, total: int) -> None:
        if stage.startswith("end to end"):
            raise Stop

    with pytest.raises(Stop):
        fgt.check_completeness(nn.Linear(4, 3).eval(), X, on_progress=listen)


def test_a_sample_that_cannot_be_read_is_named() -> None:
    class Samples:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise KeyError("label")

    model = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(98, 2)).eval()
    with pytest.raises(
        errors.InputError, match=r"sample 0 cannot be read: KeyError: 'label'.*test_door"
    ):
        fgt.evaluate(model, Samples(), "fullgrad", metrics="completeness-error")  # type: ignore[arg-type]


def test_no_page_of_the_graph_stands_behind_an_error() -> None:
    infinite = Module(lambda m, x: x / 0.0).eval()
    for model, x in ((nn.Linear(4, 3).eval(), torch.ones(2, 4, dtype=torch.long)), (infinite, X)):
        with pytest.raises(errors.FullgradError) as caught:
            fgt.check_completeness(model, x)
        page = "".join(traceback.format_exception(caught.value))
        assert "While executing" not in page and "tlparse" not in page


def test_no_plan_is_said_once() -> None:
    report = fgt.check_completeness(
        Module(lambda m, x: x.log() + x).eval(), X.abs() + 1, policy="libra"
    )
    assert any("no honest plan" in problem for problem in report.problems)
    assert not any(problem.count("no honest plan") > 1 for problem in report.problems)


def test_a_dtype_that_does_not_fit_is_told_before_any_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fullgrad_theory.graph import tracing

    monkeypatch.setattr(tracing, "_export", lambda *given: _raise(AssertionError("traced")))
    model = nn.Sequential(nn.Linear(4, 3)).bfloat16().eval()
    for numeric in (True, False):
        with pytest.raises(errors.InputError, match="model is bfloat16 and an input float32"):
            fgt.check_completeness(model, X, numeric=numeric)


def test_a_model_that_casts_its_input_is_taken() -> None:
    model = Module(lambda m, x: m.fc(x.to(m.fc.weight.dtype)), fc=nn.Linear(4, 3).double()).eval()
    assert fgt.check_completeness(model, X).complete is True


def test_the_way_out_for_a_mask_is_one() -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    body, x = nn.Transformer(8, 2, 1, 1, 16, batch_first=True), seeded(2, 3, 8)

    def run(m: Any, x: Tensor, **given: bool) -> Tensor:
        return m.body(x, x, tgt_mask=mask, **given)

    with pytest.raises(errors.TraceError, match="tgt_is_causal=True"):
        fgt.check_completeness(Module(run, body=body).eval(), x, numeric=False)
    told = Module(partial(run, tgt_is_causal=True), body=body).eval()
    assert fgt.check_completeness(told, x, numeric=False).complete is False


def test_a_function_over_a_model_of_another_dtype_is_told_so() -> None:
    half = nn.Linear(4, 3).bfloat16().eval()
    with pytest.raises(errors.InputError, match=r"pass x\.to\(torch\.bfloat16\)"):
        fgt.check_completeness(lambda x: half(x), X)


def test_a_model_on_another_device_is_told_so() -> None:
    with pytest.raises(errors.InputError, match="model is on meta and an input on cpu"):
        fgt.check_completeness(nn.Linear(4, 3, device="meta").eval(), X)


@pytest.mark.filterwarnings("ignore")
def test_wrappers_over_processes_are_named() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 3)).eval()
        with pytest.raises(errors.TraceError, match=r"DistributedDataParallel.*its \.module"):
            fgt.check_completeness(wrapped, X)
        assert fgt.check_completeness(wrapped.module, X).complete is True
        sharded = fully_shard(nn.Linear(4, 3), mesh=init_device_mesh("cpu", (1,))).eval()
        with pytest.raises(errors.TraceError, match=r"FSDP.*full state dict"):
            fgt.check_completeness(sharded, X)
        assert sharded(X).shape == (2, 3)  # as it was
    finally:
        dist.destroy_process_group()


def test_a_cause_that_nobody_knows_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*given: Any, **named: Any) -> None:
        raise ValueError("something new\nand a page")

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(
        errors.TraceError, match=r"none that is known here.*something new"
    ) as caught:
        fgt.trace(nn.Linear(4, 3).eval(), X)
    assert "control flow" not in str(caught.value) and "a page" not in str(caught.value)


@pytest.mark.slow
def test_transformers_models_are_told_their_own_way_out() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.MixtralConfig(**sizes, num_local_experts=4, use_cache=False)
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 32, (2, 6))
    model.set_experts_implementation("eager")
    with pytest.raises(errors.FullgradError, match=r'set_experts_implementation\("batched_mm"\)'):
        fgt.check_completeness(model, {"input_ids": ids}, numeric=False)
    for way in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        assert fgt.check_completeness(model, {"input_ids": ids}, numeric=False).complete is False


# --------------------------------------------------------------------------- training mode


class Wrapper(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Asking(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (2 if self.training else 1)


class AskingByName(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (2 if getattr(self, "training", False) else 1)


def _helper(module: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, module.training)


class AskingBeside(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return _helper(self, self.body(x))


@pytest.mark.parametrize("kind", [Asking, AskingByName, AskingBeside])
def test_code_that_asks_for_its_mode_is_in_training_mode(kind: type[Wrapper]) -> None:
    model = kind(nn.Linear(4, 3))
    assert acts_in_training(model)
    with pytest.raises(errors.TrainingModeError, match="training mode"):
        fgt.check_completeness(model, X)
    assert fgt.check_completeness(model.eval(), X).complete is True


@pytest.mark.parametrize(
    "part",
    [
        nn.Dropout(),
        nn.BatchNorm1d(3),
        nn.RReLU(),
        nn.AlphaDropout(),
        nn.Dropout1d(),
        nn.SyncBatchNorm(3),
    ],
    ids=lambda part: type(part).__name__,
)
def test_layers_that_act_in_training_mode(part: nn.Module) -> None:
    with pytest.raises(errors.TrainingModeError, match="'1'"):
        fgt.check_completeness(nn.Sequential(nn.Linear(4, 3), part), X)


@pytest.mark.parametrize(("rate", "acts"), [(0.0, False), (0.1, True)])
def test_layers_of_torch_act_where_they_drop(rate: float, acts: bool) -> None:
    x = seeded(2, 3, 4)
    rnn = nn.LSTM(4, 4, 2, dropout=rate, batch_first=True)
    attention = nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True)
    for model, inputs in ((rnn, x), (attention, (x, x, x))):
        assert acts_in_training(model) is acts
        if acts:
            with pytest.raises(errors.TrainingModeError):
                fgt.trace(model, inputs)
        else:
            fgt.derive_rules(model, inputs)


def test_a_flag_that_nobody_reads_is_no_mode() -> None:
    inner = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.BatchNorm1d(3)).eval()
    wrapped = Wrapper(inner)
    for model in (wrapped, nn.Sequential(inner), nn.Linear(4, 3), nn.Sequential(nn.Dropout(0.0))):
        before = [m.training for m in model.modules()]
        assert fgt.check_completeness(model, X).complete is True
        assert torch.equal(fgt.balance(model, X)(X), model(X))
        assert [m.training for m in model.modules()] == before


# --------------------------------------------------------------------------- in-place writes


def _few(m: Any, x: Tensor) -> Tensor:
    z = x * 1.0
    z[z > 0][:3].relu_()
    return z


def _some(m: Any, x: Tensor) -> Tensor:
    z = (x * 2)[x > 0]
    z[:3].mul_(3.0)
    return z.sum()


def _end(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    h += 1
    return h[torch.arange(h.shape[0]), (x > 0).int().argmax(1)]


def _last(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    h += 1
    return h[(x[:, 0] > -99).nonzero()[-1]]


def _masked(m: Any, x: Tensor) -> Tensor:
    z = (x * 2)[x > 0]
    z.view(-1, 1).mul_(2)
    return z.sum()


def _diagonal(m: Any, x: Tensor) -> Tensor:
    a = x[:, :2] * 2
    a.fill_diagonal_(5.0)
    return a


def _wrapped(m: Any, x: Tensor) -> Tensor:
    a = m.fc(x.t())[:, :2] * 2
    a.fill_diagonal_(5.0, wrap=True)
    return a


def _cube(m: Any, x: Tensor) -> Tensor:
    a = torch.stack([x[:, :2], x[:, 2:]])
    a.fill_diagonal_(5.0)
    return a


WRITES = {
    "dropout": Module(lambda m, x: m.d(m.fc(x)), d=nn.Dropout(inplace=True), fc=nn.Linear(4, 3)),
    "alpha dropout": Module(lambda m, x: m.d(x * 1), d=nn.AlphaDropout(inplace=True)),
    "feature alpha": Module(
        lambda m, x: m.d(x[:, :, None] * 1), d=nn.FeatureAlphaDropout(inplace=True)
    ),
    "dropout1d": Module(lambda m, x: m.d(x[:, :, None] * 1), d=nn.Dropout1d(inplace=True)),
    "rrelu": Module(lambda m, x: m.d(x * 1), d=nn.RReLU(inplace=True)),
    "torch.dropout_": Module(lambda m, x: torch.dropout_((x * 1)[:, 1:], 0.3, False)),
    "feature_dropout_": Module(
        lambda m, x: torch.feature_dropout_((x * 1)[:, :, None], 0.3, False)
    ),
    "masked slice": Module(_few),
    "slice of masked": Module(_some),
    "end of sequence": Module(_end),
    "last row": Module(_last),
    "view of masked": Module(_masked),
    "diagonal": Module(_diagonal),
    "wrapped diagonal": Module(_wrapped, fc=nn.Linear(2, 3)),
    "diagonal of a cube": Module(_cube),
    "requires_grad_": Module(lambda m, x: (x * 1).requires_grad_() * 2),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_in_place_are_right(name: str) -> None:
    model = WRITES[name].eval()
    report = fgt.check_completeness(model, X)
    assert report.complete is True, str(report)
    assert torch.equal(fgt.balance(model, X)(X), model(X))


def test_a_length_that_values_decide_is_refused_by_name() -> None:
    def pieces(m: Any, x: Tensor) -> Tensor:
        return (x * 2)[x > 0].split(1)[0].relu_()

    with pytest.raises(errors.TraceError, match=r"a size.*depends on a tensor's values"):
        fgt.check_completeness(Module(pieces).eval(), X)


@pytest.mark.parametrize("name", ["normal_", "uniform_", "bernoulli_", "exponential_"])
def test_draws_in_place_are_random_by_name(name: str) -> None:
    with pytest.raises(errors.TrainingModeError, match="is random"):
        fgt.check_completeness(Module(lambda m, x: getattr(x * 1, name)() + x).eval(), X)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_torchvision_models_with_dropout_in_place(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    model, x = getattr(models, name)(weights=None).eval(), seeded(1, 3, 64, 64)
    report = fgt.check_completeness(model, x, policy="libra", numeric=False)
    assert report.complete is True, str(report)
