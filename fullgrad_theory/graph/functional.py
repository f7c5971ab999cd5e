"""In-place writes made functional, writes through views included.

`run_decompositions({})` would do it too, but it also erases `no_grad` and renames batch norm.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import TraceError
from ..operators.calls import bind, target_name
from ..operators.inplace import Emitted, functional
from ..operators.registry import lookup
from ..operators.views import View
from .aliases import Alias, Aliases
from .fakes import fake_call, fake_mode
from .normal import is_effect, mutates

aten = torch.ops.aten


def functionalise(module: fx.GraphModule) -> None:
    """Rewrite in-place calls, writes through views included, into functional ones.

    The values are those of the original graph bit for bit, and so are its gradients. Raises
    `TraceError` for a write through memory that overlaps itself (`expand`), for one that autograd
    does not see (`detach`, `no_grad`), and for an operation without a functional form.
    """
    if any(n.op == "call_function" and mutates(n) for n in module.graph.nodes):
        _merge_tied(module)
        _Rewriter(module.graph).run()
        module.graph.eliminate_dead_code(is_impure_node=is_effect)


def _merge_tied(module: fx.GraphModule) -> None:
    """One node for a tensor that is an attribute under several names."""
    first: dict[int, fx.Node] = {}
    for node in list(module.graph.find_nodes(op="get_attr")):
        try:
            tensor = operator.attrgetter(str(node.target))(module)
        except AttributeError:
            continue
        if first.setdefault(id(tensor), node) is not node:
            node.replace_all_uses_with(first[id(tensor)])


class _Emitter:
    """Writes calls at the insertion point; `live` are the nodes so far that carry gradient."""

    def __init__(self, graph: fx.Graph, mode: Any) -> None:
        self.graph, self.mode = graph, mode
        self.live: set[fx.Node] = set()

    def mark(self, node: fx.Node) -> None:
        """Note whether a node carries gradient."""
        if node.op == "placeholder":
            value = node.meta.get("val")
            real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        else:
            passes = node.target is not aten.detach.default
            real = passes and not self.live.isdisjoint(node.all_input_nodes)
        if real:
            self.live.add(node)

    def emit(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
    ) -> fx.Node:
        """A new call, made for `like`."""
        node = self.graph.call_function(target, args, kwargs)
        kept = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")
        node.meta = {key: like.meta[key] for key in kept if key in like.meta}
        if self.mode is not None and all("val" in n.meta for n in node.all_input_nodes):
            node.meta["val"] = fake_call(self.mode, node)[1]
        self.mark(node)
        return node

    def computed(self, node: fx.Node) -> fx.Node:
        """What an in-place call computes, before it is cast to the dtype it is written to."""
        if node.target is aten.copy_.default:  # aten.copy has no derivative
            target, source = node.args[:2]
            cast = self.emit(aten.type_as.default, (source, target), {}, node)
            return self.emit(aten.expand_as.default, (cast, target), {}, node)
        return self.emit(*_functional(node), node)

    def cast(self, value: fx.Node, target: fx.Node) -> fx.Node:
        """A write keeps the dtype of the memory it goes to."""
        old, new = target.meta.get("val"), value.meta.get("val")
        if isinstance(old, Tensor) and isinstance(new, Tensor) and old.dtype != new.dtype:
            return self.emit(aten.to.dtype, (value, old.dtype), {}, value)
        return value

    def rebase(self, view: fx.Node, value: fx.Node) -> fx.Node:
        """The same view of another base."""
        known = _view(view.target)
        if not isinstance(view.args[0], fx.Node) or (known is not None and known.of_memory):
            raise _refusal(view, f"{view.target} makes a view of memory that is written to later")
        return self.emit(_relaid(view.target), (value, *view.args[1:]), dict(view.kwargs), view)

    def back(self, node: fx.Node, view: fx.Node, base: fx.Node, value: Any) -> Any:
        """What `base` holds after `value` was written through a view of it."""
        if view.target is operator.getitem:
            count = len(base.meta["val"])
            parts: list[Any] = [
                self.emit(operator.getitem, (base, i), {}, view) for i in range(count)
            ]
            parts[bind(view)["index"]] = value
            return parts
        known = _view(view.target)
        emitted = known.back(view, base, value) if known and known.back else None
        if emitted is None:
            raise _refusal(node, f"it writes in place through a view made by {view.target}")
        return self.emit(*emitted, {}, node)


class _Rewriter:
    """Goes through a graph in order: what is read is what its memory holds by then, and a write
    makes a new value of it."""

    def __init__(self, graph: fx.Graph) -> None:
        mode = fake_mode(graph)
        self.graph, self.aliases, self.emitter = graph, Aliases(mode), _Emitter(graph, mode)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._call(node)
            elif node.op == "placeholder":
                self.emitter.mark(node)
            else:
                self._read(node)
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and mutates(node):
                self.graph.erase_node(node)

    def _call(self, node: fx.Node) -> None:
        target = next(iter(node.args), None)
        if mutates(node):
            self._read(node)
            self._write(node, target)
            return
        operand = self.aliases.shared_operand(node)  # of the eager values, whose strides count
        self._read(node)
        self.emitter.mark(node)
        if operand is not None:
            self.aliases.view(node, operand)
        if node.args and node.args[0] is not target:
            node.target = _relaid(node.target)

    def _read(self, node: fx.Node) -> None:
        """Every operand is what its memory holds now."""
        node.args, node.kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self._current(n, node)
        )

    def _current(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that now holds what `node` would read."""
        alias = self.aliases.get(node)
        if alias is None or alias.untouched:
            return node
        value = alias.shown
        if value is None:
            value = alias.storage.newest
            with self.graph.inserting_before(before):
                for view in alias.chain:
                    value = self.emitter.rebase(view, value)
            alias.fresh[alias.storage.version] = value
            self.aliases.put(value, alias)
        return value

    def _write(self, node: fx.Node, target: Any) -> None:
        """Put the functional form of an in-place call, and what it changes, before it."""
        alias = self.aliases.of(target)
        with self.graph.inserting_before(node):
            pure = self.emitter.computed(node)
            if node.target is not aten.copy_.default and _makes_view(pure.target):
                # of the old values
                alias.chain = (*alias.chain, pure)
                alias.fresh = {alias.storage.version: pure}
                self.aliases.put(pure, alias)
            else:
                self._refuse_hidden(node, alias, pure)
                value = self._base_after(node, alias, pure)
                alias.storage.hold(value)
                self.aliases.put(value, Alias(alias.storage))
        self.aliases.put(node, alias)

    def _base_after(self, node: fx.Node, alias: Alias, pure: fx.Node) -> Any:
        """What the memory holds after a value was written through the views that lead to it."""
        value: Any = self.emitter.cast(pure, node.args[0])  # type: ignore[arg-type]
        bases = [alias.storage.newest]
        for view in alias.chain[:-1]:
            bases.append(self.emitter.rebase(view, bases[-1]))
        for view, base in reversed([*zip(alias.chain, bases, strict=False)]):
            if view not in self.aliases.same:
                value = self.emitter.back(node, view, base, value)
        return value

    def _refuse_hidden(self, node: fx.Node, alias: Alias, pure: fx.Node) -> None:
        """Refuse writes that autograd does not see, or that nobody can follow."""
        if alias.storage.tangled:
            raise _refusal(node, "it writes to memory that several results share")
        detached = any(view.target is aten.detach.default for view in alias.chain)
        if detached and not self.emitter.live.isdisjoint({alias.storage.newest, pure}):
            raise _refusal(
                node,
                "it writes through detach() or under no_grad to a value that carries gradient, "
                "which changes that value behind autograd's back",
            )


# --------------------------------------------------------------------------- what torch says


def _functional(node: fx.Node) -> Emitted:
    """The call that computes what an in-place one writes to its first argument."""
    found = functional(node)
    if found is None:
        raise _refusal(node, f"{node.target} writes in place and has no functional form here")
    return found


def _makes_view(target: Any) -> bool:
    """Whether an operation always returns memory of what it reads, by its schema."""
    returned = target._schema.returns
    return len(returned) == 1 and returned[0].alias_info is not None


def _view(target: Any) -> View | None:
    record = lookup(target_name(target))
    return None if record is None else record.view


def _relaid(target: Any) -> Any:
    """The operation of the same values for an operand in other strides."""
    known = _view(target)
    return known.relaid if known is not None and known.relaid is not None else target


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
