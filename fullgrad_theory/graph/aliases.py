"""Which nodes of a graph share memory, through which views, and who holds its newest contents."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from .fakes import fake_call

_DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@dataclass(eq=False)
class Storage:
    """One piece of memory: the node that holds its newest contents, after so many writes.

    `tangled`: results share it that are views of other memory, too.
    """

    newest: fx.Node
    version: int = 0
    tangled: bool = False

    def hold(self, value: fx.Node) -> None:
        """It was written to."""
        self.newest, self.version = value, self.version + 1


@dataclass
class Alias:
    """A node that shares memory: a chain of view calls from the storage's base.

    `fresh`: the version of the storage -> the node that shows the same part of it.
    """

    storage: Storage
    chain: tuple[fx.Node, ...] = ()
    fresh: dict[int, fx.Node] = field(default_factory=dict)

    @property
    def untouched(self) -> bool:
        """Whether the node itself shows what there is."""
        return self.storage.version == 0 and not self.fresh

    @property
    def shown(self) -> fx.Node | None:
        """The node that shows the newest contents; None where the views must be taken anew."""
        at = self.storage
        return self.fresh.get(at.version) if self.chain else self.fresh.get(at.version, at.newest)


class Aliases:
    """The nodes of a graph, seen so far, that share memory.

    `mode`: of the fake values, None where there are none. `same`: views that are element by element
    what they are of.
    """

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.same: set[fx.Node] = set()
        self._known: dict[fx.Node, Alias] = {}

    def get(self, node: fx.Node) -> Alias | None:
        """What is known of a node, None where it shares nothing so far."""
        return self._known.get(node)

    def of(self, node: fx.Node) -> Alias:
        """What is known of a node; a new one has memory of its own."""
        return self._known.setdefault(node, Alias(Storage(node)))

    def put(self, node: fx.Node, alias: Alias) -> None:
        """A node shows what that alias shows."""
        self._known[node] = alias

    def view(self, node: fx.Node, operand: fx.Node) -> None:
        """A call's result shares an operand's memory."""
        parent = self.of(operand)
        version = parent.storage.version
        fresh = {version: node} if version else {}
        self._known[node] = Alias(parent.storage, (*parent.chain, node), fresh)
        if _congruent(operand, node):
            self.same.add(node)

    def shared_operand(self, node: fx.Node) -> fx.Node | None:
        """The operand whose memory a pure call's result shares, judged by running it on fakes.

        A schema does not tell: reshape, contiguous and dropout share it sometimes, `to` seldom.
        """
        if node.target is operator.getitem:
            listed = node.args[0]
            return listed if isinstance(listed, fx.Node) and listed in self._known else None
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
            for operand in shared:
                self.of(operand).storage.tangled = True
        return shared[0] if shared else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _congruent(base: fx.Node, view: fx.Node) -> bool:
    """Whether a view is element by element its base: `to` the same dtype, dropout in eval mode."""
    a, b = base.meta.get("val"), view.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    # where values decide a size, what holds for some of them is not asked for
    known = sym_eq((a.shape, a.stride()), (b.shape, b.stride()))
    offsets = sym_eq(a.storage_offset(), b.storage_offset())
    return statically_known_true(known) and statically_known_true(offsets)
