"""Random architectures: that every property holds of them, and that what checks them can fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from planted import GATES, plant, plant_gate
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import fullgrad_theory as fgt
from fullgrad_theory.command import cli
from fullgrad_theory.edits.base import Edit
from fullgrad_theory.edits.pruning import Prune
from fullgrad_theory.edits.scaling import Scale
from fullgrad_theory.errors import InputError
from fullgrad_theory.operators import registered, registry
from fullgrad_theory.testing import campaign as campaigns
from fullgrad_theory.testing import properties
from fullgrad_theory.testing.campaign import Campaign, Tally, load_failure, shrink
from fullgrad_theory.testing.independent import Evaluation, evaluate
from fullgrad_theory.testing.properties import PropertyError, check_properties
from fullgrad_theory.testing.strategies import (
    NOT_DRAWN,
    Architecture,
    architectures,
    calling,
    drawable,
    from_data,
    random_architecture,
    to_data,
)

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent
DATABASE = sorted((ROOT / "experiments" / "fuzz" / "failures").glob("*.json"))
QUIET = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def some_architectures(count: int, first: int = 50_000) -> Iterator[Architecture]:
    made = (random_architecture(seed) for seed in range(first, first + 2 * count))
    found = [a for a in made if a is not None]
    return iter(found[:count])


# --------------------------------------------------------------------------- the properties


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_every_property_holds(block: int) -> None:
    """By seeds: what hypothesis draws depends on the constants of whatever modules are imported.
    Nothing of a check is left in the process that draws otherwise after it."""
    for seed in range(60_000 + 25 * block, 60_025 + 25 * block):
        architecture = random_architecture(seed)
        if architecture is not None:
            check_properties(architecture, thorough=seed % 16 == 0)
            assert random_architecture(seed) == architecture


@pytest.mark.slow
@settings(max_examples=60, **QUIET)
@given(architectures())
def test_what_hypothesis_draws_is_a_model(architecture: Architecture) -> None:
    model, inputs = architecture.module(), architecture.example()
    given = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    made = pytree.tree_leaves(model(*given))
    assert len(made) == len(architecture.outputs) and all(m.requires_grad for m in made)


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in DATABASE])
def test_what_failed_once_holds_now(path: Path) -> None:
    architecture, data = load_failure(path)
    if "open" in data:
        with pytest.raises(PropertyError):
            check_properties(architecture)
        pytest.xfail(data["open"])
    check_properties(architecture)


# --------------------------------------------------------------------------- the strategies


def test_every_registered_operation_is_drawn_or_listed() -> None:
    names = {o.name for o in registered()}
    assert NOT_DRAWN.keys() <= names, "a reason for an operation that is not registered"
    assert set(drawable()) | NOT_DRAWN.keys() == names
    missing = [name for name in drawable() if calling(name) is None]
    assert not missing, "no architecture calls these; say why in NOT_DRAWN"


def test_a_program_is_its_source() -> None:
    for architecture in some_architectures(60):
        names: dict[str, Any] = {}
        exec(architecture.source(), names)
        made, module = names["Architecture"]().eval(), architecture.module()
        ours, theirs = made.state_dict(), module.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        inputs = architecture.example()
        with torch.no_grad():
            assert properties._same_bits(made(*inputs), module(*inputs))
        assert from_data(json.loads(json.dumps(to_data(architecture)))) == architecture


def test_a_seed_is_a_program() -> None:
    drawn = [random_architecture(seed) for seed in range(40)]
    assert drawn == [random_architecture(seed) for seed in range(40)]
    assert len({a for a in drawn if a}) > 35


def test_nothing_unread_is_left() -> None:
    for architecture in some_architectures(60):
        count = len(architecture.inputs)
        read = set(architecture.outputs)
        for place, statement in reversed(list(enumerate(architecture.statements))):
            assert place + count in read
            read |= set(statement.reads)
        assert set(range(count)) <= read


def test_operations_of_others_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    with torch.library._scoped_library("foreign", "FRAGMENT") as library:
        library.define("op(Tensor x) -> Tensor")
        fgt.register("foreign.op.default", fgt.Algebra.STRUCTURAL, "x")
        assert drawable.__wrapped__() == drawable()


@pytest.mark.slow
def test_hypothesis_finds_a_fault_and_keeps_it() -> None:
    """How far it shrinks depends on the constants of whatever modules are imported, which it tries,
    and on how long it may."""
    met: list[int] = []

    def fails(architecture: Architecture) -> bool:
        if "aten.gelu.default" in architecture.calls:
            met.append(len(architecture.statements))
        return "aten.gelu.default" in architecture.calls

    found = find(architectures(), fails, settings=settings(max_examples=400, **QUIET))
    assert "aten.gelu.default" in found.calls and len(found.statements) <= max(met)
    found.module()(*found.example())


@pytest.mark.slow
def test_a_campaign_shrinks_to_the_fault_alone() -> None:
    def fails(architecture: Architecture) -> bool:
        return "aten.layer_norm.default" in architecture.calls

    large = next(a for a in some_architectures(400) if fails(a) and len(a.statements) > 12)
    small = shrink(large, fails, seconds=300)
    assert fails(small) and len(small.statements) < len(large.statements)
    assert not any(campaigns._runs(a) and fails(a) for a in campaigns._smaller(small))
    small.module()(*small.example())


# --------------------------------------------------------------------------- planted faults


def _lost(edits: tuple[Edit, ...], place: int) -> tuple[Edit, ...]:
    return edits[:place] + edits[place + 1 :]


def _scaled(by: Fraction) -> Callable[[tuple[Edit, ...], int], tuple[Edit, ...]]:
    def change(edits: tuple[Edit, ...], place: int) -> tuple[Edit, ...]:
        edit = edits[place]
        taken = {e.node for e in edits if isinstance(e, (Prune, Scale))}
        return (*edits, Scale(edit.node, by)) if edit.node not in taken else edits

    return change


FAULTS = {
    "a lost edit": _lost,
    "a wrong factor": _scaled(Fraction(3, 2)),
    "a vanishing factor": _scaled(Fraction(1, 1000)),
}


def judged_under(
    graph: fgt.ComputationGraph, plan: fgt.Plan, points: Any, divisors: frozenset[str]
) -> Evaluation | None:
    """The judge's verdict; None where it has none, or a value moves at none of the points, which
    any degree fits."""
    starts = properties.from_zero(plan)
    try:
        found, _ = evaluate(fgt.balance(graph, policy=plan).fx, points, divisors, starts)
    except properties.Unjudged:
        return None
    return None if found.zero or found.flat else found


@pytest.mark.slow
def test_the_independent_verdict_sees_faults() -> None:
    """It is complete under the plan, and under no plan with one edit gone wrong."""
    tried = dict.fromkeys(FAULTS, 0)
    for architecture in some_architectures(60):
        model = architecture.module()
        try:
            graph = fgt.trace(model, architecture.example())
            plan = fgt.derive_rules(graph)
            points = properties._points(architecture, model)
            _, _, divisors = properties._plainly(graph, points)
        except (fgt.FullgradError, properties.Unjudged):
            continue
        if not plan.edits or len(graph.outputs) > 1:
            continue
        right = judged_under(graph, plan, points, divisors)
        if right is None or right.unread:  # an input that is detached
            continue
        assert right.complete
        for fault, change in FAULTS.items():
            for place, edit in enumerate(plan.edits):
                edits = change(plan.edits, place)
                if edits == plan.edits:
                    continue
                wrong = replace(plan, edits=edits)
                found = judged_under(graph, wrong, points, divisors)
                if found is not None and found.complete:  # a branch may be taken at none of them
                    many = properties._points(architecture, model, many=True)
                    found = judged_under(graph, wrong, many, divisors)
                if found is None:
                    continue
                assert not found.complete, (fault, str(edit), architecture.source())
                tried[fault] += 1
        if min(tried.values()) >= 12:
            break
    assert min(tried.values()) >= 12


@pytest.mark.parametrize(("op", "closed"), [("exp", True), ("exp", False), ("softmax", True)])
def test_the_judge_is_told_which_calls_integrate_from_zero(
    monkeypatch: pytest.MonkeyPatch, op: str, closed: bool
) -> None:
    """f(0) is a leaf there, whatever the function that is called: by no name of it."""
    if not closed:
        plant(monkeypatch, "aten.exp.default", gate=None)  # the quotient is taken numerically

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp() if op == "exp" else x.softmax(-1)

    points = [(scale * torch.linspace(-1, 1, 6).double().reshape(2, 3),) for scale in (1, -0.5, 2)]
    graph = fgt.trace(Model().eval(), points[0])
    plan = fgt.derive_rules(graph)
    module, starts = fgt.balance(graph, policy=plan).fx, properties.from_zero(plan)
    assert len(plan.edits) == 1 and starts == {plan.edits[0].node}
    assert evaluate(module, points, from_zero=starts)[0].complete
    assert not evaluate(module, points)[0].complete


def test_the_judge_keeps_what_a_mask_made_infinite() -> None:
    mask = torch.tensor([[True, False, True]])

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, x, -torch.inf).logsumexp(-1)

    x = torch.randn(2, 3, dtype=torch.float64)
    graph = fgt.trace(model, x)
    plan = fgt.derive_rules(graph)
    module, starts = fgt.balance(graph, policy=plan).fx, properties.from_zero(plan)
    assert evaluate(module, [(x,), (1.25 * x,)], from_zero=starts)[0].complete


@pytest.mark.slow
def test_a_fault_in_the_library_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that is off by a hundredth: the campaign meets it, shrinks it and says which edit."""
    right = GATES["aten.tanh.default"]
    plant_gate(monkeypatch, "aten.tanh.default", lambda u: 1.01 * right(u))
    architecture = next(
        a
        for a in some_architectures(400)
        if "aten.tanh.default" in a.calls and len(a.statements) > 4 and _is_mended_by_secant(a)
    )
    with pytest.raises(PropertyError, match=r"aten\.tanh\.default|secant tanh"):
        check_properties(architecture)
    small = shrink(architecture, _fails, seconds=10)
    assert _fails(small) and "aten.tanh.default" in small.calls
    assert len(small.statements) <= len(architecture.statements)


