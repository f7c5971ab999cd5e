"""Maps over tokens: methods against slow versions from their definitions, on models of transformers
(their own attentions, autograd at their layers' outputs); what axes mean, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullgrad_theory.attribution import METHODS, Axes, Explainer, explain
from fullgrad_theory.errors import FullgradError, InputError

tf = pytest.importorskip("transformers")

LENGTH, POSITION = 7, 4
SIZES = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
WIDE = SIZES | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16,
}  # fmt: skip
GPT2 = SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
METHODS_OF_TEXT = ["attcat", "genatt", "rollout"]


@dataclass(frozen=True)
class Case:
    """How to make a model; where its layers are; the row that the output reads; the target."""

    make: Callable[[str], Any]
    layers: Callable[[Any], Any]
    row: int
    target: tuple[int, ...]


CASES = {
    "bert": Case(
        lambda form: tf.BertForSequenceClassification(
            tf.BertConfig(**WIDE, attn_implementation=form)
        ),
        lambda model: model.bert.encoder.layer,
        0,
        (1,),
    ),
    "gpt2": Case(
        lambda form: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, attn_implementation=form)),
        lambda model: model.transformer.h,
        POSITION,
        (POSITION, 3),
    ),
    "llama": Case(
        lambda form: tf.LlamaForCausalLM(
            tf.LlamaConfig(**WIDE, num_key_value_heads=2, attn_implementation=form)
        ),
        lambda model: model.model.layers,
        LENGTH - 1,
        (LENGTH - 1, 3),
    ),
}


def made(name: str, form: str) -> Any:
    """A model whose weights are large enough for attention that differs between tokens."""
    torch.manual_seed(0)
    model = CASES[name].make(form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def texts(count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 30, (count, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def explained(model: Any, given: dict[str, Tensor], policy: str | None = None) -> Explainer:
    return Explainer(model, given, policy, constant=("attention_mask",), output="logits")


def slow(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The methods from their definitions, on the eager model."""
    case, model, states = CASES[name], made(name, "eager"), []
    for layer in case.layers(model):
        layer.register_forward_hook(
            lambda m, i, o: states.append(o[0] if isinstance(o, tuple) else o)
        )
    out = model(**given, output_attentions=True)
    value = out.logits[(slice(None), *case.target)].sum()
    count = len(states)
    found = torch.autograd.grad(value, [*states, *out.attentions])
    attention = [a.detach() for a in out.attentions]
    eye = torch.eye(LENGTH, dtype=torch.float64)
    genatt, rollout, attcat = eye, eye, torch.zeros(len(value.shape) + 1)
    for a, g in zip(attention, found[count:], strict=True):
        genatt = genatt + (a * g).clamp(min=0).mean(1) @ genatt
        rollout = (rollout + a.mean(1) @ rollout) / 2
    for a, h, g in zip(attention, states, found[:count], strict=True):
        attcat = attcat + a.mean(1).mean(1) * (h.detach() * g).sum(-1)
    return {
        "attcat": attcat, "genatt": genatt[:, case.row], "rollout": rollout[:, case.row]
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_against_definitions(name: str, form: str) -> None:
    given = texts()
    fast = explained(made(name, form), given)(given, METHODS_OF_TEXT, CASES[name].target)
    # llama's norms and its eager softmax are of float32, whatever the model is
    near = 1e-5 if (name, form) == ("llama", "sdpa") else 1e-9
    for method, expected in slow(name, given).items():
        found = fast[method].values
        assert found.shape == (2, LENGTH)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=near * scale, msg=method)
        assert found[0].std() > 1e-3 * scale  # no row of the same


@pytest.mark.slow
def test_all_methods_run_on_a_text() -> None:
    """Each sample has its own map; padding, behind a mask, has none."""
    model, given = made("bert", "sdpa"), texts()
    given["attention_mask"][1, -2:] = 0
    explainer = explained(model, given, "libra")
    assert explainer.applying() == tuple(METHODS)
    assert explainer.blocks == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    names = [name for name in METHODS if name != "smoothgrad"]  # it is of many forwards
    found = explainer(given, names, [1, 0])
    second = {key: value[1:] for key, value in given.items()}
    alone = explainer(second, names, 0, seed=1)
    for name in names:
        values = found[name].values
        assert values.shape == (2, LENGTH) and values.isfinite().all(), name
        assert (values.abs().amax(1) > 0).all(), name
        scale = float(values.abs().max())
        torch.testing.assert_close(alone[name].values[0], values[1], rtol=0, atol=1e-9 * scale)
    for name in (
        "input-x-gradient",
        "fullgrad",
        "fullgrad+",
        "integrated-gradients",
        *METHODS_OF_TEXT,
    ):
        assert not found[name].values[1, -2:].any(), name
        assert found[name].values[0, -2:].all(), name
    error = found["fullgrad"].error
    assert error is not None and error.max() < 1e-9
    # what has no place is in the total alone: the pooler's bias, and the classifier's
    total = found["fullgrad"].total
    assert total is not None and (total - found["fullgrad"].values.sum(1)).abs().min() > 1e-6


