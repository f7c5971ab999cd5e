"""Nothing of a trace, of a check or of a try that failed stays in what the user's code keeps."""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.graph.keeping import kept

X = torch.randn(2, 5)


def ramp(count: int) -> Tensor:
    return torch.linspace(0.1, 1.0, 3).sum() * torch.arange(count) / count


GLOBAL: dict[Any, Any] = {}
LISTED: list[Tensor] = []
QUEUE: deque[Tensor] = deque(maxlen=3)
ORDERED: OrderedDict[Any, Any] = OrderedDict(nested={})
LAST: Tensor | None = None
SPACE = SimpleNamespace(table=None)
LOCAL = threading.local()


@functools.cache
def unbounded(count: int) -> Tensor:
    return ramp(count)


@functools.lru_cache(maxsize=4)
def bounded(count: int) -> tuple[int, list[Tensor]]:
    return count, [ramp(count)]


def in_a_dict(count: int) -> Tensor:
    if count not in GLOBAL:
        GLOBAL[count] = ramp(count)
    return GLOBAL[count]


def in_a_nested_dict(count: int) -> Tensor:
    return ORDERED["nested"].setdefault(count, ramp(count))


def in_a_list(count: int) -> Tensor:
    if not LISTED:
        LISTED.append(ramp(count))
    return LISTED[0]


def in_a_queue(count: int) -> Tensor:
    if not QUEUE:
        QUEUE.append(ramp(count))
    return QUEUE[-1]


def in_a_variable(count: int) -> Tensor:
    global LAST
    LAST = ramp(count) if LAST is None else LAST
    return LAST


def never_there(count: int) -> Tensor:
    global NEW
    try:
        return NEW
    except NameError:
        NEW = ramp(count)
        return NEW


def in_a_namespace(count: int) -> Tensor:
    SPACE.table = ramp(count) if SPACE.table is None else SPACE.table
    return SPACE.table


def of_the_thread(count: int) -> Tensor:
    if not hasattr(LOCAL, "table"):
        LOCAL.table = ramp(count)
    return LOCAL.table


