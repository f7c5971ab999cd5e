"""The zoo: sources, workers that fail in every way, the file of results, and what is made of it."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import browsing, opened
from typer.testing import CliRunner, Result

from fullgrad_theory.command.cli import app
from fullgrad_theory.errors import InputError, UnknownNameError
from fullgrad_theory.zoo import pages, store, workers
from fullgrad_theory.zoo.compare import change, compared
from fullgrad_theory.zoo.rows import Architecture, Options, Outcome, Row
from fullgrad_theory.zoo.sources import Shard, chosen, listed

ROOT = Path(__file__).resolve().parent.parent
OWN = """
import os, signal, time
import torch
from torch import nn


class Net(nn.Sequential):
    example_input_array = torch.zeros(1, 4)


def relu():
    return Net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def bare():
    return nn.Linear(4, 2)

def raises():
    raise ValueError("no weights here")

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def sleeps():
    time.sleep(60)

def greedy():
    held = torch.ones(2**28)
    time.sleep(60)

def gelu(width=8):
    return Net(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 2))

def _hidden():
    pass

def needs(width):
    pass
"""


def architecture(name: str = "net", family: str = "nets") -> Architecture:
    return Architecture("timm", name, family, "timm 1.0", name)


OPTIONS = Options("libra", False, 60.0, 4096, "0.1.0", "2.14.0")


def row(name: str = "net", verdict: Outcome = Outcome.COMPLETE, **fields: object) -> Row:
    known = Row.of(architecture(name), OPTIONS, verdict)
    return replace(known, plain=Outcome.INCOMPLETE, **fields).ended()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def zoo(*arguments: str) -> Result:
    """The command, in this process; its workers are forks of one that stays for all tests."""
    return CliRunner().invoke(app, ["zoo", *arguments])


def started(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    code = "from fullgrad_theory.command.cli import app; app()"
    alone = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "zoo", *arguments]
    return subprocess.Popen(command, env=alone, stderr=subprocess.DEVNULL, text=True)


def rows_of(path: str) -> dict[str, Row]:
    with store.reading(Path(path)) as found:
        return {row.name: row for row in found.latest()}


# --------------------------------------------------------------------------- sources


def test_a_python_file_is_read_and_not_run(own: Path) -> None:
    (own / "loud.py").write_text(OWN + "\nraise RuntimeError('imported')\n")
    found = listed("loud.py")
    assert [a.name for a in found][:2] == ["relu", "bare"]
    assert not {"_hidden", "needs", "Net"} & {a.name for a in found}
    assert {a.source for a in found} == {"loud.py"}


def test_a_list_has_names_and_shapes(own: Path) -> None:
    (own / "list.txt").write_text("# mine\nown.py:bare 2,4  # two\n\npackage.models:build\n")
    first, second = listed("list.txt")
    assert (first.name, first.family, first.shapes) == ("own.py:bare", "own.py", ("2,4",))
    assert (second.target, second.shapes) == ("package.models:build", ())


def test_an_edited_file_is_another_version(own: Path) -> None:
    before = listed("own.py")[0].version
    (own / "own.py").write_text(OWN + "# more\n")
    assert listed("own.py")[0].version != before


@pytest.mark.parametrize(
    ("source", "name", "family"),
    [
        ("timm", "vit_tiny_patch16_224", "vision_transformer"),
        ("torchvision", "fcn_resnet50", "segmentation.fcn"),
        ("transformers", "BertForMaskedLM", "bert"),
        ("transformers", "GPT2LMHeadModel", "gpt2"),
    ],
)
def test_what_is_installed_is_listed(source: str, name: str, family: str) -> None:
    pytest.importorskip(source)
    (found,) = (a for a in listed(source) if a.name == name)
    assert found.family == family and found.version.startswith(f"{source} ")


def test_patterns_families_and_shards() -> None:
    names = ["a_large", "a_tiny", "a_s", "test_b", "b"]
    found = [architecture(n, n.removeprefix("test_")[0]) for n in names]

    def picked(*given: object) -> list[str]:
        return [a.name for a in chosen(found, *given)]

    assert picked(["a"]) == names[:3] and picked(["*_t*", "b"]) == ["a_tiny", "test_b", "b"]
    assert picked([], True) == ["a_tiny", "b"]
    parts = [picked([], False, Shard(k, 3)) for k in (1, 2, 3)]
    assert (
        sorted(name for part in parts for name in part) == sorted(names)
        and max(map(len, parts)) == 2
    )
    with pytest.raises(UnknownNameError, match="did you mean a_large"):
        chosen(found, ["a_larg"])
    for text in ("3", "0/2", "3/2", "a/b"):
        with pytest.raises(InputError, match="3/16"):
            Shard.parse(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "own.py"], "--one-per-family or --all"),
        (["--source", "none.py", "--all"], "there is no source 'none.py'"),
        (["--source", "empty.txt", "--all"], "nothing to audit"),
        (["--source", "wrong.txt", "--all"], "'2,x' is no shape"),
        (["--source", "broken.py", "--all"], "broken.py:1 is no Python"),
        (["relux", "--source", "own.py"], "did you mean relu"),
        (["--all", "--shard", "3/2"], "write 3/16"),
        (["--all", "--policy", "libera"], "did you mean libra"),
        (["--all", "--out", "no/zoo.sqlite"], "make it first"),
        (["--all", "--source", "own.py", "--out", "own.py"], "cannot be used"),
        (["show", "none.sqlite"], "none.sqlite"),
        (["compare", "own.py", "own.py"], "file is not a database"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments: list[str], said: str, own: Path) -> None:
    (own / "empty.txt").write_text("# nothing\n")
    (own / "wrong.txt").write_text("own.py:bare 2,x\n")
    (own / "broken.py").write_text("def (\n")
    found = zoo(*arguments)
    assert found.exit_code == 2
    assert said in found.stderr.replace("\n", " ") and not found.stdout
    assert not list(own.glob("*.sqlite"))


# --------------------------------------------------------------------------- workers


def twice(number: int) -> int:
    if number == 7:
        os._exit(3)
    if number == 8:
        time.sleep(60)
    return 2 * number


def test_workers_return_die_or_are_ended() -> None:
    found = dict(workers.each(twice, [1, 7, 8, 2], 2, 20.0, 4096))
    assert (found[1], found[2]) == (2, 4)
    assert isinstance(found[7], workers.Ended) and found[7].outcome is Outcome.DIED
    assert found[7].words.endswith("exit code 3")
    assert isinstance(found[8], workers.Ended) and found[8].outcome is Outcome.OUT_OF_TIME


@pytest.mark.skipif(sys.platform != "linux", reason="memory is seen on Linux alone")
def test_every_way_to_fail_is_a_row(own: Path) -> None:
    wrong = ["bare", "raises", "killed", "greedy", "relu", "gelu"]
    done = zoo(*wrong, "--source", "own.py", "--memory-limit", "1000", "--jobs", "2")
    assert done.exit_code == 0, done.stderr
    assert "6 architectures: 2 complete, 2 not built, 1 out of memory, 1 died" in done.stdout
    found = rows_of("zoo.sqlite")
    assert "does not say what it takes" in found["bare"].failure
    assert "ValueError: no weights here (at own.py:" in found["raises"].failure
    assert found["raises"].failure_class == "InputError"
    assert found["killed"].failure == "its process ended: killed by SIGKILL"
    assert (found["greedy"].memory or 0) > 1000 and "1000 MiB" in found["greedy"].failure
    assert found["relu"].plain is Outcome.COMPLETE and not found["relu"].edits
    gelu = found["gelu"]
    assert gelu.plain is Outcome.INCOMPLETE and gelu.verdict is Outcome.COMPLETE
    assert gelu.edits == {"secant gelu": 1} and list(gelu.operations.values()) == [1]
    assert (gelu.nonlinear, gelu.inputs, gelu.modules) == (1, "1,4", {"*": 1})
    assert gelu.seconds and gelu.memory and gelu.error is None and gelu.finished

    late = zoo("sleeps", "--source", "own.py", "--time-limit", "2")
    assert "1 out of time" in late.stdout, late.stderr
    assert rows_of("zoo.sqlite")["sleeps"].failure == "not ended after 2 s"


def test_values_where_it_is_run(own: Path) -> None:
    (own / "list.txt").write_text("own.py:bare 2,4\nown.py:gelu\n")
    done = zoo("--source", "list.txt", "--all", "--numeric")
    assert "2 complete" in done.stdout, done.stderr + done.stdout
    found = rows_of("zoo.sqlite")["own.py:gelu"]
    assert found.numeric and found.error is not None and found.error < 1e-10
    assert found.error_before is not None and found.error_before > 1e-6
    assert found.input_share is not None and found.bias_share is not None
    assert found.input_share + found.bias_share == pytest.approx(1.0)


# --------------------------------------------------------------------------- the file


def test_a_run_that_is_killed_goes_on_where_it_stopped(own: Path) -> None:
    run = started("relu", "sleeps", "gelu", "--source", "own.py", "--time-limit", "60")
    try:
        kept = wait_for_a_row(own / "zoo.sqlite")
        second = zoo("gelu", "--source", "own.py")
        assert second.exit_code == 2 and "another run is writing" in second.stderr
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    done = zoo("relu", "gelu", "--source", "own.py")
    assert "2 complete, 1 of them before" in done.stdout, done.stderr
    found = rows_of("zoo.sqlite")
    assert found["relu"] == kept and set(found) == {"relu", "gelu"}
    again = zoo("relu", "gelu", "--source", "own.py")
    assert "2 complete, 2 of them before" in again.stdout
    assert rows_of("zoo.sqlite") == found


def wait_for_a_row(path: Path) -> Row:
    for _ in range(600):
        time.sleep(0.2)
        if path.exists():
            try:
                (found,) = rows_of(str(path)).values()
            except (InputError, ValueError):  # not made yet
                continue
            return found
    raise AssertionError("no row was kept")


def test_what_need_not_be_done_again() -> None:
    late = row(verdict=Outcome.OUT_OF_TIME)
    assert late.holds(OPTIONS) and not late.holds(replace(OPTIONS, time_limit=61.0))
    large = row(verdict=Outcome.OUT_OF_MEMORY)
    assert large.holds(OPTIONS) and not large.holds(replace(OPTIONS, memory_limit=9999))
    assert row(verdict=Outcome.RAISED).holds(replace(OPTIONS, time_limit=61.0))
    keys = {
        Row.of(architecture(), replace(OPTIONS, **other), Outcome.COMPLETE).key
        for other in ({}, {"policy": "attnlrp"}, {"numeric": True}, {"torch": "2.15"},
                      {"library": "0.2"}, {"time_limit": 1.0})
    }  # fmt: skip
    assert len(keys) == 5


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = row(
        operations={"gelu": 3}, modules={"blocks.*": 3}, edits={"secant gelu": 3},
        problems=["one", "ä"], error=1e-12, error_before=0.5, seconds=1.5, memory=400.0,
        nonlinear=3, input_share=0.25, bias_share=0.75, inputs="1,3",
    )  # fmt: skip
    with store.writing(tmp_path / "z.sqlite") as kept:
        kept.keep(written)
    with store.reading(tmp_path / "z.sqlite") as kept:
        assert kept.latest() == [written]
    assert [p.name for p in tmp_path.iterdir()] == ["z.sqlite"]


def test_of_two_rows_the_better_is_kept(tmp_path: Path) -> None:
    judged, cut = row(finished="1"), row(verdict=Outcome.DIED)
    judged, cut = replace(judged, finished="1"), replace(cut, finished="2")
    with store.writing(tmp_path / "z.sqlite") as kept:
        for one in (cut, judged, cut):
            kept.keep(one)
        assert kept.latest() == [judged]
        later = replace(judged, finished="3")
        kept.keep(later)
        kept.keep(judged)
        assert kept.latest() == [later]


def test_another_schema_and_another_program_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "z.sqlite"
    with store.writing(path) as kept:
        kept.keep(row())
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="schema 99"), store.reading(path):
        pass
    connection.execute("PRAGMA application_id = 1")
    with pytest.raises(InputError, match="another program"), store.writing(path):
        pass
    connection.close()


def written(path: Path, *rows: Row) -> str:
    with store.writing(path) as kept:
        for one in rows:
            kept.keep(one)
    return str(path)


def test_shards_merge_into_one(tmp_path: Path) -> None:
    a, b, c = row("a"), row("b", Outcome.RAISED), row("c")
    first = written(tmp_path / "1.sqlite", a, b)
    second = written(tmp_path / "2.sqlite", b, c)
    into = str(tmp_path / "all.sqlite")
    found = zoo("merge", first, second, "--into", into)
    assert found.exit_code == 0 and "3 architectures: 2 complete, 1 raised" in found.stdout
    assert list(rows_of(into).values()) == [a, b, c]


# --------------------------------------------------------------------------- what is made of it


def test_worse_is_said_and_is_exit_code_1(tmp_path: Path) -> None:
    old = written(tmp_path / "old.sqlite", row("a"), row("b"), row("c", Outcome.RAISED), row("d"))
    new = written(
        tmp_path / "new.sqlite",
        row("a"),
        row("b", Outcome.INCOMPLETE, problems=["no plan"]),
        row("c"),
        row("e"),
    )
    found = zoo("compare", old, new)
    assert found.exit_code == 1
    assert "worse   timm b: under libra complete -> incomplete: no plan" in found.stdout
    assert "better  timm c: under libra raised -> complete" in found.stdout
    assert "1 worse, 1 better, 1 as before; 1 only in old.sqlite, 1 only in" in found.stdout
    back = zoo("compare", old, old)
    assert back.exit_code == 0 and "0 worse" in back.stdout


def test_a_worse_plain_gradient_counts_and_nothing_in_common_is_refused() -> None:
    was = replace(row(), plain=Outcome.COMPLETE)
    now = row(operations={"gelu": 1})
    found = compared([was], [now])
    assert found.worse == ((was, now),)
    assert "as it is complete -> incomplete: gelu" in change(was, now)
    with pytest.raises(InputError, match="in common"):
        compared([row("a")], [row("b")])


ROWS = [
    row("net|a", operations={"gelu": 2}, edits={"secant gelu": 2}, seconds=1.25),
    row("<b>", Outcome.RAISED, failure_class="TraceError", failure="a < b"),
    row("c", Outcome.OUT_OF_TIME, failure="not ended after 2 s"),
]


def test_shown_by_verdict_and_pattern(tmp_path: Path) -> None:
    path = written(tmp_path / "z.sqlite", *ROWS)

    def shown(*arguments: str) -> str:
        found = zoo("show", path, *arguments)
        assert found.exit_code == 0
        assert all(len(line) <= 100 for line in found.stdout.splitlines())
        return found.stdout

    everything = shown()
    assert "3 architectures: 1 complete, 1 raised, 1 out of time." in everything
    assert "2 x gelu" in everything and "TraceError: a < b" in everything
    raised = shown("--verdict", "raised")
    assert "<b>" in raised and "net|a" not in raised
    assert "1 architecture: 1 complete." in shown("net|*")


def test_markdown_and_csv(tmp_path: Path) -> None:
    lines = pages.markdown(ROWS).splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert r"net\|a" in table[2]
    assert "| gelu | 1 | 2 |" in lines
    read = list(csv.DictReader(io.StringIO(pages.comma_separated(ROWS))))
    assert [r["name"] for r in read] == [r.name for r in ROWS]
    assert json.loads(read[0]["operations"]) == {"gelu": 2}
    path = written(tmp_path / "z.sqlite", *ROWS)
    out = zoo("export", path, "--format", "csv")
    assert out.exit_code == 0 and len(list(csv.DictReader(io.StringIO(out.stdout)))) == 3


class Balanced(HTMLParser):
    """Refuses a page whose elements do not nest."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.cells += tag == "td"
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_no_network(tmp_path: Path) -> None:
    path, out = written(tmp_path / "z.sqlite", *ROWS), tmp_path / "zoo.html"
    done = zoo("export", path, "--format", "html", "-o", str(out))
    assert done.exit_code == 0, done.stderr
    text = out.read_text()
    page = Balanced()
    page.feed(text)
    page.close()
    assert not page.open and page.cells == 3 * len(pages.TITLES) + 3
    assert page.links == ["data:,"] and "http" not in text.partition("<main>")[2]
    assert "&lt;b&gt;" in text and "<b>" not in text


