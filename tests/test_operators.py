"""One row per registered operation, generated from its entry: meaning, scaling, autograd, kinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fullgrad_theory.operators import (
    Algebra,
    Call,
    Operator,
    Relation,
    lookup,
    register,
    registered,
)
from fullgrad_theory.operators import registry as registry_module
from fullgrad_theory.operators.calls import Running
from fullgrad_theory.testing.sample_calls import Sample, call, kinks, overload, samples, values
from proofs import symbolic

# composites are never in a graph: their steps are
NAMES = [o.name for o in registered() if o.algebra is not Algebra.COMPOSITE]


def entry(name: str) -> Operator:
    found = lookup(name)
    assert found is not None
    return found


def algebra(name: str) -> Algebra:
    return entry(name).algebra


EULER = {
    Algebra.STRUCTURAL,
    Algebra.AFFINE,
    Algebra.MULTILINEAR,
    Algebra.HOMOGENEOUS,
    Algebra.NORMALISER,
    Algebra.ATTENTION,
}
FREE = (sp.Rational(1, 2), sp.Integer(1), sp.Integer(2), sp.Rational(3, 2))
STEP = 2.0**-10

pytestmark = pytest.mark.filterwarnings("ignore")


def drawn(name: str) -> list[Sample]:
    return samples(name, torch.Generator().manual_seed(7))


def rows(name: str) -> Iterator[tuple[Sample, Call, int, Mapping[str, float], float]]:
    """Every sample with every solution of its unedited relation: operand weights, output degree."""
    operator = entry(name)
    for sample in drawn(name):
        if not sample.live or operator.algebra not in EULER:
            continue
        seen = call(name, sample)
        for index, relation in enumerate(operator.modes(seen)[0].outputs):
            yield from ((sample, seen, index, w, d) for w, d in numeric_weightings(relation, seen))


def numeric_weightings(
    relation: Relation, seen: Call
) -> Iterator[tuple[Mapping[str, float], float]]:
    """The relation's solutions, with free degrees set to different numbers."""
    for weights, degree in symbolic.weightings(relation, seen):
        free = sorted({s for e in [*weights.values(), degree] for s in e.free_symbols}, key=str)
        point = dict(zip(free, FREE * 3, strict=False))
        yield (
            {n: float(sp.sympify(w).xreplace(point)) for n, w in weights.items()},
            float(sp.sympify(degree).xreplace(point)),
        )


def run(name: str, sample: Sample, change: Callable[[str, Any], Any]) -> list[Tensor]:
    """The operation with every operand passed through `change(operand name, value)`."""
    arguments: dict[str, Any] = {}
    for key, value in symbolic.bound_arguments(name, sample).items():
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            arguments[key] = [change(f"{key}[{i}]", v) for i, v in enumerate(value)]
        else:
            number = isinstance(value, (Tensor, float, int)) and not isinstance(value, bool)
            arguments[key] = change(key, value) if number else value
    return outputs(symbolic._run(name, arguments))


def outputs(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def of_output(result: list[Any], index: int, name: str, seen: Call) -> list[Tensor]:
    """The tensors one relation speaks of: one output, or the whole list an operation returns."""
    many = len(seen.operator.modes(seen)[0].outputs) > 1
    return list(pytree.tree_leaves(result[index] if many else result))


def check_scaling(name: str) -> None:
    """v(t^d_i u_i) = t^d v(u), biases scaled by t."""
    for sample, seen, index, weights, degree in rows(name):
        if seen.operator.algebra is Algebra.ATTENTION and any(
            weights.get(n) for n in ("query", "key")
        ):
            raise AssertionError("attention weights have no degree")
        t = 1 + STEP

        def grow(operand: str, value: Any, w: Any = weights, t: float = t) -> Any:
            return value * t ** w[operand] if w.get(operand) else value

        before = of_output(run(name, sample, lambda _, v: v), index, name, seen)
        after = of_output(run(name, sample, grow), index, name, seen)
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old * t**degree, rtol=1e-12, atol=1e-12)


def real_product(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).real.sum()


# torch has no derivative of these, though the value depends on them
NO_GRADIENT = {
    ("aten.batch_norm.default", "running_mean"),
    ("aten._native_batch_norm_legit_no_training.default", "running_mean"),
}


