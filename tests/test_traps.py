"""Where a checker of gradients passes too easily, or falls over: each trap with its model."""

from __future__ import annotations

import copy
import dataclasses
import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fullgrad_theory as fgt
from fullgrad_theory.check.report import Verdict
from fullgrad_theory.errors import (
    FullgradError,
    InputError,
    NonFiniteError,
    NoPlanError,
    PlanError,
    TraceError,
    TrainingModeError,
    UnregisteredOperationError,
)
from fullgrad_theory.operators import registry

SOUND = (Verdict.PROVED, Verdict.NUMERIC)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Module(nn.Module):
    """A module in eval mode around a function of itself and its inputs."""

    def __init__(self, function, **parts) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        self.eval()

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.function(self, *args, **kwargs)


def contributions(model, x: Tensor, leaves: list[Tensor]) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """The output and what autograd alone attributes of it to x and to leaves passed by hand."""
    given = [t.detach().clone().requires_grad_() for t in (x, *leaves)]
    value = model(*given).sum()
    grads = torch.autograd.grad(value, given)
    return float(value.detach()), sum(
        float((g * t.detach()).sum()) for g, t in zip(grads, given, strict=True)
    )


# ------------------------------------------------------------------ verdicts, plain and edited

C = seeded(4, seed=9).abs() + 0.5
X, TOKENS, IMAGE = seeded(2, 4), seeded(2, 5, 8), seeded(2, 3, 8, 8)
NORM = nn.BatchNorm1d(4).eval()
with torch.no_grad():
    for _tensor in (NORM.running_mean, NORM.running_var, NORM.weight, NORM.bias):
        _tensor.copy_(torch.rand(4, generator=torch.Generator().manual_seed(1)) + 0.5)

# name -> model, input, complete as it is, complete under libra (None: no honest plan)
VERDICTS = {
    "a factor without gradient": (lambda x: x * x.detach(), X, True, True),
    "a summand without gradient": (lambda x: x + x.detach(), X, False, None),
    "straight through": (lambda x: x + (x.round() - x).detach(), X, False, None),
    "x.int() as a factor": (lambda x: x * x.int(), X, True, True),
    "x.int() as a summand": (lambda x: x + x.int(), X, False, None),
    "a mask as a factor": (lambda x: x * (x > 0), X, True, True),
    "a table looked up by argmax": (lambda x: torch.arange(4.0)[x.argmax(1)], X, False, None),
    "a value picked by argmax": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), X, True, True),
    "x + softmax(x)": (lambda x: x + x.softmax(-1), X, False, True),  # integrated
    "bounds of degree 2": (lambda x: (x * x).clamp(0.1, 0.3), X, False, True),
    "padding of degree 2": (lambda x: F.pad(x * x, (1, 1), value=2.0), X, False, True),
    "batch norm of degree 2": (lambda x: NORM(x * x), X, False, True),
    "a constant of the shape of x": (lambda x: x + C.to(x).expand_as(x), X, True, True),
    "where with a constant": (lambda x: torch.where(x > 0, x, 2.0), X, False, None),
    "where with frozen": (lambda x: torch.where(x > 0, x, x.detach()), X, False, None),
    "a frozen fill": (lambda x: x.masked_fill(x > 0, 3.0), X, False, None),
    "fft": (lambda x: torch.fft.fft(x).abs(), X, True, True),
    "fft power": (lambda x: torch.fft.fft(x).abs() ** 2, X, False, True),
    "z conj z": (lambda x: (torch.fft.fft(x) * torch.fft.fft(x).conj()).real, X, False, True),
    "complex exponential": (lambda x: torch.exp(1j * x).real, X, False, True),
    "a complex output": (lambda x: torch.fft.fft(x), X, True, True),
    "factory": (lambda x: torch.ones(3, 4).index_add(0, torch.tensor([0, 2]), x), X, True, True),
    "sampling": (lambda x: _sampled(x, torch.zeros(2, 3, 3, 2)), IMAGE, True, True),
    "remainder": (lambda x: x % 0.3, X, False, None),
    "remainder of a constant": (lambda x: torch.remainder(C.to(x), x), X, True, True),
    "hypot": (lambda x: torch.hypot(x, C.to(x)), X, True, True),
    "distance": (lambda x: torch.cdist(x, C.to(x)[None]), X, True, True),
    "GeM": (lambda x: x.clamp(min=0.1).pow(3).mean((2, 3)).pow(1 / 3), IMAGE, True, True),
    "cosine attention": (
        lambda x: torch.softmax(_unit(x) @ _unit(x).mT / 0.1, -1) @ x,
        TOKENS,
        True,
        True,
    ),
    "attention with one value thrice": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        TOKENS[:, None],
        False,
        True,
    ),
    "live kernel and bias": (lambda x: F.linear(x, x, torch.ones(2).to(x)), X, False, True),
    "x in place": (lambda x: _written(x), X, True, True),
    "product in place": (lambda x: _product_written(x), X, False, True),
    "the input itself": (lambda x: x, X, True, True),
    "a number": (lambda x: x * 3 + 1, torch.tensor(2.0), True, True),
    "None among outputs": (lambda x: [x * 2, None, {"a": x}], X, True, True),
    "sampled by itself": (
        lambda x: _sampled(x, x[:, :2].permute(0, 2, 3, 1).tanh()),
        IMAGE,
        False,
        True,
    ),
}


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _sampled(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, align_corners=False)


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = 2.0
    y[:, 0].mul_(3)
    return y.add_(1)


