"""The faults: what is planted where, and which tests ought to notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`find` stands exactly once in `file` and is replaced by `put`; `suspects`: pytest arguments.

    `excuse`: why a survivor is no fault that anybody could see.
    """

    name: str
    kind: str
    file: str
    find: str
    put: str
    suspects: tuple[str, ...]
    excuse: str = ""


PROOFS = "proofs/test_operations.py"
OPERATORS = "tests/test_operators.py"
HONESTY = "tests/test_honesty.py"
DERIVE = "tests/test_derive.py"
CHECK = "tests/test_check.py"
GATES = "tests/test_gates.py"
BACKWARD = "tests/test_backward.py"
BALANCE = "tests/test_balance.py"
FULLGRAD = "tests/test_fullgrad.py"
FUNCTIONAL = "tests/test_functionalise.py"
INTEGRATE = "tests/test_integrate.py"
TRAPS = "tests/test_traps.py"


def _entry(table: str, kind: str, op: str, rule: str, wrong: str) -> Mutant:
    """A wrong degree rule of one operation."""
    line = f'"aten.{op}": "{{}}",'
    suspects = (PROOFS, OPERATORS, "-k", op)
    name = f"{op}: {rule} as {wrong}"
    return Mutant(
        name, kind, f"operators/{table}.py", line.format(rule), line.format(wrong), suspects
    )


DEGREE, CLASS, LIVENESS = "wrong degree", "wrong class", "lost liveness"
FACTOR, ZERO, LEAF = "dropped factor", "secant at 0", "forgotten bias leaf"
TWICE, PRUNED, SEARCH = "rule applied twice", "pruned operand left live", "wrong search"
VERDICT, FORWARD = "wrong verdict", "wrong trace"

