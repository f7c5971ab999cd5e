"""In-place operations and writes through views: same values and gradients, no write left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fullgrad_theory.errors import TraceError
from fullgrad_theory.graph.computation import ComputationGraph
from fullgrad_theory.graph.normal import enter_autocast, leave_autocast, mutates
from fullgrad_theory.graph.tracing import trace

Function = Callable[[Tensor], Any]


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6)), generator=torch.Generator().manual_seed(1))


def writes(graph: ComputationGraph) -> list[str]:
    return [str(n) for n in graph.fx.graph.nodes if n.op == "call_function" and mutates(n)]


def run(function: Callable[..., Any], x: Tensor, grad: bool = True) -> list[Tensor]:
    """The outputs and, where asked for, the input's gradient for fixed random cotangents."""
    leaf = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        outputs = [t for t in pytree.tree_leaves(function(leaf)) if isinstance(t, Tensor)]
        outputs = [o.clone() for o in outputs]
        if not grad:
            return outputs
        generator = torch.Generator().manual_seed(2)
        total = leaf.new_zeros((), dtype=torch.float64).requires_grad_()
        for o in outputs:
            cotangent = torch.randn(o.shape, generator=generator, dtype=torch.float64)
            total = total + (cotangent * o).sum()
        (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return [*(o.detach() for o in outputs), torch.zeros_like(x) if gradient is None else gradient]


def agree(
    model: Any,
    x: Tensor,
    grad: bool = True,
    graph: ComputationGraph | None = None,
    tolerance: float = 1e-5,
) -> None:
    """The graph writes nowhere and equals eager: values bit for bit, gradients but for rounding."""
    graph = graph or trace(model, x)
    assert not writes(graph)
    before = x.clone()
    # a copy: the in-place calls of a model may not be made on a leaf
    want = run(lambda t: model(t.clone()), x, grad)
    got = run(lambda t: graph.fx(t.clone()), x, grad)
    assert torch.equal(x, before)
    assert len(want) == len(got)
    for index, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if grad and index == len(want) - 1:
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b), f"output {index}"


# --------------------------------------------------------------------------- the operations

IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu_": lambda y: y.relu_(),
    "F.relu": lambda y: F.relu(y, inplace=True),
    "leaky": lambda y: F.leaky_relu(y, inplace=True),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "add_": lambda y: y.add_(1.5, alpha=2),
    "sub_": lambda y: y.sub_(y.flip(0)),
    "mul_": lambda y: y.mul_(y.detach() + 1),
    "div_": lambda y: y.div_(3.0),
    "pow_": lambda y: y.pow_(2),
    "exp_": lambda y: y.exp_(),
    "neg_": lambda y: y.neg_(),
    "tanh_": lambda y: y.tanh_(),
    "lerp_": lambda y: y.lerp_(y.flip(1), 0.3),
    "addcmul_": lambda y: y.addcmul_(y.flip(0), y.flip(1), value=0.5),
    "clamp_": lambda y: y.clamp_(-0.5, 0.5),
    "clamp_min_": lambda y: y.clamp_min_(0.1),
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 2.0),
    "copy_": lambda y: y.copy_(y.flip(0) * 2),
    "copy_ broadcast": lambda y: y.copy_(y[0] * 2),
    "zero_": lambda y: y.zero_(),
    "fill_": lambda y: y.fill_(0.5),
    "fill_ tensor": lambda y: y.fill_(y.sum()),
    "index_put_": lambda y: y.index_put_((torch.tensor([0, 2]),), y[1] * 3),
    "accumulate": lambda y: y.index_put_((torch.tensor([0, 0]),), y[1] * 3, accumulate=True),
    "index_add_": lambda y: y.index_add_(0, torch.tensor([1, 1]), y[2:] * 2),
    "index_fill_": lambda y: y.index_fill_(1, torch.tensor([0, 3]), 7.0),
    "index_copy_": lambda y: y.index_copy_(0, torch.tensor([3]), y[:1] * 2),
    "scatter_": lambda y: y.scatter_(0, torch.zeros(1, 6, dtype=torch.long), y[1:2] * 5),
    "scatter_add_": lambda y: y.scatter_add_(0, torch.ones(2, 6, dtype=torch.long), y[:2] * 5),
    "triu_": lambda y: y.triu_(),
    "y += z": lambda y: y.__iadd__(y.flip(0)),
    "y[:] = z": lambda y: y.__setitem__(slice(None), y.flip(0)),
    "y[1:3] = 2": lambda y: y.__setitem__(slice(1, 3), 2.0),
    "y[..., 0] = z": lambda y: y.__setitem__((Ellipsis, 0), y[..., 1] * 4),
    "y[:, ::2] += 1": lambda y: y[:, ::2].add_(1.0),
    "y[mask] = 0": lambda y: y.__setitem__(y > 0.3, 0.0),
    "y[[0, 2]] = z": lambda y: y.__setitem__([0, 2], y[1] * 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str) -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 1.5
        view, doubled = y.view(2, -1), y + y
        IN_PLACE[name](y)
        return y * 2, view + 1, doubled

    agree(model, image())


