"""The kernel: the few rules that a verdict rests on. It imports nothing of the package.

The judgement is *value v is carried at degree d*: of a cotangent c at v, d <c, v> arrives at the
sources and bias leaves behind it. A `Fact` is that judgement, and only the rules below make one.
Trusted besides: kernel.toml, which says what each operation means, and that the graph is the model.
A step is one result of a call: `operands`, argument -> (value, factor of its gradient, 0 for none);
`monomials`, exponents of operands; `bias`, whether constants are added; `scale` of its gradient.
"""

from __future__ import annotations

import operator
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_RULE = object()  # who holds it can make a fact
EDITS = ("prune", "scale", "secant", "freeze", "integrate")
UNKNOWN = "kernel.toml does not say"
Named = Mapping[str, Any]


class Refused(Exception):
    """The kernel does not follow a step: which, and why."""


@dataclass(frozen=True)
class Fact:
    """`value`, a node's name (`name#k` a further result), is carried at `degree`, `supposing` that
    sources are such, and what is not known here and has to be true."""

    value: str
    degree: Fraction
    supposing: frozenset[str]
    rule: object

    def __post_init__(self) -> None:
        if self.rule is not _RULE:
            raise Refused(f"no rule of the kernel says how {self.value} is carried")


def leaf(value: str, degree: Fraction | None = None) -> Fact:
    """A source is carried at degree 1: what arrives is <c, v>. A given degree is supposed."""
    why = f"{value} is a source" if degree is None else f"{value} is carried at degree {degree}"
    return Fact(value, Fraction(1) if degree is None else degree, frozenset([why]), _RULE)


def carry(step: Named, facts: Mapping[str, Fact]) -> Fact:
    """A value whose monomials have one degree n is carried at n, times the scale behind it.

    J_a u_a = p f for a monomial f of degree p in its operand a (Euler): the sum of e_a J_a u_a is
    n f, where e_a are the degrees that are seen. A constant is a bias leaf at n = 1, a coefficient
    at n = 0; an operand in no monomial must be seen at 0.
    """
    value, scale = step["value"], Fraction(step["scale"])
    read = {a: (Fraction(f), facts[v]) for a, (v, f) in step["operands"].items() if Fraction(f)}
    seen = {a: f * fact.degree for a, (f, fact) in read.items()}
    terms = [{a: Fraction(p) for a, p in monomial} for monomial in step["monomials"]]
    totals = {sum((p * seen.get(a, 0) for a, p in m.items()), Fraction(0)) for m in terms}
    n = min(totals, default=Fraction(0))
    if loose := [a for a in seen if seen[a] and not any(a in m for m in terms)]:
        raise Refused(f"{value} reads {', '.join(loose)} at a degree other than 0")
    if len(totals) > 1:
        raise Refused(f"{value} adds values of degree {', '.join(map(str, sorted(totals)))}")
    if step["bias"] and n not in (0, 1):
        raise Refused(f"{value} adds a constant at degree {n}")
    if scale <= 0 or any(factor < 0 for factor, _ in read.values()):
        raise Refused(f"{value} turns its gradient round")
    behind = [fact.supposing for _, fact in read.values()]
    return Fact(value, n * scale, frozenset(step["supposing"]).union(*behind), _RULE)


def complete(outputs: Sequence[Fact]) -> Fact:
    """Outputs at degree 1 are complete: the sum of what their gradient gives sources and biases."""
    if wrong := [f"{fact.value} at {fact.degree}" for fact in outputs if fact.degree != 1]:
        raise Refused(f"an output is carried at a degree other than 1: {', '.join(wrong)}")
    supposing = frozenset[str]().union(*(fact.supposing for fact in outputs))
    return Fact(", ".join(fact.value for fact in outputs), Fraction(1), supposing, _RULE)


@cache
def meanings() -> Mapping[str, Sequence[Any]]:
    """Operation -> its entries in kernel.toml; "pointwise" -> the operations that are that."""
    table = tomllib.loads(files(__package__).joinpath("kernel.toml").read_text("utf-8"))
    rows: dict[str, list[Any]] = {"pointwise": table["pointwise"].split()}
    for entry in table["meaning"]:
        for name in entry["operations"].split():
            rows.setdefault(name, []).append(entry)
    return rows