def check_autograd(name: str) -> None:
    """sum_i d_i <g_i, u_i> + sum_b <g_b, b> = d <c, v>; a literal's part by differences."""
    for sample, seen, index, weights, degree in rows(name):
        leaves: dict[str, Tensor] = {}

        def lift(operand: str, value: Any, leaves: Any = leaves, w: Any = weights) -> Any:
            if isinstance(value, Tensor) and w.get(operand) and (name, operand) not in NO_GRADIENT:
                leaves[operand] = value.detach().clone().requires_grad_()
                return leaves[operand]
            return value

        result = of_output(run(name, sample, lift), index, name, seen)
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in result]
        pairs = list(zip(cotangents, result, strict=True))
        total = sum(real_product(c, v) for c, v in pairs)
        carried = torch.zeros((), dtype=torch.float64)
        if leaves and total.requires_grad:
            grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            for (operand, leaf), grad in zip(leaves.items(), grads, strict=True):
                if grad is not None:
                    carried = carried + weights[operand] * real_product(grad, leaf.detach())
        for operand, weight in weights.items():
            if weight and operand not in leaves:
                carried = carried + weight * literal_part(name, sample, seen, index, operand, pairs)
        torch.testing.assert_close(carried, degree * total.detach(), rtol=1e-9, atol=1e-9)


def literal_part(
    name: str, sample: Sample, seen: Call, index: int, operand: str, pairs: Any
) -> Tensor:
    """<c, dv/db b> of an argument without autograd, by a central difference: v is linear in it."""

    def shifted(factor: float) -> Tensor:
        result = run(name, sample, lambda n, v: v * factor if n == operand else v)
        parts = of_output(result, index, name, seen)
        return sum(real_product(c, v) for (c, _), v in zip(pairs, parts, strict=True))

    return ((shifted(1 + STEP) - shifted(1 - STEP)) / (2 * STEP)).detach()


def check_residual(name: str) -> None:
    """The symbolic residual of every mode is identically 0."""
    operator = entry(name)
    for sample in drawn(name):
        for mode in operator.modes(call(name, sample)) if sample.live else ():
            for expression in symbolic.residual(name, sample, mode.edit):
                assert symbolic.vanishes(expression), (sample.live, mode.edit, expression)


# --------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", NAMES)
def test_has_a_sample_that_runs(name: str) -> None:
    operator = entry(name)
    found = drawn(name)
    assert found
    for sample in found:
        overload(name)(*sample.args, **sample.kwargs)
        if operator.refuses is not None:
            assert operator.refuses(call(name, sample).arguments) is None
        if operator.algebra not in (Algebra.FREEZING, Algebra.FACTORY):
            assert sample.live or name == "aten.where.Scalar"  # it chooses between numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_torch_computes_the_symbolic_meaning(name: str) -> None:
    if algebra(name) is Algebra.FACTORY:
        return
    seen = set()
    for sample in drawn(name):
        key = str(sample.args), str(sample.kwargs)
        if key in seen:
            continue  # the same call with other live operands
        seen.add(key)
        check_meaning(name, sample)


def check_meaning(name: str, sample: Sample) -> None:
    arguments = {
        n: symbolic.from_torch(v) for n, v in symbolic.bound_arguments(name, sample).items()
    }
    region = symbolic.Region()
    found = pytree.tree_leaves(symbolic.meaning(name)(region, arguments))
    wanted = pytree.tree_leaves(overload(name)(*sample.args, **sample.kwargs))
    for got, want in zip(found, wanted, strict=True):
        if isinstance(want, Tensor):
            got = region.array(got) if got.dtype == object else got
            want = want.resolve_conj().numpy()
        assert np.shape(got) == np.shape(want)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


KINKED = [n for n in NAMES if n in symbolic._MEANINGS and any(True for _ in kinks(n))]


@pytest.mark.parametrize("name", KINKED)
def test_meaning_at_zeros_and_kinks(name: str) -> None:
    for sample in kinks(name):
        wanted = pytree.tree_leaves(overload(name)(*sample.args, **sample.kwargs))
        if all(torch.isfinite(w).all() for w in wanted) and not _indeterminate(name, sample):
            values_only(name, sample)


