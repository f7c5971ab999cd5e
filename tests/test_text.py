"""`explain --text`: what words contribute, against embeddings x gradient by hand, and the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browsing, opened
from typer.testing import CliRunner

from fullgrad_theory.command import telling
from fullgrad_theory.command.cli import app
from fullgrad_theory.command.making import Wanted
from fullgrad_theory.command.passage import Passage, Reader, entry, reader, tokenised
from fullgrad_theory.command.tokenmaps import TokenMap, token_maps

tf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "The film was not bad but wonderful"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "the film was not bad but won ##der ##ful he good <b>".split()
SIZES = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
LABELS = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


def tokenizer(folder: Path, framed: bool) -> None:
    """A WordPiece of its own, with or without [CLS] and [SEP] around a text, which pads to 20."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.enable_padding(length=20)
    if framed:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    tf.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert: a config alone; qa, mask and llama with (random) weights."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    named = {"architectures": ["BertForSequenceClassification"]}
    tf.BertConfig(**SIZES, **LABELS, **named).save_pretrained(root / "bert")
    tf.BertForQuestionAnswering(tf.BertConfig(**SIZES)).save_pretrained(root / "qa")
    tf.BertForMaskedLM(tf.BertConfig(**SIZES)).save_pretrained(root / "mask")
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).save_pretrained(root / "llama")
    for name in ("bert", "qa", "mask", "llama"):
        tokenizer(root / name, framed=name != "llama")
    return root


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["explain", "--text", *map(str, arguments)])
    return done.exit_code, done.output


def rows(said: str) -> dict[str, list[float]]:
    """The lines of the table that have figures."""
    found = (
        re.fullmatch(r" ?(\S.*?)((?:\s+[+-]?[\d.e+-]+)+) *", line) for line in said.splitlines()
    )
    return {m[1]: [float(value) for value in m[2].split()] for m in found if m}


def open_folder(folder: Path, text: str = TEXT) -> tuple[Reader, Passage]:
    read = reader(folder)
    return read, tokenised(text, read.tokenizer)


# --------------------------------------------------------------------------- words


def test_words_are_whole_and_written_as_in_the_text(folders: Path) -> None:
    _, words = open_folder(folders / "bert")
    assert [piece.text for piece in words.pieces] == ["[CLS]", *TEXT.split(), "[SEP]"]
    assert [piece.special for piece in words.pieces] == [True, *[False] * 7, True]
    assert [piece.places for piece in words.pieces[-2:]] == [(7, 8, 9), (10,)]
    assert words.length == 11  # no padding
    _, words = open_folder(folders / "llama", "good strange [MASK] good")
    assert [piece.text for piece in words.pieces] == ["good", "[UNK]", "[MASK]", "good"]


def test_what_is_meant(folders: Path) -> None:
    def meant(name: str, text: str = TEXT, **wanted: Any) -> tuple[Any, str]:
        read, words = open_folder(folders / name, text)
        found = entry(Wanted(**wanted), read, words)
        return found.index, found.words

    assert meant("bert", target="positive") == ((1,), "logits: positive")
    assert meant("bert", target="0", against="positive")[1].endswith(
        "negative rather than positive"
    )
    assert meant("llama", target="he") == ((8, 14), "logits: 'he' (14), at token 8 (##ful)")
    assert meant("llama", target="29")[1].startswith("logits: entry 29, at")  # no token of it
    assert meant("llama", target="he", position=-9)[0] == (0, 14)
    assert meant("mask", "the [MASK] was good", target="film")[0] == (2, 6)
    assert meant("qa", target="2") == ((2,), "start logits: 'film' (token 2)")
    assert meant("qa", output="end_logits", target="2")[1].startswith("end logits")


# --------------------------------------------------------------------------- contributions


def values(one: TokenMap) -> torch.Tensor:
    return one.found.values[0].double()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "qa", "llama"])