def name_of(target: Any) -> str:
    """`aten.gelu.default` for an overload, the qualified name of a Python function."""
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", str(target))
    named = name if module in ("_operator", "builtins") else f"{module}.{name}"
    return str(target) if isinstance(target, torch._ops.OpOverload) else named


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, the defaults of its schema among them."""
    schema = getattr(node.target, "_schema", None)
    named = [] if schema is None else schema.arguments
    names = [a.name for a in named] or [f"arg{i}" for i in range(len(node.args))]
    names = ["self", "index"] if node.target is operator.getitem else names
    defaults = {a.name: a.default_value for a in named if a.has_default_value()}
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def reads(arguments: Named) -> dict[str, fx.Node]:
    """The node at every argument position: `weight`, or `tensors[1]`."""
    found, queue = {}, [*arguments.items()]
    for name, value in queue:
        value = [value.start, value.stop, value.step] if isinstance(value, slice) else value
        value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(value, dict):
            queue += [(f"{name}[{key}]", element) for key, element in value.items()]
        elif isinstance(value, fx.Node):
            found[name] = value
    return found


def results(node: fx.Node) -> list[str]:
    """Each result: "float", also of what is not known, "integer" for other tensors, "" for none."""
    value, found = node.meta.get("val", torch.empty(0)), []
    for v in value if isinstance(value, (tuple, list)) else [value]:
        floats = isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())
        found.append("float" if floats else "integer" if isinstance(v, Tensor) else "")
    return found


_FACTOR = re.compile(r"([*/]?)\s*([A-Za-z_]\w*(?:\[\d+\])?|1)(\??)(?:\^([-\w./]+))?")


def monomials(rule: str, arguments: Named, operands: Named) -> tuple[list[list[Any]], bool]:
    """A rule's products in one call, and if it adds constants; what is left out, or 0, is none."""
    found, bias = list[list[Any]](), False
    for term in filter(None, map(str.strip, rule.split("+"))):
        product: list[list[Any]] = []
        for sign, name, where_live, power in _FACTOR.findall(term):
            exponent = _exponent(power or "1", arguments) * (-1 if sign == "/" else 1)
            value = 1 if name == "1" or name in operands else arguments.get(name)
            if isinstance(value, (list, tuple)):
                product += [[f"{name}[{i}]", str(exponent)] for i, v in enumerate(value) if v != 0]
            elif (value is None and not product) or (value == 0 and exponent > 0):
                product = []
                break
            elif value is not None and not (where_live and operands.get(name, "00")[1] == "0"):
                product.append([name, str(exponent)])
        is_sum = bool(product) and "[" in product[0][0] and not term.startswith("*")
        for one in [[factor] for factor in product] if is_sum else [product] * bool(product):
            moved = [factor for factor in one if factor[0] in operands]
            held = bool(moved) or one == [["1", "0"]]  # to 1^0 it jumps
            found += [moved] if held and moved not in found else []
            bias |= not held
    return found, bias


def _exponent(text: str, arguments: Named) -> Fraction:
    """The number that an exponent is; the fraction, of a rounded one."""
    value: Any = arguments.get(text, text)
    if isinstance(value, (fx.Node, torch.SymInt)):
        raise Refused(f"{UNKNOWN} what number the exponent {value} is")
    near = Fraction(value).limit_denominator(24)
    return near if abs(near - Fraction(value)) < Fraction(1, 10**9) else Fraction(value)