@pytest.mark.slow
def test_the_page_sorts_and_searches(tmp_path: Path) -> None:
    file = tmp_path / "zoo.html"
    file.write_text(pages.html(ROWS))
    with browsing() as browser, opened(browser, file) as page:

        def shown() -> list[str]:
            return [
                row.inner_text().split()[0] for row in page.locator("#zoo tbody tr:visible").all()
            ]

        assert shown() == ["net|a", "<b>", "c"]
        page.get_by_role("button", name="architecture").click()
        assert shown() == ["<b>", "c", "net|a"]
        page.get_by_role("button", name="CPU s").click()
        assert shown()[0] == "net|a"
        page.fill("#find", "timm raised")
        assert shown() == []
        page.fill("#find", "nets RAISED")
        assert shown() == ["<b>"] and page.inner_text("#shown") == "1 of 3 shown"


def test_parquet_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "z.sqlite", *ROWS)
    plain = zoo("export", path, "--format", "parquet")
    assert plain.exit_code == 2 and "--out" in plain.stderr
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    out = ["--out", str(tmp_path / "z.parquet")]
    lacking = zoo("export", path, "--format", "parquet", *out)
    assert lacking.exit_code == 2 and "fullgrad-theory[parquet]" in lacking.stderr


def test_parquet_holds_every_field(tmp_path: Path) -> None:
    files = pytest.importorskip("pyarrow.parquet")
    pages.parquet(ROWS, tmp_path / "z.parquet")
    read = files.read_table(tmp_path / "z.parquet").to_pylist()
    assert [r["name"] for r in read] == [r.name for r in ROWS]
    assert set(read[0]) == set(Row.__dataclass_fields__)


