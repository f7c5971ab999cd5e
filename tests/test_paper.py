"""The paper's evaluation in its small form: every table and figure, and what they say."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F

import fullgrad_theory as fgt
from experiments.paper import run as command
from experiments.paper import tables
from experiments.paper.clip import train_clip
from experiments.paper.measure import crowded, scenes
from experiments.paper.models import load
from experiments.paper.prompted import PROMPTS, Prompted
from experiments.paper.ready import Ready
from experiments.paper.setup import BARE, BOUNDS, METRICS, SMALL
from experiments.paper.summary import MEAN, PAPER, Cell, Claim, Table, orders
from fullgrad_theory.measure.results import Results
from fullgrad_theory.metrics import Deletion

pytestmark = pytest.mark.slow

FIGURES = (
    "completeness", "faithfulness", "sizes", "mixers", "ablation", "discrimination",
    "heatmaps-methods", "heatmaps-models", "text",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
BETTER, WORSE = 1, -1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(results, cache) of one small run of everything."""
    folder = tmp_path_factory.mktemp("paper")
    failing = command.run(SMALL, folder / "out", folder / "cache", say=lambda text: None)
    assert failing == []
    return folder / "out", folder / "cache"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def side(row: dict[str, str]) -> int:
    """Of a difference: `BETTER`, `WORSE` or 0."""
    return BETTER if float(row["low"]) > 0 else WORSE if float(row["high"]) < 0 else 0


# --------------------------------------------------------------------------- completeness


def test_libra_is_complete_everywhere(made: tuple[Path, Path]) -> None:
    out, _ = made
    worst = {
        (r["model"], r["policy"]): float(r["worst"])
        for r in rows(out / "completeness.csv")
        if r["method"] == "fullgrad" and r["metric"] == "relative-completeness-error"
    }
    for model in SMALL.models:
        for kind, most in BOUNDS.items():
            assert worst[model, f"libra, {kind}"] <= most
            assert worst[model, f"plain, {kind}"] > 1e-2  # the bound is not met by itself
    page = (out / "completeness.md").read_text()
    assert f"Libra FullGrad is complete on all {len(SMALL.models)} models" in page


def test_errors_are_those_of_the_library(made: tuple[Path, Path]) -> None:
    """The table's numbers, by `fullgrad` on the graph, which knows nothing of maps."""
    out, cache = made
    model = load("gmixer", cache, SMALL.recipe)
    x = torch.stack([s.image for s in scenes(SMALL.images)])
    for policy in ("libra", "decompx"):
        found = fgt.fullgrad(fgt.balance(model.double(), x[:1].double(), policy), x.double())
        total = found.total.detach()
        error = float((found.output.detach() - total).abs().mean())
        (row,) = (
            r
            for r in rows(out / "completeness.csv")
            if (r["model"], r["method"], r["policy"], r["metric"], r["than"])
            == ("gmixer", "fullgrad", f"{policy}, float64", "completeness-error", "")
        )
        assert float(row["mean"]) == pytest.approx(error, rel=1e-3, abs=1e-13)


def cell(**given: object) -> Cell:
    usual: dict[str, object] = {
        "model": "vit", "method": "fullgrad", "policy": "libra", "than": "plain",
        "metric": "srg", "mean": 0.0, "low": 0.0, "high": 0.0, "worst": 0.0, "count": 9,
    }  # fmt: skip
    return Cell(**{**usual, **given})  # type: ignore[arg-type]


def test_a_broken_bound_is_told() -> None:
    name = "relative-completeness-error"
    fine = [cell(policy=f"libra, {k}", metric=name, than="", worst=1e-16) for k in BOUNDS]
    assert tables.broken(Table(fine)) == []
    bad = [fine[0], replace(fine[1], worst=1e-9)]
    assert tables.broken(Table(bad)) == ["vit, float64"]
    assert "does not hold on: vit, float64" in tables.bound_sentence(Table(bad))
    assert tables.broken(Table(fine[:1])) == ["vit, float64"]  # not measured is not met
    assert tables.broken(Table([fine[0], replace(fine[1], worst=float("nan"))]))


# --------------------------------------------------------------------------- who wins