@pytest.mark.parametrize("name", ["relu_", "add_", "y[1:3] = 2", "copy_"])
def test_in_place_on_the_input(name: str) -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        read = x * 3
        IN_PLACE[name](x)
        return x * 2, read

    agree(model, image())


def test_the_result_of_a_write_is_the_written_tensor() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        z = y.add_(1).mul_(3)
        y.sub_(5)
        return z.clamp_(min=-7)

    agree(model, image())


# --------------------------------------------------------------------------- views

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: y.view(-1),
    "reshape": lambda y: y.reshape(2, 2, 6),
    "reshape of a transpose, still a view": lambda y: y.t().reshape(6, 2, 2),
    "reshape of a transpose, a copy": lambda y: y.t().reshape(-1),
    "transpose": lambda y: y.transpose(0, 1),
    "swapaxes": lambda y: y.swapaxes(0, 1),
    "t": lambda y: y.t(),
    "T": lambda y: y.T,
    "mT": lambda y: y.mT,
    "permute": lambda y: y.view(2, 2, 6).permute(2, 0, -2),
    "movedim": lambda y: y.unsqueeze(0).movedim(0, 2),
    "movedims": lambda y: y.view(2, 2, 6).movedim((0, 1), (2, 0)),
    "slice": lambda y: y[1:3],
    "strided slice": lambda y: y[:, ::2],
    "select": lambda y: y[1],
    "two selects": lambda y: y[1, 2],
    "unsqueeze": lambda y: y.unsqueeze(1),
    "squeeze": lambda y: y[:, :1].squeeze(1),
    "squeeze all": lambda y: y[:1].squeeze(),
    "flatten": lambda y: y.flatten(),
    "ravel": lambda y: y.ravel(),
    "unflatten": lambda y: y.unflatten(1, (2, 3)),
    "diagonal": lambda y: y.diagonal(),
    "upper diagonal": lambda y: y.diagonal(1),
    "narrow": lambda y: y.narrow(1, 1, 2),
    "narrow from the end": lambda y: y.narrow(1, -2, 2),
    "ellipsis and None": lambda y: y[..., None, 2:4],
    "view_as": lambda y: y.view_as(y),
    "expand to the same": lambda y: y.expand(4, 6),
    "to the same dtype": lambda y: y.to(torch.float32),
    "float": lambda y: y.float(),
    "type_as": lambda y: y.type_as(y),
    "to another dtype, a copy": lambda y: y.double(),
    "dropout in eval mode": lambda y: F.dropout(y, 0.5, False),
    "identity": lambda y: nn.Identity()(y),
    "contiguous": lambda y: y.contiguous(),
    "contiguous of a transpose, a copy": lambda y: y.t().contiguous(),
    "indexing, a copy": lambda y: y[[0, 1]],
    "clone": lambda y: y.clone(),
    "chain": lambda y: y.view(2, 2, 6).transpose(0, 2)[1:, 0].unsqueeze(0)[:, ::2],
    "chain of reshapes": lambda y: y.t().unflatten(0, (2, 3)).permute(2, 0, 1)[1:].mT,
}

MULTIPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda y: y.chunk(2, 1)[1],
    "unbind": lambda y: y.unbind(0)[2],
    "unbind from the end": lambda y: y.unbind(1)[-1],
    "split": lambda y: y.split(4, 1)[1],
    "split with sizes": lambda y: y.split([2, 4], 1)[0],
    "tensor_split": lambda y: y.tensor_split(4, 1)[1],
    "chain": lambda y: y.view(2, 2, 6).chunk(2, 2)[0].unbind(0)[1][1:],
}