def _is_mended_by_secant(architecture: Architecture) -> bool:
    try:
        plan = fgt.derive_rules(architecture.module(), architecture.example())
    except fgt.FullgradError:
        return False
    return any(str(e).startswith("secant tanh") for e in plan)


def _fails(architecture: Architecture) -> bool:
    try:
        check_properties(architecture, thorough=False)
    except PropertyError:
        return True
    return False


# --------------------------------------------------------------------------- campaigns


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Examples that are drawn and not checked, so that campaigns are quick."""
    ran: list[int] = []

    def example(seed: int) -> Tally:
        ran.append(seed)
        tally = Tally(1)
        tally.outcomes["complete"] += 1
        architecture = random_architecture(seed)
        if architecture is not None:
            tally.coverage.update(campaigns.contexts(architecture))
        return tally

    monkeypatch.setattr(campaigns, "run_example", example)
    return ran


def silent(stage: str, done: int, total: int) -> None:
    """No progress bar."""


def test_a_campaign_goes_on_where_it_was(tmp_path: Path, cheap: list[int]) -> None:
    Campaign(40, seed=3, out=tmp_path).run(silent)
    assert len(cheap) == 40
    longer = Campaign(90, seed=3, out=tmp_path)
    tally = longer.run(silent)
    assert len(cheap) == 90 and len(set(cheap)) == 90
    assert tally.examples == 90 and tally.outcomes["complete"] == 90
    longer.write_summary()
    assert json.loads((tmp_path / "summary.json").read_text())["examples"] == 90
    assert "90 random architectures" in (tmp_path / "summary.md").read_text()


DEADLY = 3_000_033


def dies_of_one(first: int, count: int) -> Tally:
    """A chunk of which one example ends the process, as a fault in native code does."""
    if first <= DEADLY < first + count:
        os.kill(os.getpid(), signal.SIGKILL)
    return Tally(count, outcomes=Counter(complete=count))


@pytest.mark.slow
def test_a_campaign_survives_a_process_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaigns, "_SPAWN", multiprocessing.get_context("fork"))  # is quicker
    tally = Campaign(200, jobs=2, seed=3, out=tmp_path, work=dies_of_one).run(silent)
    assert tally.outcomes == {"complete": 199, "failed": 1} and tally.examples == 200
    assert [f["seed"] for f in tally.failures] == [DEADLY]
    assert (tmp_path / "failures" / f"the-process-lives-{DEADLY}.json").exists()
    monkeypatch.setitem(globals(), "DEADLY", -1)  # and is judged anew, where it is mended
    again = Campaign(200, jobs=2, seed=3, out=tmp_path, work=dies_of_one).run(silent)
    assert again.outcomes == Counter(complete=200) and not again.failures
    assert not list((tmp_path / "failures").iterdir())


def test_a_folder_holds_one_campaign(tmp_path: Path, cheap: list[int]) -> None:
    Campaign(20, seed=3, out=tmp_path).run(silent)
    with pytest.raises(InputError, match="seed 3"):
        Campaign(20, seed=4, out=tmp_path).run(silent)


def test_a_failure_is_written_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(architecture: Architecture, thorough: bool) -> None:
        if "aten.relu.default" in architecture.calls:
            raise PropertyError("planted", "relu is called")

    drawn = ((s, random_architecture(s)) for s in range(60_000, 61_000))
    seed, large = next((s, a) for s, a in drawn if a and _calls_relu(a))
    tally = campaigns.run_example(seed, check)
    (failure,) = tally.failures
    path = campaigns.save_failure(tmp_path, failure)
    architecture, data = load_failure(path)
    assert data["property"] == "planted" and _calls_relu(architecture)
    assert len(architecture.statements) <= len(large.statements)
    data = json.loads(json.dumps(tally.to_data()))
    assert Tally.from_data(data).to_data() == data


def _calls_relu(architecture: Architecture) -> bool:
    return "aten.relu.default" in architecture.calls


def test_contexts_are_what_they_say() -> None:
    draw = random.Random(0)
    seen = {c for a in some_architectures(150, draw.randrange(10**6)) for _, c in
            campaigns.contexts(a)}  # fmt: skip
    assert seen == set(campaigns.CONTEXTS)


def test_the_command_exits_with_what_it_found(
    tmp_path: Path, cheap: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CliRunner()
    good = runner.invoke(cli.app, ["fuzz", "--examples", "5", "--out", str(tmp_path)])
    assert good.exit_code == 0 and "5 random architectures" in good.output
    file = tmp_path / "file"
    file.write_text("")
    assert runner.invoke(cli.app, ["fuzz", "--out", str(file)]).exit_code == 2
    bad = Tally(1, failures=[{"seed": 1, "property": "p", "message": "m"}])
    monkeypatch.setattr(campaigns, "run_example", lambda seed: bad)
    assert runner.invoke(cli.app, ["fuzz", "--examples", "1"]).exit_code == 1
