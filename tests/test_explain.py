"""`fullgrad-theory explain`: a picture of maps, and what is refused at the door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fullgrad_theory.attribution import Explainer
from fullgrad_theory.attribution.map import Map
from fullgrad_theory.command import picture
from fullgrad_theory.command.cli import app
from fullgrad_theory.command.target import load
from fullgrad_theory.errors import InputError

OWN = """
import timm, torch

def build():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=(32, 48), depth=1, embed_dim=16, num_heads=2, num_classes=5
    )

def mixer():
    return timm.models.MlpMixer(img_size=32, num_blocks=1, embed_dim=16, num_classes=5)
"""


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    picture_of = Image.new("RGB", (60, 40), (20, 120, 220))
    picture_of.paste((220, 40, 30), (5, 5, 25, 30))
    path = tmp_path / "scene.png"
    picture_of.save(path)
    return path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "200"})
    return done.exit_code, done.output


@pytest.mark.slow
def test_methods_and_policies_in_one_picture(image: Path) -> None:
    methods = ("--method", "fullgrad", "--method", "genatt")
    code, said = run(
        image, "--model", "own.py:build", "--input", "1,3,32,48", *methods,
        "--policy", "plain", "--policy", "libra", "--target", 3, "-o", "maps.png",
    )  # fmt: skip
    assert code == 0, said
    assert "class 3, value" in said and "probability 0." in said
    rows = {
        tuple(line.split()[:2]): line.split()[-1] for line in said.splitlines() if " x " in line
    }
    assert set(rows) == {(m, p) for m in ("fullgrad", "genatt") for p in ("plain", "libra")}
    assert float(rows["fullgrad", "libra"]) < 1e-4 < float(rows["fullgrad", "plain"])
    assert rows["genatt", "libra"] == "-"
    with Image.open("maps.png") as drawn:
        assert drawn.width > drawn.height > 300
        assert len(drawn.convert("RGB").getcolors(2**24) or []) > 1000  # not a blank sheet


@pytest.mark.slow
def test_a_timm_model(image: Path) -> None:
    code, said = run(image, "--model", "test_vit", "-o", "maps.pdf")
    assert code == 0, said
    assert Path("maps.pdf").read_bytes().startswith(b"%PDF")
    assert "fullgrad+" in said and "10 x 10" in said
    assert said.startswith("test_vit (random weights): ")


def test_the_picture_shows_what_the_maps_say(image: Path) -> None:
    """Scales are symmetric about 0, and a map's cells cover the image that the model saw."""
    model = load("own.py:build")
    example = torch.zeros(1, 3, 32, 48)
    seen = picture.see(picture.read(image), model, example)
    assert seen.pixels.shape == example.shape and seen.shown.shape == (32, 48, 3)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close((seen.shown - mean) / deviation, seen.pixels[0].permute(1, 2, 0))
    found = Explainer(model, example)(seen.pixels, "fullgrad+", 1)
    figure = picture.draw(seen, {"fullgrad+": {"plain": found["fullgrad+"]}}, "title")
    heat = figure.axes[1].images[0]
    low, high = heat.get_clim()
    sizes = found["fullgrad+"].values.abs()
    assert high == -low == pytest.approx(float(sizes.quantile(0.99)))
    assert heat.colorbar.extend != "neither"  # what is beyond is seen to be
    torch.testing.assert_close(torch.tensor(heat.get_array()), found["fullgrad+"].values[0])
    assert heat.get_extent() == [0, 48, 32, 0]
    assert figure.get_suptitle() == "title"


def test_a_scale_suits_the_sign_and_no_outlier_takes_it_all() -> None:
    seen = picture.Seen(torch.zeros(1, 3, 8, 8), torch.rand(8, 8, 3))
    flat = torch.linspace(0, 1, 64).reshape(1, 8, 8)
    maps = {
        name: Map(name, values, torch.ones(1), None, total, (8, 8))
        for name, values, total in (
            ("positive", flat, None),
            ("signed", flat - 0.5, torch.tensor([0.75])),
        )
    }
    figure = picture.draw(seen, {name: {"plain": found} for name, found in maps.items()}, "")
    scales = {
        axes.get_ylabel(): figure.axes[place + 1].images[0]
        for place, axes in enumerate(figure.axes)
        if axes.get_ylabel() in maps
    }
    assert scales["positive"].get_clim()[0] == 0 and scales["positive"].get_cmap().name == "cividis"
    low, high = scales["signed"].get_clim()
    assert low == -high and scales["signed"].get_cmap().name == "RdBu_r"
    titles = [axes.get_title() for axes in figure.axes]
    assert "completeness error 0.25" in titles and "over the image" in titles
    one_large = flat.clone()
    one_large[0, 0, 0] = 1e6
    assert picture.reach(one_large) < 1e6 * 0.5
    assert picture.reach(torch.zeros(2, 2)) == 1.0
    assert picture.reach(torch.tensor([0.0] * 300 + [2.0])) == 2.0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--method", "fulgrad"), 2, "did you mean fullgrad"),
        (("--policy", "libre"), 2, "did you mean"),
        (("--target", "5"), 2, "out of range for 5 classes"),
        (("-o", "nowhere/maps.png"), 2, "does not exist"),
        (("-o", "maps.txt"), 2, "name a file that ends in"),
        (("--input", "1,1,32,48"), 2, "channels"),
        (
            ("--model", "own.py:mixer", "--input", "1,3,32,32", "--method", "genatt"),
            2,
            "that apply",
        ),
        (("--model", "vit_tinny_patch16_224"), 2, "did you mean"),
    ],
)
def test_what_is_refused(image: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    given = ("--model", "own.py:build", "--input", "1,3,32,48", "-o", "maps.png")
    if "--input" in arguments:
        given = (*given[:2], *given[4:])
    found, said = run(image, *given, *arguments)
    assert found == code
    assert message in " ".join(said.replace("│", " ").split())
    assert not Path("maps.png").exists()


def test_a_picture_is_seen_as_the_camera_was_held(tmp_path: Path) -> None:
    stored = Image.new("RGB", (64, 32), (0, 0, 0))
    stored.paste((255, 0, 0), (0, 0, 16, 16))  # top left as stored, top right once upright
    exif = stored.getexif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = picture.read(tmp_path / "turned.jpg")
    assert upright.size == (32, 64) and upright.mode == "RGB"
    assert upright.getpixel((26, 6))[0] > 200 > 50 > upright.getpixel((6, 6))[0]


def test_an_unreadable_image_is_met_before_the_model_is_made(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not an image")
    code, said = run(path, "--model", "no.such:model", "-o", tmp_path / "maps.png")
    assert code == 2 and "is not an image that can be read" in " ".join(said.split())
    with pytest.raises(InputError, match="can be read"):
        picture.read(path)
    code, said = run(tmp_path / "none.png", "--model", "test_vit", "-o", tmp_path / "maps.png")
    assert code == 2 and "does not exist" in said