def _product_written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1] * x[:, 2]
    return y


@pytest.mark.slow
@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    model, x, plain, libra = VERDICTS[name]
    report = fgt.check_completeness(model, x)
    assert report.complete is plain, str(report)
    assert (report.error is not None and report.error < 1e-10) or not plain
    edited = fgt.check_completeness(model, x, policy="libra")
    assert edited.complete is bool(libra), str(edited)
    if libra is None:
        with pytest.raises(NoPlanError):
            fgt.derive_rules(model, x)
        return
    assert edited.error is not None
    assert edited.error < 1e-10
    assert all(n.verdict in SOUND for n in edited.nodes)


def test_leaves_by_hand_agree_with_the_verdict() -> None:
    """Constants lifted to arguments by hand and plain autograd: no code of the library."""
    mean, bias = NORM.running_mean, NORM.bias
    scale = (NORM.weight / (NORM.running_var + NORM.eps).sqrt()).detach()
    lifted = {
        "clamp": (lambda x: x.clamp(-0.3, 0.3), lambda x, a, b: torch.clamp(x, a, b), (-0.3, 0.3)),
        "maximum": (lambda x: torch.maximum(x, C), torch.maximum, (C,)),
        "norm": (NORM, lambda x, m, b: (x - m) * scale + b, (mean, bias)),
        "pad": (
            lambda x: F.pad(x, (1, 1), value=2.0),
            lambda x, p: torch.cat([p.expand(2, 1), x, p.expand(2, 1)], 1),
            (2.0,),
        ),
        "hypot": (lambda x: torch.hypot(x, C), torch.hypot, (C,)),
        "distance": (
            lambda x: torch.cdist(x, C[None]).squeeze(1),
            lambda x, c: (x - c).norm(dim=-1),
            (C,),
        ),
        "where": (
            lambda x: torch.where(x > 0.2, x, 0.2),
            lambda x, c: torch.where(x > 0.2, x, c),
            (0.2,),
        ),
    }
    for name, (model, by_hand, constants) in lifted.items():
        leaves = [torch.as_tensor(c) for c in constants]
        value, attributed = contributions(by_hand, X, leaves)
        torch.testing.assert_close(float(model(X).detach().sum()), value, msg=name)
        assert attributed == pytest.approx(value, rel=1e-5), name
        parts = fgt.fullgrad(lambda x, m=model: m(x).sum(), X)
        biases = sum(float(b.sum()) for b in parts.biases.values())
        g, *_ = torch.autograd.grad(model(leaf := X.clone().requires_grad_()).sum(), leaf)
        assert float(parts.input.sum()) == pytest.approx(float((g * X).sum()), rel=1e-5), name
        assert biases == pytest.approx(value - float((g * X).sum()), rel=1e-4), name


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(5, 4, 3), nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(2, 4, 3)],
    ids=lambda m: type(m).__name__,
)
def test_an_image_without_a_batch_dimension(layer: nn.Module) -> None:
    x = TOKENS[0] if isinstance(layer, nn.Conv1d) else TOKENS
    report = fgt.check_completeness(layer.eval(), x)
    assert report.complete is True, str(report)


# ------------------------------------------------------------------ vacuous passes


def test_liveness_goes_through_unbind() -> None:
    """A tracer that loses q, k and v at `getitem` calls attention constant, and passes."""
    qkv = nn.Linear(8, 24, bias=False)

    def attention(self: nn.Module, x: Tensor) -> Tensor:
        q, k, v = qkv(x).reshape(2, 5, 3, 8).unbind(2)
        return (q @ k.mT).softmax(-1) @ v

    model = Module(attention, qkv=qkv)
    report = fgt.check_completeness(model, TOKENS)
    assert "aten.softmax.int" in {n.op for n in report.nodes if n.verdict not in SOUND}
    assert {"aten.unbind.int", "getitem"} <= {n.op for n in report.nodes}
    assert fgt.check_completeness(model, TOKENS, policy="libra").complete is True


