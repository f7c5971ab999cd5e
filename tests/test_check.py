"""The verdict: who is named, what is never passed, and that two ways must agree."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import timm
import torch
from planted import plant_gate
from small_models import SMALL, small
from torch import Tensor, nn
from torch.nn import functional as F

import fullgrad_theory as fgt
from fullgrad_theory.check.copies import cast_copy
from fullgrad_theory.check.formats import to_junit, to_sarif
from fullgrad_theory.check.report import Verdict
from fullgrad_theory.edits import scaling
from fullgrad_theory.errors import NonFiniteError
from fullgrad_theory.operators import registry

SOUND = (Verdict.PROVED, Verdict.NUMERIC)


def broken(report: fgt.Report) -> dict[str, int]:
    return dict(Counter(n.op.split(".")[-2] for n in report.nodes if n.verdict not in SOUND))


CULPRITS = {
    "vit": {"layer_norm", "scaled_dot_product_attention", "gelu"},
    "eva": {"layer_norm", "scaled_dot_product_attention", "silu", "mul"},
    "beit": {"layer_norm", "scaled_dot_product_attention", "gelu"},
    "gmixer": {"layer_norm", "silu", "mul"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_transformers_and_mixers(name: str) -> None:
    model, x = small(name)
    plain = fgt.check_completeness(model, x)
    assert plain.complete is False
    assert plain.exit_code == 1
    assert broken(plain).keys() == CULPRITS[name]
    assert plain.error is not None
    assert plain.error > 1e-2
    for node in plain.nodes:
        if node.verdict not in SOUND:
            assert node.error is not None  # its witness
            assert node.error > 1e-6
            assert node.edit
            assert node.source
    structural = fgt.check_completeness(model, x, numeric=False)
    assert [(n.name, n.verdict) for n in structural.nodes] == [
        (n.name, n.verdict) for n in plain.nodes
    ]
    libra = fgt.check_completeness(model, x, policy="libra")
    assert libra.complete is True, str(libra)
    assert libra.error is not None
    assert libra.error < 1e-10
    (moved,) = (
        m for m in plain.measurements if m.where[:9] == "perturbed" and m.dtype == "float64"
    )
    assert libra.error_before == pytest.approx(moved.relative)
    shown = {m.dtype: m.relative for m in libra.measurements}
    assert shown.keys() == {"float64", "float32", "bfloat16"}
    assert shown["float64"] < shown["float32"] < 1e-4 and shown["bfloat16"] < 0.1
    assert all(n.error is not None and n.error < 1e-10 for n in libra.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "test_vgg", "test_convmixer"])
def test_convolutional_nets(name: str) -> None:
    torch.manual_seed(0)
    if name == "test_convmixer":
        from timm.models.convmixer import ConvMixer

        model: nn.Module = ConvMixer(dim=16, depth=2, kernel_size=3, patch_size=4, num_classes=5)
    elif name == "test_vgg":
        from timm.models.vgg import VGG

        model = VGG(cfg=[8, "M", 16, "M", 16, "M"], num_classes=5, mlp_ratio=0.01)
    else:
        model = timm.create_model(name, num_classes=5)
    report = fgt.check_completeness(model.eval(), torch.randn(1, 3, 64, 64))
    if name == "test_convmixer":  # the class's default activation is GELU
        assert broken(report) == {"gelu": 5}
    else:
        assert report.complete is True, str(report)
        assert len(fgt.derive_rules(model, torch.randn(1, 3, 64, 64))) == 0


@pytest.mark.slow
def test_audits_an_architecture_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=3).eval()
    report = fgt.check_completeness(model, policy="libra")
    assert report.complete is True
    assert report.error is None
    assert any("meta" in n for n in report.notes)


def test_a_balanced_model_is_judged_by_its_plan() -> None:
    model, x = small("vit")
    report = fgt.check_completeness(fgt.balance(model, x))
    assert report.complete is True
    assert report.policy == "libra"


@pytest.mark.slow
def test_a_plan_is_a_policy_and_a_lost_edit_is_found() -> None:
    model, x = small("eva")
    plan = fgt.derive_rules(model, x)
    assert fgt.check_completeness(model, x, policy=plan).complete is True
    for lost in (plan.edits[0], plan.edits[len(plan.edits) // 2], plan.edits[-1]):
        less = dataclasses.replace(plan, edits=tuple(e for e in plan.edits if e != lost))
        report = fgt.check_completeness(model, x, policy=less)
        assert report.complete is False
        assert lost.node in {n.name for n in report.nodes if n.verdict not in SOUND}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [p.name for p in fgt.policies()])
def test_every_policy_says_the_truth_about_itself(policy: str) -> None:
    model, x = small("eva")
    report = fgt.check_completeness(model, x, policy=policy)
    assert report.complete is fgt.policy(policy).complete, str(report)
    assert (report.error is not None and report.error < 1e-10) is report.complete


def test_the_two_ways_disagreeing_is_an_error_of_the_library(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Plant a wrong gate: the lemma still says consistent, the real backward does not."""
    model, x = small("vit")
    wrong = lambda u, approximate="none": torch.sigmoid(u)  # noqa: E731
    plant_gate(monkeypatch, "aten.gelu.default", wrong)
    report = fgt.check_completeness(model, x, policy="libra")
    assert report.complete is False
    assert "error of this library" in " ".join(report.problems)
    assert {n.op for n in report.nodes if n.verdict is Verdict.UNKNOWN} == {"aten.gelu.default"}