@pytest.mark.parametrize("page", ["faithfulness", "discrimination", "sizes", "mixers", "text"])
def test_sentences_agree_with_the_data(made: tuple[Path, Path], page: str) -> None:
    out, _ = made
    data = {"sizes": "faithfulness", "mixers": "faithfulness"}.get(page, page)
    models = {
        "sizes": {"vit-tiny", "vit"},
        "mixers": {"gmixer"},
        "text": {"clip-towers"},
    }.get(page, {"vit", "eva2", "gmixer"})
    by_name = {name: metric for metric, name in tables.NAMES.items()}
    pattern = re.compile(
        r"- Libra improves (.+?) in (.+) on (\d+) of (\d+) architectures \(interval above 0\)"
        r"(?:, \*\*makes it worse on (\d+)\*\* \((.+?)\))?(?:, is undecided on (\d+) \((.+?)\))?\."
    )
    said = 0
    for line in (out / f"{page}.md").read_text().splitlines():
        if not line.startswith("- Libra improves"):
            continue
        match = pattern.fullmatch(line)
        assert match, line
        method, metric, better, count, worse, losers, open_, unsure = match.groups()
        cells = {
            r["model"]: side(r)
            for r in rows(out / f"{data}.csv")
            if r["than"] == "plain" and r["method"] == method and r["model"] in models
            and r["metric"] == by_name[metric]
        }  # fmt: skip
        counts = Counter(cells.values())
        assert int(count) == len(cells) and int(better) == counts[BETTER]
        assert int(worse or 0) == counts[WORSE] and int(open_ or 0) == counts[0]
        assert {*(losers or "").split(", ")} - {""} == {m for m, s in cells.items() if s == WORSE}
        assert {*(unsure or "").split(", ")} - {""} == {m for m, s in cells.items() if s == 0}
        said += 1
    assert said >= 4 * 7


def test_cells_where_libra_loses_are_marked(made: tuple[Path, Path]) -> None:
    out, _ = made
    shown = {"vit", "eva2", "gmixer", MEAN}
    lost = [
        r
        for r in rows(out / "faithfulness.csv")
        if r["than"] and r["model"] in shown and r["metric"] in METRICS and side(r) == WORSE
    ]
    page = (out / "faithfulness.md").read_text()
    legend = 1
    assert page.count("▼ Libra loses") - legend == len(lost) > 0


def test_marks() -> None:
    sides = [cell(than="", policy=p, mean=0.5) for p in ("plain", "libra")]
    for low, high, mark in ((-0.2, -0.1, "Libra loses"), (-0.1, 0.1, ""), (0.1, 0.2, "▲")):
        table = Table([*sides, cell(mean=(low + high) / 2, low=low, high=high)])
        text = tables.change(table, "vit", "fullgrad", "srg")
        assert text.startswith("50.0 → 50.0") and (mark in text)
        assert bool(mark) == ("▲" in text or "▼" in text)
        (sentence,) = tables.sentences(table, ["vit", MEAN], "srg")
        assert ("worse on 1** (vit)" in sentence) == (high < 0)
        assert ("on 1 of 1" in sentence) == (low > 0)


def weighted(target: int) -> Callable[[Tensor], Tensor]:
    """The paper's z[c] - sum softmax(z) z, the softmax held."""
    return lambda z: z[:, target] - (z.softmax(1).detach() * z).sum(1)


@pytest.mark.parametrize(
    ("policy", "raw"), [("libra", False), ("alilrp", False), ("attnlrp", True), ("decompx", True)]
)
def test_each_method_has_the_papers_target(made: tuple[Path, Path], policy: str, raw: bool) -> None:
    """Segmentation AP of the maps of either target, image by image; one of them was kept."""
    _, cache = made
    model = load("gmixer", cache, SMALL.recipe)
    explain = fgt.Explainer(model, scenes(1)[0].image[None], policy)
    found: dict[bool, list[float]] = {True: [], False: []}
    for sample in scenes(SMALL.images):
        x, mask = sample.image[None], sample.mask
        assert mask is not None
        best = int(model(x).argmax())
        for kind, target in ((True, best), (False, weighted(best))):
            values = explain(x, "fullgrad+", target)["fullgrad+"].values
            fine = F.interpolate(values[None], (64, 64), mode="bicubic")[0, 0]
            found[kind].append(float(average_precision_score(mask.flatten(), fine.flatten())))
    (kept,) = (
        results.values("fullgrad+", policy, "segmentation-ap")
        for file in cache.glob("rows-*/faithfulness/gmixer/*/batch-*.json")
        for results in [Results.load(file)]
        if policy in results.policies
    )
    np.testing.assert_allclose(kept, found[raw], rtol=1e-4)
    assert np.abs(kept - found[not raw]).max() > 1e-3 * kept.max()


