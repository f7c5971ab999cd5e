"""Normalises an exported graph: no higher-order nodes, no assertions, composites in their steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..operators.algebra import Algebra
from ..operators.calls import bind, target_name
from ..operators.inplace import STEPS
from ..operators.record import Operator
from ..operators.registry import lookup
from ..operators.steps import with_bits_of
from .fakes import fake_mode

aten = torch.ops.aten


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
        if guard or _asserts(node):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=is_effect)


def _asserts(node: fx.Node) -> bool:
    """Whether a call returns nothing and writes nothing: all it can do is raise."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema is not None and not schema.returns and not schema.is_mutable


def is_effect(node: fx.Node) -> bool:
    return (
        node.op in ("placeholder", "output")
        or node.target in (enter_autocast, leave_autocast)
        or bool(mutates(node))
    )


def unroll(module: fx.GraphModule) -> None:
    """Replace what is `opened` on its device by the calls that torch makes for it, and what nobody
    registered where torch makes it of calls that are known."""
    mode = fake_mode(module.graph)
    for node in list(module.graph.nodes):
        if mode is None or node.op != "call_function":
            continue
        record = lookup(target_name(node.target))
        if node.target in STEPS:
            _splice(module, node, *_traced(STEPS[node.target], node, mode, False))
        elif record is not None and _opens(record, node):
            _splice(module, node, *_steps(node, mode, record.algebra is not Algebra.COMPOSITE))
        elif record is not None and record.steps is not None and _moves(record, node):
            _write_beside(module, node, record.steps, mode)
        elif record is None and _is_made_of_others(node.target):
            try:
                steps, given = _steps(node, mode, False)
            except (RuntimeError, ValueError, TypeError, KeyError):
                continue  # what it does depends on values, or on what has none here
            held = any(n.op == "get_attr" for n in steps.graph.nodes)
            if not held and all(_is_known(n) and "val" in n.meta for n in _calls(steps)):
                _splice(module, node, steps, given)


def _moves(record: Operator, node: fx.Node) -> bool:
    """Whether all the operands that have to depend on the input do."""
    arguments = bind(node) if record.together else {}
    return all(_depends(arguments.get(name)) for name in record.together)


def _depends(value: Any) -> bool:
    """Whether an input is behind a value."""
    behind = dict.fromkeys([value] if isinstance(value, fx.Node) else [])
    for node in (queue := list(behind)):
        if node.op == "placeholder":
            return True
        queue += [n for n in node.all_input_nodes if n not in behind]
        behind |= dict.fromkeys(node.all_input_nodes)
    return False


def _write_beside(
    module: fx.GraphModule, node: fx.Node, steps: Callable[..., Any], mode: Any
) -> None:
    """The steps of a kernel before it, and from there on its value with their gradient."""
    try:
        made_of, given = _traced(steps, node, mode, True)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError):
        return  # arguments that the steps do not know: it stays one operation
    if [n.target for n in _calls(made_of)] == [node.target]:  # a linear layer without a bias
        return
    made = _written(module, node, made_of, given)
    read = {node: made} if isinstance(made, fx.Node) else {u: made[u.args[1]] for u in node.users}
    for kernel, value in read.items():
        with module.graph.inserting_after(kernel):
            joined = module.graph.call_function(with_bits_of, (value, kernel))
        joined.meta = dict(kernel.meta)
        for user in [u for u in kernel.users if u is not joined]:
            user.replace_input_with(kernel, joined)


def _is_made_of_others(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._can_decompose()


def _is_known(node: fx.Node) -> bool:
    """Whether an operation is registered, or the one that it is when it does not write."""
    name = target_name(node.target)
    return lookup(name) is not None or lookup(name.replace("_.", ".")) is not None


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "call_function"]


def _steps(node: fx.Node, mode: Any, with_modes: bool) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The calls that torch makes for a call, and the nodes that they read."""
    target: Any = node.target
    return _traced(target.decompose, node, mode, with_modes)


def _traced(
    function: Callable[..., Any], node: fx.Node, mode: Any, with_modes: bool
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The calls that a function makes of a node's arguments, and the nodes that they read."""
    given = {n: n.meta["val"] for n in node.all_input_nodes}
    given = {n: v if hasattr(v, "fake_mode") else mode.from_tensor(v) for n, v in given.items()}

    def compute(*values: Tensor) -> Any:
        env = dict(zip(given, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return function(*args, **kwargs)

    with mode:
        return make_fx(compute, pre_dispatch=with_modes)(*given.values()), list(given)


def _opens(record: Operator, node: fx.Node) -> bool:
    """Whether a call is opened on the device that its results are on."""
    devices = {v.device.type for v in _tensors(node.meta.get("val"))}
    return record.opened is None or (bool(record.opened) and devices <= {*record.opened})


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _splice(
    module: fx.GraphModule, node: fx.Node, steps: fx.GraphModule, given: list[fx.Node]
) -> None:
    results = _written(module, node, steps, given)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _written(
    module: fx.GraphModule, node: fx.Node, steps: fx.GraphModule, given: list[fx.Node]
) -> Any:
    """What the steps result in, written before a node."""
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
    return fx.map_arg(results, env.__getitem__)


def mutates(node: fx.Node) -> str | None:
    """The name of the argument that a call writes to, None for a pure call."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            return str(argument.name)
    return None