def test_a_branch_scaled_to_nothing_is_still_violated() -> None:
    """LayerScale at 0: end to end nothing is wrong, and the branch is."""
    model = Module(
        lambda self, x: x + self.gamma * F.gelu(self.fc(x)),
        gamma=nn.Parameter(torch.zeros(4)),
        fc=nn.Linear(4, 4),
    )
    report = fgt.check_completeness(model, X)
    own, moved, *_ = report.measurements
    assert own.relative < 1e-12
    assert moved.relative > 1e-6
    assert report.complete is False
    assert [n.op for n in report.nodes if n.verdict not in SOUND] == ["aten.gelu.default"]


def test_a_root_of_zero_is_undetermined() -> None:
    """0 * inf: NaN is larger than any tolerance, and `max` passes over it."""
    x = torch.tensor([[1.0, 0.0], [4.0, 9.0]])
    for policy in (None, "libra"):
        report = fgt.check_completeness(lambda x: x.abs().sqrt(), x, policy=policy)
        assert report.complete is False
        assert report.error is not None
        assert math.isnan(report.error)
        assert any("infinity times zero" in p for p in report.problems)
        assert not any("modified" in n for n in report.notes)


def test_shares_are_shown() -> None:
    """Formally perfect: the literal 1 gets all of the output, and the report says so."""
    report = fgt.check_completeness(
        lambda x: x.square().sum(-1, keepdim=True).exp() * (1 + 1e-9 * x), X, policy="libra"
    )
    assert all(abs(m.input_share) < 1e-6 < 0.99 < m.bias_share for m in report.measurements)
    assert "0.0 %" in str(report) or "0.0%" in str(report)


def test_eps_is_no_bias_leaf() -> None:
    """A hand-written RMSNorm is frozen at one place; eps is credited with nothing."""

    def rms(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2)

    x = 1e-2 * X.double()
    plan = fgt.derive_rules(rms, x)
    assert [type(e) for e in plan] == [fgt.Prune]
    parts = fgt.fullgrad(fgt.balance(rms, x), x, target=1)
    assert not parts.biases
    torch.testing.assert_close(parts.input.sum(1), rms(x)[:, 1])


def test_a_pruned_summand_is_opaque() -> None:
    graph = fgt.trace(lambda x: x + x.softmax(-1), X)
    plan = fgt.derive_rules(graph, policy="plain")
    plan = dataclasses.replace(plan, edits=(fgt.Prune("softmax", "self"),))
    report = fgt.check_completeness(graph, policy=plan)
    assert report.complete is False
    assert [n.op for n in report.nodes if n.verdict is Verdict.OPAQUE] == ["aten.add.Tensor"]
    with pytest.raises(NoPlanError, match="softmax"):  # a policy without an edit for it
        fgt.derive_rules(graph, policy=dataclasses.replace(fgt.policy("libra"), integrate=None))


# ------------------------------------------------------------------ the user's own backward


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return x * 1.0

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return -g


def _hooked(x: Tensor) -> Tensor:
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda g: g * 3)
    return y


def _linear_with_hook(kind: str) -> nn.Module:
    layer = nn.Linear(4, 3).eval()
    with torch.no_grad():
        layer.bias.add_(1.0)
    if kind == "parameter":
        layer.bias.register_hook(lambda g: g * 5)
    elif kind == "before":
        layer.register_full_backward_pre_hook(lambda module, g: (g[0] * 2,))
    else:
        layer.register_full_backward_hook(lambda module, g, out: (g[0] * 2,))
    return layer


@pytest.mark.parametrize(
    "model",
    [
        lambda x: Reversed.apply(x) * 2,
        _hooked,
        _linear_with_hook("before"),
        _linear_with_hook("after"),
        _linear_with_hook("parameter"),
    ],
    ids=["function", "tensor hook", "backward pre-hook", "backward hook", "parameter hook"],
)
def test_a_modified_backward_is_never_passed(model) -> None:  # type: ignore[no-untyped-def]
    report = fgt.check_completeness(model, X)
    assert report.complete is False, str(report)
    assert any("backward is modified" in n for n in report.notes)
    assert not any("error of this library" in p for p in report.problems)


