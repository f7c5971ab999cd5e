"""Evaluation: rows, costs, resuming, several processes, intervals."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.stats import bootstrap
from torch import Tensor, nn

from fullgrad_theory.attribution import Explainer
from fullgrad_theory.errors import FullgradError, InputError, NonFiniteError, UnknownNameError
from fullgrad_theory.measure.evaluation import evaluate
from fullgrad_theory.measure.results import Interval, Results, Row
from fullgrad_theory.measure.settings import fingerprint
from fullgrad_theory.measure.workers import together
from fullgrad_theory.metrics import METRICS, Deletion, segmentation_ap, srg, to_pixels

METHODS = ("fullgrad+", "gradcam+", "random")


@dataclass(frozen=True)
class Sample:
    image: Tensor
    label: int
    mask: Tensor | None


def samples(count: int = 5, size: int = 32) -> list[Sample]:
    """Noise with a bright square, which is the object; the second has no mask."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for index in range(count):
        image = torch.randn((3, size, size), generator=generator)
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[4 * index : 4 * index + 10, 5:17] = True
        image[:, mask] += 1.0
        made.append(Sample(image, index % 3, None if index == 1 else mask))
    return made


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A ViT of 4 x 4 patches, written here: importing timm takes seconds in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.cls, self.places = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(16, 24))
        self.blocks = nn.ModuleList(Block(24, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT + self.places
        tokens = torch.cat([self.cls.expand(len(x), 1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 0]))


class Counting(nn.Module):
    """A small ViT that counts the images it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = Vit()
        self.seen: list[int] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.vit(x)


@dataclass(frozen=True)
class Found:
    values: Tensor
    output: Tensor
    total: Tensor | None

    def tokens(self, grid: tuple[int, int]) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(self.values[:, None], grid)[:, 0]

    def pixels(self, size: tuple[int, int]) -> Tensor:
        return to_pixels(self.values, size)


class Simple:
    """Input x gradient and random, written for these tests; counts its calls."""

    calls = 0

    def __init__(self, model: nn.Module, example: Tensor, policy: object) -> None:
        self.model, self.sign = model.vit, 1 if policy == "libra" else -1

    def __call__(
        self, x: Tensor, methods: Sequence[str], target: Tensor, *, seed: int = 0
    ) -> dict[str, Found]:
        Simple.calls += 1
        x = x.clone().requires_grad_()
        output = self.model(x).gather(1, target[:, None])[:, 0]
        parts = x * torch.autograd.grad(output.sum(), x)[0]
        draws = [torch.Generator().manual_seed(seed + i) for i in range(len(x))]
        noise = torch.stack([torch.randn(x.shape[2:], generator=g) for g in draws])
        found = {
            "ixg": Found(
                self.sign * parts.sum(1).detach(),
                output.detach(),
                parts.detach().flatten(1).sum(1),
            ),
            "noise": Found(noise, output.detach(), None),
        }
        return {method: found[method] for method in methods}


def simple(count: int = 5, **options: object) -> Results:
    return evaluate(
        options.pop("model", None) or Counting(),
        options.pop("samples", None) or samples(count),
        ("ixg", "noise"),
        explainer=Simple,
        batch_size=options.pop("batch_size", 2),
        **options,
    )


# ----------------------------------------------------------- rows


def test_one_row_an_image_method_policy_and_metric() -> None:
    results = simple()
    assert len(results) == 5 * 2 * 2 * len(METRICS)
    keys = [(r.image, r.method, r.policy, r.metric) for r in results]
    assert len(set(keys)) == len(keys)
    assert results.methods == ("ixg", "noise") and results.policies == ("plain", "libra")
    assert results.metrics == tuple(METRICS)
    assert results.settings["removal"].startswith("tokens of removed patches are dropped")
    missing = {(r.image, r.method, r.metric) for r in results if math.isnan(r.value)}
    no_total = {
        (i, "noise", name) for i in range(5) for name, m in METRICS.items() if m.needs == "total"
    }
    no_mask = {
        (1, method, name)
        for method in results.methods
        for name, m in METRICS.items()
        if m.needs == "masks"
    }
    assert missing == no_total | no_mask


def test_every_value_is_that_of_its_metric() -> None:
    """One image, one method and one policy at a time, without evaluate()."""
    model, given = Counting(), samples()
    results = simple(target="label", model=model, samples=given)
    deletion = Deletion(model, given[0].image[None])
    assert deletion.grid == (4, 4)
    for policy in ("plain", "libra"):
        explain = Simple(model, given[0].image, policy)
        for index, sample in enumerate(given):
            x, target = sample.image[None], torch.tensor([sample.label])
            found = explain(x, ("ixg", "noise"), target, seed=index)
            for method, m in found.items():
                curves = deletion.curves(x, {"a": m.tokens((4, 4))}, target)["a"]
                for name, metric in METRICS.items():
                    got = results.values(method, policy, name)[index]
                    if metric.needs == "curves":
                        want = float(metric.compute(curves)[0])
                    elif metric.needs == "masks" and sample.mask is not None:
                        want = float(metric.compute(m.values, sample.mask[None])[0])
                    elif metric.needs == "total" and m.total is not None:
                        want = float(metric.compute(m.output, m.total)[0])
                    else:
                        want = math.nan
                    assert got == pytest.approx(want, rel=1e-3, abs=1e-5, nan_ok=True), name
    assert [r.target for r in results] == [r.label for r in results]


def test_the_prediction_is_the_target_by_default() -> None:
    model, given = Counting(), samples()
    predicted = [int(model.vit(s.image[None]).argmax()) for s in given]
    rows = list(simple(model=model, samples=given, metrics="srg"))
    assert [r.target for r in rows[:: len(rows) // 5]] == predicted
    assert {r.label for r in rows} == {0, 1, 2}


def test_batches_change_nothing_but_rounding() -> None:
    one, many = simple(batch_size=1, forward_batch=3), simple(batch_size=4)
    for a, b in zip(one, many, strict=True):
        assert a[:-1] == b[:-1]
        assert a.value == pytest.approx(b.value, rel=1e-3, abs=1e-5, nan_ok=True)


# ----------------------------------------------------------- cost


def distinct(model: nn.Module, given: Sequence[Sample]) -> int:
    """How many different images with patches removed there are, for all fractions and orders."""
    kept = set()
    for index, sample in enumerate(given):
        x = sample.image[None]
        target = model.vit(x).argmax(1)
        for policy in ("plain", "libra"):
            maps = Simple(model, x, policy)(x, ("ixg", "noise"), target, seed=index)
            for found in maps.values():
                cells = found.tokens((4, 4)).flatten().tolist()
                ranked = sorted(range(16), key=lambda cell: -cells[cell])
                for tenth in range(1, 10):
                    gone = round(16 * tenth / 10)
                    kept |= {(index, frozenset(ranked[gone:]))}
                    kept |= {(index, frozenset(ranked[: 16 - gone]))}
    return len(kept)


def test_no_forward_more_than_the_metrics_need() -> None:
    model = Counting()
    given = samples()
    Deletion(model, given[0].image[None])
    trial = sum(model.seen)
    model.seen.clear()
    Simple.calls = 0
    simple(model=model, samples=given)
    assert Simple.calls == 3 * 2  # batches x policies
    assert sum(model.seen) - trial == 5 + distinct(model, given) <= 5 * (1 + 4 * 2 * 9)
    model.seen.clear()
    simple(model=model, samples=given, metrics=("segmentation-ap", "pointing-game"))
    assert sum(model.seen) - trial == 5  # no metric reads curves


@pytest.mark.slow
def test_masks_meet_maps_where_their_tokens_lie() -> None:
    """Of 36 x 36 pixels 4 x 4 patches of 8 cover 32 x 32; a stretched map would be off by 4."""
    given = [s for s in samples(size=36) if s.mask is not None]
    results = evaluate(Counting(), given, "fullgrad+", "libra", ("segmentation-ap",))
    explain = Explainer(Counting(), given[0].image[None], policy="libra")
    stretched = []
    for sample, row in zip(given, results, strict=True):
        found = explain(sample.image[None], "fullgrad+", torch.tensor([row.target]))["fullgrad+"]
        assert row.value == segmentation_ap(found.pixels(), sample.mask[None]).item()
        stretched.append(segmentation_ap(found.values, sample.mask[None]).item() - row.value)
    assert max(map(abs, stretched)) > 1e-3


# ----------------------------------------------------------- resuming


def test_an_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = simple()
    model = Counting()
    given = samples()

    class Breaks:
        """Samples of which the fourth cannot be read."""

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Sample:
            if index == 3:
                raise OSError("the disk is gone")
            return given[index]

    with pytest.raises(OSError, match="disk is gone"):
        simple(model=model, samples=Breaks(), folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["batch-00000000.json", "settings.json"]
    Simple.calls = 0
    resumed = simple(model=model, folder=tmp_path)
    assert Simple.calls == 2 * 2  # two of three batches, two policies
    assert_same(resumed, whole)
    Simple.calls = 0
    assert_same(simple(folder=tmp_path), whole)
    assert Simple.calls == 0


def test_a_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    simple(folder=tmp_path, metrics="srg")
    with pytest.raises(InputError, match=r"differs in metrics, target"):
        simple(folder=tmp_path, metrics="aopc", target="label")
    other = Counting()
    with torch.no_grad():
        other.vit.head.bias.add_(1)
    with pytest.raises(InputError, match=r"differs in model:"):
        simple(folder=tmp_path, metrics="srg", model=other)


@pytest.mark.parametrize("changed", ["image", "label", "mask", "no mask"])
def test_kept_batches_of_other_samples_are_refused(changed: str, tmp_path: Path) -> None:
    """One sample in the middle is another; neither the first nor the last is."""
    given = samples()
    simple(folder=tmp_path, samples=given, metrics="segmentation-ap")
    sample = given[3]
    given[3] = {
        "image": replace(sample, image=sample.image + 1e-6),
        "label": replace(sample, label=1),
        "mask": replace(sample, mask=~sample.mask),
        "no mask": replace(sample, mask=None),
    }[changed]
    Simple.calls = 0
    with pytest.raises(InputError, match=r"batch-00000002\.json .* samples 2 to 3 have now"):
        simple(folder=tmp_path, samples=given, metrics="segmentation-ap")
    assert Simple.calls == 0
    fresh = simple(samples=given, metrics="segmentation-ap")
    assert fresh.settings["data"] != simple(metrics="segmentation-ap").settings["data"]


class Acting(Counting):
    """The same parameters and modules as `Counting`; `act` is called by its code alone."""

    def __init__(self, act: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_model_of_the_same_parameters_is_told_by_its_modules_and_its_output(
    tmp_path: Path,
) -> None:
    simple(folder=tmp_path / "modules", metrics="srg")
    other = Counting()
    for block in other.vit.blocks:
        block.mlp[1] = nn.ReLU().eval()
    with pytest.raises(InputError, match="differs in model:"):
        simple(folder=tmp_path / "modules", metrics="srg", model=other)
    simple(folder=tmp_path / "code", metrics="srg", model=Acting())
    for act in (torch.tanh, lambda x: x * 1.01, lambda x: x[:, :2]):
        with pytest.raises(InputError, match="differs in the model's output for the first sample"):
            simple(folder=tmp_path / "code", metrics="srg", model=Acting(act))
    Simple.calls = 0
    simple(folder=tmp_path / "code", metrics="srg", model=Acting(lambda x: x * (1 + 1e-5)))
    assert Simple.calls == 0  # as another device may round


def test_addresses_in_what_a_module_prints_do_not_tell_models_apart() -> None:
    class Printing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = object()

        def extra_repr(self) -> str:
            return f"of={self.of}"

    pair = Printing(), Printing()
    assert str(pair[0]) != str(pair[1])
    assert fingerprint(pair[0]) == fingerprint(pair[1])


def test_folders_that_say_too_little_or_nothing_are_refused(tmp_path: Path) -> None:
    simple(folder=tmp_path, metrics="srg")
    settings, batch = tmp_path / "settings.json", tmp_path / "batch-00000002.json"
    held = {file: file.read_text() for file in (settings, batch)}

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            simple(folder=tmp_path, metrics="srg")
        for file, text in held.items():
            file.write_text(text)

    batch.write_text(json.dumps(json.loads(held[batch]) | {"settings": {}}))
    refused("kept by an earlier version")
    old = json.loads(held[settings])
    del old["output"]
    settings.write_text(json.dumps(old))
    refused("kept by an earlier version")
    settings.write_text("{")
    refused(r"settings\.json holds no settings: .*remove this one")
    settings.write_text("7")
    refused(r"settings\.json holds no settings")
    settings.unlink()
    refused(r"settings\.json holds no settings: .*No such file")
    batch.write_text("{")
    refused(r"batch-00000002\.json does not hold results")
    simple(folder=tmp_path, metrics="srg")


# ----------------------------------------------------------- samples


def test_samples_that_do_not_fit_are_named() -> None:
    given = samples()
    image, mask = given[3].image, given[3].mask

    def refused(message: str, sample: object, kind: type = InputError, **options: object) -> None:
        changed = [*given[:3], sample, given[4]]
        Simple.calls = 0
        for size in (1, 5):  # alone in its batch, and among others
            with pytest.raises(kind, match=message):
                simple(samples=changed, metrics="completeness-error", batch_size=size, **options)
        assert Simple.calls in (0, 2 * 3)  # of the batches before it

    refused("sample 3 is a tuple without image, label, mask", (image, 1))
    refused("sample 3 needs an image tensor", Sample(image.numpy(), 1, None))  # type: ignore[arg-type]
    refused(r"sample 3 .*\(1, 3, 32, 32\)", Sample(image[None], 1, None))
    refused("images of one size", Sample(image[:, :24], 1, None))
    broken = image.clone()
    broken[1, 2, 3] = math.nan
    refused("image of sample 3 holds NaN", Sample(broken, 1, mask), NonFiniteError)
    for label in (-1, 3):
        wrong = Sample(image, label, mask)
        refused(f"sample 3 has the label {label}, .* 0 to 2", wrong, target="label")
        kept = simple(samples=[wrong], metrics="completeness-error")  # nothing reads it as a class
        assert kept.columns["label"][0] == label
    with pytest.raises(InputError, match="masks of one size"):
        simple(samples=[given[0], replace(given[3], mask=mask[:8])])
    with pytest.raises(NonFiniteError, match="image of sample 0 holds NaN"):
        simple(samples=[Sample(broken, 1, mask)])
    with pytest.raises(InputError, match="sample 0 is a tuple"):
        simple(samples=[(image, 1)])


def test_an_output_that_is_not_finite_is_met_at_its_sample() -> None:
    model = Acting(lambda x: x / (x[:, :1] < 1e9))
    assert len(simple(model=model, metrics="completeness-error")) == 5 * 2 * 2
    model.act = lambda x: x * math.nan
    for metrics in ("srg", "completeness-error"):
        with pytest.raises(NonFiniteError, match="the model's output of sample 0 holds NaN"):
            simple(model=model, metrics=metrics)


def test_masks_may_have_a_size_of_their_own() -> None:
    small = [replace(s, mask=None if s.mask is None else s.mask[::2, ::2]) for s in samples()]
    found = simple(samples=small, metrics="segmentation-ap").values(
        "ixg", "plain", "segmentation-ap"
    )
    assert np.isnan(found).tolist() == [False, True, False, False, False]


def test_a_model_in_bfloat16_has_every_metric() -> None:
    results = simple(2, model=Counting().bfloat16())
    for name in METRICS:
        assert np.isfinite(results.values("ixg", "plain", name)[0]), name


def assert_same(a: Results, b: Results) -> None:
    """Equal bit for bit, NaN included."""
    assert [r[:-1] for r in a] == [r[:-1] for r in b]
    np.testing.assert_array_equal(a.columns["value"], b.columns["value"])
    assert a.settings == b.settings


# ----------------------------------------------------------- several processes

SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_evaluate as t
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
t.simple(folder=folder / "kept").save(folder / f"kept-{rank}.json")
t.simple().save(folder / f"gone-{rank}.json")
changed = t.samples()
changed[3] = t.replace(changed[3], label=2)  # in the second batch, which process 1 compares
try:
    t.simple(samples=changed, folder=folder / "kept")
except Exception as error:
    (folder / f"stale-{rank}").write_text(f"{type(error).__name__}: {error}")
broken = t.samples()
broken[2] = t.Sample(torch.zeros(3, 8, 8), 0, None)  # in the second batch: that of process 1
try:
    t.simple(samples=broken)
except Exception as error:
    (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(tmp_path: Path) -> None:
    """And where one of them fails, the other does not wait for ever."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(root.parent), str(root)])
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, *start, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = simple()
    for rank in (0, 1):
        assert_same(Results.load(tmp_path / f"kept-{rank}.json"), alone)
        assert_same(Results.load(tmp_path / f"gone-{rank}.json"), alone)
    assert len(list((tmp_path / "kept").glob("batch-*.json"))) == 3
    Simple.calls = 0
    assert_same(simple(folder=tmp_path / "kept"), alone)  # one process reads what two have written
    assert Simple.calls == 0
    for name, own in (
        ("stale", "InputError: the folder's batch-00000002.json was made of other images"),
        ("error", "InputError: a batch needs images of one size"),
    ):
        assert (tmp_path / f"{name}-1").read_text().startswith(own)
        told = f"FullgradError: process 1 of 2 failed: {own}"
        assert (tmp_path / f"{name}-0").read_text().startswith(told)


# ----------------------------------------------------------- the library's own explainer


@pytest.mark.slow
def test_the_own_explainer_and_what_libra_does_to_completeness() -> None:
    model, given = Counting().vit, samples(3)
    results = evaluate(model, given, METHODS, batch_size=3)
    assert len(results) == 3 * 3 * 2 * len(METRICS)
    exact = evaluate(model.double(), given, "fullgrad", metrics="relative-completeness-error")
    assert (exact.values("fullgrad", "libra", "relative-completeness-error") < 1e-10).all()
    assert (exact.values("fullgrad", "plain", "relative-completeness-error") > 1e-2).all()
    randoms = [results.values("random", policy, "srg") for policy in ("plain", "libra")]
    np.testing.assert_array_equal(*randoms)


def test_a_method_that_does_not_apply_leaves_no_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    with pytest.raises(InputError, match="methods that apply"):
        evaluate(conv, samples(2), "raw-attention", folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------- means and intervals


def made(plain: Sequence[float], libra: Sequence[float]) -> Results:
    rows = [
        Row(i, 0, 0, "m", policy, "srg", value)
        for policy, values in (("plain", plain), ("libra", libra))
        for i, value in enumerate(values)
    ]
    return Results.of(rows)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = made(draw.exponential(2.0, 60), [0.0] * 60).mean("m", "plain", "srg", 0.9, 500)
        covered += found.low <= 2.0 <= found.high
    assert 0.84 <= covered / 200 <= 0.96


def test_a_difference_is_paired() -> None:
    """Images differ a lot, the policies little: only pairs can tell."""
    draw = np.random.default_rng(1)
    plain = draw.normal(0, 10, 50)
    libra = plain + 0.1 + draw.normal(0, 0.05, 50)
    results = made(plain.tolist(), libra.tolist())
    gain = results.difference("m", "srg")
    assert 0.05 < gain.low < gain.mean < gain.high < 0.15
    assert gain.mean == pytest.approx(float((libra - plain).mean()))
    normal = 1.96 * (libra - plain).std(ddof=1) / 50**0.5  # the textbook's, for many images
    assert gain.high - gain.mean == pytest.approx(normal, rel=0.2)
    apart = [results.mean("m", policy, "srg") for policy in ("plain", "libra")]
    assert apart[0].high > apart[1].low
    assert results.difference("m", "srg") == gain  # seeded


def test_intervals_where_there_is_little_to_say() -> None:
    nan = math.nan
    results = made([1.0, nan, 3.0], [2.0, 2.0, 2.0])
    assert results.mean("m", "plain", "srg").count == 2
    assert results.mean("m", "libra", "srg") == Interval(2.0, 2.0, 2.0, 3)
    one = made([1.0], [nan])
    everything = (-math.inf, math.inf)
    for found, count, note in (
        (one.mean("m", "plain", "srg"), 1, "one value"),
        (one.mean("m", "libra", "srg"), 0, "no values"),
        (one.difference("m", "srg"), 0, "no values"),
        (made([1.0, math.inf], [0.0, 0.0]).mean("m", "plain", "srg"), 2, "an infinite value"),
        (made([1e308, -1e308] * 9, [0.0] * 18).mean("m", "plain", "srg"), 18, None),
    ):
        assert found.count == count and not math.isnan(found.low) and not math.isnan(found.high)
        if note is not None:
            assert ((found.low, found.high), found.note) == (everything, note)
    assert results.mean("m", "libra", "srg").note == "all values equal"
    assert str(one.mean("m", "plain", "srg")) == "1 [-inf, inf] (one value)"
    assert str(Interval(0.5, 0.25, 0.75, 9)) == "0.5 [0.25, 0.75]"


NEXT = float(np.nextafter(0.1, 1))
NEARLY_EQUAL = [
    [0.1, 0.1, 0.1 + 1e-16],
    [0.1, 0.1, 0.1, NEXT],
    [NEXT, 0.1, 0.1, 0.1, NEXT],
    [1.0, 1.0, 5.0],
    [1.0, 1.0, 1e9],
    [1.0, 2.0],
    [0.1, NEXT],
    [1.0, 2.0, 4.0],
    [1e-200, 2e-200],
    [1e-320, 2e-320, 3e-320],
    [1e200, -1e200, 3.0],
    [0.0, 0.0, 0.0, 0.0, -1.0],
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", NEARLY_EQUAL, ids=str)
def test_an_interval_is_never_nan(values: list[float]) -> None:
    """Also where BCa's corrections are 0 / 0, for values that differ in their last digits alone."""
    found = made(values, [0.0] * len(values)).mean("m", "plain", "srg")
    rounding = 4 * np.finfo(float).eps * max(map(abs, values))
    assert min(values) - rounding <= found.low <= found.high <= max(values) + rounding
    assert found.low - rounding <= found.mean <= found.high + rounding
    assert found == made(values, [0.0] * len(values)).difference("m", "srg", "plain", "libra")


@pytest.mark.filterwarnings("ignore:The BCa")
@hypothesis.given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=7))
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_intervals_of_any_values_are_bcas_or_the_percentiles(values: list[float]) -> None:
    found = made(values, [0.0] * len(values)).mean("m", "plain", "srg", resamples=200)
    assert np.isfinite([found.low, found.high]).all() and found.low <= found.high
    if len(set(values)) == 1:
        return
    with np.errstate(all="ignore"):
        wanted = [
            bootstrap(
                (np.array(values),), np.mean, n_resamples=200, method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
            for method in ("BCa", "percentile")
        ]  # fmt: skip
    at = wanted[bool(np.isnan(wanted[0]).any())]
    assert (found.low, found.high) == (at.low, at.high)
    assert ("percentiles" in found.note) == (at is wanted[1])


@pytest.mark.parametrize("name", ["r.json", "r.csv"])
def test_results_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    results = made([0.1, math.nan, math.inf], [1 / 3, -math.inf, 1e-300])
    results.save(tmp_path / name)
    back = Results.load(tmp_path / name)
    assert_same(back, results)
    assert "NaN" not in (tmp_path / name).read_text()


def test_files_that_hold_no_results_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.csv").write_text("image,value\n1,2\n")
    for name in ("a.json", "b.csv"):
        with pytest.raises(InputError, match="does not hold results"):
            Results.load(tmp_path / name)
    with pytest.raises(InputError, match=r"\.json or \.csv"):
        made([1.0], [1.0]).save(tmp_path / "r.txt")


def test_unknown_names_are_errors() -> None:
    results = made([1.0], [1.0])
    for given, kind in ((("n", "plain", "srg"), "method"), (("m", "libre", "srg"), "policy")):
        with pytest.raises(UnknownNameError, match=kind):
            results.values(*given)
    with pytest.raises(UnknownNameError, match=r"unknown metric 'sgr'.*srg"):
        simple(metrics=("sgr",))
    with pytest.raises(InputError, match="no samples"):
        evaluate(Counting(), [], "ixg")
    with pytest.raises(InputError, match="each once"):
        simple(policies=("plain", "plain"))
    with pytest.raises(InputError, match="'prediction' or 'label'"):
        simple(target="truth")
    with pytest.raises(InputError, match="at least 1"):
        simple(batch_size=0)
    with pytest.raises(InputError, match=r"policies are given by names, or objects as a dict"):
        simple(policies=[{"libra": 1}])


def test_a_failure_is_told_to_the_others() -> None:
    """The same, without processes: what another one reports is raised here."""

    class Two:
        count = 2

        def from_all(self, value: tuple[object, str | None]) -> list[tuple[object, str | None]]:
            return [value, (None, "OSError: no disk")]

    with pytest.raises(FullgradError, match="process 1 of 2 failed: OSError: no disk"):
        together(Two(), dict)
    with pytest.raises(ZeroDivisionError):
        together(Two(), lambda: 1 / 0)


def test_srg_of_a_constant_map_is_reading_order() -> None:
    """Ties are broken in reading order, the same in every run."""
    model, given = Counting(), samples(1)
    deletion = Deletion(model, given[0].image[None])
    flat, falling = torch.zeros(1, 4, 4), -torch.arange(16.0).reshape(1, 4, 4)
    curves = deletion.curves(given[0].image[None], {"flat": flat, "falling": falling}, 0)
    assert torch.equal(srg(curves["flat"]), srg(curves["falling"]))