def in_a_default(count: int, cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return cache.setdefault(count, ramp(count))


def on_the_function(count: int) -> Tensor:
    if not hasattr(on_the_function, "table"):
        on_the_function.table = ramp(count)
    return on_the_function.table


def memoised(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    known: dict[int, Tensor] = {}

    @functools.wraps(function)
    def call(count: int) -> Tensor:
        if count not in known:
            known[count] = function(count)
        return known[count]

    return call


def enclosed() -> Callable[[int], Tensor]:
    held = None

    def call(count: int) -> Tensor:
        nonlocal held
        held = ramp(count) if held is None else held
        return held

    return call


class Table:
    """Keeps what it computed in an attribute, in a slot, in its class, by its own methods."""

    __slots__ = ("__dict__", "slot")
    shared: ClassVar[Any] = None

    def in_an_attribute(self, count: int) -> Tensor:
        if not hasattr(self, "table"):
            self.table = {count: ramp(count)}
        return self.table[count]

    def in_a_slot(self, count: int) -> Tensor:
        if not hasattr(self, "slot"):
            self.slot = ramp(count)
        return self.slot

    @classmethod
    def in_the_class(cls, count: int) -> Tensor:
        cls.shared = ramp(count) if cls.shared is None else cls.shared
        return cls.shared

    @functools.cached_property
    def five(self) -> Tensor:
        return ramp(5)

    def computed_once(self, count: int) -> Tensor:
        return self.five

    @functools.lru_cache  # noqa: B019
    def by_instance(self, count: int) -> Tensor:
        return ramp(count)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "lru_cache": unbounded,
    "bounded lru_cache": lambda count: bounded(count)[1][0],
    "dict": in_a_dict,
    "nested dict": in_a_nested_dict,
    "list": in_a_list,
    "deque": in_a_queue,
    "global": in_a_variable,
    "new global": never_there,
    "namespace": in_a_namespace,
    "thread's own": of_the_thread,
    "default argument": in_a_default,
    "attribute of a function": on_the_function,
    "decorator": memoised(ramp),
    "enclosed": enclosed(),
    "attribute": Table().in_an_attribute,
    "slot": Table().in_a_slot,
    "class": Table.in_the_class,
    "cached property": Table().computed_once,
    "cached method": Table().by_instance,
    "partial": functools.partial(in_a_default, cache={}),
}


class Ramped(nn.Module):
    def __init__(self, table: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(5, 5), table

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.table(x.shape[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_left_as_it_was_found(kind: str) -> None:
    """Neither a fake tensor nor one in the audit's float64 is found by the user's next run."""
    torch.manual_seed(0)
    model = Ramped(KINDS[kind]).eval()
    fresh = model.linear(X) + ramp(5)
    assert fgt.check_completeness(model, X).complete
    assert fgt.check_completeness(model, X).complete  # nor by the next trace
    fgt.derive_rules(model, X)
    balanced = fgt.balance(model, X)
    found = model(X)
    assert type(found) is Tensor and found.dtype == torch.float32
    assert torch.equal(found, fresh) and torch.equal(balanced(X), fresh)
    assert torch.equal(model(X), fresh)
    # what the user's own run kept is a constant; a copy of the model may not find it
    assert fgt.check_completeness(model, X).complete is not False
    assert torch.equal(model(X), fresh)


def test_what_was_there_stays() -> None:
    GLOBAL["mine"] = mine = torch.ones(1)
    in_a_dict(5)
    before = dict(GLOBAL)
    fgt.check_completeness(Ramped(in_a_dict).eval(), X)
    assert GLOBAL["mine"] is mine
    assert {k: id(v) for k, v in GLOBAL.items()} == {k: id(v) for k, v in before.items()}


class Counting(nn.Module):
    """Counts its runs, keeps its last input, and looks up what it computed by batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.seen = 0, []
        self.tables: dict[str, dict[int, Tensor]] = {"by size": {}}
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.seen.append(x)
        self.last = x
        table = self.tables["by size"].setdefault(x.shape[-1], self.linear.bias * 2.0)
        return self.linear(x) + table


def test_a_modules_own_state_is_put_back() -> None:
    model = Counting().eval()
    fgt.check_completeness(model, X)
    assert (model.runs, model.seen, model.tables) == (0, [], {"by size": {}})
    assert not hasattr(model, "last")


class Refused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        table = in_a_dict(x.shape[-1])
        return x * table if float(x.detach().sum()) > 0 else x


def test_a_trace_that_fails_leaves_nothing() -> None:
    GLOBAL.clear()
    with pytest.raises(fgt.FullgradError):
        fgt.trace(Refused().eval(), X)
    assert not GLOBAL


SHARED: list[Any] = []


def test_what_another_thread_writes_meanwhile_is_not_undone() -> None:
    """Numbers in what is shared, and attributes of models that are not traced, are not ours."""

    def logging(x: Tensor) -> Tensor:
        assert SHARED is not None
        return x * 2.0

    other = Counting().eval()
    with kept(logging):
        SHARED.append("written beside")
        other(X)
    assert SHARED == ["written beside"]
    assert other.runs == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0"])
def test_models_that_keep_their_attention_biases_are_traced(name: str) -> None:
    import timm

    model = timm.create_model(name).eval()
    graph = fgt.trace(model)
    (x,) = graph.args
    with torch.no_grad():
        expected = model(x)
        assert type(expected) is Tensor and torch.equal(graph.fx(x), expected)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(6), nn.GELU()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.act(x)).mean(1)


@pytest.mark.slow
def test_eight_threads_check_models_of_their_own() -> None:
    before = sys.stderr, torch.backends.mha.get_fastpath_enabled(), nn.Module.__call__
    patched = nn.Module.__getattr__, nn.Module.__setattr__
    done, wrong, made = [], [], []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            model, x = Encoder().eval(), torch.randn(2, 3, 6, generator=generator)
            assert fgt.check_completeness(model, x, policy="libra", beside=()).complete
            balanced = fgt.balance(model, x)
            made.append((balanced, model, x))
            assert fgt.fullgrad(balanced, x, target=1).error.max() < 1e-3
            with pytest.raises(fgt.FullgradError):
                fgt.trace(Refused().eval(), x)
            done.append(seed)
        except BaseException as error:  # noqa: BLE001
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sorted(done) == list(range(8))
    # not meanwhile: a trace turns the fast path off for the whole process
    assert all(torch.equal(balanced(x), model(x)) for balanced, model, x in made)
    assert before == (sys.stderr, torch.backends.mha.get_fastpath_enabled(), nn.Module.__call__)
    assert patched == (nn.Module.__getattr__, nn.Module.__setattr__)
