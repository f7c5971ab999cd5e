"""Linear layers multiply those channels of their cotangent alone that are not held at zero."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import SMALL, small
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.backward import balanced as room
from fullgrad_theory.edits.channels import some_channels


class Fused(nn.Module):
    """Attention whose query, key and value are one projection, laid out in one of several ways."""

    def __init__(self, layout: str, heads: int = 2, width: int = 6) -> None:
        super().__init__()
        self.layout, self.heads, self.width = layout, heads, width
        self.qkv = nn.Linear(5, 3 * heads * width)
        self.out = nn.Linear(heads * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        made, (b, n, h, d) = self.qkv(x), (*x.shape[:2], self.heads, self.width)
        if self.layout == "unbind":
            q, k, v = made.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "chunk":
            q, k, v = (t.reshape(b, n, h, d).transpose(1, 2) for t in made.chunk(3, -1))
        elif self.layout == "slices":
            parts = made[..., : h * d], made[..., h * d : 2 * h * d], made[..., 2 * h * d :]
            q, k, v = (t.unflatten(-1, (h, d)).transpose(1, 2) for t in parts)
        elif self.layout == "interleaved":  # head by head: the value is no range of channels
            q, k, v = made.reshape(b, n, h, 3, d).permute(3, 0, 2, 1, 4).unbind(0)
        elif self.layout == "value first":
            v, q, k = made.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        else:  # the value is read twice
            q, k, v = made.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
            v = v + v.flip(-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, h * d)).mean(1)


LAYOUTS = {  # layout -> the channels that are multiplied, None where all of them are
    "unbind": (24, 36),
    "chunk": (24, 36),
    "slices": (24, 36),
    "interleaved": None,
    "value first": (0, 12),
    "twice": (24, 36),
}


def parts(balanced: Any) -> list[Any]:
    return [n for n in balanced.fx.graph.nodes if n.target is some_channels]


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    (g,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).to(x).view_as(out))
    return g


@pytest.fixture
def wholly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`balance` in which every linear layer multiplies all of its channels."""

    def made(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(room, "narrow_linears", lambda graph: None)
            return fgt.balance(*given)

    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fused_projection(layout: str, wholly: Callable[..., Any]) -> None:
    model = Fused(layout).eval().double().requires_grad_(False)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    balanced = fgt.balance(model, x)
    found = [tuple(n.args[-2:]) for n in parts(balanced)]
    assert found == ([] if LAYOUTS[layout] is None else [LAYOUTS[layout]])
    for batch in (x, x[:1], torch.cat([x, x])):
        assert torch.equal(balanced(batch), model(batch))
        expected = gradient(wholly(model, x, balanced.plan), batch)
        torch.testing.assert_close(gradient(balanced, batch), expected, atol=1e-13, rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_models_have_the_gradient_that_they_had(name: str, wholly: Callable[..., Any]) -> None:
    model, x = small(name)
    model, x = model.double().requires_grad_(False), x.double()
    balanced = fgt.balance(model, x)
    expected = gradient(wholly(model, x, balanced.plan), x)
    torch.testing.assert_close(gradient(balanced, x), expected, atol=1e-12, rtol=1e-11)
    again = pickle.loads(pickle.dumps(balanced))
    torch.testing.assert_close(gradient(again, x), expected, atol=1e-12, rtol=1e-11)


def test_parameters_that_ask_have_their_own_gradient(wholly: Callable[..., Any]) -> None:
    model = Fused("unbind").eval().double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    balanced = fgt.balance(model, x)
    ours = torch.autograd.grad(balanced(x).sum(), list(model.parameters()))
    slow = torch.autograd.grad(wholly(model, x, balanced.plan)(x).sum(), list(model.parameters()))
    assert any(g.abs().max() > 0 for g in ours)
    for one, other in zip(ours, slow, strict=True):
        torch.testing.assert_close(one, other)


def test_contributions_are_those_of_every_bias() -> None:
    """The bias of the fused projection is heard of though its layer is passed by."""
    model = Fused("unbind").eval().double().requires_grad_(False)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    balanced = fgt.balance(model, x)
    assert parts(balanced)
    found = fgt.fullgrad(balanced, x, target=0)
    torch.testing.assert_close(found.total, found.output, atol=1e-12, rtol=1e-12)
    assert sum(v.abs().sum() for v in found.biases.values()) > 0.1


def test_a_product_of_fewer_channels_is_run() -> None:
    """The backward multiplies a third of the weight: counted, not timed."""
    model = Fused("unbind").eval().requires_grad_(False)
    x = torch.randn(2, 7, 5)
    balanced, leaf = fgt.balance(model, x), x.clone().requires_grad_()
    out = balanced(leaf).sum()
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(out, leaf)
    products = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::bmm")]
    weights = [shapes[1] for shapes in products]
    assert [12, 5] in weights and [36, 5] not in weights


def test_compiled() -> None:
    model = Fused("unbind").eval().requires_grad_(False)
    x = torch.randn(2, 7, 5)
    balanced = fgt.balance(model, x)
    compiled = torch.compile(balanced, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled, x), gradient(balanced, x))


def sliced(x: Tensor, layer: nn.Linear) -> Tensor:
    return x + layer(x)[..., 2:7].relu()


def test_under_vmap_parameters_keep_their_gradient() -> None:
    """No value says under vmap whether what it is a part of asks for a gradient."""
    model = Fused("unbind").eval().double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    balanced = fgt.balance(model, x)
    state = {n: v.detach() for n, v in balanced.named_parameters()}
    many = {n: torch.stack([v, v * 1.1]).requires_grad_() for n, v in state.items()}

    def run(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(balanced, p, (x,))

    out = torch.vmap(run, in_dims=(0, None))(many, x)
    ours = torch.autograd.grad(out.sum(), list(many.values()))
    for place in range(2):
        one = {n: v[place].detach().requires_grad_() for n, v in many.items()}
        slow = torch.autograd.grad(run(one, x).sum(), list(one.values()))
        for many_g, g in zip(ours, slow, strict=True):
            torch.testing.assert_close(many_g[place], g)


def test_an_export_keeps_the_branch() -> None:
    layer = nn.Linear(5, 24).double().requires_grad_(False)
    x = torch.randn(2, 5, dtype=torch.float64)
    balanced = fgt.balance(lambda x: sliced(x, layer), x)
    assert parts(balanced)
    exported = torch.export.export(balanced, (x,)).module()
    torch.testing.assert_close(gradient(exported, x), gradient(balanced, x))
    again = fgt.balance(balanced, x)
    torch.testing.assert_close(gradient(again, x), gradient(balanced, x))


def test_a_complex_layer_has_the_conjugate() -> None:
    layer = nn.Linear(5, 24, dtype=torch.complex128).requires_grad_(False)
    x = torch.randn(2, 5, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        return layer(x.to(torch.complex128))[..., 3:6].abs()

    balanced = fgt.balance(model, x)
    assert parts(balanced)
    torch.testing.assert_close(gradient(balanced, x), gradient(model, x))


def test_a_layer_that_is_replaced_is_guarded() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU()).double().eval()
    x = torch.randn(2, 5, dtype=torch.float64)
    balanced = fgt.balance(model, x)
    balanced(x)
    names = [n for n, _ in balanced.fx.named_parameters()]
    holder = balanced.fx.get_submodule(names[0].rpartition(".")[0])
    holder.weight = nn.Parameter(holder.weight.detach().clone())
    (g,) = torch.autograd.grad(balanced(x).pow(2).sum(), holder.weight, create_graph=True)
    with pytest.raises(fgt.errors.DerivativeError):
        torch.autograd.grad(g.pow(2).sum(), holder.weight)