def _indeterminate(name: str, sample: Sample) -> bool:
    """Where torch has a convention for a direction that does not exist."""
    numbers = [v for v in values(name, sample).values() if isinstance(v, Tensor)]
    return name == "aten.angle.default" and not all(n.any() for n in numbers)


def values_only(name: str, sample: Sample) -> None:
    """As `check_meaning`, without the indices: among ties any will do."""
    arguments = {
        n: symbolic.from_torch(v) for n, v in symbolic.bound_arguments(name, sample).items()
    }
    region = symbolic.Region()
    found = pytree.tree_leaves(symbolic.meaning(name)(region, arguments))
    wanted = pytree.tree_leaves(overload(name)(*sample.args, **sample.kwargs))
    for got, want in zip(found, wanted, strict=True):
        if want.is_floating_point():
            np.testing.assert_allclose(region.array(got), want.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if algebra(n) in EULER])
def test_degree_rule_against_scaling(name: str) -> None:
    check_scaling(name)


@pytest.mark.parametrize("name", [n for n in NAMES if algebra(n) in EULER])
def test_degree_rule_against_autograd(name: str) -> None:
    check_autograd(name)


@pytest.mark.parametrize(
    "name",
    [n for n in NAMES if algebra(n) in (Algebra.ZERO_ORIGIN, Algebra.ELEMENTWISE)],
)
def test_origin_is_the_value_at_zero(name: str) -> None:
    operator = entry(name)
    found = overload(name)(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full_like(found, operator.origin), rtol=0, atol=1e-15)
    assert (operator.origin == 0) == (operator.algebra is Algebra.ZERO_ORIGIN)


SMOOTH = [n for n in NAMES if algebra(n) in (Algebra.SMOOTH, Algebra.ATTENTION)]


@pytest.mark.parametrize("name", SMOOTH)
def test_the_ray_starts_at_a_finite_value(name: str) -> None:
    """f(0) is finite, f(t u) tends to it, and it is 0 where the entry says that f vanishes."""
    vanishing = entry(name).vanishes
    for sample in drawn(name):

        def moved(t: float, only: str = "", sample: Sample = sample) -> list[Tensor]:
            def along(operand: str, value: Any) -> Any:
                moves = operand == only if only else operand in sample.live
                return value * t if moves else value

            return pytree.tree_leaves(run(name, sample, along))

        for start, near in zip(moved(0.0), moved(2.0**-30), strict=True):
            assert torch.isfinite(start).all()
            torch.testing.assert_close(near, start, rtol=0, atol=1e-6)
        if vanishing:
            assert not any(v.any() for v in moved(0.0, vanishing))


# f(t u) with t going to 0: it jumps, or its slope has no bound
BROKEN: dict[str, tuple[tuple[Any, ...], float]] = {
    "aten.log.default": ((torch.tensor(2.0),), 0.0),
    "aten.log2.default": ((torch.tensor(2.0),), 0.0),
    "aten.log10.default": ((torch.tensor(2.0),), 0.0),
    "aten.logit.default": ((torch.tensor(0.5),), 0.0),
    **dict.fromkeys(
        (
            "aten.xlogy.Tensor",
            "aten.special_xlogy.default",
            "aten.pow.Tensor_Tensor",
            "aten.float_power.Tensor_Tensor",
            "aten.atan2.default",
        ),
        ((torch.tensor(2.0), torch.tensor(2.0)), 0.0),
    ),
}


def test_every_singular_operation_has_a_broken_ray() -> None:
    assert BROKEN.keys() == {n for n in NAMES if algebra(n) is Algebra.SINGULAR}
    for name, (given, start) in BROKEN.items():
        assert not entry(name).edits

        def at(t: float, name: str = name, given: Any = given) -> float:
            return float(overload(name)(*(u.double() * t for u in given)))

        step = 1e-12
        left, right = at(start - step if start else 0.0), at(start + step)
        slope = abs(at(start + 2 * step) - right) / step
        assert not np.isfinite(left) or abs(right - left) > 0.1 or slope > 20, name


GRADIENTLESS = [n for n in NAMES if algebra(n) in (Algebra.FREEZING, Algebra.FACTORY)]


@pytest.mark.parametrize("name", GRADIENTLESS)
def test_carries_no_gradient(name: str) -> None:
    for sample in drawn(name):
        check_frozen(name, sample, None)