def test_what_a_definition_changes_by_hand(made: tuple[Path, Path]) -> None:
    out, cache = made
    model = load("gmixer", cache, SMALL.recipe)
    explain = fgt.Explainer(model, scenes(1)[0].image[None], "libra")
    found: dict[str, list[float]] = {"raw logit": [], "early biases": []}
    for sample in scenes(SMALL.images):
        x = sample.image[None]
        best = int(model(x).argmax())
        wanted, other = (
            explain(x, "fullgrad+", t)["fullgrad+"].values.flatten() for t in (weighted(best), best)
        )
        found["raw logit"].append(float(np.corrcoef(wanted, other)[0, 1]))
        # what is before the first block is input x gradient there, less that of the pixels
        parts = explain(x, ["embedding-x-gradient", "input-x-gradient"], weighted(best))
        pixels = F.avg_pool2d(parts["input-x-gradient"].values[:, None], 8)[0, 0] * 64
        twice = wanted + (parts["embedding-x-gradient"].values[0] - pixels).flatten()
        found["early biases"].append(float(np.corrcoef(wanted, twice)[0, 1]))
    cells = {
        r["metric"]: float(r["mean"])
        for r in rows(out / "definitions.csv")
        if (r["model"], r["method"], r["policy"], r["than"]) == ("gmixer", "fullgrad+", "libra", "")
    }
    for name, values in found.items():
        assert cells[name] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-4), name


def test_results_of_other_definitions_say_so(made: tuple[Path, Path], tmp_path: Path) -> None:
    said = "Measured before the paper's definitions"
    assert said not in (made[0] / "README.md").read_text()
    shutil.copytree(made[0], tmp_path / "old")
    run = json.loads((tmp_path / "old" / "run.json").read_text())
    del run["definitions"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(run))
    command.render(tmp_path / "old")
    assert said in (tmp_path / "old" / "README.md").read_text()


def test_objects_by_hand(made: tuple[Path, Path]) -> None:
    """Own and other AP of one model, map by map."""
    out, cache = made
    model = load("gmixer", cache, SMALL.recipe)
    explain = fgt.Explainer(model, scenes(1)[0].image[None], "libra")
    own, other = [], []
    for sample in crowded(SMALL.objects):
        assert sample.mask is not None and sample.others
        masks = {sample.label: sample.mask, **sample.others}
        scores: dict[bool, list[float]] = {True: [], False: []}
        for target in masks:
            values = explain(sample.image[None], "fullgrad", weighted(target))["fullgrad"].values
            fine = F.interpolate(values[None], (64, 64), mode="bicubic")[0, 0]
            for label, mask in masks.items():
                ap = average_precision_score(mask.flatten(), fine.flatten())
                scores[label == target].append(float(ap))
        own.append(np.mean(scores[True]))
        other.append(np.mean(scores[False]))
    cells = {
        r["metric"]: float(r["mean"])
        for r in rows(out / "discrimination.csv")
        if (r["model"], r["method"], r["policy"], r["than"]) == ("gmixer", "fullgrad", "libra", "")
    }
    assert cells["AP own"] == pytest.approx(np.mean(own), rel=1e-3)
    assert cells["AP gap"] == pytest.approx(np.mean(own) - np.mean(other), rel=1e-2, abs=1e-4)