MUTANTS: tuple[Mutant, ...] = (
    # ------------------------------------------------------------------ operators
    _entry("linear", DEGREE, "mul.Tensor", "self*other", "self + other"),
    _entry("linear", DEGREE, "matmul.default", "self*other", "self + other"),
    _entry("linear", DEGREE, "div.Tensor", "self/other", "self*other"),
    _entry("linear", DEGREE, "reciprocal.default", "self^-1", "self"),
    _entry("linear", DEGREE, "einsum.default", "*tensors", "tensors"),
    _entry("linear", DEGREE, "cumsum.default", "self", "self^2"),
    _entry("linear", DEGREE, "lerp.Scalar", "self + end", "self"),
    _entry("linear", DEGREE, "bilinear.default", "input1*input2*weight + bias", "input1*input2^2*weight + bias"),
    _entry("linear", LEAF, "linear.default", "input*weight + bias", "input*weight"),
    _entry("linear", LEAF, "conv2d.default", "input*weight + bias", "input*weight"),
    _entry("linear", LEAF, "addmm.default", "mat1*mat2 + self", "mat1*mat2"),
    _entry("linear", LEAF, "addcmul.default", "tensor1*tensor2 + self", "tensor1*tensor2"),
    _entry("homogeneous", DEGREE, "square.default", "self^2", "self"),
    _entry("homogeneous", DEGREE, "sqrt.default", "self^1/2", "self"),
    _entry("homogeneous", DEGREE, "rsqrt.default", "self^-1/2", "self^1/2"),
    _entry("homogeneous", DEGREE, "var.correction", "self^2", "self"),
    _entry("homogeneous", DEGREE, "std.correction", "self", "self^2"),
    _entry("homogeneous", DEGREE, "pow.Tensor_Scalar", "self^exponent", "self"),
    _entry("homogeneous", DEGREE, "hypot.default", "self + other", "self*other"),
    _entry("homogeneous", DEGREE, "maximum.default", "self + other", "self"),
    _entry("homogeneous", LEAF, "clamp.default", "self + min + max", "self + max"),
    _entry("homogeneous", LEAF, "hardtanh.default", "self + min_val + max_val", "self + min_val"),
    _entry("homogeneous", LEAF, "softshrink.default", "self + lambd", "self"),
    _entry("homogeneous", LIVENESS, "max.dim", "self ; -", "- ; -"),
    _entry("structural", DEGREE, "cat.default", "tensors", "*tensors"),
    _entry("structural", DEGREE, "stack.default", "tensors", "*tensors"),
    _entry("structural", LEAF, "where.self", "self + other", "self"),
    _entry("structural", LEAF, "masked_fill.Scalar", "self + value", "self"),
    _entry("structural", LEAF, "constant_pad_nd.default", "self + value", "self"),
    _entry("normaliser", LEAF, "layer_norm.default", "input*weight + bias", "input*weight"),
    _entry("normaliser", DEGREE, "rms_norm.default", "input*weight", "input*weight^2"),
    Mutant("batch norm forgets its running mean", LEAF, "operators/linear.py",
           '"input*weight + running_mean*weight + bias",\n    refuses', '"input*weight + bias",\n    refuses',
           (PROOFS, OPERATORS, "-k", "aten.batch_norm")),
    Mutant("sigmoid(0) = 0", LEAF, "operators/elementwise.py", '"sigmoid": 0.5', '"sigmoid": 0.0',
           (PROOFS, OPERATORS, "-k", "sigmoid")),
    Mutant("exp(0) = 0", LEAF, "operators/elementwise.py", '"exp": 1.0', '"exp": 0.0',
           (PROOFS, OPERATORS, "-k", "exp.default")),
    Mutant("softplus(0) = 1", LEAF, "operators/elementwise.py", "origin=math.log(2.0))", "origin=1.0)",
           (PROOFS, OPERATORS, "-k", "softplus")),
    Mutant("GELU and its like are linear", CLASS, "operators/elementwise.py",
           "Algebra.ZERO_ORIGIN)", "Algebra.STRUCTURAL)", (PROOFS, "-k", "gelu")),
    Mutant("softmax is linear", CLASS, "operators/smooth.py",
           'aten.pow.Scalar\n""".split():\n    register(_name, Algebra.SMOOTH)', 'aten.pow.Scalar\n""".split():\n    register(_name, Algebra.STRUCTURAL)',
           (PROOFS, OPERATORS, "-k", "softmax")),
    Mutant("layer norm is linear", CLASS, "operators/normaliser.py",
           "register(_name, Algebra.NORMALISER, _signature)",
           "register(_name, Algebra.MULTILINEAR, _signature)", (PROOFS, OPERATORS, "-k", "layer_norm")),
    Mutant("comparisons are constants", CLASS, "operators/freezing.py",
           '""".split():\n    register(_name, Algebra.FREEZING)\n\nfor _name in "aten.div',
           '""".split():\n    register(_name, Algebra.FACTORY)\n\nfor _name in "aten.div', (DERIVE, CHECK, "-k", "opaque or plan or obstacle")),
    Mutant("dropout in training mode is let in", VERDICT, "operators/structural.py",
           'if a["train"] and a["p"] else None', "if False else None", (OPERATORS, CHECK)),
    # ------------------------------------------------------------------ relations
    Mutant("f(0) at any degree", LEAF, "operators/base.py",
           "domain = (1,) if op.origin else None", "domain = None", (OPERATORS, DERIVE, PROOFS)),
    Mutant("eps does not count", CLASS, "operators/base.py",
           "if eps is None or eps > 0:", "if eps is None:",
           (OPERATORS, PROOFS, DERIVE, "-k", "norm")),
    Mutant("1/sigma may be of any degree", DEGREE, "operators/base.py",
           'plain = tuple(replace(r, zero=(*r.zero, "input")) for r in plain)', "pass",
           (TRAPS, DERIVE, "-k", "norm")),
    Mutant("a norm is linear in a constant input", LEAF, "operators/base.py",
           '(Mode(None, frozen),) if weighted else (_none(call), Mode("freeze", frozen))',
           "(Mode(None, frozen),)", (TRAPS, DERIVE, "-k", "norm")),
    Mutant("a constant may be added at any degree", LEAF, "operators/base.py",
           "domain = ((0,) if call.eps else (0, 1)) if constant else None", "domain = None",
           (DERIVE, OPERATORS, CHECK)),
    Mutant("operands without a rule may have any degree", DEGREE, "operators/base.py",
           "selectors = tuple(sorted(call.moving - mentioned))", "selectors = ()", (OPERATORS, DERIVE)),
    Mutant("a quotient is a product", DEGREE, "operators/base.py",
           'match["name"], -1 if match["op"] == "/" else 1', 'match["name"], 1', (PROOFS, OPERATORS, "-k", "div")),
    Mutant("smooth operations are consistent anywhere", DEGREE, "operators/base.py",
           "return Mode(None, (Relation(zero=tuple(sorted(call.moving))),))", "return Mode(None, (Relation(),))",
           (OPERATORS, CHECK, DERIVE)),
    Mutant("attention forgets its keys", DEGREE, "operators/base.py",
           'call.moving & {"query", "key", "attn_mask"}', 'call.moving & {"query", "attn_mask"}',
           (DERIVE, PROOFS, CHECK)),
    Mutant("no operand is a bias leaf", LEAF, "operators/base.py",
           "    return tuple(dict.fromkeys(names))", "    return ()", (CHECK, FULLGRAD, BALANCE)),
    # ------------------------------------------------------------------ degrees
    Mutant("getitem of a tuple is constant", LIVENESS, "degrees.py",
           "state = _item(states[inputs[0].name], node.args[1])", "state = (State.CONSTANT,)", (CHECK, DERIVE)),
    Mutant("frozen is constant", LIVENESS, "degrees.py",
           "return (State.FROZEN,) * len(outputs)", "return (State.CONSTANT,) * len(outputs)", (DERIVE, CHECK)),
    Mutant("a pruned edge keeps its degree", PRUNED, "degrees.py",
           "Fact(State.FROZEN) if operand.name in pruned else fact", "fact", (DERIVE, CHECK)),
    Mutant("a scale is forgotten", FACTOR, "degrees.py", "degree = natural * factor", "degree = natural",
           (DERIVE, CHECK)),
    Mutant("an output of degree 1/2 passes", VERDICT, "degrees.py",
           "fact.state is State.LIVE and fact.degree != 1", "fact.state is State.LIVE and fact.degree > 1",
           (DERIVE, CHECK)),
    Mutant("degree 0 is not asked for", DEGREE, "degrees.py",
           "wrong = [n for n in relation.zero if seen[n].degree != 0]", "wrong: list[str] = []", (CHECK, DERIVE)),
    Mutant("nothing is opaque", VERDICT, "degrees.py",
           "return any(frozen) and not all(frozen)", "return False", (CHECK, DERIVE)),
    Mutant("eps is a bias leaf", LEAF, "degrees.py",
           "if adds_literal(c) and only_divides(graph.nodes[name])", "if False", (DERIVE, CHECK)),
    Mutant("bias leaves at degree 0", LEAF, "degrees.py",
           "relation.domain is not None and natural == 1 and not call.eps",
           "relation.domain is not None and natural == 0 and not call.eps", (CHECK, FULLGRAD)),
    Mutant("attribution does not end at embeddings", LIVENESS, "degrees.py",
           'only_ids and name == "aten.embedding.default"', 'only_ids and name == "aten.no_such.default"', (CHECK, DERIVE, FULLGRAD)),
    Mutant("refused calls go on", VERDICT, "degrees.py", "                    if refused:", "                    if False:",
           ("tests/test_traps.py",)),
    # ------------------------------------------------------------------ the search
    Mutant("every scale is a half", FACTOR, "derive.py",
           "[Scale(name, 1 / choice.degree)]", "[Scale(name, Fraction(1, 2))]", (DERIVE,)),
    Mutant("gradient paths may end anywhere", SEARCH, "derive.py", "        self._keep_alive()\n", "", (DERIVE,)),
    Mutant("cuts need no degree", SEARCH, "derive.py",
           "            end = model.add(wanted[site.live.index(True)] == self.one)", "            end = model.add(wanted[site.live.index(True)] >= 0)", (DERIVE,)),
    Mutant("cuts where paths jump over", SEARCH, "derive.py",
           "if reach <= index[name] and site.small == (True,)", "if site.small == (True,)", (DERIVE,)),
    Mutant("pruning is cheap", SEARCH, "policies.py", '"prune": 30', '"prune": 3', (DERIVE,)),
    Mutant("the dearest plan", SEARCH, "derive.py", "self.model.minimize(", "self.model.maximize(", (DERIVE,)),
    # ------------------------------------------------------------------ gates
    Mutant("gelu's gate is doubled", FACTOR, "gates.py", ".erfc_().mul_(0.5)", ".erfc_()", (GATES,)),
    Mutant("gelu's tanh gate with another slope", FACTOR, "gates.py",
           "math.sqrt(8.0 / math.pi) * u", "math.sqrt(2.0 / math.pi) * u", (GATES,)),
    Mutant("gelu's float32 gate is 0 at 0", ZERO, "gates.py", "nan_to_num_(0.5)", "nan_to_num_(0.0)",
           (GATES,)),
    Mutant("0/0 at 0", ZERO, "gates.py", "small = u.abs() < near", "small = u.abs() < 0", (GATES,)),
    Mutant("sigmoid's gate at 0 is 1/2", ZERO, "gates.py", "return 0.25 * tanh(0.5 * u)", "return 0.5 * tanh(0.5 * u)",
           (GATES,)),
    Mutant("silu saturates early", ZERO, "gates.py",
           "softplus_backward.default(grad, u, 1.0, 40.0)", "softplus_backward.default(grad, u, 1.0, 4.0)",
           (GATES, HONESTY, BACKWARD, "-k", "silu or secant")),
    Mutant("hardswish saturates early", FACTOR, "gates.py", "(u + 3.0).clamp(0.0, 6.0) / 6.0",
           "(u + 3.0).clamp(0.0, 5.0) / 6.0", (GATES,)),
    Mutant("elu forgets input_scale", FACTOR, "gates.py",
           "alpha * scale * input_scale * expm1", "alpha * scale * expm1", (GATES,)),
    Mutant("softplus forgets beta in f(0)", ZERO, "gates.py", "math.log(2.0) / beta if", "math.log(2.0) if", (GATES,)),
    Mutant("gates in 16 bits", ZERO, "gates.py",
           "if u.dtype in (torch.float16, torch.bfloat16):", "if u.dtype is torch.complex32:", (GATES,)),
    # ------------------------------------------------------------------ backward
    Mutant("scale does nothing", FACTOR, "backward.py", "return grad * ctx.factor, None", "return grad, None",
           (BACKWARD, CHECK)),
    Mutant("scale twice", TWICE, "backward.py", "return grad * ctx.factor, None",
           "return grad * ctx.factor * ctx.factor, None", (BACKWARD, CHECK)),
    Mutant("frozen rms norm forgets its weight", FACTOR, "backward.py",
           "return (grad * frozen if weight is None else grad * weight * frozen).to(grad.dtype)",
           "return (grad * frozen).to(grad.dtype)", (BACKWARD, "-k", "rms_norm or norm")),
    Mutant("frozen layer norm forgets its weight", FACTOR, "backward.py",
           "torch.zeros_like(frozen), frozen, weight, None, only_x", "torch.zeros_like(frozen), frozen, None, None, only_x",
           (BACKWARD, HONESTY, "-k", "layer_norm or norm")),
    Mutant("frozen layer norm keeps its mean", PRUNED, "backward.py",
           'frozen = rstd.reshape(*rstd.shape, *[1] * len(args[0]))\n        return aten.native_layer_norm_backward',
           'frozen = rstd.reshape(*rstd.shape, *[1] * len(args[0]))\n        return grad * frozen\n        return aten.native_layer_norm_backward',
           (BACKWARD, HONESTY, "-k", "layer_norm or norm")),
    Mutant("attention's backward forgets the scale", FACTOR, "backward.py",
           "q[i : i + step] * scale", "q[i : i + step]", (BACKWARD, "-k", "attention")),
    Mutant("attention's backward forgets the mask", DEGREE, "backward.py",
           "if mask is None or index is None:", "if True:", (BACKWARD, "-k", "attention")),
    Mutant("attention's backward forgets causality", DEGREE, "backward.py",
           "    if is_causal:\n", "    if False:\n", (BACKWARD, "-k", "attention")),
    Mutant("shared heads are averaged", FACTOR, "backward.py",
           "dv.unflatten(-3, (ctx.value_shape[-3], -1)).sum(-3)", "dv.unflatten(-3, (ctx.value_shape[-3], -1)).mean(-3)",
           (BACKWARD, "-k", "attention")),
    # ------------------------------------------------------------------ balance, biases
    Mutant("pruned edges are not cut", PRUNED, "balance.py",
           "_wrap_edge(copied, node, edit.argument, aten.detach.default)",
           "_wrap_edge(copied, node, edit.argument, aten.alias.default)", (CHECK, BALANCE, HONESTY)),
    Mutant("a node's scale is squared", TWICE, "balance.py",
           "(node, float(edit.factor))", "(node, float(edit.factor) ** 2)", (CHECK, BALANCE)),
    Mutant("secants are left out", PRUNED, "balance.py",
           "            node.target = backward.secant\n", "            node.args = node.args[1:]\n", (CHECK, BALANCE)),
    Mutant("f(0) contributes nothing", LEAF, "bias.py",
           "zero = torch.zeros_like(values[operand])", "return torch.zeros_like(output)",
           (FULLGRAD, CHECK, DERIVE, BALANCE)),
    Mutant("an active bound contributes nothing", LEAF, "bias.py",
           "return output.masked_fill(chosen, 0.0)", "return torch.zeros_like(output)", (FULLGRAD, CHECK, "tests/test_operators.py")),
    # ------------------------------------------------------------------ verdict
    Mutant("zero outputs pass", VERDICT, "check.py",
           "            if magnitude == 0.0:\n                return None", "            if magnitude == 0.0:\n                return 0.0",
           (CHECK,)),
    Mutant("the end to end residual is not looked at", VERDICT, "check.py",
           "        elif worst > self.tolerance:", "        elif worst < 0:", ("tests/test_traps.py",)),
    Mutant("local residuals are not looked at", VERDICT, "check.py",
           "if sound and not error <= LOCAL_TOLERANCE:", "if False:", (CHECK,)),
    Mutant("probabilities pass", VERDICT, "check.py",
           "if target_name(head.target) in _PROBABILITIES:", "if False:", (CHECK,)),
    Mutant("dead inputs pass", VERDICT, "check.py",
           "            elif source not in self.labels.alive:", "            elif False:", (CHECK,)),
    Mutant("parameters stay as they are", VERDICT, "numeric.py",
           "                tensor.add_(noise", "                tensor.mul_(1.0).add_(0 * noise", (CHECK,)),
    Mutant("casts limit the audit", VERDICT, "numeric.py",
           "return _WIDE.get(argument, argument) if isinstance(argument, torch.dtype) else argument",
           "return argument", (CHECK,)),
    Mutant("a local residual ignores its bias leaves", VERDICT, "numeric.py",
           "left += sum(inner(c, b) for (_, c, _), b in zip(kept, maps, strict=False))", "left += 0", (CHECK,)),
    Mutant("another plan fits", VERDICT, "plan.py",
           "if self.fingerprint != fingerprint(graph):", "if False:", ("tests/test_plan.py",)),
    # ------------------------------------------------------------------ trace
    Mutant("no_grad blocks carry gradient", LIVENESS, "functionalise.py",
           "    if not enabled:\n", "    if False:\n", (FUNCTIONAL, CHECK)),
    Mutant("one argument for two equal tensors", FORWARD, "trace.py",
           "return tensor.clone() if again or tensor.is_inference() else tensor", "return tensor",
           ("tests/test_traps.py", FUNCTIONAL, DERIVE)),
    Mutant("any batch size goes", FORWARD, "trace.py",
           "if _any_batch(program) and _same_calls(module, more, named):", "if True:",
           ("tests/test_traps.py",)),
    # ------------------------------------------------------------------ integrals, black boxes, shares
    Mutant("an integral's f(0) at any degree", LEAF, "operators/base.py",
           "for name in sorted(moving)), domain=(1,))", "for name in sorted(moving)))", (INTEGRATE, PROOFS, DERIVE)),
    Mutant("a quadrature without its weights", FACTOR, "quadrature.py",
           "g * float(weight * (b - a) / 2)", "g * float((b - a) / 8)", (INTEGRATE,)),
    Mutant("a quadrature takes one half twice", FACTOR, "quadrature.py",
           "self.estimate(pull, m, b)", "self.estimate(pull, a, m)", (INTEGRATE,)),
    Mutant("an integral that does not converge is silent", VERDICT, "quadrature.py",
           "        if missed > EXCESS * self.residual * scale or unsure >", "        if unsure > float('inf') *", (INTEGRATE,)),
    Mutant("a logarithm is integrated", CLASS, "operators/smooth.py",
           "    register(_name, Algebra.SINGULAR)", "    register(_name, Algebra.SMOOTH)", (INTEGRATE, DERIVE, PROOFS)),
    Mutant("a scaled edge keeps its degree", FACTOR, "degrees.py",
           "scaled = {e.argument: e.factor for e in edits if isinstance(e, Scale)}",
           "scaled: dict[str | None, Fraction] = {}", ("tests/test_traps.py", HONESTY, CHECK)),
    Mutant("shapes are values", LIVENESS, "degrees.py",
           "        and o.name not in op.shapes\n", "", ("tests/test_traps.py", "tests/test_fuzz.py", OPERATORS)),
    Mutant("the input's share is not asked for", VERDICT, "check.py",
           "said = self.problems if share < self.least_share else self.notes", "said = self.notes", (CHECK, "tests/test_traps.py")),
    Mutant("NaN is no error", VERDICT, "numeric.py",
           'key=lambda e: float("inf") if math.isnan(e) else e', 'key=lambda e: -1.0 if math.isnan(e) else e',
           ("tests/test_traps.py", CHECK)),
    Mutant("random models are let in", VERDICT, "degrees.py", "and _is_random(node)", "and False", ("tests/test_traps.py",)),
    Mutant("alternatives need not be minimal", SEARCH, "derive.py",
           "        minimal = smaller is None or smaller.cost == answer.cost", "        minimal = True",
           ("tests/test_alternatives.py",)),
    Mutant("a black box is proved", VERDICT, "check.py",
           "self.verdicts[name], self.reasons[name] = Verdict.NUMERIC, op.note",
           "self.verdicts[name], self.reasons[name] = Verdict.PROVED, op.note", ("tests/test_userops.py",)),
)  # fmt: skip