class Proof:
    """Facts about values under a claim: `edits` as the file of a plan has them, `sources`, `held`
    inputs, a rule `declared` of a node, a degree of one `broken`. All others carry nothing."""

    def __init__(self, graph: fx.Graph, claim: Named) -> None:
        self.facts: dict[str, Fact] = {}
        self.steps: dict[str, Named] = {}
        self.refused: dict[str, str] = {}
        self.claim, self.nodes = claim, {node.name: node for node in graph.nodes}
        self._edits: dict[tuple[str, str, str], Named] = {}
        for edit in claim["edits"]:
            kind = "own" if edit["edit"] in EDITS[2:] else edit["edit"]
            place = (edit["node"], edit.get("argument") or "", kind)
            if edit["edit"] not in EDITS or place[0] not in self.nodes or place in self._edits:
                raise Refused(f"{edit} is no edit of this graph, or one of two at one place")
            self._edits[place] = edit
        self._moving, self._zeros, self._integers = set[fx.Node](), set[fx.Node](), set[fx.Node]()
        self._rules: dict[str, list[str]] = {}  # of every result, or of all alike
        for name, node in self.nodes.items():
            if (node.op == "placeholder" and name in claim["held"]) or not self._moves(node):
                continue
            try:
                for step in self._steps(node) if node.op == "call_function" else ():
                    self.steps[step["value"]] = step
                    self.facts[step["value"]] = carry(step, self.facts)
            except Exception as error:  # noqa: BLE001  what cannot be read is not followed
                self.refused[name] = str(error)
            if name in claim["broken"] or (name in claim["sources"] and self._is_source(node)):
                self.facts[name] = leaf(name, claim["broken"].get(name))

    def _moves(self, node: fx.Node) -> bool:
        """Whether a value depends on the input; by a shape it does where values decide that."""
        row = next(iter(meanings().get(name_of(node.target), ())), {"class": "", "rule": ""})
        found = {a: n for a, n in reads(arguments_of(node)).items() if n in self._moving}
        rule = row["rule"].split(";")[0] if row["class"] in ("linear", "product") else "1"
        if row["class"] == "zeros" or monomials(rule, self._arguments(node), found) == ([], False):
            self._zeros.add(node)
            self._integers.add(node)
            return False
        decided = bool(found) and bool(free_unbacked_symbols(node.meta.get("val")))
        floats, given = "float" in results(node), node.op == "placeholder"
        moves = decided or (any(results(node)) and (given or bool({*found} - {row.get("shape")})))
        of = node.all_input_nodes if floats or not moves else found.values()
        if (node.op == "call_function" or (given and not floats)) and self._integers.issuperset(of):
            self._integers |= {node}
        self._moving |= {node} if moves else set()
        return moves

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """As `arguments_of`; what the model's code fills with zeros is the number."""
        return dict(fx.map_arg(arguments_of(node), lambda n: 0 if n in self._zeros else n))

    def _is_source(self, node: fx.Node) -> bool:
        """Whether attribution may end there: a float input, or what integers look up."""
        found = [n for n in node.all_input_nodes if n in self._moving]
        among = node.target is operator.getitem and self._is_source(found[0])
        looked_up = all(n in self._integers for n in found) and node not in self._integers
        return "float" in results(node) and (looked_up or among)

    def _steps(self, node: fx.Node) -> Iterator[Named]:
        """What each result is of the operands, as they are seen under the edits."""
        own = self._edits.get((node.name, "", "own"), {})
        arguments = self._outside(node, own) if own.get("region") else self._arguments(node)
        moving = {a: n for a, n in reads(arguments).items() if n in self._moving}
        row = self._meaning(node, own, arguments, moving)
        rules = row[own.get("edit", "rule")].split(";")
        self._rules[node.name] = rules
        lends = [*moving] if rules == ["-"] else [row.get("shape")]  # what carries nothing
        operands = {a: self._read(node, a, n) for a, n in moving.items() if a not in lends}
        scale = self._edits.get((node.name, "", "scale"), {"factor": "1"})["factor"]
        carries = any(factor != "0" for _, factor in operands.values())
        for k, (result, rule) in enumerate(zip(results(node), rules, strict=False)):
            if result != "float" or rule.strip() == "-" or not carries:
                continue
            terms, bias = monomials(rule, arguments, operands)
            chosen = operands.keys() - {a for term in terms for a, _ in term}
            picks = row["class"] == "linear" and ("+" not in rule or bias + len(terms) > 1)
            said = {
                "is what is declared of it": row["class"] == "declared",
                "is integrated along a ray": own.get("edit") == "integrate",
                "does not jump": picks and not self._integers.issuperset(map(moving.get, chosen)),
            }
            value = f"{node.name}#{k}" if k else node.name
            made = {"value": value, "operation": name_of(node.target), "class": row["class"]}
            made |= {"edit": own.get("edit", ""), "operands": operands, "monomials": terms}
            made |= {"supposing": [f"{value} {words}" for words, so in said.items() if so]}
            yield made | {"bias": bias, "scale": scale}

    def _meaning(self, node: fx.Node, own: Named, arguments: Named, moving: Named) -> Named:
        """The entry of kernel.toml that a call has, under an edit of its own."""
        edit, name = own.get("edit", "rule"), name_of(node.target)
        if own.get("region") and edit != "freeze":
            return {"class": "region", edit: " + ".join([*moving, "1"])}
        if node.name in self.claim["declared"]:
            return {"class": "declared", edit: self.claim["declared"][node.name]}
        for row in meanings().get(name, ()):
            fits = all(arguments.get(k) == v for k, v in row.get("where", {}).items())
            fits &= not any(arguments.get(k) == v for k, v in row.get("unless", {}).items())
            if fits and edit in row and {*row.get("moving", moving)} == {*moving}:
                return row
        raise Refused(f"{UNKNOWN} what {name} means as {node.name} calls it")

    def _read(self, node: fx.Node, argument: str, read: fx.Node) -> list[str]:
        """What an operand reads, and the factor of its gradient there."""
        rules, kinds = self._rules.get(read.name, [""]), results(read)
        k: Any = node.args[1] if node.target is operator.getitem and len(kinds) > 1 else 0
        value = f"{read.name}#{k}" if k and len(rules) > 1 else read.name
        stops = kinds[k] != "float" or rules[min(k, len(rules) - 1)].strip() == "-"
        pruned, known = (node.name, argument, "prune") in self._edits, value in self.facts
        if pruned or stops or not (known or read.name in self.refused):
            return [value, "0"]
        if value not in self.facts:
            raise Refused(f"{node.name} reads {read.name}, which is not followed")
        return [value, self._edits.get((node.name, argument, "scale"), {"factor": "1"})["factor"]]

    def _outside(self, node: fx.Node, own: Named) -> dict[str, fx.Node]:
        """What a region reads; under a secant it has to be pointwise, of one value that moves."""
        inside = [n for n in self.nodes.values() if n.name in (*own["region"], node.name)]
        read = list(dict.fromkeys(n for m in inside for n in m.all_input_nodes if n not in inside))
        pointwise = all(name_of(n.target) in meanings()["pointwise"] for n in inside)
        one = pointwise and sum(n in self._moving for n in read) == 1
        if own["edit"] == "secant" and not one:
            raise Refused(f"the region of {node.name} is no pointwise function of one value")
        return {f"arg{i}": n for i, n in enumerate(read, 2)}
