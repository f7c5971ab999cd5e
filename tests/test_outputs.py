"""What a model returns and takes: outputs that are found or selected, inputs that are held."""

from __future__ import annotations

import collections
import dataclasses
import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.errors import FullgradError, InputError, NoPlanError, UnknownNameError
from fullgrad_theory.graph.door import input_form, split_inputs
from fullgrad_theory.graph.outputs import judged_paths

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


class DynamicCache:
    """As transformers' own: no container that torch knows."""

    def __init__(self, value: Tensor) -> None:
        self.keys = [value]


@dataclasses.dataclass
class Answer:
    logits: Tensor
    boxes: Tensor | None = None
    cache: Any = None


@dataclasses.dataclass(frozen=True)
class Fixed:
    logits: Tensor
    boxes: Tensor


class ModelOutput(collections.OrderedDict):
    """As transformers' own: a mapping by attributes."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else list(self.values())[key]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value


@dataclasses.dataclass
class HiddenOutput(ModelOutput):
    loss: Tensor | None = None
    pooled: Tensor | None = None
    last_hidden_state: Tensor | None = None


Named = collections.namedtuple("Named", "logits boxes")


class Heads(nn.Module):
    """Logits that a policy can mend, boxes behind a sigmoid, put together by `how`."""

    def __init__(self, how: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.logits = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
        self.boxes = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.how(self.logits(x), self.boxes(x).sigmoid())


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "dict": (lambda a, b: {"logits": a, "boxes": b}, "boxes"),
    "dict of a detector": (lambda a, b: {"pred_boxes": b, "pred_logits": a}, "pred_boxes"),
    "dataclass with a cache": (lambda a, b: Answer(a, b, DynamicCache(b)), "boxes, cache"),
    "frozen dataclass": (lambda a, b: Fixed(a, b), "boxes"),
    "named tuple": (lambda a, b: Named(a, b), "boxes"),
    "plain object": (lambda a, b: types.SimpleNamespace(logits=a, boxes=b, n=3), "boxes"),
    "ModelOutput without logits": (
        lambda a, b: HiddenOutput(loss=b.sum(), pooled=b, last_hidden_state=a),
        "loss, pooled",
    ),
    "first of a ModelOutput": (lambda a, b: HiddenOutput(loss=b.sum(), pooled=a), "loss"),
    "tuple with a cache": (lambda a, b: (a, DynamicCache(b)), "1"),
    "nested": (lambda a, b: [Answer(a, b), {"n": 3, "name": "x"}], "0.boxes"),
    "two logits": (lambda a, b: {"start_logits": a, "end_logits": 2 * a, "p": b}, "p"),
}


def same(ours: Any, theirs: Any) -> bool:
    """Whether two results are of one kind and equal; a cache is None in ours."""
    if isinstance(theirs, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(theirs, DynamicCache):
        return ours is None
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[n], theirs[n]) for n in theirs)
    if isinstance(theirs, (tuple, list)):
        return type(ours) is type(theirs) and all(map(same, ours, theirs))
    held = getattr(theirs, "__dict__", None)
    if held is None or type(ours) is not type(theirs):
        return bool(ours == theirs)
    return all(same(getattr(ours, n), v) for n, v in held.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_found_and_all_is_returned(kind: str) -> None:
    how, aside = KINDS[kind]
    model = Heads(how).eval()
    report = fgt.check_completeness(model, X, policy="libra", beside=())
    assert report.complete is True, str(report)
    assert any(f"and not {aside}; output=" in note for note in report.notes)
    balanced = fgt.balance(model, X)
    more = torch.cat([X, X + 1])
    assert type(balanced(X)) is type(model(X))
    assert same(balanced(more), model(more))
    parts = fgt.fullgrad(balanced, X, target=1)
    torch.testing.assert_close(parts.output, model.logits(X)[:, 1].detach())
    torch.testing.assert_close(parts.total, parts.output)


@pytest.mark.parametrize("how", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": b}])
def test_what_has_no_logits_is_judged_whole(how: Callable[..., Any]) -> None:
    model = Heads(how).eval()
    report = fgt.check_completeness(model, X, policy="libra", beside=())
    assert report.complete is False
    assert any("probability (output 1" in problem for problem in report.problems)
    assert same(fgt.balance(model, X)(X), model(X))


@pytest.mark.parametrize("output", [0, "0", (0,), lambda o: o[0], lambda o: {"logits": o[0]}])
def test_an_output_is_selected(output: Any) -> None:
    model = Heads(lambda a, b: (a, b)).eval()
    report = fgt.check_completeness(model, X, policy="libra", beside=(), output=output)
    assert report.complete is True
    assert report.notes == ()
    assert fgt.derive_rules(model, X, output=output).edits == report.plan.edits  # type: ignore[union-attr]
    made = fgt.balance(model, X, output=output)(X)
    (value,) = (
        [made] if isinstance(made, Tensor) else made.values() if isinstance(made, dict) else made
    )
    assert torch.equal(value, model(X)[0])
    assert fgt.fullgrad(model, X, target=0, output=output).output.shape == (2,)


def test_what_is_selected_may_be_computed() -> None:
    """One class against another, the last token: part of the trace, and of the own gradient."""
    model = Heads(lambda a, b: Answer(a, b)).eval()
    against = lambda o: o.logits[:, 1] - o.logits[:, 2]  # noqa: E731
    report = fgt.check_completeness(model, X, beside=(), output=against)
    assert report.complete is False and not any("copy" in p for p in report.problems)
    parts = fgt.fullgrad(fgt.balance(model, X, output=against), X)
    logits = model.logits(X).detach()
    torch.testing.assert_close(parts.output, logits[:, 1] - logits[:, 2])
    torch.testing.assert_close(parts.total, parts.output)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("foo", "no 'foo' in tuple"),
        (7, "output=7: the model returns tuple"),
        (lambda o: o.foo, "raised AttributeError"),
        (lambda o: o[0].argmax(), "holds no floating-point tensor"),
        (3.5, "pass a name, a position"),
    ],
)
def test_an_output_that_is_not_there(output: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fgt.trace(Heads(lambda a, b: (a, b)).eval(), X, output=output)


def test_what_is_traced_has_its_output() -> None:
    model = Heads(lambda a, b: (a, b)).eval()
    graph = fgt.trace(model, X, output=0)
    assert fgt.check_completeness(graph, policy="libra", beside=()).complete is True
    for given in (graph, fgt.balance(graph)):
        with pytest.raises(InputError, match="already"):
            fgt.check_completeness(given, output=0)
    with pytest.raises(InputError, match="already"):
        fgt.fullgrad(fgt.balance(graph), X, target=0, constant="x")


def test_an_output_without_tensors_is_described() -> None:
    with pytest.raises(InputError, match=r"no floating-point tensor, but dict\(ids\)"):
        fgt.trace(lambda x: {"ids": x.argmax(-1)}, X)


def test_the_users_hooks_see_what_they_always_see() -> None:
    seen = []
    model = Heads(lambda a, b: Answer(a, b)).eval()
    model.register_forward_hook(lambda m, i, o: seen.append(type(o)))
    before = dict(model._forward_hooks)
    fgt.trace(model, X, output="logits")
    assert set(seen) == {Answer} and dict(model._forward_hooks) == before


def test_a_balanced_model_of_any_output_is_saved_and_loaded() -> None:
    balanced = fgt.balance(Heads(lambda a, b: {"logits": a, "boxes": b}).eval(), X)
    balanced._reading = dataclasses.replace(balanced._reading, selection=None)
    file = io.BytesIO()
    balanced.graph = None
    torch.save(balanced.state_dict(), file)
    assert file.tell() > 0
    assert same(balanced.double()(X.double()), balanced(X.double()))


def test_an_explainer_selects() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.net(x)
            return scores.softmax(-1), scores

    x, model = torch.randn(2, 3, 6, 6), Net().eval()
    found = fgt.Explainer(model, x, "libra", output=1)(x, "fullgrad", target=2)["fullgrad"]
    torch.testing.assert_close(found.output, model(x)[1][:, 2].detach())
    assert found.error.max() < 1e-4
    torch.testing.assert_close(
        fgt.explain(model, x, "fullgrad", 2, "libra", output=1).values, found.values
    )


# --------------------------------------------------------------------------- inputs


class Diffusion(nn.Module):
    """A step in time, as sines, added to what a layer makes of x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angle = timestep[:, None].float() * torch.exp(-4.6 * torch.arange(4) / 4)
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        return self.head(F.silu(self.embed(x) + time))


