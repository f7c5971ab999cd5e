"""In-place writes made functional, writes through views included.

`run_decompositions({})` would do it too, but it also erases `no_grad` and renames batch norm.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..operators.calls import bind, target_name
from ..operators.registry import lookup
from ..operators.views import View
from .fakes import fake_call, fake_mode
from .normal import is_effect, mutates

aten = torch.ops.aten


def _functional(node: fx.Node) -> Any:
    """The overload that computes what an in-place one writes to its first argument."""
    target: Any = node.target
    if target is aten.zero_.default:  # aten.zero has no derivative
        return aten.zeros_like.default
    name = target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    # by its signature: pow_.Scalar is pow.Tensor_Scalar, and pow.Scalar something else
    fitting = [o for o in overloads if not o._schema.is_mutable and _takes(o) == _takes(target)]
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    alone = written[0] and not any(written[1:]) and isinstance(node.args[0], fx.Node)
    if not fitting or not alone or name in ("as_strided_", "resize_", "set_"):
        raise _refusal(node, f"{target} writes in place and has no functional form here")
    return fitting[0]


def _takes(target: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments]


def _refusal(node: fx.Node, why: str) -> TraceError:
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values()][-1:]
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    code = [line for line in frames if line.startswith("File ")][-1:]
    where = ", ".join(["", *(f"in {p}" for p in path if p), *code])
    return TraceError(
        f"node {node.name}{where}: {why}; rewrite that line of the model without the in-place "
        "operation, or clone() what it writes to"
    )


@dataclass(eq=False)
class _Storage:
    """One piece of memory: the node that holds its newest contents."""

    newest: fx.Node
    version: int = 0


@dataclass
class _Alias:
    """A node that shares memory: a chain of view calls from the storage's base."""

    storage: _Storage
    chain: tuple[fx.Node, ...] = ()
    fresh: dict[int, fx.Node] = field(default_factory=dict)