@pytest.mark.slow
def test_a_wrong_scale_is_found(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    right = scaling.scale
    monkeypatch.setattr(scaling, "scale", lambda x, factor: right(x, factor * 1.001))
    model, x = small("eva")
    report = fgt.check_completeness(model, x, policy="libra")
    assert report.complete is False


def test_opaque_values_are_reported() -> None:
    x = torch.randn(3, 4)
    for model in (lambda x: x + x.softmax(-1).detach(), lambda x: x + 5.0 * (x > 0)):
        report = fgt.check_completeness(model, x)
        assert report.complete is False
        assert [n.verdict for n in report.nodes if n.op == "aten.add.Tensor"] == [Verdict.OPAQUE]
    assert fgt.check_completeness(lambda x: x * (1.0 + x.detach()), x).complete is True


@pytest.mark.parametrize(
    "head", [lambda z: z.softmax(-1), torch.sigmoid, lambda z: z.log_softmax(-1)]
)
def test_probabilities_are_named(head) -> None:  # type: ignore[no-untyped-def]
    layer = nn.Linear(4, 3).eval()
    wrapped = lambda x: head(layer(x))  # noqa: E731
    report = fgt.check_completeness(wrapped, torch.randn(2, 4), policy="libra")
    assert report.complete is False
    assert any("probability" in p for p in report.problems)


class Zero(nn.Module):
    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        if learned:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.learned = learned

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * (1.0 if self.learned else 0.0)


def test_zero_outputs_are_never_passed() -> None:
    report = fgt.check_completeness(Zero(learned=True).eval(), torch.randn(2, 4))
    assert report.complete is True  # at perturbed parameters, and said so
    assert any("zero at the model's own parameters" in n for n in report.notes)
    report = fgt.check_completeness(Zero(learned=False).eval(), torch.randn(2, 4))
    assert report.complete is None
    assert report.exit_code == 2
    assert any("zero" in p for p in report.problems)


def test_inputs_that_do_not_reach_the_output() -> None:
    report = fgt.check_completeness(lambda x, y: x * 2.0, (torch.randn(2, 3), torch.randn(2, 3)))
    assert report.complete is False
    assert any("'y' does not reach" in p for p in report.problems)
    report = fgt.check_completeness(lambda x: (x, torch.round(x)), torch.randn(2, 3))
    assert report.complete is False


class Modified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(u)
        return F.gelu(u)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        (u,) = ctx.saved_tensors
        return g * 0.5 * (1.0 + torch.erf(u / 2.0**0.5))


class Gelu(nn.Module):
    def __init__(self, modified: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.modified = nn.Linear(4, 8), nn.Linear(8, 3), modified

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(Modified.apply(h) if self.modified else F.gelu(h))


def test_a_modified_backward_is_judged_as_it_is() -> None:
    """Export erases the Function; the end-to-end residual is the module's own all the same."""
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    report = fgt.check_completeness(Gelu(modified=True).eval(), x)
    assert report.complete is True
    assert report.error is not None
    assert report.error < 1e-12
    assert any("backward is modified" in n for n in report.notes)
    plain = fgt.check_completeness(Gelu(modified=False).eval(), x)
    assert plain.complete is False
    assert not any("modified" in n for n in plain.notes)
    wrong = Gelu(modified=False).eval()
    wrong.fc1.register_full_backward_hook(lambda module, g, out: (g[0] * 2.0,))
    report = fgt.check_completeness(wrong, x)
    assert report.complete is False
    assert any("backward is modified" in n for n in report.notes)
    assert plain.error is not None
    assert plain.error > 1e-3


def test_the_first_node_that_is_not_finite_is_named() -> None:
    with pytest.raises(NonFiniteError, match=r"log.*first node"):
        fgt.check_completeness(lambda x: torch.log(x - 10.0).relu() + x, torch.rand(2, 3))
    with pytest.raises(NonFiniteError, match="input 'x'"):
        fgt.check_completeness(lambda x: x * 2.0, torch.tensor([[1.0, float("nan")]]))
    layer = nn.Linear(3, 3).eval()
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="'weight'"):
        fgt.check_completeness(layer, torch.rand(2, 3))


def test_attention_masks_are_held_fixed() -> None:
    mask = torch.full((4, 4), float("-inf")).triu(1)

    def fused(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.to(x))

    def unfused(x: Tensor) -> Tensor:
        return (x @ x.transpose(-1, -2) + mask.to(x)).softmax(-1) @ x

    x = torch.randn(2, 1, 4, 8)
    for attention in (fused, unfused):
        report = fgt.check_completeness(attention, x, policy="libra")
        assert report.complete is True, str(report)


def test_low_precision_inside_the_model_does_not_limit_the_audit() -> None:
    def model(x: Tensor) -> Tensor:
        return (x.to(torch.float32) * 3.0).relu().to(x.dtype) + x

    report = fgt.check_completeness(model, torch.randn(2, 3))
    assert report.error is not None
    assert report.error < 1e-10


@pytest.mark.slow
def test_raise_json_and_determinism() -> None:
    model, x = small("vit")
    one, two = (fgt.check_completeness(model, x) for _ in range(2))
    assert one.to_json() == two.to_json()
    assert json.loads(one.to_json())["complete"] is False
    with pytest.raises(fgt.IncompleteError, match="layer_norm"):
        one.raise_if_incomplete()
    fgt.check_completeness(model, x, policy="libra").raise_if_incomplete()


def test_a_registered_operation_needs_two_lines(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @torch.library.custom_op("fgt_tests::triple", mutates_args=())
    def triple(x: Tensor) -> Tensor:
        return x * 3.0

    triple.register_fake(torch.empty_like)
    triple.register_autograd(lambda ctx, g: g * 3.0)
    x = torch.randn(2, 3)
    with pytest.raises(fgt.FullgradError, match=r"fgt_tests.triple.default"):
        fgt.check_completeness(lambda x: triple(x) + 1.0, x)
    fgt.register("fgt_tests.triple.default", fgt.Algebra.STRUCTURAL, "x")
    report = fgt.check_completeness(lambda x: triple(x) + 1.0, x)
    assert report.complete is True
    assert {n.verdict for n in report.nodes if "triple" in n.op} == {Verdict.NUMERIC}
    with pytest.raises(ValueError, match="registered already"):
        fgt.register("fgt_tests.triple.default", fgt.Algebra.STRUCTURAL, "x")


def test_a_mend_names_the_operation_of_a_node_called_scale(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The node's name is a word of the edit as well: "scale scale by 1/2"."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @torch.library.custom_op("fgt_tests::scale", mutates_args=())
    def scale(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return g * y, g * x

    scale.register_fake(lambda x, y: torch.empty_like(x))
    scale.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    fgt.register("fgt_tests.scale.default", fgt.Algebra.MULTILINEAR, "x*y")
    report = fgt.check_completeness(lambda x: scale(x, 2 * x), torch.rand(2, 3) + 1.0)
    (node,) = (n for n in report.nodes if n.name == "scale")
    assert node.edit == "scale scale by 1/2"
    assert node.mend == "scale fgt_tests.scale.default by 1/2"
    assert report.brief().endswith(f"mend  {node.mend}")
    assert f"Mend: {node.mend}." in to_sarif(report) and f"Mend: {node.mend}." in to_junit(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_in_another_precision_leaves_the_original(dtype: torch.dtype) -> None:
    model, x = small("vit")
    root = fgt.trace(model, x).fx
    before = {name: (id(t), t.dtype) for name, t in root.state_dict(keep_vars=True).items()}
    copied = cast_copy(root, dtype)
    assert {t.dtype for t in copied.state_dict().values() if t.is_floating_point()} == {dtype}
    after = {name: (id(t), t.dtype) for name, t in root.state_dict(keep_vars=True).items()}
    assert after == before
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_scales_are_exact_rationals() -> None:
    plan = fgt.derive_rules(lambda x: x + x**2 / 2 - x**3 / 5, torch.rand(2, 3) + 1.0)
    assert sorted(e.factor for e in plan if isinstance(e, fgt.Scale)) == [
        Fraction(1, 3),
        Fraction(1, 2),
    ]


def test_a_least_share_for_the_input() -> None:
    """Formally perfect, and the literal 1 gets the rest (the theory's own counter-example)."""

    def model(x: Tensor, small: float = 1e-9) -> Tensor:
        return torch.exp(x.square().sum(-1, keepdim=True).detach()) * (1 + small * x)

    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    free = fgt.check_completeness(model, x)
    assert free.complete is True and any("next to nothing" in note for note in free.notes)
    bound = fgt.check_completeness(model, x, least_share=1e-3)
    assert bound.complete is False and any("next to nothing" in p for p in bound.problems)
    assert fgt.check_completeness(lambda x: model(x, 1.0), x, least_share=1e-3).complete is True


def test_a_parameter_twice_in_one_call_is_no_modified_backward() -> None:
    """Leaf and blend at once: its own gradient is that of both uses."""

    class Blend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.lerp(self.w, x, self.w)

    report = fgt.check_completeness(Blend().eval(), torch.randn(2, 3))
    assert report.complete is True, str(report)
    assert not any("modified" in note for note in report.notes)