def test_a_patched_function_is_judged_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """LibraGrad by hand: gelu's gate detached; export keeps the detach, and all agree."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    assert fgt.check_completeness(model, X).complete is False

    def patched(x: Tensor, approximate: str = "none") -> Tensor:
        return x * (0.5 * (1 + torch.erf(x / math.sqrt(2.0)))).detach()

    monkeypatch.setattr(F, "gelu", patched)
    report = fgt.check_completeness(model, X)
    assert report.complete is True, str(report)


def test_a_balanced_model_that_lost_its_graph_is_judged_by_its_own_backward() -> None:
    """Exporting it again erases its rules."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    copied = copy.deepcopy(fgt.balance(model, X))
    report = fgt.check_completeness(copied, X)
    assert any("backward is modified" in n for n in report.notes)
    assert report.error is not None
    assert report.error < 1e-10


class Gate(nn.Module):
    def __init__(self, added: bool) -> None:
        super().__init__()
        self.fc, self.added = nn.Linear(4, 4), added
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.fc(x))
        return x + gate if self.added else x * gate


def test_no_grad_inside_the_model() -> None:
    assert fgt.check_completeness(Gate(added=False), X).complete is True
    report = fgt.check_completeness(Gate(added=True), X)
    assert report.complete is False
    assert Verdict.OPAQUE in {n.verdict for n in report.nodes}
    with torch.no_grad():  # nor does that of the caller make everything constant
        assert fgt.check_completeness(nn.GELU().eval(), X).complete is False


# ------------------------------------------------------------------ what a model may be


def test_a_module_used_twice_keeps_both_calls_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(self.act(self.fc(x))))

    model = Twice().eval()
    report = fgt.check_completeness(model, X)
    gelus = [n for n in report.nodes if n.op == "aten.gelu.default"]
    assert [n.module_path for n in gelus] == ["act", "act"]
    assert len({n.name for n in gelus}) == 2
    assert len(fgt.derive_rules(model, X)) == 2
    assert fgt.check_completeness(model, X, policy="libra").complete is True


def test_tied_weights_and_integer_inputs() -> None:
    """One tensor, looked up and multiplied: the embedding's rows are where attribution ends."""

    def forward(self: nn.Module, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.table(ids) + self.position))  # type: ignore[operator]

    model = Module(
        forward,
        table=nn.Embedding(10, 8),
        head=nn.Linear(8, 10, bias=False),
        position=nn.Parameter(seeded(5, 8)),
    )
    model.head.weight = model.table.weight
    ids = torch.randint(0, 10, (2, 5), generator=torch.Generator().manual_seed(0))
    report = fgt.check_completeness(model, ids)
    assert report.complete is True, str(report)
    assert all(m.bias_share > 0.01 for m in report.measurements)
    parts = fgt.fullgrad(model, ids, target=(2, 3))
    assert parts.input.shape == (2, 5, 8)
    torch.testing.assert_close(parts.total, model(ids)[:, 2, 3].detach())


def test_integer_inputs_are_frozen_not_constant() -> None:
    ids = torch.randint(1, 5, (2, 4), generator=torch.Generator().manual_seed(0))
    report = fgt.check_completeness(lambda x, i: x + i.float(), (X, ids))
    assert Verdict.OPAQUE in {n.verdict for n in report.nodes}
    assert fgt.check_completeness(lambda x, i: x * i.float(), (X, ids)).complete is True
    report = fgt.check_completeness(lambda i: i.float() @ torch.ones(4, 3), ids)
    assert report.complete is False
    assert any("carries no gradient" in p for p in report.problems)
    looked_up = fgt.fullgrad(
        lambda i: F.one_hot(i, 5).float() @ torch.ones(5, 3), ids, target=(0, 0)
    )
    assert isinstance(looked_up.input, Tensor) and looked_up.input.shape == (2, 4, 3)
    with pytest.raises(InputError, match="no floating-point tensor"):
        fgt.check_completeness(lambda i: i * 2, ids)


def test_functions_methods_partials_and_keywords() -> None:
    layer = nn.Linear(4, 3).eval()
    assert fgt.check_completeness(layer.forward, X).complete is True
    assert fgt.check_completeness(torch.relu, X).complete is True
    assert fgt.check_completeness(partial(torch.clamp, min=0.3), X).complete is True
    given = {"x": X, "scale": 2.0}
    report = fgt.check_completeness(lambda x, *, scale: {"y": (x * scale,)}, given)
    assert report.complete is True
    balanced = fgt.balance(lambda x, *, scale: {"y": (x * x * scale,)}, given)
    assert torch.equal(balanced(**given)["y"][0], X * X * 2.0)
    same = fgt.check_completeness(lambda a, b: a - b * 2, (X, X))
    assert same.complete is True
    assert all(m.input_share == pytest.approx(1.0) for m in same.measurements)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reparametrised_weights() -> None:
    for wrap in (
        nn.utils.weight_norm,  # keeps a computed tensor, which deepcopy refuses
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ):
        report = fgt.check_completeness(wrap(nn.Linear(4, 3)).eval(), X)
        assert report.complete is True, str(report)