@pytest.mark.slow
def test_methods_of_the_embedding_by_hand() -> None:
    """And of embeddings that are the model's input: the same maps."""
    model, given = made("gpt2", "sdpa"), texts()
    target = CASES["gpt2"].target
    found = explained(model, given)(given, ["input-x-gradient", "genatt", "fullgrad+"], target)
    embedded = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    value = model(inputs_embeds=embedded).logits[(slice(None), *target)].sum()
    (gradient,) = torch.autograd.grad(value, embedded)
    by_hand = (embedded * gradient).sum(-1).detach()
    torch.testing.assert_close(found["input-x-gradient"].values, by_hand, rtol=1e-9, atol=1e-12)
    assert not found["genatt"].values[:, POSITION + 1 :].any()  # nothing of what follows
    vectors = {"inputs_embeds": embedded.detach()}
    same = Explainer(model, vectors, output="logits")(vectors, [*found], target)
    for name, one in found.items():
        torch.testing.assert_close(same[name].values, one.values, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_words_and_positions_that_both_come_from_the_ids() -> None:
    """RoBERTa looks three tables up by its tokens: all are the input."""
    torch.manual_seed(0)
    model, given = tf.RobertaForSequenceClassification(tf.RobertaConfig(**WIDE)), texts()
    model = model.double().eval()
    found = explained(model, given)(given, ["input-x-gradient", "integrated-gradients"], 1)
    kept: list[Tensor] = []
    for table in ("word_embeddings", "token_type_embeddings", "position_embeddings"):
        module = getattr(model.roberta.embeddings, table)
        module.register_forward_hook(lambda m, i, o: kept.append(o))
    value = model(**given).logits[:, 1].sum()
    gradients = torch.autograd.grad(value, kept)
    by_hand = sum((h.detach() * g).sum(-1) for h, g in zip(kept, gradients, strict=True))
    torch.testing.assert_close(found["input-x-gradient"].values, by_hand, rtol=1e-9, atol=1e-12)
    integrated = found["integrated-gradients"].values
    assert integrated.shape == (2, LENGTH) and integrated.isfinite().all() and integrated.any()


# --------------------------------------------------------------------------- axes


class Series(nn.Module):
    """Channels over time (B, C, T), or over hours and days (B, T, S, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.first, self.last = nn.Linear(channels, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.channels_at(x), -1).flatten(1, -2)
        return self.last(self.first(x).relu().mean(1))

    def channels_at(self, x: Tensor) -> int:
        return 1 if x.dim() == 3 else 3


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 4, 6), Axes((2,), (1,))), ((2, 5, 6, 4), Axes((1, 2), (3,)))]
)
def test_axes_are_data(shape: tuple[int, ...], axes: Axes) -> None:
    torch.manual_seed(0)
    model, x = Series(4).double().eval(), torch.randn(shape).double()
    found = Explainer(model, x, axes=axes)(x, ["input-x-gradient", "fullgrad", "random"], 1)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    by_hand = (x * gradient).sum(axes.features)
    one = found["input-x-gradient"]
    torch.testing.assert_close(one.values, by_hand)
    places = tuple(shape[dim] for dim in axes.places)
    for each in found.values():
        assert each.values.shape == (2, *places) == each.pixels().shape
        assert each.image == places and each.axes == axes
    half = tuple(n // 2 if n % 2 == 0 else n for n in places)
    torch.testing.assert_close(one.tokens(half).flatten(1).sum(1), by_hand.flatten(1).sum(1))
    assert one.pixels(tuple(2 * n for n in places)).shape == (2, *(2 * n for n in places))
    torch.testing.assert_close(
        explain(model, x, "fullgrad", 1, axes=axes).values, found["fullgrad"].values
    )


def test_what_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Series(4).eval(), torch.randn(2, 4, 6)
    for axes in (Axes((2,)), Axes((1, 2), (2,)), Axes((), (1, 2)), Axes((0,), (1, 2))):
        with pytest.raises(InputError, match="each dimension behind the batch once, 1 to 2"):
            Explainer(model, x, axes=axes)
    explainer = Explainer(model, x, axes=Axes((2,), (1,), called="recording"))
    with pytest.raises(FullgradError, match=r"^genatt needs attention.*apply: .*fullgrad.*random"):
        explainer(x, "genatt")
    with pytest.raises(InputError, match=r"expected \w+ of shape \(B, 4, 6\), got \(2, 4, 5\)"):
        explainer(x[..., 1:])


@pytest.mark.slow
def test_a_text_that_does_not_fit() -> None:
    model, given = made("bert", "sdpa"), texts()
    types = given | {"token_type_ids": torch.zeros_like(given["input_ids"])}
    with pytest.raises(InputError, match=r"one input, and this model has several, .* by constant="):
        Explainer(model, types, constant=("attention_mask",))
    explainer = explained(model, given)
    with pytest.raises(InputError, match=r"balanced for inputs of shape \('any', 7\)"):
        explainer({key: value[:, 1:] for key, value in given.items()})
