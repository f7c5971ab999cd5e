"""What bias leaves contribute to a call's results: J_b b, as maps of the results' shapes.

Autograd gives nothing for Python scalars, clamp bounds, padding, `running_mean` or f(0), and one
parameter can be coefficient and bias at once; so the contribution is taken at the call. A reader is
`reader(running, output)`; the class of an operation brings one, and its entry may bring another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .calls import Running, is_ray, origin
from .relations import polynomial

Reader = Callable[[Running, Tensor], Tensor]
"""(call at run time, its first result) -> J_b b, broadcastable to that result"""


def origins(running: Running) -> list[Tensor]:
    """f(0) of every output: the operation with its moving operands at 0.

    An infinite entry is a mask's, which restricts the domain: it stays as it is.
    """
    return running.at({n: origin(v) for n, v in running.moving.items()})


def at_origin(running: Running, output: Tensor) -> Tensor:
    """f(0) of an elementwise operation."""
    operand = next(iter(running.call.moving))
    zero = torch.zeros_like(running.values[operand])
    return running.at({operand: zero})[0]


def at_zero(running: Running, output: Tensor) -> Tensor:
    """What an affine operation gives where everything live that it multiplies is 0."""
    relations = polynomial(running.call.operator.signature, running.call) or ()
    factors = {n for r in relations for term in r.terms for n, power in term if power > 0}
    return running.at({n: torch.zeros_like(running.values[n]) for n in factors})[0]


def intercepts(running: Running, output: Tensor) -> Tensor:
    """v - J u of an elementwise operation of linear pieces: what its piece has at u = 0."""
    ((name, operand),) = running.moving.items()
    with torch.enable_grad():
        leaf = operand.detach().requires_grad_()
        (slope,) = torch.autograd.grad(running.at({name: leaf})[0].sum(), leaf)
    return output - slope * operand


def selected(running: Running, output: Tensor) -> Tensor:
    """Where the value chosen is a constant (a clamp's bound) that constant, elsewhere 0.

    Constants that are tensors may share an element with live values between equals, and a distance
    has no element to choose: there it is the derivative along the constants.
    """
    held = [n for n, v in running.values.items() if n not in running.call.moving and is_ray(v)]
    if held:
        return along_constants(running, output)
    # the slope itself: at a bound, torch gives clamp's operand all and hardtanh's nothing
    with torch.enable_grad():
        ((name, operand),) = running.moving.items()
        leaf = operand.detach().requires_grad_()
        value = running.at({name: leaf})[0]
        slope = torch.autograd.grad(value.sum(), leaf)[0]
    return output.masked_fill(slope != 0, 0.0)


def along_constants(running: Running, output: Tensor) -> Tensor:
    """J_b b by the operation's own derivative as its constant tensors b grow."""
    return _grown(running, lambda replaced: running.at(replaced)[0])


def _grown(running: Running, value: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    moving = running.call.moving
    given = {n: v for n, v in running.values.items() if is_ray(v)}
    tangents = {
        n: torch.zeros_like(v) if n in moving else torch.where(v.isfinite(), v, 0.0)
        for n, v in given.items()
    }

    def along(*tensors: Tensor) -> Tensor:
        return value(dict(zip(given, tensors, strict=True)))

    return torch.func.jvp(along, tuple(given.values()), tuple(tangents.values()))[1]


# --------------------------------------------------------------------------- of single operations


def _bias_alone(by_shape: Reader) -> Reader:
    """A bias that is added as it is has a map without running the operation again."""

    def reader(running: Running, output: Tensor) -> Tensor:
        if running.call.operator.bias_operands(running.call) == ("bias",):
            return by_shape(running, output)
        return at_zero(running, output)

    return reader


@_bias_alone
def bias_of_last(running: Running, output: Tensor) -> Tensor:
    """A bias over the last dimension."""
    bias: Tensor = running.values["bias"]
    return bias


@_bias_alone
def bias_of_kernel(running: Running, output: Tensor) -> Tensor:
    """A convolution's, over the channels, which come first where there is no batch dimension."""
    bias: Tensor = running.values["bias"]
    return bias.reshape(-1, *[1] * (running.values["weight"].dim() - 2))


@_bias_alone
def bias_of_second(running: Running, output: Tensor) -> Tensor:
    """A bias over dimension 1."""
    bias: Tensor = running.values["bias"]
    return bias.reshape(-1, *[1] * (output.dim() - 2))


def shrunk(running: Running, output: Tensor) -> Tensor:
    """softshrink's bound, added to what is not 0."""
    return torch.where(output == 0, 0.0, output - next(iter(running.moving.values())))


def remaining(running: Running, output: Tensor) -> Tensor:
    """remainder and fmod: self - n other, n a whole number."""
    held: Tensor = running.values["self"]
    return output - held if "self" in running.call.moving else held


def of_distances(running: Running, output: Tensor) -> Tensor:
    """cdist, which has no forward derivative, written as a norm of differences."""

    def distances(replaced: dict[str, Tensor]) -> Tensor:
        apart = replaced["x1"].unsqueeze(-2) - replaced["x2"].unsqueeze(-3)
        return torch.linalg.vector_norm(apart, running.values.get("p", 2.0), dim=-1)

    return _grown(running, distances)