def test_fullgrad_plus_without_biases(made: tuple[Path, Path]) -> None:
    """It is the sum over blocks of h dL/dh, by hooks on the model."""
    _, cache = made
    model = load("vit", cache, SMALL.recipe)
    x = torch.stack([s.image for s in scenes(SMALL.images)])
    inputs = []
    handles = [
        b.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        for b in model.blocks  # type: ignore[union-attr]
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    target = logits.argmax(1)
    gradients = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), inputs)
    wanted = torch.stack([(h * g).sum(-1)[:, 1:] for h, g in zip(inputs, gradients, strict=True)])
    made_map = Ready("vit", model).explainer("plain")(x, (BARE,), target)[BARE]
    torch.testing.assert_close(made_map.values.flatten(1), wanted.sum(0), rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------- orderings


def test_orders() -> None:
    table = {"random": 10.0, "A": 30.0, "Libra A": 20.0, "Libra FullGrad+": 40.0}
    pairs = orders(table, True, "Libra FullGrad+")
    assert ("A", "Libra A") in pairs and ("Libra A", "A") not in pairs
    assert {(("Libra FullGrad+"), e) for e in ("A", "Libra A", "random")} <= {*pairs}
    assert len(pairs) == len({*pairs}) == 6
    assert ("random", "A") in orders(table, False, "random")


def test_orderings_say_what_was_found(made: tuple[Path, Path]) -> None:
    out, _ = made
    found = [Claim(**c) for c in json.loads((out / "orderings.json").read_text())]
    assert {c.table for c in found} == {
        "completeness error", "MIF accuracy", "SRG (later work)", "ablation, MIF accuracy",
        "ablation, AP",
    }  # fmt: skip
    for claim in found:
        wanted = "yes" if claim.low > 0 else "no" if claim.high < 0 else "undecided"
        slack = 1e-4 * max(abs(claim.low), abs(claim.high))  # written with five digits
        assert claim.verdict == wanted and claim.low <= claim.high
        assert claim.low - slack <= claim.mean <= claim.high + slack
        assert bool(claim.reason) == (claim.verdict != "yes")
    counts = Counter(c.verdict for c in found)
    page = (out / "orderings.md").read_text()
    assert f"Of {len(found)} orderings, {counts['yes']} are the same here" in page
    assert page.count("| **no** |") == counts["no"]
    assert page.count("| undecided |") == counts["undecided"]
    exact = [c for c in found if c.table == "completeness error" and c.better == "Libra FullGrad"]
    assert len(exact) == 6 and all(c.verdict == "yes" for c in exact)


def test_reasons_are_of_claims_that_exist() -> None:
    names = {*PAPER["entries"]}
    for key in PAPER["reasons"]:
        _, pair = key.split(": ")
        assert {*pair.split(" > ")} <= names


# --------------------------------------------------------------------------- pictures and files


@pytest.mark.parametrize("name", FIGURES)
def test_figures_show_something(made: tuple[Path, Path], name: str) -> None:
    from PIL import Image

    file = made[0] / f"{name}.png"
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(float)
    assert min(pixels.shape[:2]) > 100 and file.stat().st_size < 300_000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4
    inner = pixels[pixels.shape[0] // 8 : -pixels.shape[0] // 8]
    assert (inner.min(2) < 250).mean() > 0.01  # not white
    coloured = (inner.max(2) - inner.min(2) > 60).mean()
    assert coloured > 0.001


def test_texts_are_classes(made: tuple[Path, Path]) -> None:
    _, cache = made
    clip = train_clip(cache, SMALL.recipe).model
    prompted = Prompted(clip)  # type: ignore[arg-type]
    x = torch.stack([s.image for s in scenes(SMALL.images)])
    from experiments.paper.clip import tokens

    with torch.no_grad():
        wanted = clip(x, tokens(PROMPTS)) / clip.scale.exp().clamp(max=100)  # type: ignore[operator,union-attr]
        torch.testing.assert_close(prompted(x), wanted)
    found = fgt.explain(prompted, x, "fullgrad", 3, "libra")
    assert found.error is not None and float(found.error.max()) < 1e-5
    assert "have not learnt" in tables.learnt({"accuracy": 0.2})
    assert "not" not in tables.learnt({"accuracy": 0.9})


def test_everything_is_written_from_the_data_alone(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = made
    for file in out.iterdir():
        if file.suffix in (".csv", ".json", ".npz"):
            shutil.copy(file, tmp_path)
    monkeypatch.setattr("sys.argv", ["run", "--render", "--out", str(tmp_path)])
    command.main()
    names = sorted(f.name for f in out.iterdir())
    assert names == sorted(f.name for f in tmp_path.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes(), name
    pages = {f.stem for f in out.glob("*.md")}
    assert pages == {*command.TABLES, "README"} - {"heatmaps"}
    for link in re.findall(r"\]\(([^)]+)\)", (out / "README.md").read_text()):
        assert (out / link).exists()


def test_what_was_measured_is_not_measured_again(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = made

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Deletion, "curves", fail)
    setup = replace(SMALL, models=("eva2",))
    command.run(setup, tmp_path, cache, ["ablation"], say=lambda text: None)
    assert (tmp_path / "ablation.csv").read_text() == (out / "ablation.csv").read_text()


MEASURING = """
from dataclasses import replace
from pathlib import Path
from experiments.paper import run
from experiments.paper.setup import SMALL

setup = replace(SMALL, models=("eva2",))
run.run(setup, Path({out!r}), Path({cache!r}), ["ablation"], say=lambda text: None)
"""


def test_killed_and_resumed_the_table_is_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed after something was measured; byte for byte."""

    def start(name: str) -> subprocess.Popen[bytes]:
        """Of the models that are trained, with nothing measured."""
        out, cache = tmp_path / name, tmp_path / f"{name}-cache"
        if not cache.exists():
            shutil.copytree(made[1], cache, ignore=shutil.ignore_patterns("rows-*"))
        code = MEASURING.format(out=str(out), cache=str(cache))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", code], env=environment)

    assert start("whole").wait() == 0
    process = start("killed")
    cache = tmp_path / "killed-cache"
    while process.poll() is None and not any(cache.glob("rows-*/**/*.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "ablation.csv").exists()
    assert start("killed").wait() == 0
    whole, resumed = (tmp_path / name / "ablation.csv" for name in ("whole", "killed"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_name_that_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--models", "vitt"])
    with pytest.raises(SystemExit):
        command.main()