def test_against_embeddings_and_gradients_by_hand(folders: Path, name: str) -> None:
    read, words = open_folder(folders / name)
    at = entry(Wanted(target="1", against="0"), read, words)
    plain, edited, whole = (
        token_maps(read, words, at, [method], [policy])[0]
        for method, policy in (
            ("input-x-gradient", "plain"), ("input-x-gradient", "libra"), ("fullgrad", "libra")
        )
    )  # fmt: skip
    embedded = read.model.get_input_embeddings()(words.given["input_ids"]).detach().requires_grad_()
    rest = {key: value for key, value in words.given.items() if key != "input_ids"}
    scores = read.model(inputs_embeds=embedded, **rest)[at.name][0]
    assert at.against is not None
    value = scores[at.index] - scores[at.against]
    (gradient,) = torch.autograd.grad(value, embedded)
    by_hand = (gradient * embedded).sum(-1)[0].double()
    torch.testing.assert_close(values(plain), by_hand, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(values(edited), by_hand, rtol=1e-2, atol=1e-7)
    # nothing is lost: words and biases are the output
    rest = whole.beside(words)
    assert rest is not None and whole.error is not None and whole.error < 1e-4
    total = float(values(whole).sum()) + rest
    assert total == pytest.approx(float(value.detach()), rel=1e-3, abs=1e-6)
    assert sum(whole.of(piece) for piece in words.pieces) == pytest.approx(
        float(values(whole).sum())
    )
    fewer = words.without_special()  # what is hidden is counted beside
    assert not any(piece.special for piece in fewer.pieces)
    beside = whole.beside(fewer)
    assert beside is not None
    shown = sum(whole.of(piece) for piece in fewer.pieces)
    assert shown + beside == pytest.approx(total, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_nothing_comes_from_what_follows(folders: Path) -> None:
    read, words = open_folder(folders / "llama")
    at = entry(Wanted(position=3), read, words)
    (found,) = token_maps(read, words, at, ["fullgrad"], ["libra"])
    assert float(values(found)[:4].abs().min()) > 0 and not values(found)[4:].any()


# --------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_side_by_side(folders: Path, tmp_path: Path) -> None:
    given = ("--policy", "plain", "--policy", "libra", "--target", "positive")
    methods = [part for m in ("fullgrad", "attcat", "genatt") for part in ("--method", m)]
    page = tmp_path / "text.html"
    text = f"{TEXT} <b>"
    code, said = run(text, "--model", folders / "bert", *given, *methods, "-o", page)
    assert code == 0, said
    assert said.startswith("bert (random weights): logits: positive, value ")
    found = rows(said)
    assert [len(found[word]) for word in ("[CLS]", "wonderful", "<b>")] == [6, 6, 6]
    assert min(values[4] for values in found.values() if len(values) == 6) >= 0  # genatt
    plain, libra = found["completeness error"]
    assert libra < 1e-4 < plain
    with browsing() as browser:
        for width in (1280, 400):
            with opened(browser, page, width) as shown:
                assert shown.locator(".words").count() == 6
                word = shown.locator(".words >> nth=1").locator("span >> nth=7")
                assert word.inner_text().split()[0] == "wonderful"
                assert word.get_attribute("title") == "3 tokens"
                assert shown.locator("b").count() == 0 and "<b>" in shown.inner_text("main")


@pytest.mark.slow
def test_special_tokens_may_be_hidden(folders: Path, tmp_path: Path) -> None:
    given = (TEXT, "--model", folders / "bert", "--method", "rollout", "--method", "fullgrad+")
    code, said = run(*given, "--no-special", "-o", tmp_path / "text.html")
    assert code == 0, said
    assert {"The", "wonderful"} <= {*rows(said)} and "[CLS]" not in said
    assert "[SEP]" not in (tmp_path / "text.html").read_text()
    assert "[PAD]" not in run(*given)[1]


@pytest.mark.slow
def test_a_picture_has_a_bar_a_word(folders: Path, tmp_path: Path) -> None:
    read, words = open_folder(folders / "bert", "The film costs 5$ or 6$")
    at = entry(Wanted(target="positive"), read, words)
    maps = token_maps(read, words, at, ["fullgrad"], ["plain", "libra"])
    figure = telling.draw(words, maps, "a title", tmp_path / "words.png")
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")
    for axis, found in zip(figure.axes, maps, strict=True):
        drawn = [bar.get_width() for bar in axis.patches]
        assert drawn == pytest.approx([found.of(piece) for piece in words.pieces])
        assert f"completeness error {found.error:.2g}" in axis.get_title()
    shown = [label.get_text().replace("\\", "") for label in figure.axes[0].get_yticklabels()]
    assert shown == [piece.text for piece in words.pieces]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bert", "--method", "gen-att"), "did you mean genatt"),
        (("bert", "--target", "nice"), "known: negative, positive"),
        (("bert", "--target", "2"), "no entry 2 among 2"),
        (("bert", "--output", "hidden"), "there is logits"),
        (("bert", "--position", "1"), "score each token"),
        (("bert", "-o", "text.doc"), "name a file that ends in"),
        (("llama", "--position", "9"), "no position 9 among 9 tokens"),
        (("llama", "--target", "wonderful"), "3 tokens"),
        (("qa", "--target", "film"), "by its place, 0 to 10"),
        (("none",), "it has no config.json"),
    ],
)
def test_what_is_refused(
    folders: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    code, said = run(TEXT, "--model", *arguments)
    assert code == 2 and message in said and said.count("\n") == 1


def test_a_text_or_an_image(folders: Path) -> None:
    image = folders / "image.png"
    image.write_bytes(b"")
    code, said = run(TEXT, image, "--model", folders / "bert")
    assert code == 2 and "not both" in said
    for options, message in (
        ((), "name an image, or --text"),
        ((str(image),), "name --out"),
        ((str(image), "-o", "x.html"), "not as a page"),
        ((str(image), "-o", "x.png", "--target", "cat"), "by its number"),
        ((str(image), "-o", "x.png", "--against", "3"), "--against is for --text"),
    ):
        done = CliRunner().invoke(app, ["explain", "--model", "test_vit", *options])
        assert done.exit_code == 2 and message in done.output
