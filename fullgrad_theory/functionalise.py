"""Normalises an exported graph: no in-place writes, no higher-order nodes, no assertions.

`run_decompositions({})` would do the first, but it also erases `no_grad` and renames batch norm.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .errors import TraceError
from .operators import bind

aten = torch.ops.aten
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


def inline_regions(module: fx.GraphModule) -> None:
    """Replace `wrap_with_set_grad_enabled` and `wrap_with_autocast` by their bodies.

    A no-grad region's results are detached; an autocast region is entered and left by two calls.
    """
    regions = {
        torch.ops.higher_order.wrap_with_set_grad_enabled: _no_grad_region,
        torch.ops.higher_order.wrap_with_autocast: _autocast_region,
    }
    again = True
    while again:  # a region's body may hold regions
        again = False
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target in regions:
                again = True
                with module.graph.inserting_before(node):
                    results = regions[node.target](module, node)
                for user in list(node.users):
                    if user.target is not operator.getitem:
                        raise TraceError(f"cannot inline {node.name}: used whole by {user.name}")
                    user.replace_all_uses_with(results[user.args[1]])
                    module.graph.erase_node(user)
                module.graph.erase_node(node)
            elif node.op == "call_function" and isinstance(
                node.target, torch._ops.HigherOrderOperator
            ):
                raise TraceError(
                    f"node {node.name} is {node.target}, control flow that depends on data; "
                    "trace the branch you mean, or the layers around it, as a module of their own"
                )
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)


def _body(module: fx.GraphModule, attribute: fx.Node, arguments: tuple[Any, ...]) -> list[Any]:
    body = module.get_submodule(str(attribute.target))
    assert isinstance(body, fx.GraphModule)
    env: dict[fx.Node, Any] = {}
    inputs = iter(arguments)
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(inputs)
        elif inner.op == "output":
            results = inner.args[0]
            results = results if isinstance(results, (list, tuple)) else (results,)
            return [env[r] if isinstance(r, fx.Node) else r for r in results]
        else:
            copy = module.graph.node_copy(inner, lambda n: env[n])
            if inner.op == "get_attr":
                copy.target = f"{attribute.target}.{inner.target}"
            env[inner] = copy
    raise TraceError(f"the region {attribute.target} has no output")


def _no_grad_region(module: fx.GraphModule, node: fx.Node) -> list[Any]:
    """The body on detached operands: what it computes and what it writes carries no gradient."""
    enabled, attribute, *arguments = node.args
    if not enabled:
        arguments = [_detached(module.graph, a) for a in arguments]
    return _body(module, attribute, tuple(arguments))  # type: ignore[arg-type]


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    copy = graph.call_function(aten.detach.default, (value,))
    copy.meta = dict(value.meta)
    return copy


def enter_autocast(device: str, dtype: torch.dtype | None, enabled: bool, cache: bool) -> Any:
    """Enter an autocast region; returns what `leave_autocast` takes."""
    return torch.amp.autocast_mode._enter_autocast(device, dtype, enabled, cache)


def leave_autocast(region: Any) -> None:
    """Leave the region that `enter_autocast` entered."""
    torch.amp.autocast_mode._exit_autocast(region)


def _autocast_region(module: fx.GraphModule, node: fx.Node) -> list[Any]:
    device, dtype, enabled, cache, attribute, *arguments = node.args
    graph = module.graph
    region = graph.call_function(enter_autocast, (device, dtype, enabled, cache))
    results = _body(module, attribute, tuple(arguments))  # type: ignore[arg-type]
    leave = graph.call_function(leave_autocast, (region,))
    inside = region.next
    while enabled and inside is not leave:  # in-place operations are never autocast
        if mutates(inside):
            with graph.inserting_before(inside):
                outside = graph.call_function(enter_autocast, (device, dtype, False, cache))
            with graph.inserting_after(inside):
                inside = graph.call_function(leave_autocast, (outside,))
        inside = inside.next
    return results


def drop_assertions(module: fx.GraphModule) -> None:
    """Remove assertions and guards: a balanced model checks its inputs itself."""
    for node in reversed(list(module.graph.nodes)):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if guard or (node.op == "call_function" and node.target in _ASSERTIONS):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=_is_effect)


def _is_effect(node: fx.Node) -> bool:
    return (
        node.op in ("placeholder", "output")
        or node.target in (enter_autocast, leave_autocast)
        or bool(mutates(node))
    )


_RECURRENT = {
    aten.rnn_tanh_cell.default: False,
    aten.rnn_relu_cell.default: False,
    aten.rnn_tanh.input: True,
    aten.rnn_relu.input: True,
}
"""Composites that torch itself computes step by step, and whether the steps are traced before
dispatch (the cells do not open there). Those of LSTM and GRU write in place, in
strides of their own, and a functional copy of them has other bits: they stay whole."""
SPREADS = (
    aten.meshgrid.default,
    aten.meshgrid.indexing,
    aten.broadcast_tensors.default,
)
"""Composites that return a view of each of their operands, which have nothing to do with each
other: each view is a call of its own."""


def unroll(module: fx.GraphModule) -> None:
    """Replace recurrent cells and layers, and `SPREADS`, by the calls that torch makes for them.

    Recurrent ones on the CPU alone: other devices have kernels of their own, with other bits.
    """
    mode = fake_mode(module.graph)
    for node in list(module.graph.nodes):
        devices = {v.device.type for v in _tensors(node.meta.get("val"))}
        steps_here = node.target in _RECURRENT and devices <= {"cpu", "meta"}
        if (steps_here or node.target in SPREADS) and mode is not None:
            given = {n: n.meta["val"] for n in node.all_input_nodes}
            given = {
                n: v if hasattr(v, "fake_mode") else mode.from_tensor(v) for n, v in given.items()
            }
            nodes = list(given)

            def compute(*values: Tensor, at: fx.Node = node, nodes: list[fx.Node] = nodes) -> Any:
                env = dict(zip(nodes, values, strict=True))
                args, kwargs = fx.map_arg((at.args, at.kwargs), env.__getitem__)
                target: Any = at.target
                return target.decompose(*args, **kwargs)

            with mode:
                steps = make_fx(compute, pre_dispatch=_RECURRENT.get(node.target, False))(
                    *given.values()
                )
            _splice(module, node, steps, nodes)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _splice(
    module: fx.GraphModule, node: fx.Node, steps: fx.GraphModule, given: list[fx.Node]
) -> None:
    inputs = iter(given)
    env: dict[fx.Node, fx.Node] = {}
    kept = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    with module.graph.inserting_before(node):
        for inner in steps.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "output":
                results = inner.args[0]
            else:
                env[inner] = module.graph.node_copy(inner, env.__getitem__)
                env[inner].meta = {"val": inner.meta["val"]} | kept
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(env[results])
    for user in list(node.users):
        user.replace_all_uses_with(env[results[user.args[1]]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)


# --------------------------------------------------------------------------- fake values


def fake_mode(graph: fx.Graph) -> Any:
    """The fake tensor mode under which a graph was exported, None where it holds no tensor."""
    values = (leaf for n in graph.nodes for leaf in pytree.tree_leaves(n.meta.get("val")))
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next((mode for mode in modes if mode is not None), None)


def fake_call(mode: Any, node: fx.Node) -> tuple[list[Any], Any]:
    """The fake values of a call's operands, and what the call returns for them.

    What the call asks of sizes is no condition on the model, it would pin an open batch.
    """
    given = {n: n.meta["val"] for n in node.all_input_nodes}
    given = pytree.tree_map_only(
        Tensor, lambda t: t if hasattr(t, "fake_mode") else mode.from_tensor(t), given
    )
    args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
    sizes = getattr(mode, "shape_env", None)
    with nullcontext() if sizes is None else sizes.suppress_guards(), mode, torch.no_grad():
        return list(given.values()), node.target(*args, **kwargs)  # type: ignore[operator]


# --------------------------------------------------------------------------- in-place writes


def mutates(node: fx.Node) -> str | None:
    """The name of the argument that a call writes to, None for a pure call."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            return str(argument.name)
    return None