@pytest.mark.parametrize("name", [n for n in NAMES if "-" in entry(n).signature.split()])
def test_frozen_outputs_carry_no_gradient(name: str) -> None:
    operator = entry(name)
    for sample in drawn(name):
        frozen = operator.modes(call(name, sample))[-1].outputs
        for index, relation in enumerate(frozen):
            if relation.frozen:
                check_frozen(name, sample, index)


def check_frozen(name: str, sample: Sample, index: int | None) -> None:
    leaves: list[Tensor] = []

    def lift(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaves.append(value.clone().requires_grad_())
        return leaves[-1]

    args, kwargs = pytree.tree_map_only(Tensor, lift, (sample.args, sample.kwargs))
    try:
        result = overload(name)(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return  # torch has no derivative of it
    for value in pytree.tree_leaves(result if index is None else result[index]):
        if isinstance(value, Tensor) and value.requires_grad:
            try:
                grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
            except RuntimeError:
                continue  # not implemented
            assert all(g is None or not g.any() for g in grads)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.dropout.default", (torch.ones(2), 0.5, True)),
        ("aten.rrelu.default", (torch.ones(2), 0.1, 0.3, True)),
        (
            "aten.batch_norm.default",
            (torch.ones(2, 3), None, None, None, None, True, 0.1, 1e-5, False),
        ),
        (
            "aten.instance_norm.default",
            (torch.ones(1, 2, 3), None, None, None, None, False, 0.1, 1e-5, False),
        ),
        ("aten.linalg_vector_norm.default", (torch.ones(2), 0)),
        ("aten.norm.Scalar", (torch.ones(2), 0)),
        ("aten.scaled_dot_product_attention.default", (*[torch.ones(1, 2, 2)] * 3, None, 0.5)),
        ("aten.div.Tensor_mode", (torch.ones(2), torch.ones(2))),
    ],
)
def test_refusals(name: str, args: tuple[Any, ...]) -> None:
    operator = entry(name)
    assert operator.refuses is not None
    kwargs = {"rounding_mode": None} if "mode" in name else {}
    assert operator.refuses(call(name, Sample(args, kwargs, ())).arguments)


def test_eval_mode_is_not_refused() -> None:
    operator = entry("aten.dropout.default")
    assert operator.refuses is not None
    sample = Sample((torch.ones(2), 0.5, False), {}, ())
    assert operator.refuses(call(operator.name, sample).arguments) is None


# --------------------------------------------------------------------------- special calls


def degree_of(name: str, sample: Sample) -> tuple[Relation, ...]:
    return entry(name).modes(call(name, sample))[0].outputs


def test_shape_only_operands_may_have_any_degree() -> None:
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    for name in ("aten.expand_as.default", "aten.view_as.default", "aten.type_as.default"):
        (relation,) = degree_of(name, Sample((x, y), {}, ("self", "other")))
        assert relation.zero == () and relation.terms == ((("self", 1),),)
    (relation,) = degree_of("aten.fill.Tensor", Sample((x, y[0, 0]), {}, ("self", "value")))
    assert relation.zero == () and relation.terms == ((("value", 1),),)


def test_literal_zero_is_no_bias() -> None:
    x = torch.ones(2)
    (relation,) = degree_of("aten.add.Scalar", Sample((x, 0), {}, ("self",)))
    assert relation.domain is None
    (relation,) = degree_of("aten.add.Scalar", Sample((x, 0.5), {}, ("self",)))
    assert relation.domain == (0, 1)


def test_norm_without_eps_has_the_degree_of_its_live_weight() -> None:
    x, w = torch.ones(2, 3), torch.ones(3)
    both = ("input", "weight")
    (relation,) = degree_of("aten.layer_norm.default", Sample((x, [3], w, None, 0.0), {}, both))
    assert relation.terms == ((("weight", 1),),) and not relation.zero
    (relation,) = degree_of("aten.layer_norm.default", Sample((x, [3], w, w, 0.0), {}, both))
    assert relation.domain == (0, 1)


@pytest.mark.parametrize("eps", [1e-5, -1e-3])
def test_a_norm_with_eps_of_either_sign_needs_its_input_at_degree_0(eps: float) -> None:
    x, w = torch.ones(2, 3), torch.ones(3)
    sample = Sample((x, [3], w, None, eps), {}, ("input", "weight"))
    (relation,) = degree_of("aten.layer_norm.default", sample)
    assert relation.zero == ("input",)


