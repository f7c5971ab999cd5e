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
SPELLED = "tests/test_one_function.py"
WHOLE = "tests/test_spelled_out.py"
LIARS = "tests/test_liars.py"
HEADS = "tests/test_heads.py"
OWN = "tests/test_own.py"
MEASURED = "tests/test_measured_domain.py"


def _record(name: str, kind: str, op: str, fields: str, suspects: tuple[str, ...]) -> Mutant:
    """A wrong record of one operation: written behind the tables, as they are read."""
    line = "    _add(_operator)\n"
    wrong = f'replace(_REGISTRY["{op}"], {fields})'
    put = f'{line}from dataclasses import replace\n\n_REGISTRY["{op}"] = {wrong}\n'
    return Mutant(name, kind, "operators/registry.py", line, put, suspects)


def _rule(kind: str, op: str, rule: str, wrong: str) -> Mutant:
    """A wrong degree rule of one operation."""
    suspects = (PROOFS, OPERATORS, "-k", op)
    return _record(f"{op}: {rule} as {wrong}", kind, f"aten.{op}", f'signature="{wrong}"', suspects)


DEGREE, CLASS, LIVENESS = "wrong degree", "wrong class", "lost liveness"
FACTOR, ZERO, LEAF = "dropped factor", "secant at 0", "forgotten bias leaf"
TWICE, PRUNED, SEARCH = "rule applied twice", "pruned operand left live", "wrong search"
VERDICT, FORWARD = "wrong verdict", "wrong trace"