@pytest.mark.slow
def test_the_fast_path_of_torch_is_not_taken_for_an_error() -> None:
    """nn.TransformerEncoderLayer rounds differently without gradients."""
    for frozen in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        layer.requires_grad_(not frozen)
        report = fgt.check_completeness(layer, TOKENS, policy="libra")
        assert report.complete is True, str(report)
        assert any("fast path" in n for n in report.notes)
        grown = TOKENS.clone().requires_grad_()
        reference = layer(grown) if not frozen else None
        if reference is not None:
            assert torch.equal(fgt.balance(layer, TOKENS)(TOKENS), reference)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
def test_precisions_may_be_mixed() -> None:
    body = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = Module(
            lambda self, x, d=dtype: self.head(self.body(x).to(d)).float(),
            body=body,
            head=nn.Linear(8, 3).to(dtype),
        )
        assert fgt.check_completeness(model, X).complete is False
        report = fgt.check_completeness(model, X, policy="libra")
        assert report.complete is True, str(report)
        assert torch.equal(fgt.balance(model, X)(X), model(X))


def test_callers_in_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    with torch.inference_mode():
        x = torch.ones(2, 4)
        assert fgt.check_completeness(model, x).complete is False
        assert fgt.check_completeness(model, x, policy="libra").complete is True
        assert (fgt.fullgrad(model, x, target=0).error > 1e-3).all()


def test_state_written_by_forward_is_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.fc, self.seen = nn.Linear(4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            self.seen = self.seen + 1
            return self.fc(x) * self.calls

    model = Counting().eval()
    for policy in (None, "libra"):
        assert fgt.check_completeness(model, X, policy=policy).complete is True
    assert float(model.calls) == 0.0
    assert model.seen == 0
    given = X.clone()
    report = fgt.check_completeness(lambda x: x.mul_(2) + 1, given, policy="libra")
    assert report.complete is True
    assert fgt.check_completeness(lambda x: x.mul_(2) + 1, given).complete is True
    assert torch.equal(given, X)


def test_layouts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = IMAGE.to(memory_format=torch.channels_last)
    assert fgt.check_completeness(model, x, policy="libra").complete is True
    assert torch.equal(fgt.balance(model, x)(x), model(x))
    for strided in (seeded(4, 2).t(), seeded(1, 4).expand(2, 4)):
        assert fgt.check_completeness(nn.Linear(4, 3).eval(), strided).complete is True


def test_balanced_models_under_function_transforms() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    model = model.double().eval()
    x = X.double()
    balanced = fgt.balance(model, x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: balanced(v[None])[0]))(x)
    leaf = x.clone().requires_grad_()
    for i in range(3):
        (g,) = torch.autograd.grad(balanced(leaf)[:, i].sum(), leaf)
        torch.testing.assert_close(jacobian[:, i], g)
    plain = torch.func.vmap(torch.func.jacrev(lambda v: model(v[None])[0]))(x)
    assert not torch.allclose(plain, jacobian)


# ------------------------------------------------------------------ what cannot be judged


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x * x


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("boom")


_TRAINING = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout()).train())
_TRAINING.training = False