def through(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 1.5
        before, other, made = y.flip(0), y.transpose(0, 1), view(y)
        made.mul_(3.0)
        y[0] += 1
        other[2].sub_(y[:, 1])
        return y + 1, made * 2, other - 1, before, view(y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", VIEWS)
def test_writes_through_views(name: str) -> None:
    agree(through(VIEWS[name]), image())


def test_a_write_may_change_the_layout() -> None:
    """What eager would view is viewed, whatever strides the functional value has."""

    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        y.t().copy_(y[:, 0].clone().exp())
        flat = y.view(-1)
        flat[3:].mul_(2)
        y.copy_(y[1].clone())
        y.reshape(2, 12).add_(flat.sum())
        return y, flat, y.t().reshape(3, -1)

    agree(model, image())


@pytest.mark.parametrize("name", MULTIPLE)
def test_writes_through_one_of_many_views(name: str) -> None:
    """Eager autograd refuses these; without gradients they are allowed."""
    agree(through(MULTIPLE[name]), image(), grad=False)


def test_views_that_change_shape_in_place() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        row = y[1]
        y.unsqueeze_(0)
        y.mul_(3)
        z = y.squeeze_(0).t_()
        z[1] = 5.0
        row += 1
        return y, z, row, y.view(-1, 3) if y.is_contiguous() else y * 2

    agree(model, image())


def test_any_batch_size() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1)[::2].mul_(2)
        y.transpose(0, 1)[1] = 4.0
        y[:, 2:].reshape(y.shape[0], 2, 2).add_(y[:, :1, None])
        return y.flatten()

    graph = trace(model, image(1, 6))
    assert graph.dynamic
    for batch in (1, 2, 5):
        agree(model, image(batch, 6), graph=graph)


# --------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_write_keeps_the_dtype_of_its_memory(dtype: torch.dtype) -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x.to(dtype)
        wide = x.double() / 3
        view = y[1:]
        y.mul_(wide)
        view.copy_(wide[1:] + 1)
        view[:, 0].add_(wide[1:, 0])
        return y, view, y.float() * 2

    agree(model, image(), tolerance=10 * torch.finfo(dtype).eps)


def test_integers_are_written_too() -> None:
    def model(x: Tensor) -> Tensor:
        index = torch.zeros(4, dtype=torch.long)
        index[1:] = torch.tensor([3, 2, 1])
        index += 1
        index.clamp_(max=3)
        return x[index]

    agree(model, image())


def test_autocast_leaves_in_place_operations_alone() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        with torch.autocast("cpu", torch.bfloat16):
            z = y @ y.t()
            z.exp_()  # stays bfloat16, where exp would be computed in float32
            y.add_(1)
            w = z @ z
        return y, z, w

    agree(model, image(), grad=False)
    targets = [n.target for n in trace(model, image()).fx.graph.nodes]
    assert targets.count(enter_autocast) == targets.count(leave_autocast) >= 1
    assert not torch.is_autocast_enabled("cpu")


# --------------------------------------------------------------------------- gradients switched off


def test_no_grad_carries_no_gradient() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean(1, keepdim=True)
            scale.mul_(2)
            scale[0] += 1
        scale.add_(1)
        return x * scale

    agree(model, image())


def test_a_no_grad_write_into_a_constant_is_frozen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean.copy_(x.mean(0))
            return x - self.mean

    model = Model().eval()
    x = image()
    graph = trace(model, x)
    assert torch.equal(model.mean, torch.zeros(6))
    got = run(graph.fx, x)
    assert torch.equal(model.mean, torch.zeros(6))
    assert torch.equal(got[0], x - x.mean(0))
    ones = run(lambda t: t - x.mean(0), x)
    assert torch.equal(got[1], ones[1])


def test_buffers_are_read_as_written_and_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("tied", self.count)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.tied + self.count

    model = Model().eval()
    graph = trace(model, image())
    assert not writes(graph)
    assert torch.equal(graph.fx(image()), image() + 1)
    assert float(model.count) == 0.0


HIDDEN: dict[str, Function] = {
    "detach": lambda y: y.detach().mul_(3),
    "a view of detach": lambda y: y.view(-1).detach()[2:].zero_(),
    "no_grad": torch.no_grad()(lambda y: y.mul_(3)),
    "no_grad through a view": torch.no_grad()(lambda y: y[1:].mul_(3)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_writes_behind_the_back_of_autograd_are_refused(name: str) -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        HIDDEN[name](y)
        return y * 2

    with pytest.raises(TraceError, match=r"(?s)autograd.*without the in-place operation|clone"):
        trace(model, image())


# --------------------------------------------------------------------------- what is refused

REFUSED: dict[str, Function] = {
    "expand": lambda y: y.unsqueeze(0).expand(2, 4, 6).mul_(2),
    "as_strided": lambda y: y.as_strided((2, 2), (6, 1)).mul_(2),
    "unfold": lambda y: y.unfold(1, 2, 2).mul_(2),
    "out=": lambda y: torch.add(y, 1, out=y),
    "foreach": lambda y: torch._foreach_mul_([y, y.clone()], 2.0),
    "shared by several": lambda y: torch.broadcast_tensors(y, y[:1].clone())[1].mul_(2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_place_and_the_way_out(name: str) -> None:
    class Inner(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            REFUSED[name](y)
            return y

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * 2) + 1

    with pytest.raises(TraceError) as caught:
        trace(Model().eval(), image())
    text = str(caught.value)
    assert "inner" in text and "test_functionalise.py" in text
    assert "clone()" in text or "torch.where" in text


def test_a_graph_without_writes_is_left_alone() -> None:
    graph = trace(lambda x: x.view(-1).relu().view_as(x) + 1, image())
    ops = [str(n.target) for n in graph.fx.graph.nodes if n.op == "call_function"]
    assert ops == [
        "aten.view.default",
        "aten.relu.default",
        "aten.view_as.default",
        "aten.add.Tensor",
    ]


# --------------------------------------------------------------------------- random programs

STEPS: dict[str, Callable[[Tensor, Tensor, int], Tensor | None]] = {
    "view": lambda a, b, k: a.reshape(-1),
    "split": lambda a, b, k: a.unflatten(0, (a.shape[0] // 2, 2)) if a.shape[0] % 2 == 0 else a,
    "swap": lambda a, b, k: a.transpose(0, -1),
    "slice": lambda a, b, k: a[k % 2 :: 1 + k % 3],
    "select": lambda a, b, k: a.select(-1, k % a.shape[-1]) if a.dim() > 1 else a,
    "diagonal": lambda a, b, k: a.diagonal(0, 0, -1) if a.dim() > 1 else a,
    "unsqueeze": lambda a, b, k: a.unsqueeze(k % (a.dim() + 1)),
    "squeeze": lambda a, b, k: a.squeeze() if a.numel() > 1 else a,
    "dropout": lambda a, b, k: F.dropout(a, 0.1, False),
    "clone": lambda a, b, k: a.clone(),
    "read": lambda a, b, k: a * 2 + k,
    "write number": lambda a, b, k: a.mul_(k - 2.5),
    "write sum": lambda a, b, k: a.add_(b.sum()),
    "write clamp": lambda a, b, k: a.clamp_(-k, k + 0.5),
    "write fill": lambda a, b, k: a.fill_(k),
    "write index": lambda a, b, k: a[0].sub_(b.mean()) if a.dim() > 1 else a.sub_(k),
    "write copy": lambda a, b, k: a.copy_(b.mean() * k),
    "write mask": lambda a, b, k: a.masked_fill_(a > k / 4, -1.0),
    "write like": lambda a, b, k: a.add_(b, alpha=k) if a.shape == b.shape else None,
}

instructions = st.tuples(
    st.sampled_from(sorted(STEPS)), st.integers(0, 30), st.integers(0, 30), st.integers(0, 5)
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(st.lists(instructions, min_size=3, max_size=14))
def test_random_programs(program: list[tuple[str, int, int, int]]) -> None:
    """Draw views, writes and reads; whatever is held in the end is as in eager."""

    def model(x: Tensor) -> list[Tensor]:
        held = [x * 1.0]
        for step, i, j, k in program:
            a, b = held[i % len(held)], held[j % len(held)]
            made = STEPS[step](a, b, k) if a.numel() and b.numel() else None
            if made is not None and made.numel():
                held.append(made)
        return [t + 0 for t in held]

    try:
        eager = run(model, image())
    except RuntimeError:  # a write that autograd refuses, or a copy onto itself
        return
    assert eager
    agree(model, image())