def test_norm_without_eps_is_no_constant_beside_a_live_bias() -> None:
    x, w = torch.ones(2, 3), torch.ones(3)
    sample = Sample((x, [3], w, w, 0.0), {}, ("input", "bias"))
    (relation,) = degree_of("aten.layer_norm.default", sample)
    assert relation.terms == ((), (("bias", 1),)) and relation.domain is None


def test_native_layer_norm_has_three_outputs_in_every_mode() -> None:
    name = "aten.native_layer_norm.default"
    for mode in entry(name).modes(call(name, drawn(name)[0])):
        assert [r.frozen for r in mode.outputs] == [False, True, True]


def test_registering_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register("aten.relu.default", Algebra.HOMOGENEOUS)


# --------------------------------------------------------------------------- can these tests fail?

WRONG = {
    "aten.mul.Tensor": "self + other",
    "aten.div.Tensor": "self*other",
    "aten.sqrt.default": "self",
    "aten.var.correction": "self",
    "aten.relu.default": "self^2",
    "aten.mean.dim": "self^0",
    "aten.linear.default": "input*weight",
    "aten.matmul.default": "self + other",
    "aten.clamp.default": "self",
    "aten.hardtanh.default": "self",
    "aten.threshold.default": "self",
    "aten.pad.default": "self",
    "aten.index_put.default": "self",
    "aten.batch_norm.default": "input*weight + bias",
    "aten.addcdiv.default": "tensor1*tensor2 + self",
    "aten.remainder.Tensor": "self",
}


def _missed(check: Callable[[str], None], name: str) -> bool:
    try:
        check(name)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = entry(name)
    wrong = replace(right, signature=WRONG[name])
    monkeypatch.setitem(registry_module._REGISTRY, name, wrong)
    checks = (check_scaling, check_autograd, check_residual)
    assert not [check.__name__ for check in checks if _missed(check, name)]


@pytest.mark.parametrize(
    ("name", "origin"), [("aten.sigmoid.default", 0.25), ("aten.cos.default", 0.5)]
)
def test_a_wrong_origin_is_noticed(
    name: str, origin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = entry(name)
    monkeypatch.setitem(registry_module._REGISTRY, name, replace(right, origin=origin))
    assert not _missed(check_residual, name)
    assert not _missed(test_origin_is_the_value_at_zero, name)


def test_a_function_that_is_not_zero_at_zero_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = entry("aten.sigmoid.default")
    wrong = replace(right, algebra=Algebra.ZERO_ORIGIN, origin=0.0)
    monkeypatch.setitem(registry_module._REGISTRY, right.name, wrong)
    assert not _missed(check_residual, right.name)


def test_a_norm_that_forgets_its_bias_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = entry("aten.layer_norm.default")
    wrong = replace(right, signature="input*weight")
    monkeypatch.setitem(registry_module._REGISTRY, right.name, wrong)
    assert not _missed(check_residual, right.name)


WITH_READERS = [n for n in NAMES if entry(n).reader is not None]


@pytest.mark.parametrize("name", WITH_READERS)
def test_what_a_bias_adds_is_what_is_left_without_the_input(name: str) -> None:
    """An entry's own reader against the definition: the derivative along the constants."""
    for sample in samples(name, torch.Generator().manual_seed(0)):
        seen = call(name, sample)
        constant = {o.name for o in seen.operands} - seen.moving
        if not sample.live or not constant.intersection(entry(name).bias_operands(seen)):
            continue
        running = Running(seen, overload(name), (), symbolic.bound_arguments(name, sample))
        output = running.at({})[0]
        found = entry(name).bias_maps(running, [output])[0].expand(output.shape)
        torch.testing.assert_close(found, slowly_added(running, entry(name).bias_operands(seen)))


def slowly_added(running: Running, biases: Sequence[str]) -> Tensor:
    """sum_b b dv/db by central differences: exact for what is linear in b, piece by piece."""
    step = 2.0**-10

    def at(factor: float) -> Tensor:
        values = {n: running.values[n] for n in biases}
        return running.at({n: v * factor for n, v in values.items()})[0]

    return (at(1.0 + step) - at(1.0 - step)) / (2.0 * step)