MUTANTS: tuple[Mutant, ...] = (
    # ------------------------------------------------------------------ operators
    _rule(DEGREE, "mul.Tensor", "self*other", "self + other"),
    _rule(DEGREE, "matmul.default", "self*other", "self + other"),
    _rule(DEGREE, "div.Tensor", "self/other", "self*other"),
    _rule(DEGREE, "reciprocal.default", "self^-1", "self"),
    _rule(DEGREE, "einsum.default", "*tensors", "tensors"),
    _rule(DEGREE, "cumsum.default", "self", "self^2"),
    _rule(DEGREE, "lerp.Scalar", "self + end", "self"),
    _rule(DEGREE, "bilinear.default", "input1*input2*weight + bias", "input1*input2^2*weight + bias"),
    _rule(LEAF, "linear.default", "input*weight + bias", "input*weight"),
    _rule(LEAF, "conv2d.default", "input*weight + bias", "input*weight"),
    _rule(LEAF, "addmm.default", "mat1*mat2 + self", "mat1*mat2"),
    _rule(LEAF, "addcmul.default", "tensor1*tensor2 + self", "tensor1*tensor2"),
    _rule(DEGREE, "square.default", "self^2", "self"),
    _rule(DEGREE, "sqrt.default", "self^1/2", "self"),
    _rule(DEGREE, "rsqrt.default", "self^-1/2", "self^1/2"),
    _rule(DEGREE, "var.correction", "self^2", "self"),
    _rule(DEGREE, "std.correction", "self", "self^2"),
    _rule(DEGREE, "pow.Tensor_Scalar", "self^exponent", "self"),
    _rule(DEGREE, "hypot.default", "self + other", "self*other"),
    _rule(DEGREE, "maximum.default", "self + other", "self"),
    _rule(LEAF, "clamp.default", "self + min + max", "self + max"),
    _rule(LEAF, "hardtanh.default", "self + min_val + max_val", "self + min_val"),
    _rule(LEAF, "softshrink.default", "self + lambd", "self"),
    _rule(LIVENESS, "max.dim", "self ; -", "- ; -"),
    _rule(DEGREE, "cat.default", "tensors", "*tensors"),
    _rule(DEGREE, "stack.default", "tensors", "*tensors"),
    _rule(LEAF, "where.self", "self + other", "self"),
    _rule(LEAF, "masked_fill.Scalar", "self + value", "self"),
    _rule(LEAF, "constant_pad_nd.default", "self + value", "self"),
    _rule(LEAF, "layer_norm.default", "input*weight + bias", "input*weight"),
    _rule(DEGREE, "rms_norm.default", "input*weight", "input*weight^2"),
    _rule(LEAF, "batch_norm.default", "input*weight + running_mean*weight + bias", "input*weight + bias"),
    _record("sigmoid(0) = 0", LEAF, "aten.sigmoid.default", "origin=0.0", (PROOFS, OPERATORS, "-k", "sigmoid")),
    _record("exp(0) = 0", LEAF, "aten.exp.default", "origin=0.0", (PROOFS, OPERATORS, "-k", "exp.default")),
    _record("softplus(0) = 1", LEAF, "aten.softplus.default", "origin=1.0", (PROOFS, OPERATORS, "-k", "softplus")),
    _record("gelu is linear", CLASS, "aten.gelu.default", "algebra=Algebra.STRUCTURAL", (PROOFS, "-k", "gelu")),
    Mutant("all that is 0 at 0 is linear", CLASS, "operators/tables/elementwise.py",
           "rows(Algebra.ZERO_ORIGIN)", "rows(Algebra.STRUCTURAL)", (PROOFS, "-k", "silu")),
    _record("softmax is linear", CLASS, "aten.softmax.int", "algebra=Algebra.STRUCTURAL",
            (PROOFS, OPERATORS, "-k", "softmax")),
    _record("layer norm is linear", CLASS, "aten.layer_norm.default", "algebra=Algebra.MULTILINEAR",
            (PROOFS, OPERATORS, "-k", "layer_norm")),
    Mutant("comparisons are constants", CLASS, "operators/tables/freezing.py",
           "freezing = rows(Algebra.FREEZING)", "freezing = rows(Algebra.FACTORY)",
           (DERIVE, CHECK, "-k", "opaque or plan or obstacle")),
    Mutant("dropout in training mode is let in", VERDICT, "operators/tables/structural.py",
           'if drops else None', "if False else None", (OPERATORS, CHECK)),
    _record("a linear layer mixes nothing", LEAF, "aten.linear.default", "reader=None, roles=frozenset()",
            ("tests/test_attribution.py",)),
    _record("nothing is a softmax", VERDICT, "aten.softmax.int", "roles=frozenset()", (CHECK, "-k", "probabilit")),
    _record("ids are looked up nowhere", LIVENESS, "aten.embedding.default", "roles=frozenset()", (TRAPS, "-k", "integer")),
    _record("what is written through a slice is lost", FORWARD, "aten.slice.Tensor", "view=None", (FUNCTIONAL,)),
    _record("a slice is a reshape", FORWARD, "aten.transpose.int",
            'view=__import__("fullgrad_theory.operators.views", fromlist=["views"]).RESHAPED', (FUNCTIONAL,)),
    _record("a bias is read off the wrong dimension", LEAF, "aten.group_norm.default",
            'reader=__import__("fullgrad_theory.operators.readers", fromlist=["readers"]).bias_of_last', (OPERATORS, "-k", "what_a_bias_adds")),
    Mutant("register takes any argument", VERDICT, "operators/registry.py",
           "if names is not None and argument not in names:", "if False:", ("tests/test_one_entry.py",)),
    Mutant("register forgets what a class needs", VERDICT, "operators/registry.py",
           "    if lacking:\n", "    if False:\n", ("tests/test_one_entry.py",)),
    # ------------------------------------------------------------------ relations
    Mutant("f(0) at any degree", LEAF, "operators/classes.py",
           "domain = (1,) if op.origin else None", "domain = None", (OPERATORS, DERIVE, PROOFS)),
    Mutant("eps does not count", CLASS, "operators/classes.py",
           "    if eps != 0:", "    if eps is None:",
           (OPERATORS, PROOFS, DERIVE, "-k", "norm")),
    Mutant("1/sigma may be of any degree", DEGREE, "operators/classes.py",
           'plain = tuple(replace(r, zero=(*r.zero, op.normalised)) for r in plain)', "pass",
           (TRAPS, DERIVE, "-k", "norm")),
    Mutant("a norm is linear in a constant input", LEAF, "operators/classes.py",
           '(Mode(None, frozen),) if weighted else (_none(call), Mode("freeze", frozen))',
           "(Mode(None, frozen),)", (TRAPS, DERIVE, "-k", "norm")),
    Mutant("a constant may be added at any degree", LEAF, "operators/relations.py",
           "domain = ((0,) if call.eps else (0, 1)) if constant and not call.chosen else None", "domain = None",
           (DERIVE, OPERATORS, CHECK)),
    Mutant("operands without a rule may have any degree", DEGREE, "operators/relations.py",
           "selectors = tuple(sorted(call.moving - mentioned))", "selectors = ()", (TRAPS, "-k", "sampled")),
    Mutant("a quotient is a product", DEGREE, "operators/relations.py",
           'match["name"], -1 if match["op"] == "/" else 1', 'match["name"], 1', (PROOFS, OPERATORS, "-k", "div")),
    Mutant("smooth operations are consistent anywhere", DEGREE, "operators/classes.py",
           "return Mode(None, (Relation(zero=tuple(sorted(call.moving))),))", "return Mode(None, (Relation(),))",
           (OPERATORS, CHECK, DERIVE)),
    Mutant("attention forgets its keys", DEGREE, "operators/classes.py",
           "sorted(call.moving - {op.vanishes})", 'sorted(call.moving - {op.vanishes, "key"})',
           (DERIVE, PROOFS, CHECK)),
    Mutant("no operand is a bias leaf", LEAF, "operators/record.py",
           "return tuple(dict.fromkeys(names[place] for names in constant_monomials(call)))", "return ()", (CHECK, FULLGRAD, BALANCE)),
    # ------------------------------------------------------------------ degrees
    Mutant("getitem of a tuple is constant", LIVENESS, "plan/states.py",
           "return _item(walk.states[node.all_input_nodes[0].name], node.args[1])", "return (State.CONSTANT,)", (CHECK, DERIVE)),
    Mutant("frozen is constant", LIVENESS, "plan/states.py",
           "return (State.FROZEN,) * len(outputs)", "return (State.CONSTANT,) * len(outputs)", (DERIVE, CHECK)),
    Mutant("a pruned edge keeps its degree", PRUNED, "plan/labelling.py",
           "            fact = Fact(State.FROZEN)\n", "            pass\n", (DERIVE, CHECK)),
    Mutant("a scale is forgotten", FACTOR, "plan/labelling.py", "degree = snapped(natural * factor)", "degree = natural",
           (DERIVE, CHECK)),
    Mutant("an output of degree 1/2 passes", VERDICT, "plan/labelling.py",
           "fact.state is State.LIVE and fact.degree != 1", "fact.state is State.LIVE and fact.degree > 1",
           (DERIVE, CHECK)),
    Mutant("degree 0 is not asked for", DEGREE, "plan/labelling.py",
           "wrong = {n: seen[n].degree for n in relation.zero if seen[n].degree != 0}", "wrong: dict[str, Fraction] = {}", (CHECK, DERIVE)),
    Mutant("nothing is opaque", VERDICT, "plan/labelling.py",
           "return any(frozen) and not all(frozen)", "return False", (CHECK, DERIVE)),
    Mutant("eps is a bias leaf", LEAF, "plan/states.py",
           "if adds_literal(c) and only_divides(graph.nodes[name])", "if False", (DERIVE, CHECK)),
    Mutant("bias leaves at degree 0", LEAF, "plan/labelling.py",
           "relation.domain is not None and natural == 1 and not call.eps",
           "relation.domain is not None and natural == 0 and not call.eps", (CHECK, FULLGRAD)),
    Mutant("attribution does not end at embeddings", LIVENESS, "plan/states.py",
           "finds = of_ids and Role.LOOKUP in known.roles", "finds = False", (TRAPS, "-k", "integer")),
    Mutant("refused calls go on", VERDICT, "plan/states.py", "    if refused:", "    if False:",
           ("tests/test_traps.py",)),
    # ------------------------------------------------------------------ the search
    Mutant("every scale is a half", FACTOR, "plan/solving.py",
           '[Scale(node, 1 / self.degree)]', '[Scale(node, Fraction(1, 2))]', (DERIVE,)),
    Mutant("gradient paths may end anywhere", SEARCH, "plan/programme.py",
           '        self._keep_alive()\n', '', (DERIVE,)),
    Mutant("cuts need no degree", SEARCH, "plan/programme.py",
           'end = self.model.add(degrees[node.live.index(True)] == self.one)', 'end = self.model.add(degrees[node.live.index(True)] >= 0)', (DERIVE,)),
    Mutant("cuts where paths jump over", SEARCH, "plan/problem.py",
           'if reach <= index[name] and node.small == (True,)', 'if node.small == (True,)', (DERIVE,)),
    Mutant("pruning is cheap", SEARCH, "edits/costs.py", '"prune": 30', '"prune": 3', (DERIVE,)),
    Mutant("the dearest plan", SEARCH, "plan/programme.py",
           'self.model.minimize(', 'self.model.maximize(', (DERIVE,)),
    # ------------------------------------------------------------------ gates
    Mutant("gelu's gate is doubled", FACTOR, "operators/gates.py", ".erfc_().mul_(0.5)", ".erfc_()", (GATES,)),
    Mutant("gelu's tanh gate with another slope", FACTOR, "operators/gates.py",
           "math.sqrt(8.0 / math.pi) * u", "math.sqrt(2.0 / math.pi) * u", (GATES,)),
    Mutant("gelu's float32 gate is 0 at 0", ZERO, "operators/gates.py", "nan_to_num_(0.5)", "nan_to_num_(0.0)",
           (GATES,)),
    Mutant("0/0 at 0", ZERO, "operators/gates.py", "small = u.abs() < near", "small = u.abs() < 0", (GATES,)),
    Mutant("sigmoid's gate at 0 is 1/2", ZERO, "operators/gates.py", "return 0.25 * tanh(0.5 * u)", "return 0.5 * tanh(0.5 * u)",
           (GATES,)),
    Mutant("silu saturates early", ZERO, "operators/gates.py",
           "softplus_backward.default(grad, u, 1.0, 40.0)", "softplus_backward.default(grad, u, 1.0, 4.0)",
           (GATES, HONESTY, BACKWARD, "-k", "silu or secant")),
    Mutant("hardswish saturates early", FACTOR, "operators/gates.py", "(u + 3.0).clamp(0.0, 6.0) / 6.0",
           "(u + 3.0).clamp(0.0, 5.0) / 6.0", (GATES,)),
    Mutant("elu forgets input_scale", FACTOR, "operators/gates.py",
           "alpha * scale * input_scale * expm1", "alpha * scale * expm1", (GATES,)),
    Mutant("softplus forgets beta in f(0)", ZERO, "operators/gates.py", "math.log(2.0) / beta if", "math.log(2.0) if", (GATES,)),
    Mutant("gates in 16 bits", ZERO, "operators/gates.py",
           "if u.dtype in (torch.float16, torch.bfloat16):", "if u.dtype is torch.complex32:", (GATES,)),
    # ------------------------------------------------------------------ backward
    Mutant("scale does nothing", FACTOR, "edits/scaling.py", "return grad * ctx.factor, None", "return grad, None",
           (BACKWARD, CHECK)),
    Mutant("scale twice", TWICE, "edits/scaling.py", "return grad * ctx.factor, None",
           "return grad * ctx.factor * ctx.factor, None", (BACKWARD, CHECK)),
    Mutant("frozen rms norm forgets its weight", FACTOR, "operators/norms.py",
           "return (grad * frozen if weight is None else grad * weight * frozen).to(grad.dtype)",
           "return (grad * frozen).to(grad.dtype)", (BACKWARD, "-k", "rms_norm or norm")),
    Mutant("frozen layer norm forgets its weight", FACTOR, "operators/norms.py",
           "torch.zeros_like(frozen), frozen, weight, None, only_x", "torch.zeros_like(frozen), frozen, None, None, only_x",
           (BACKWARD, HONESTY, "-k", "layer_norm or norm")),
    Mutant("frozen layer norm keeps its mean", PRUNED, "operators/norms.py",
           'frozen = rstd.reshape(*rstd.shape, *[1] * len(args[0]))\n        return aten.native_layer_norm_backward',
           'frozen = rstd.reshape(*rstd.shape, *[1] * len(args[0]))\n        return grad * frozen\n        return aten.native_layer_norm_backward',
           (BACKWARD, HONESTY, "-k", "layer_norm or norm")),
    Mutant("attention's backward forgets the scale", FACTOR, "operators/attention_form.py",
           ".to(wide) * scale", ".to(wide)", (BACKWARD, "-k", "attention")),
    Mutant("attention's backward forgets the mask", DEGREE, "operators/attention_form.py",
           "if mask is None or index is None:", "if True:", (BACKWARD, "-k", "attention")),
    Mutant("attention's backward forgets causality", DEGREE, "operators/attention_form.py",
           "    if is_causal:\n", "    if False:\n", (BACKWARD, "-k", "attention")),
    Mutant("shared heads are averaged", FACTOR, "operators/attention_form.py",
           "dv.unflatten(-3, (*own, -1)).sum(-3)", "dv.unflatten(-3, (*own, -1)).mean(-3)",
           (BACKWARD, "-k", "attention")),
    Mutant("attention's blocks see the whole first mask", DEGREE, "operators/attention_form.py",
           "mask[index[i : i + heads], j : j + rows, :seen]", "mask[index[i : i + heads], :rows, :seen]",
           (BACKWARD, "-k", "attention")),
    Mutant("a causal block loses its last key", PRUNED, "operators/attention_form.py",
           "min(source, j + rows) if is_causal", "min(source, j + rows - 1) if is_causal",
           (BACKWARD, "-k", "attention")),
    Mutant("a kernel's log-sum-exp is believed unseen", FACTOR, "operators/attention_form.py",
           "return kept if _MEANS_IT[kernel] else None", "return kept", ("tests/test_fused.py",)),
    Mutant("the Triton kernel forgets its log-sum-exp", FACTOR, "operators/triton_kernels.py",
           "p = tl.exp2(s - lse[None, :])", "p = tl.exp2(s)", ("tests/test_fused.py",)),
    Mutant("a fused projection's first channels are multiplied", FACTOR, "edits/channels.py",
           "weight[ctx.start : ctx.stop]", "weight[: ctx.stop - ctx.start]", ("tests/test_channels.py",)),
    Mutant("a view's dimensions are read in their order", FACTOR, "edits/channels.py",
           "return (*ones, *outer, *inner), start", "return tuple(range(seen.dim())), start", ("tests/test_channels.py",)),
    Mutant("a range of channels is one too short", PRUNED, "edits/channels.py",
           "start, start + count\n", "start, start + count - 1\n", ("tests/test_channels.py",)),
    Mutant("what is written to shared memory is judged", DEGREE, "operators/tables/structural.py",
           "if stride < written:", "if stride < 0:", (HONESTY, "-k", "share_memory")),
    # ------------------------------------------------------------------ balance, biases
    Mutant("pruned edges are not cut", PRUNED, "edits/pruning.py",
           "writing.on_edge(node, self.argument, detach)",
           "writing.on_edge(node, self.argument, torch.ops.aten.alias.default)", (CHECK, BALANCE, HONESTY)),
    Mutant("a node's scale is squared", TWICE, "edits/scaling.py",
           "writing.behind(node, scale, float(self.factor))", "writing.behind(node, scale, float(self.factor) ** 2)", (CHECK, BALANCE)),
    Mutant("secants are left out", PRUNED, "edits/secants.py",
           "            node.target = secant\n", "            node.args = node.args[1:]\n", (CHECK, BALANCE)),
    Mutant("f(0) contributes nothing", LEAF, "operators/readers.py",
           "zero = torch.zeros_like(running.values[operand])", "return torch.zeros_like(output)",
           (FULLGRAD, CHECK, DERIVE, BALANCE)),
    Mutant("an active bound contributes nothing", LEAF, "operators/readers.py",
           "return output.masked_fill(slope != 0, 0.0)", "return torch.zeros_like(output)", (FULLGRAD, CHECK, "tests/test_operators.py")),
    # ------------------------------------------------------------------ verdict
    Mutant("zero outputs pass", VERDICT, "check/gradient.py",
           "        if magnitude == 0.0:", "        if magnitude < 0.0:", (CHECK,)),
    Mutant("the end to end residual is not looked at", VERDICT, "check/verdict.py",
           '    if evidence.error <= bounds.tolerance:\n        return Sum.ADDS_UP', '    if evidence.error >= 0:\n        return Sum.ADDS_UP', ("tests/test_traps.py",)),
    Mutant("local residuals are not looked at", VERDICT, "check/verdict.py",
           'return residual <= LOCAL_TOLERANCE', 'return True', (CHECK,)),
    Mutant("probabilities pass", VERDICT, "check/structure.py",
           '*head_problems(graph, unedited),', '', (CHECK, HEADS)),
    Mutant("dead inputs pass", VERDICT, "check/structure.py",
           '*(words.unreaching_input(s) for s in unreached if s not in unedited.alive),', '', (CHECK,)),
    Mutant("parameters stay as they are", VERDICT, "check/copies.py",
           'tensor.copy_(_moved(tensor, 0.3, generator))', 'pass', (CHECK,)),
    Mutant("casts limit the audit", VERDICT, "check/lifting.py",
           'return WIDE.get(value, value)', 'return value', (CHECK, LIARS)),
    Mutant("a local residual ignores its bias leaves", VERDICT, "check/local.py",
           'return sum(inner(c, b) for (_, c, _), b in zip(ran.outputs, maps, strict=False))', 'return 0.0', (CHECK,)),
    Mutant("another plan fits", VERDICT, "plan/plan.py",
           'if missing or self.fingerprint != fingerprint(graph):', 'if False:', ("tests/test_plan.py",)),
    # ------------------------------------------------------------------ trace
    Mutant("no_grad blocks carry gradient", LIVENESS, "graph/normal.py",
           "    if not enabled:\n", "    if False:\n", (FUNCTIONAL, CHECK)),
    Mutant("one argument for two equal tensors", FORWARD, "graph/door.py",
           "return tensor.clone() if again or tensor.is_inference() else tensor", "return tensor",
           ("tests/test_traps.py", FUNCTIONAL, DERIVE)),
    Mutant("any batch size goes", FORWARD, "graph/tracing.py",
           "        if assumed:\n", "        if False:\n",
           ("tests/test_traps.py",)),
    # ------------------------------------------------------------------ integrals, black boxes, shares
    Mutant("an integral's f(0) at any degree", LEAF, "operators/classes.py",
           "for name in sorted(moving)), domain=(1,))", "for name in sorted(moving)))", (INTEGRATE, PROOFS, DERIVE)),
    Mutant("a quadrature without its weights", FACTOR, "edits/quadrature.py",
           "g * float(weight * (b - a) / 2)", "g * float((b - a) / 8)", (INTEGRATE,)),
    Mutant("a quadrature takes one half twice", FACTOR, "edits/quadrature.py",
           "self.estimate(pull, m, b)", "self.estimate(pull, a, m)", (INTEGRATE,)),
    Mutant("an integral that does not converge is silent", VERDICT, "edits/quadrature.py",
           "        if missed > EXCESS * self.residual * scale or unsure >", "        if unsure > float('inf') *", (INTEGRATE,)),
    Mutant("a logarithm is integrated", CLASS, "operators/tables/smooth.py",
           "rows(Algebra.SINGULAR)", "rows(Algebra.SMOOTH)", (INTEGRATE, DERIVE, PROOFS)),
    Mutant("a scaled edge keeps its degree", FACTOR, "plan/labelling.py",
           "factor = prod((e.multiplies(operand.name) for e in edits), start=ONE)",
           "factor = ONE", ("tests/test_traps.py", HONESTY, CHECK)),
    Mutant("shapes are values", LIVENESS, "plan/states.py",
           "if o.node is not None and o.name not in op.shapes and walk.moves(o.node)", "if o.node is not None and walk.moves(o.node)", ("tests/test_traps.py", "tests/test_fuzz.py", OPERATORS)),
    Mutant("the input's share is not asked for", VERDICT, "check/verdict.py",
           'if share < bounds.least_share:', 'if False:', (CHECK, "tests/test_traps.py")),
    Mutant("NaN is no error", VERDICT, "check/numeric.py",
           'key=lambda e: float("inf") if math.isnan(e) else e', 'key=lambda e: -1.0 if math.isnan(e) else e', ("tests/test_traps.py", CHECK)),
    Mutant("random models are let in", VERDICT, "plan/states.py", "and _is_random(node)", "and False", ("tests/test_traps.py",)),
    Mutant("alternatives need not be minimal", SEARCH, "plan/alternatives.py",
           '        minimal = smaller.cost == answer.cost', '        minimal = True', ("tests/test_alternatives.py",)),
    Mutant("a black box is proved", VERDICT, "check/structure.py",
           'return Judgement(Verdict.NUMERIC, measured.note)', 'return Judgement(Verdict.PROVED, measured.note)', ("tests/test_userops.py",)),
    # ------------------------------------------------------------------ what a liar would like
    Mutant("a number read off a value is constant", LIVENESS, "plan/states.py",
           'return moves and bool(free_unbacked_symbols(node.meta.get("val")))', 'return False', (SPELLED, LIARS)),
    Mutant("a constant that the input selects is a bias", LIVENESS, "plan/jumps.py",
           'return not any(all(map(is_continuous, way)) for way in ways)', 'return False', (SPELLED, LIARS)),
    Mutant("a remainder does not jump", LIVENESS, "operators/tables/homogeneous.py",
           'jumps=lambda arguments: ("other",),', '', (SPELLED, TRAPS)),
    Mutant("every choice jumps", LIVENESS, "plan/jumps.py",
           'return not any(all(map(is_continuous, way)) for way in ways)', 'return True', (SPELLED, LIARS)),
    Mutant("a bias in a divisor is an eps", LEAF, "plan/states.py",
           'literal = any(all(reads[name] is None for name in names) for names in added)', 'literal = True', (SPELLED,)),
    Mutant("a piece has no intercept", LEAF, "operators/readers.py",
           'return output - slope * operand', 'return torch.zeros_like(output)', (SPELLED, FULLGRAD)),
    Mutant("a gate of its own value is any other", SEARCH, "plan/gating.py",
           'return next(n for n in powers if n != value) if value else ""', 'return ""', (SPELLED,)),
    Mutant("functions are not folded", SEARCH, "plan/spelling.py",
           '        if widest is None:', '        if True:', (SPELLED,)),
    Mutant("the own backward is not run", VERDICT, "check/own.py",
           '    if model is None:', '    if True:', (OWN, LIARS)),
    Mutant("the own backward has an allowance", VERDICT, "check/own.py",
           'TOLERANCE = 1e-13', 'TOLERANCE = 1e-2', (OWN, LIARS)),
    Mutant("one norm over all gradients", VERDICT, "check/own.py",
           'rounding.agree(g, _of(traced, name), lambda other, n=name: _of(other, n), values[name])',
           'float((g - _of(traced, name)).norm()) <= 1e-6 * max(float(h.norm()) for h in own.values())', (OWN,)),
    Mutant("the copy's values are not compared", VERDICT, "check/own.py",
           '    if len(outputs) != len(traced.outputs) or not all(', '    if False and not all(', (OWN, LIARS)),
    Mutant("the model's values are not compared", VERDICT, "check/own.py",
           'return Forward.OTHER if _same_bits(plain, again) else Forward.RANDOM', 'return Forward.SAME_BITS', (OWN, LIARS)),
    Mutant("noise leaves the domain", VERDICT, "check/copies.py",
           'return value * (1.0 - part * draw)', 'return value + part * (2 * draw - 1)', (OWN,)),
    Mutant("a degree's exponent is perturbed", VERDICT, "check/copies.py",
           'if tensor.is_floating_point() and key not in stay:', 'if tensor.is_floating_point():', (CHECK, SPELLED)),
    Mutant("what cannot be judged is incomplete", VERDICT, "check/verdict.py",
           'return False if shown or infinite or misses or modified or small else None', 'return False', (OWN,)),
    Mutant("what is taken back is shown", VERDICT, "check/verdict.py",
           'return len(evidence.wholes) > 1 and evidence.error <= ROUNDING', 'return False', (OWN,)),
    Mutant("a measurement is believed once", VERDICT, "plan/measuring.py",
           'if not probe.repeats():', 'if False:', (MEASURED,)),
    Mutant("complex values lose their imaginary part", VERDICT, "plan/probe.py",
           'return torch.view_as_real(value.resolve_conj()) if is_complex else value', 'return value.real if is_complex else value', (MEASURED,)),
    Mutant("a cotangent lies as it comes", FORWARD, "edits/writing.py",
           'if record is None or not record.misreads:', 'if True:', (TRAPS,)),
    # ------------------------------------------------------------------ one function, one verdict
    Mutant("a softmax is known by its value alone", SEARCH, "plan/exponentials.py",
           'return bool(((wanted - slope).abs() <= CLOSE * (1.0 + slope.abs())).all())', 'return True', (SPELLED,)),
    Mutant("softmaxes are taken apart", SEARCH, "plan/exponentials.py",
           'if len(part.entries) == 1 and _is_softmax(part):', 'if False:', (WHOLE,)),
    Mutant("attentions are taken apart", SEARCH, "plan/spelling.py",
           'policy.integrate < (policy.prune or 0)', 'False', (WHOLE,)),
    Mutant("a kernel has the bits of its steps", FORWARD, "operators/steps.py",
           'return _Bits.apply(kernel.detach(), made)', 'return made', ("tests/test_steps.py",)),
    Mutant("a sum keeps its product", SEARCH, "graph/normal.py",
           'return all(_depends(arguments.get(name)) for name in record.together)', 'return False', (WHOLE,)),
    Mutant("what holds at one point is not hit", LIVENESS, "plan/jumps.py",
           'if bool(((before != after) | (here != before) | turn.isnan()).all()):', 'if True:', (SPELLED,)),
    Mutant("a divisor is scaled and scaled back", SEARCH, "plan/problem.py",
           'return any(p < 0 for p in powers) or (bool(inverse) and all(p < 0 for p in inverse))', 'return False', (WHOLE,)),
    Mutant("plans follow the order of evaluation", SEARCH, "plan/problem.py",
           'return [node.name for node in found]', 'return [*self.graph.nodes]', (WHOLE,)),
)  # fmt: skip