REFUSED = {
    "training mode": (nn.Dropout(), X, TrainingModeError, "training mode"),
    "training inside": (_TRAINING, X, TrainingModeError, r"'1\.0'"),
    "random": (lambda x: x + torch.randn(4), X, TrainingModeError, "random"),
    "dropout": (F.dropout, X, UnregisteredOperationError, "random"),
    "strides": (
        lambda x: x.reshape(-1)[:1].as_strided((2, 2), (2, 1)),
        X,
        UnregisteredOperationError,
        "reads memory",
    ),
    "control flow": (Branching().eval(), X, TraceError, "depends on a tensor's values"),
    "no inputs": (nn.Linear(4, 3).eval(), None, InputError, "pass inputs"),
    "wrong shape": (nn.Linear(4, 3).eval(), seeded(2, 5), InputError, r"\(2, 5\)"),
    "too many": (nn.Linear(4, 3).eval(), (X, X), InputError, "do not fit"),
    "wrong name": (nn.Linear(4, 3).eval(), {"y": X}, InputError, "do not fit"),
    "no tensor": (nn.Linear(4, 3).eval(), "abc", InputError, "must be a tensor"),
    "empty batch": (nn.Linear(4, 3).eval(), X[:0], InputError, "no tensor with elements"),
    "empty output": (lambda x: x[:, 4:] * 2, X, InputError, "empty"),
    "no model": (3, X, InputError, "expected a torch.nn.Module"),
    "a failing model": (Failing().eval(), X, InputError, "boom"),
    "scripted": (torch.jit.trace(nn.ReLU(), X).eval(), X, TraceError, "ScriptModule"),
    "no derivative": (
        lambda x: x * torch.heaviside(x, torch.zeros(1).to(x)),
        X,
        TraceError,
        "heaviside",
    ),
    "NaN within": (lambda x: (x * math.nan).relu(), X, NonFiniteError, "mul.*first node"),
    "infinite output": (lambda x: x / 0.0, X, NonFiniteError, "div.*first node"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    model, x, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        fgt.check_completeness(model, x)
    assert isinstance(caught.value, FullgradError)


def test_parts_that_cancel_to_rounding_are_unknown() -> None:
    x = seeded(1, 1000).double()
    bias = nn.Parameter(1e-12 - x.sum(-1, keepdim=True))
    report = fgt.check_completeness(Module(lambda m, x: x.sum(-1, True) + m.b, b=bias), x)
    assert report.complete is None
    assert report.error is not None and 1e-10 < report.error < 1
    assert any("rounding" in problem for problem in report.problems)


@pytest.mark.parametrize("larger", [torch.maximum, torch.fmax, torch.minimum, torch.fmin])
@pytest.mark.parametrize("swapped", [False, True])
def test_constants_that_tie_with_live_values(larger, swapped: bool) -> None:  # type: ignore[no-untyped-def]
    """Torch gives each of two equals half, or one of them all: what is left is the constant's."""
    x = seeded(3, 4).double()
    tie = nn.Parameter(torch.where(x > 0, x, seeded(3, 4, seed=1).double()).detach())

    def function(m, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return larger(m.tie, x) if swapped else larger(x, m.tie)

    report = fgt.check_completeness(Module(function, tie=tie), x)
    assert report.complete and report.error is not None and report.error < 1e-12


@pytest.mark.parametrize(
    "bounded",
    [
        lambda x: F.hardtanh(x, -0.5, 0.5),
        lambda x: F.threshold(x, 0.5, 0.5),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.clamp_min(0.5),
    ],
)
def test_values_at_a_bound_itself(bounded) -> None:  # type: ignore[no-untyped-def]
    x = torch.tensor([[0.5, 0.2, 0.9, 0.5]], dtype=torch.float64)
    parts = fgt.fullgrad(lambda x: bounded(x) * 2, x, target=0)
    assert torch.equal(parts.total, parts.output)
    whole = fgt.fullgrad(lambda x: bounded(x).sum(-1), x)
    assert torch.allclose(whole.total, whole.output, rtol=1e-14)


def test_views_of_several_operands_have_nothing_to_do_with_each_other() -> None:
    """Of degrees 1 and 0 and constant: one label for all of them fits none."""
    x, w = seeded(2, 4), nn.Parameter(seeded(4))

    def function(m, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        linear, direction, constant = torch.broadcast_tensors(x, x / norm, m.w)
        return linear * constant * direction

    assert fgt.check_completeness(Module(function, w=w), x).complete

    def grid(m, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        rows, columns = torch.meshgrid(x[0], m.w, indexing="xy")
        return rows * columns

    assert fgt.check_completeness(Module(grid, w=w), x).complete


@torch.library.custom_op("fgt_tests::careless", mutates_args=())
def careless(x: Tensor) -> Tensor:
    return x.clone()


careless.register_fake(torch.empty_like)
careless.register_autograd(lambda ctx, g: g.as_strided(g.shape, torch.empty(g.shape).stride()))


@pytest.mark.parametrize("name", ["careless", "batch_norm"])
def test_a_backward_that_misreads_its_cotangent_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every residual under a fresh cotangent vanishes, and the whole is wrong. torch's batch_norm
    does so on the CPU for one sample whose cotangent came through a transpose."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    fgt.register("fgt_tests.careless.default", fgt.Algebra.STRUCTURAL, "x")
    layer = nn.BatchNorm2d(4).double() if name == "batch_norm" else careless
    model = Module(
        lambda m, x: (layer(x).flatten(2).transpose(1, 2) * m.w).sum((1, 2)),
        part=layer if name == "batch_norm" else nn.Identity(),
        w=nn.Parameter(seeded(1, 9, 4).double()),
    )
    x = seeded(1, 4, 3, 3).double()
    if name == "batch_norm":
        leaf = x.clone().requires_grad_()
        layer.running_var.uniform_(0.5, 2.0)
        (g,) = torch.autograd.grad(model(leaf).sum(), leaf)
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        right = model.w.mT.reshape(1, 4, 3, 3) * scale[:, None, None]
        if torch.allclose(g, right):
            pytest.skip("this torch reads it right")
    report = fgt.check_completeness(model, x)
    assert report.complete is not True
    assert any(f"{name}" in p and "lies in memory otherwise" in p for p in report.problems)
    assert not any("error of this library" in p for p in report.problems)


RATIO = {  # what a norm reads beside a live value, and whether the gradient as it is is complete
    "a ratio, live weight": (lambda x, w: F.layer_norm(x / x.flip(-1), (4,), x[0], w), True),
    "a ratio, live bias": (lambda x, w: F.layer_norm(x / x.flip(-1), (4,), w, x[0]), False),
    "a constant, live weight": (lambda x, w: F.layer_norm(w, (4,), x[0], w), True),
    "a constant, live bias": (lambda x, w: F.layer_norm(w, (4,), None, x[0]), False),
    "a constant, live bias, no eps": (lambda x, w: F.layer_norm(w, (4,), None, x[0], 0.0), False),
    "a live one, live weight": (lambda x, w: F.layer_norm(x, (4,), x[0], w), False),
    "a live one, live weight, no eps": (lambda x, w: F.layer_norm(x, (4,), x[0], w, 0.0), True),
}


@pytest.mark.parametrize("what", RATIO)
def test_norms_of(what: str) -> None:
    """Linear in their weight and bias where 1/sigma is of degree 0; a constant input is no bias."""
    function, complete = RATIO[what]
    model, x = (
        Module(lambda m, x: function(x, m.w), w=nn.Parameter(seeded(4, seed=1))),
        seeded(2, 4),
    )
    assert fgt.check_completeness(model, x).complete is complete
    assert fgt.check_completeness(model, x, numeric=False).complete is complete
    plan = fgt.derive_rules(model, x)
    assert fgt.check_completeness(model, x, policy=plan).complete
    assert not any(isinstance(e, fgt.Prune) and e.argument == "input" for e in plan)


def test_all_unregistered_operations_are_listed_at_once() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.special.i0(x) + torch.lgamma(x) + torch.digamma(x)

    with pytest.raises(UnregisteredOperationError) as caught:
        fgt.check_completeness(model, X.abs() + 1)
    for name in ("i0", "lgamma", "digamma"):
        assert f"{name}.default" in str(caught.value)
    assert "test_traps.py" in str(caught.value)
    assert "register(" in str(caught.value)


def test_scales_need_exact_rationals() -> None:
    plan = fgt.derive_rules(lambda x: (x.abs() ** 1.5).sum(-1), X)
    assert [e.factor for e in plan if isinstance(e, fgt.Scale)] == [Fraction(2, 3)]
    with pytest.raises(NoPlanError):
        fgt.derive_rules(lambda x: x.abs() ** math.pi, X)


def edited(model, *edits) -> fgt.Report:  # type: ignore[no-untyped-def]
    """The verdict of a plan written by hand, by structure alone and measured: they agree."""
    graph = fgt.trace(model, X)
    plan = dataclasses.replace(fgt.derive_rules(graph, policy="plain"), edits=edits)
    report = fgt.check_completeness(graph, policy=plan)
    assert fgt.check_completeness(graph, policy=plan, numeric=False).complete is report.complete
    assert not any("error of this library" in p for p in report.problems)
    return report


def test_plans_by_hand() -> None:
    half = Fraction(1, 2)
    square = lambda x: x * x  # noqa: E731
    assert edited(square, fgt.Scale("mul", half)).complete is True
    edges = fgt.Scale("mul", half, "self"), fgt.Scale("mul", half, "other")
    assert edited(square, *edges).complete is True
    uneven = fgt.Scale("mul", Fraction(1, 3), "self"), fgt.Scale("mul", Fraction(2, 3), "other")
    assert edited(square, *uneven).complete is True
    assert edited(square, edges[0]).complete is False
    assert edited(lambda x: (x * 2).relu(), fgt.Scale("relu", half, "self")).complete is False
    assert edited(lambda x: x * 2, fgt.Prune("mul", "self")).complete is False
    assert edited(lambda x: torch.sigmoid(x * x), fgt.Secant("sigmoid")).complete is False
    for wrong in (
        (fgt.Scale("mul", half), fgt.Scale("mul", half)),
        (fgt.Prune("mul", "self"), fgt.Prune("mul", "self")),
        (fgt.Secant("mul"),),
        (fgt.Prune("mul", "nothing"),),
        (fgt.Scale("x", Fraction(2)),),
        (fgt.Scale("nowhere", half),),
    ):
        with pytest.raises(PlanError):
            edited(square, *wrong)
    with pytest.raises(PlanError, match="twice"):
        edited(F.gelu, fgt.Secant("gelu"), fgt.FreezeScale("gelu"))
    with pytest.raises(PlanError, match="positive"):
        fgt.Scale("mul", Fraction(-1))


def test_arguments_find_their_places() -> None:
    """The graph takes them by position: a call in another form must not swap them."""

    def model(a: Tensor, c: Tensor, *, k: float = 1.0) -> Tensor:
        return a * c * c * k

    a, c = X, seeded(2, 4, seed=3)
    for given in ((a, c), {"c": c, "a": a}):
        balanced = fgt.balance(model, given)
        for ours in (balanced(a, c), balanced(c=c, a=a), balanced(a, c=c)):
            assert torch.equal(ours, model(a, c))
        for args, named in (((a, c, c), {}), ((a,), {}), ((a, c), {"k": 2.0}), ((a,), {"a": a})):
            with pytest.raises(InputError, match="balanced for"):
                balanced(*args, **named)


def test_the_library_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    fgt.check_completeness(model, X)
    fgt.check_completeness(model, X, policy="libra")
    fgt.fullgrad(fgt.balance(model, X), X)
    with pytest.raises(TraceError):
        fgt.trace(Branching().eval(), X)
    with pytest.raises(InputError):
        fgt.trace(Failing().eval(), X)
    assert capfd.readouterr() == ("", "")


def test_factories_live_where_the_input_lives() -> None:
    """Export bakes a factory's device in: an audit without weights must not mix devices."""

    def model(x: Tensor) -> Tensor:
        return F.relu(x + torch.linspace(0, 1, 4, device=x.device))

    assert fgt.check_completeness(model, X).complete is True
    graph = fgt.trace(model, X.to("meta"))
    factory = next(n for n in graph.fx.graph.nodes if "linspace" in n.name)
    assert factory.meta["val"].device.type == "meta"
    assert fgt.check_completeness(graph).complete is True


def test_forward_mode_is_refused_and_never_wrong() -> None:
    """An edited backward has no forward derivative; torch says so instead of using the old one."""
    balanced = fgt.balance(F.gelu, X)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(balanced, (X,), (X,))


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x * 2 if x.shape[0] == 1 else x * 3,
        lambda x: x * 2 if x.shape[0] <= 4 else x * 3,
    ],
)
def test_the_batch_size_may_decide_the_way(model) -> None:  # type: ignore[no-untyped-def]
    """Export leaves 1 out, and says nothing; another size is refused, or has its own way."""
    balanced = fgt.balance(model, seeded(3, 4))
    for size in (1, 2, 3, 8):
        x = seeded(size, 4)
        try:
            found = balanced(x)
        except InputError:
            assert size != 3
        else:
            assert torch.equal(found, model(x))


def _across(g: Tensor) -> Tensor:
    """The same numbers, in memory as behind a transpose of channels and columns."""
    return g.transpose(1, -1).contiguous().transpose(1, -1)


@pytest.mark.parametrize("policy", ["libra", "plain"])
@pytest.mark.parametrize("shape", [(1, 6, 5, 1), (2, 6, 1, 5), (1, 6, 3, 3), (2, 6, 1, 1, 4)])
def test_a_balanced_batch_norm_reads_any_cotangent(shape: tuple[int, ...], policy: str) -> None:
    """However it lies in memory, the gradient is the one of the formula."""
    layer = (nn.BatchNorm2d(6) if len(shape) == 4 else nn.BatchNorm3d(6)).double().eval()
    layer.running_var.uniform_(0.5, 2.0)
    x, g = seeded(*shape).double(), seeded(*shape, seed=1).double()
    scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach()
    wanted = g * scale.view(1, -1, *[1] * (len(shape) - 2))
    balanced = fgt.balance(layer, x, policy)
    for value in (x, x.to(memory_format=torch.channels_last if x.dim() == 4 else None)):
        order = [0, *range(2, x.dim()), 1]
        back = [order.index(i) for i in range(x.dim())]
        for cotangent in (g, g.permute(order).contiguous().permute(back), _across(g)):
            leaf = value.clone().requires_grad_()
            (found,) = torch.autograd.grad(balanced(leaf), leaf, cotangent)
            torch.testing.assert_close(found, wanted)
            assert torch.equal(balanced(leaf), layer(leaf))