STEPS = torch.tensor([3, 7])


def test_integers_used_as_numbers_are_named_with_the_way_out() -> None:
    model = Diffusion().eval()
    with pytest.raises(NoPlanError, match=r"integer input 'timestep'.*constant=\('timestep',\)"):
        fgt.derive_rules(model, (X, STEPS))
    with pytest.raises(NoPlanError, match=r"integer input 't'.*passed as floats"):
        fgt.derive_rules(lambda t: t.float().sin() @ torch.ones(2), STEPS)


@pytest.mark.parametrize("steps", [STEPS, STEPS.float()])
def test_an_input_is_held_constant(steps: Tensor) -> None:
    model = Diffusion().eval()
    report = fgt.check_completeness(model, (X, steps), constant="timestep", beside=())
    assert report.complete is False and not any("copy" in p for p in report.problems)
    report = fgt.check_completeness(
        model, (X, steps), policy="libra", constant=("timestep",), beside=()
    )
    assert report.complete is True
    assert any("held constant: timestep" in note for note in report.notes)
    balanced = fgt.balance(model, (X, steps), explain="x")
    for later in (steps, steps + 2):
        assert torch.equal(balanced(X, later), model(X, later))
        parts = fgt.fullgrad(balanced, (X, later), target=1)
        assert isinstance(parts.input, Tensor)
        assert parts.input.shape == X.shape
        torch.testing.assert_close(parts.total, parts.output)