# --------------------------------------------------------------------------- the guard

SAMPLE = {
    "timm": "test_vit test_convnext test_efficientnet test_resnet test_nfnet test_mambaout "
    "regnetx_002 mobilenetv3_small_050 mixer_s32_224 poolformer_s12 resmlp_12_224 gmlp_ti16_224 "
    "edgenext_xx_small mobileone_s0",
    "torchvision": "resnet18 mnasnet0_5 shufflenet_v2_x0_5 mobilenet_v3_small alexnet",
    "transformers": "BertForMaskedLM GPT2LMHeadModel LlamaForCausalLM ViTForImageClassification "
    "T5ForConditionalGeneration",
}
"""24 small architectures of as many kinds, all of them complete under libra"""


@pytest.mark.slow
@pytest.mark.parametrize("source", SAMPLE)
def test_a_sample_of_the_zoo_stays_complete(source: str, tmp_path: Path) -> None:
    out = tmp_path / "z.sqlite"
    names = SAMPLE[source].split()
    done = zoo(*names, "--source", source, "--out", str(out))
    assert done.exit_code == 0, done.stderr
    found = rows_of(str(out))
    assert set(found) == set(names)
    assert {n: r.verdict for n, r in found.items() if r.verdict is not Outcome.COMPLETE} == {}