class _Functional:
    """Rewrites a graph in order; `aliases` are the nodes seen so far that share memory."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph, self.mode = module, module.graph, fake_mode(module.graph)
        self.aliases: dict[fx.Node, _Alias] = {}
        self.live: set[fx.Node] = set()
        self.tangled: set[_Storage] = set()
        self.same: set[fx.Node] = set()

    def run(self) -> None:
        self._merge_tied()
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                value = node.meta.get("val")
                if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                    self.live.add(node)
                continue
            target, operand = next(iter(node.args), None), None
            if node.op == "call_function" and not mutates(node):
                operand = self.shared_operand(node)  # of the eager values, whose strides count
            node.args = fx.map_arg(node.args, lambda n, at=node: self.current(n, at))  # type: ignore[misc]
            node.kwargs = fx.map_arg(node.kwargs, lambda n, at=node: self.current(n, at))  # type: ignore[misc]
            if node.op != "call_function":
                continue
            if mutates(node):
                self.write(node, target)
                continue
            self._mark(node)
            if operand is not None:
                self.view(node, operand)
            if node.args and node.args[0] is not target:
                node.target = _relaid(node.target)
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and mutates(node):
                self.graph.erase_node(node)

    def _merge_tied(self) -> None:
        """One node for a tensor that is an attribute under several names."""
        first: dict[int, fx.Node] = {}
        for node in list(self.graph.find_nodes(op="get_attr")):
            try:
                tensor = operator.attrgetter(str(node.target))(self.module)
            except AttributeError:
                continue
            if first.setdefault(id(tensor), node) is not node:
                node.replace_all_uses_with(first[id(tensor)])

    def _mark(self, node: fx.Node) -> None:
        if node.target is not aten.detach.default and not self.live.isdisjoint(
            node.all_input_nodes
        ):
            self.live.add(node)

    def emit(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
    ) -> fx.Node:
        """A new call at the insertion point, made for `like`."""
        node = self.graph.call_function(target, args, kwargs)
        kept = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")
        node.meta = {key: like.meta[key] for key in kept if key in like.meta}
        if self.mode is not None and all("val" in n.meta for n in node.all_input_nodes):
            node.meta["val"] = fake_call(self.mode, node)[1]
        self._mark(node)
        return node

    # ----------------------------------------------------------------------- reads

    def current(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that now holds what `node` would read."""
        alias = self.aliases.get(node)
        if alias is None or (alias.storage.version == 0 and not alias.fresh):
            return node
        value = alias.storage.newest
        if not alias.chain or alias.storage.version in alias.fresh:
            return alias.fresh.get(alias.storage.version, value)
        with self.graph.inserting_before(before):
            for view in alias.chain:
                value = self.rebase(view, value)
        alias.fresh[alias.storage.version] = value
        self.aliases[value] = alias
        return value

    def rebase(self, view: fx.Node, value: fx.Node) -> fx.Node:
        """The same view of another base."""
        known = _view(view.target)
        if not isinstance(view.args[0], fx.Node) or (known is not None and known.of_memory):
            raise _refusal(view, f"{view.target} makes a view of memory that is written to later")
        return self.emit(_relaid(view.target), (value, *view.args[1:]), dict(view.kwargs), view)

    def shared_operand(self, node: fx.Node) -> fx.Node | None:
        """The operand whose memory a pure call's result shares, judged by running it on fakes.

        A schema does not tell: reshape, contiguous and dropout share it sometimes, `to` seldom.
        """
        if node.target is operator.getitem:
            listed = node.args[0]
            return listed if isinstance(listed, fx.Node) and listed in self.aliases else None
        tags = getattr(node.target, "tags", None)
        if tags is None or _DATA_DEPENDENT & {*tags}:
            return None
        if self.mode is None or not all("val" in n.meta for n in node.all_input_nodes):
            return None
        given, result = fake_call(self.mode, node)
        memory = {_memory(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
        shared = [
            operand
            for operand, value in zip(node.all_input_nodes, given, strict=True)
            if isinstance(value, Tensor) and _memory(value) in memory
        ]
        if len(memory) > 1:  # the results are views of several operands
            self.tangled.update(self.storage(operand) for operand in shared)
        return shared[0] if shared else None

    def alias(self, node: fx.Node) -> _Alias:
        return self.aliases.setdefault(node, _Alias(_Storage(node)))

    def storage(self, node: fx.Node) -> _Storage:
        return self.alias(node).storage

    def view(self, node: fx.Node, operand: fx.Node) -> None:
        """Record that a call's result shares an operand's memory."""
        parent = self.alias(operand)
        version = parent.storage.version
        fresh = {version: node} if version else {}
        self.aliases[node] = _Alias(parent.storage, (*parent.chain, node), fresh)
        if _congruent(operand, node):
            self.same.add(node)

    # ----------------------------------------------------------------------- writes

    def write(self, node: fx.Node, target: Any) -> None:
        """Put the functional form of an in-place call, and what it changes, before it."""
        with self.graph.inserting_before(node):
            pure = self.functional(node)
            alias = self.alias(target)
            storage = alias.storage
            if node.target is not aten.copy_.default and _makes_view(
                pure.target
            ):  # of the old values
                alias.chain, alias.fresh = (*alias.chain, pure), {storage.version: pure}
                self.aliases[node] = self.aliases[pure] = alias
                return
            self._refuse_hidden(node, alias, pure)
            value = self.like(pure, node.args[0])  # type: ignore[arg-type]
            bases = [storage.newest] if alias.chain else []
            for view in alias.chain[:-1]:
                bases.append(self.rebase(view, bases[-1]))
            for view, base in zip(reversed(alias.chain), reversed(bases), strict=True):
                value = self.back(node, view, base, value)
        storage.newest, storage.version = value, storage.version + 1
        self.aliases[node] = alias
        self.aliases[value] = _Alias(storage)

    def functional(self, node: fx.Node) -> fx.Node:
        """What an in-place call computes, before it is cast to the dtype it is written to."""
        if node.target is aten.copy_.default:  # aten.copy has no derivative
            target, source = node.args[:2]
            cast = self.emit(aten.type_as.default, (source, target), {}, node)
            return self.emit(aten.expand_as.default, (cast, target), {}, node)
        return self.emit(_functional(node), node.args, node.kwargs, node)

    def _refuse_hidden(self, node: fx.Node, alias: _Alias, pure: fx.Node) -> None:
        """Refuse writes that autograd does not see, or that nobody can follow."""
        if alias.storage in self.tangled:
            raise _refusal(node, "it writes to memory that several results share")
        detached = any(view.target is aten.detach.default for view in alias.chain)
        if detached and (alias.storage.newest in self.live or pure in self.live):
            raise _refusal(
                node,
                "it writes through detach() or under no_grad to a value that carries gradient, "
                "which changes that value behind autograd's back",
            )

    def like(self, value: fx.Node, target: fx.Node) -> fx.Node:
        """A write keeps the dtype of the memory it goes to."""
        old, new = target.meta.get("val"), value.meta.get("val")
        if isinstance(old, Tensor) and isinstance(new, Tensor) and old.dtype != new.dtype:
            return self.emit(aten.to.dtype, (value, old.dtype), {}, value)
        return value

    def back(self, node: fx.Node, view: fx.Node, base: fx.Node, value: Any) -> Any:
        """What `base` holds after `value` was written through a view of it."""
        kind = view.target
        if kind is operator.getitem:
            parts: list[Any] = [
                self.emit(operator.getitem, (base, i), {}, view)
                for i in range(len(base.meta["val"]))
            ]
            parts[bind(view)["index"]] = value
            return parts
        if view in self.same:
            return value
        known = _view(kind)
        emitted = known.back(view, base, value) if known and known.back else None
        if emitted is None:
            raise _refusal(node, f"it writes in place through a view made by {kind}")
        return self.emit(*emitted, {}, node)


def _view(target: Any) -> View | None:
    record = lookup(target_name(target))
    return None if record is None else record.view


def _relaid(target: Any) -> Any:
    """The operation of the same values for an operand in other strides."""
    known = _view(target)
    return known.relaid if known is not None and known.relaid is not None else target


def _makes_view(target: Any) -> bool:
    """Whether an operation always returns memory of what it reads, by its schema."""
    returned = target._schema.returns
    return len(returned) == 1 and returned[0].alias_info is not None


_DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _congruent(base: fx.Node, view: fx.Node) -> bool:
    """Whether a view is element by element its base: `to` the same dtype, dropout in eval mode."""
    a, b = base.meta.get("val"), view.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return same and bool(a.storage_offset() == b.storage_offset())


def functionalise(module: fx.GraphModule) -> None:
    """Rewrite in-place calls, writes through views included, into functional ones.

    The values are those of the original graph bit for bit, and so are its gradients. Raises
    `TraceError` for a write through memory that overlaps itself (`expand`), for one that autograd
    does not see (`detach`, `no_grad`), and for an operation without a functional form.
    """
    if any(n.op == "call_function" and mutates(n) for n in module.graph.nodes):
        _Functional(module).run()
        module.graph.eliminate_dead_code(is_impure_node=is_effect)
