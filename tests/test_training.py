"""The paper's models: families kept, trained from nothing, resumed, found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.paper import clip
from experiments.paper.fit import SMOKE, accuracy, classify, fit, held_out, scenes
from experiments.paper.models import ARCHITECTURES, BUILDERS, SIZES, load, train
from experiments.paper.train import table
from fullgrad_theory.data import CLASSES
from fullgrad_theory.errors import InputError, UnknownNameError

pytestmark = pytest.mark.slow


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", BUILDERS)
def test_builders(name: str) -> None:
    model = BUILDERS[name]().eval()
    assert type(model).__module__.startswith("timm.models.")
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, len(CLASSES))
    assert 4 <= len(model.blocks) <= 6  # type: ignore[arg-type]


def test_families_are_what_they_are() -> None:
    """What tells the families apart is there, in the structure timm built."""
    built = {name: build() for name, build in ARCHITECTURES.items()}
    names = {name: {k for k, _ in model.named_parameters()} for name, model in built.items()}
    prefix = {name: getattr(model, "num_prefix_tokens", 0) for name, model in built.items()}
    assert {name for name, count in prefix.items() if count} == {
        "vit", "eva2", "beit2", "flexivit", "clip", "deit3",
    }  # fmt: skip
    places = {name: model.pos_embed.shape[1] for name, model in built.items() if name != "beit2"
              and hasattr(model, "pos_embed")}  # fmt: skip
    assert places == {"vit": 65, "eva2": 65, "flexivit": 64, "siglip": 64, "clip": 65, "deit3": 64}
    assert type(built["eva2"].blocks[0].mlp).__name__ in ("GluMlp", "SwiGLU")
    assert built["eva2"].rope is not None
    assert "blocks.0.attn.relative_position_bias_table" in names["beit2"]
    assert "blocks.0.gamma_1" in names["beit2"] and "blocks.0.ls1.gamma" in names["deit3"]
    assert built["beit2"].pos_embed is None
    assert "norm_pre.weight" in names["clip"] and "norm_pre.weight" not in names["vit"]
    assert built["siglip"].global_pool == "avg"
    assert type(built["gmixer"].blocks[0].mlp_tokens).__name__ == "GluMlp"
    assert type(built["mixer"].blocks[0].mlp_tokens).__name__ == "Mlp"


def test_sizes_grow() -> None:
    counts = [sum(p.numel() for p in build().parameters()) for build in SIZES.values()]
    assert counts == sorted(counts) and len(set(counts)) == 4


def test_a_trained_model_is_kept(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first = train("vit-tiny", tmp_path, SMOKE)
    assert torch.equal(before, torch.get_rng_state())
    written = first.file.stat().st_mtime_ns
    assert not first.model.training and set(first.scores) == {
        "accuracy", "without it", "without any",
    }  # fmt: skip
    again = load("vit-tiny", tmp_path, SMOKE)
    assert first.file.stat().st_mtime_ns == written and same_weights(first.model, again)
    assert first.scores["accuracy"] == accuracy(again, held_out(SMOKE))
    assert [p.suffix for p in tmp_path.iterdir()] == [".pt"]
    other = train("vit-tiny", tmp_path, replace(SMOKE, seed=1))
    assert other.file != first.file and not same_weights(first.model, other.model)
    line = table([("vit-tiny", first)]).splitlines()[1]
    assert line.startswith("vit-tiny") and f"accuracy {100 * first.scores['accuracy']:.1f}" in line


def test_vit_and_its_base_size_are_one(tmp_path: Path) -> None:
    short = replace(SMOKE, steps=3)
    assert train("vit", tmp_path, short).file == train("vit-base", tmp_path, short).file


@pytest.mark.parametrize("name", ["beit2", "gmixer"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path, name: str) -> None:
    build, recipe = ARCHITECTURES[name], replace(SMOKE, images=40)  # more than one round
    whole = fit(name, build, classify, recipe, tmp_path / "whole")
    for stop in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            fit(name, build, classify, recipe, tmp_path / "parts", stop_after=stop)
    assert [p.suffix for p in (tmp_path / "parts").iterdir()] == [".part"]
    parts = fit(name, build, classify, recipe, tmp_path / "parts")
    assert same_weights(whole.model, parts.model) and whole.scores == parts.scores


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean.*vit-tiny"):
        load("vit-tinny", tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_learns(tmp_path: Path) -> None:
    """A few images are learnt by heart; the full size's table says what is known of others."""
    recipe = replace(SMOKE, images=64, steps=80)
    model = load("mixer", tmp_path, recipe)
    assert accuracy(model, scenes(recipe.images, recipe.seed)) > 0.9  # chance: 0.11


# --------------------------------------------------------------------------- the two towers


def test_words() -> None:
    longest = f"a {CLASSES[0]}, a {CLASSES[4]} and a {CLASSES[8]}"
    row = clip.tokens([f"a {CLASSES[0]}", longest])
    assert row.shape == (2, clip.LENGTH) and (row[0, 3:] == 0).all() and (row[1] != 0).all()
    assert [clip.WORDS[i] for i in row[0, :3]] == ["a", *CLASSES[0].split()]
    with pytest.raises(InputError, match="words cat;"):
        clip.tokens(["a striped cat"])


def test_padding_says_nothing() -> None:
    torch.manual_seed(0)
    model = clip.Clip(dim=32, depth=1, heads=2).eval()
    short = clip.tokens([f"a {CLASSES[3]}"])
    alone = model.encode_text(short[:, :3])
    model.places.data[3:] += 1
    assert model.places.shape[0] == clip.LENGTH
    torch.testing.assert_close(model.encode_text(short), alone)


def test_two_towers_train(tmp_path: Path) -> None:
    recipe = replace(SMOKE, steps=6)
    trained = clip.train_clip(tmp_path, recipe)
    assert set(trained.scores) == {"accuracy", "retrieval", "of 32"}
    data = held_out(recipe)
    said = sorted(set(clip.captions(data)))
    with torch.no_grad():
        scores = trained.model(data.inputs, clip.tokens(said))
        right = [said[i] for i in scores.argmax(1).tolist()]
    share = sum(a == b for a, b in zip(right, clip.captions(data), strict=True)) / len(data)
    assert abs(share - trained.scores["retrieval"]) < 1e-6
    assert same_weights(trained.model, clip.load_clip(tmp_path, recipe))