_SPECIAL = {
    "aten.zero_.default": aten.zeros_like.default,
    "aten.fill_.Scalar": aten.fill.Scalar,
    "aten.fill_.Tensor": aten.fill.Tensor,
}


def _functional(node: fx.Node) -> Any:
    """The overload that computes what an in-place one writes to its first argument."""
    target: Any = node.target
    if str(target) in _SPECIAL:
        return _SPECIAL[str(target)]
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


_NEW_VIEWS = {
    "aten.squeeze_.default",
    "aten.squeeze_.dim",
    "aten.squeeze_.dims",
    "aten.unsqueeze_.default",
    "aten.t_.default",
    "aten.transpose_.default",
    "aten.swapaxes_.default",
    "aten.swapdims_.default",
    "aten.detach_.default",
}
# what a write left in other strides: the same values, as a view or as a copy
_ANY_LAYOUT = {
    aten.view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
_LAYOUT = {aten.as_strided.default, aten.view.dtype}
_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.ravel.default,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
}
_SWAPS = {aten.transpose.int, aten.swapaxes.default, aten.swapdims.default}
_SWAPS_FIXED = {aten.t.default: (0, 1), aten.mT.default: (-2, -1)}
_MOVES = {aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist}
_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_SPLITS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}


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
                node.target = _ANY_LAYOUT.get(node.target, node.target)
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
        if not isinstance(view.args[0], fx.Node) or view.target in _LAYOUT:
            raise _refusal(view, f"{view.target} makes a view of memory that is written to later")
        target: Any = view.target
        target = _ANY_LAYOUT.get(target, target)
        return self.emit(target, (value, *view.args[1:]), dict(view.kwargs), view)

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
            if str(node.target) in _NEW_VIEWS:  # of the old values
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
        kind, arguments = view.target, bind(view)
        if kind is operator.getitem:
            parts: list[Any] = [
                self.emit(operator.getitem, (base, i), {}, view)
                for i in range(len(base.meta["val"]))
            ]
            parts[arguments["index"]] = value
            return parts
        if kind in _SPLITS:
            return self.emit(aten.cat.default, (value, arguments["dim"]), {}, node)
        if kind is aten.unbind.int:
            return self.emit(aten.stack.default, (value, arguments["dim"]), {}, node)
        if view in self.same:
            return value
        if kind in _RESHAPES:
            return self.emit(aten.reshape_as.default, (value, base), {}, node)
        if kind in _SWAPS:
            return self.emit(aten.transpose.int, (value, *view.args[1:]), {}, node)
        if kind in _SWAPS_FIXED:
            return self.emit(aten.transpose.int, (value, *_SWAPS_FIXED[kind]), {}, node)
        if kind is aten.permute.default:
            rank = len(arguments["dims"])
            order = [int(d) % rank for d in arguments["dims"]]
            inverse = sorted(range(rank), key=order.__getitem__)
            return self.emit(aten.permute.default, (value, inverse), {}, node)
        if kind is aten.numpy_T.default:
            inverse = list(reversed(range(len(base.meta["val"].shape))))
            return self.emit(aten.permute.default, (value, inverse), {}, node)
        if kind in _MOVES:
            moves = (arguments["destination"], arguments["source"])
            return self.emit(kind, (value, *moves), {}, node)
        if kind is aten.narrow.default and isinstance(arguments["start"], int):
            start, length = arguments["start"], arguments["length"]
            end = start + length if start >= 0 or start + length < 0 else None
            where = (arguments["dim"], start, end)
            return self.emit(aten.slice_scatter.default, (base, value, *where), {}, node)
        if kind in _SCATTERS:
            extra = (value, *view.args[1:])
            return self.emit(_SCATTERS[kind], (base, *extra), dict(view.kwargs), node)
        raise _refusal(node, f"it writes in place through a view made by {kind}")


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
        module.graph.eliminate_dead_code(is_impure_node=_is_effect)