def test_a_degree_is_not_read_from_a_constant_input() -> None:
    """Another call may bring another value."""
    report = fgt.check_completeness(
        lambda x, p: x**p, (X.abs() + 1, torch.full((2, 5), 2.0)), constant="p", beside=()
    )
    assert report.complete is not True
    zero = torch.zeros(2, 5)
    plan = fgt.derive_rules(lambda x, m: F.gelu(x) * m, (X, zero), constant="m")
    assert len(plan) == 1


def test_names_of_inputs_that_are_not_there() -> None:
    with pytest.raises(UnknownNameError, match="timestep"):
        fgt.trace(Diffusion().eval(), (X, STEPS), constant="timesteps")
    with pytest.raises(InputError, match="not both"):
        fgt.trace(Diffusion().eval(), (X, STEPS), constant="x", explain="x")
    with pytest.raises(InputError, match="nothing left to explain"):
        fgt.trace(Diffusion().eval(), (X, STEPS), constant=("x", "timestep"))


class Batch(collections.UserDict):
    """As transformers' BatchEncoding: a mapping by attributes."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError
        return self.data[name]


@dataclasses.dataclass
class Given:
    x: Tensor
    timestep: Tensor


@pytest.mark.parametrize(
    "kind", [dict, Batch, lambda d: Given(**d), lambda d: types.SimpleNamespace(**d)]
)
def test_one_batch_goes_in_as_it_is(kind: Any) -> None:
    class OfBatch(Diffusion):
        def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
            given = types.SimpleNamespace(**batch) if isinstance(batch, dict) else batch
            return super().forward(given.x, given.timestep)

    model = OfBatch().eval()
    batch, other = kind({"x": X, "timestep": STEPS}), kind({"timestep": STEPS + 1, "x": X + 1})
    report = fgt.check_completeness(model, batch, policy="libra", beside=(), constant="timestep")
    assert report.complete is True
    balanced = fgt.balance(model, batch, constant="batch.timestep")
    assert torch.equal(balanced(other), model(other))
    parts = fgt.fullgrad(balanced, other, target=0)
    torch.testing.assert_close(parts.output, model(other)[:, 0].detach())
    torch.testing.assert_close(parts.total, parts.output)


def test_a_mapping_of_keywords_goes_in_by_name_in_any_order() -> None:
    model = Diffusion().eval()
    batch = Batch({"timestep": STEPS, "x": X})
    assert split_inputs(model, batch) == ((), {"timestep": STEPS, "x": X})
    assert input_form(model, batch) is None
    balanced = fgt.balance(model, batch, constant="timestep")
    parts = fgt.fullgrad(balanced, {"x": X, "timestep": STEPS}, target=0)
    torch.testing.assert_close(parts.output, model(**batch)[:, 0].detach())


def test_a_cache_is_no_input() -> None:
    with pytest.raises(InputError, match="leave it out"):
        fgt.trace(lambda x, past: x, {"x": X, "past": DynamicCache(X)})


# --------------------------------------------------------------------------- lookups

LOOKUPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "index": lambda m, i: m.table[i],
    "index of a buffer": lambda m, i: m.held[i],
    "index of what is computed": lambda m, i: (2 * m.table)[i, :],
    "index_select": lambda m, i: m.table.index_select(0, i[0])[None],
    "gather": lambda m, i: m.table.gather(0, i[0, :, None].expand(-1, 4))[None],
    "take_along_dim": lambda m, i: torch.take_along_dim(m.table, i[0, :, None], 0)[None],
    "take": lambda m, i: torch.take(m.table, i)[..., None].expand(-1, -1, 4),
    "one_hot": lambda m, i: F.one_hot(i, 10).float() @ m.table,
    "one_hot in the table's dtype": lambda m, i: F.one_hot(i, 10).to(m.table) @ m.table,
    "comparison": lambda m, i: (i[..., None] == torch.arange(10)).float() @ m.table,
    "scatter": lambda m, i: torch.zeros(*i.shape, 10).scatter_(-1, i[..., None], 1.0) @ m.table,
    "linear": lambda m, i: F.linear(F.one_hot(i, 10).float(), m.table.t()),
    "einsum": lambda m, i: torch.einsum("btv,vd->btd", F.one_hot(i, 10).float(), m.table),
    "embedding": lambda m, i: F.embedding(i, m.table),
    "bag of sums": lambda m, i: F.embedding_bag(i, m.table, mode="sum")[:, None],
    "bag of means": lambda m, i: F.embedding_bag(i, m.table)[:, None],
    "bag of maxima": lambda m, i: F.embedding_bag(i, m.table, mode="max")[:, None],
}


@pytest.mark.parametrize("spelling", LOOKUPS)
def test_a_lookup_by_ids_is_a_source_however_it_is_spelled(spelling: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Parameter(torch.randn(10, 4)), nn.Linear(4, 3)
            self.register_buffer("held", torch.randn(10, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(F.gelu(LOOKUPS[spelling](self, ids))).mean(1)

    model, ids = Words().eval(), torch.tensor([[1, 2, 5]])
    report = fgt.check_completeness(model, ids, policy="libra", beside=())
    assert report.complete is True, str(report)
    parts = fgt.fullgrad(fgt.balance(model, ids), ids, target=1)
    assert isinstance(parts.input, Tensor) and bool(parts.input.any())
    torch.testing.assert_close(parts.total, parts.output, atol=1e-5, rtol=1e-4)


def test_ids_that_look_nothing_up_stay_what_they_were() -> None:
    """A mask is 0 or minus infinity by ids: no table, and no source."""
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]])
    graph = fgt.trace(
        lambda x, m: (x + torch.where(m == 0, -1e9, 0.0)).softmax(-1) @ x.T, (X, mask)
    )
    assert fgt.derive_rules(graph)


# --------------------------------------------------------------------------- two towers


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
        self.text = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a, b = self.image(image), self.text(text)
        return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).t()


def test_two_towers_are_explained_both_or_one() -> None:
    model, given = Towers().eval(), {"image": X[:1], "text": X[1:]}
    both = fgt.fullgrad(fgt.balance(model, given), given, target=0)
    torch.testing.assert_close(both.total, both.output)
    assert isinstance(both.input, tuple) and len(both.input) == 2
    for name in given:
        balanced = fgt.balance(model, given, explain=name)
        one = fgt.fullgrad(balanced, given, target=0)
        torch.testing.assert_close(one.total, one.output)
        assert isinstance(one.input, Tensor) and bool(one.input.any())
        report = fgt.check_completeness(model, given, policy="libra", beside=(), explain=name)
        assert report.complete is True and not any("held fixed" in n for n in report.notes)


def test_nothing_but_a_fullgrad_error_comes_of_an_odd_output() -> None:
    for how in (lambda a, b: object(), lambda a, b: None, lambda a, b: "text", lambda a, b: {}):
        with pytest.raises(FullgradError, match="no floating-point tensor"):
            fgt.trace(Heads(how).eval(), X)


def test_paths_of_what_is_judged() -> None:
    assert judged_paths({"logits": X, "x": X}) == [("logits",)]
    assert judged_paths((X, [X, X.long()])) == [(0,), (1, 0)]
    assert judged_paths(Answer(X, X)) == [("logits",)]


def test_the_command_line_selects(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fullgrad_theory.command.cli import app

    (tmp_path / "selected_model.py").write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = torch.nn.Linear(5, 3)\n"
        "    def forward(self, x, t):\n"
        "        return self.a(x) + t.sin(), self.a(x).sigmoid()\n"
    )
    monkeypatch.chdir(tmp_path)
    call = ["check", "selected_model.py:Two", "--input", "2,5", "--input", "2,3"]
    codes = {
        asked: CliRunner().invoke(app, [*call, *asked]).exit_code
        for asked in [
            (),
            ("--output", "0"),
            ("--output", "0", "--constant", "t"),
            ("--output", "z"),
        ]
    }
    assert list(codes.values()) == [1, 1, 0, 2]
