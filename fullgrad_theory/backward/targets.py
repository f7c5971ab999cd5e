"""What of an output is attributed: a target, resolved into one value a sample."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Contrast:
    """Entry `of` of the output less entry `against`, or less the mean of the others in its row."""

    of: Any = None
    against: Any = None


@dataclass(frozen=True)
class SoftmaxWeighted:
    """Entry `of` less the mean of the output under its own softmax, whose weights are held: the
    gradient of log softmax(z)[of], sum_c (1[c = of] - p_c) z_c (LibraGrad's main tables)."""

    of: Any = None


def contrast(of: Any = None, against: Any = None) -> Contrast:
    """The target "`of` rather than `against`": z[of] - z[against]; where that is None, the mean of
    the other entries along the last dimension.

    Both as any target that names entries; `of=None` is the prediction. A negative contribution
    speaks for `against`. Example: `fullgrad(balanced, x, contrast("prediction", 281))`.
    """
    return Contrast(of, against)


def softmax_weighted(of: Any = None) -> SoftmaxWeighted:
    """The target z[of] - sum_c p_c z_c, p = softmax(z) over the last dimension, held fixed.

    `of=None` is the prediction. Its gradient by z is that of log softmax(z)[of], which LibraGrad's
    main tables differentiate.
    """
    return SoftmaxWeighted(of)


Target = (
    int | str | Sequence[Any] | Tensor | Callable[[Tensor], Tensor] | Contrast | SoftmaxWeighted
) | None
"""What is attributed of an output (batch, *rest).

None or "prediction": the largest entry of each sample. An int: that entry, where rest is one
dimension. A tuple of ints: one index a dimension of rest. A list, tensor or array of whole numbers:
one a sample; of tuples, or of shape (batch, len(rest)): one tuple a sample. A boolean mask or
weights of shape rest or (batch, *rest): the weighted sum. A callable: its value of the output,
(batch,). `contrast` and `softmax_weighted`: two targets of several entries.
"""


@dataclass(frozen=True)
class Chosen:
    """A target resolved for some samples. `places`: one index tensor (n,) for each dimension of
    rest; `weights`: (n, *rest), held, in their place or beside them."""

    places: tuple[Tensor, ...] | None = None
    weights: Tensor | None = None
    function: Callable[[Tensor], Tensor] | None = None
    samples: int = 1

    @property
    def index(self) -> Tensor | None:
        """The entry of each sample, (n,), where rest is one dimension and one entry is named."""
        return self.places[0] if self.places is not None and len(self.places) == 1 else None

    def of(self, output: Tensor) -> Tensor:
        """The value of each sample, (n,); of a complex output its real part."""
        if self.function is not None:
            return _called(self.function, output, self.samples)
        output = output.real if output.is_complex() else output
        if self.weights is not None:
            held = torch.where(self.weights != 0, output, 0.0)  # 0 times a mask's -inf is nothing
            return (self.weights * held).flatten(1).sum(1)
        if not self.places:
            return output
        rows = torch.arange(output.shape[0], device=output.device)
        return output[(rows, *self.places)]

    def sample(self, k: int) -> Chosen:
        """The same for the k-th sample alone, repeated over however many rows it is asked of."""
        places = None if self.places is None else tuple(p[k : k + 1] for p in self.places)
        weights = None if self.weights is None else self.weights[k : k + 1]
        return Chosen(places, weights, self.function, 1)

    def expanded(self, count: int) -> Chosen:
        """One sample's target for `count` rows."""
        places = None if self.places is None else tuple(p.expand(count) for p in self.places)
        return Chosen(places, self.weights, self.function, count)


def resolve(target: Target, output: Tensor) -> Chosen:
    """A target of an output (n, *rest), samples in front; raises `InputError`, see `Target`."""
    count, rest = output.shape[0], tuple(output.shape[1:])
    if callable(target) and not isinstance(target, Tensor):
        return Chosen(function=target, samples=count)
    if isinstance(target, Contrast):
        return _contrasted(target, output)
    if isinstance(target, SoftmaxWeighted):
        return _softmax_weighted(target, output)
    if target is None or (isinstance(target, str) and target == "prediction"):
        return Chosen(_predicted(output))
    if isinstance(target, str):
        raise InputError(
            f"a target is a whole number, or one a sample, not {target!r}; in words there is "
            "'prediction' alone"
        )
    if isinstance(target, tuple) and all(_is_index(t) for t in target):
        indices = torch.tensor([[operator.index(t) for t in target]] * count)
        return Chosen(_places(indices.reshape(count, len(target)), target, output))
    values = _as_tensor(target, output.device)
    if values.dtype == torch.bool or values.is_floating_point():
        return Chosen(weights=_weights(values, target, output))
    if values.is_complex():
        raise InputError("weights of an output are real numbers")
    if values.dim() == 0:
        return Chosen(_places(values.expand(count, 1), target, output))
    if values.shape[0] != count:
        raise InputError(
            f"{values.shape[0]} targets, not one for each of the {count} samples; a tuple has one "
            "index for each dimension behind the batch"
        )
    if values.dim() == 1:
        return Chosen(_places(values[:, None], target, output))
    if values.dim() == 2 and values.shape[1] == len(rest):
        return Chosen(_places(values, target, output))
    raise InputError(
        f"whole numbers of shape {tuple(values.shape)} name no entries of an output of shape "
        f"{tuple(output.shape)}: pass one a sample, or ({count}, {len(rest)}) indices; a mask is "
        "boolean, weights are floating-point"
    )


def named_classes(target: Target, output: Tensor) -> Tensor:
    """The class that a target is about, (n,): the one it names, or weighs against others.

    Of an output (n, classes). Raises `InputError` where it names none.
    """
    inner = target.of if isinstance(target, (Contrast, SoftmaxWeighted)) else target
    index = resolve(inner, output).index
    if index is None:
        raise InputError(
            "this target names no class: pass a whole number, one a sample, 'prediction', or a "
            "contrast or softmax_weighted of these"
        )
    return index


def _is_index(value: Any) -> bool:
    if isinstance(value, (bool, float)) or (isinstance(value, Tensor) and value.dim() > 0):
        return False
    try:
        operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return False
    return True


def _as_tensor(target: Any, device: torch.device) -> Tensor:
    if isinstance(target, bool):
        raise InputError(f"a target is a whole number, not {target}")
    if isinstance(target, float):
        raise InputError(f"a target is a whole number, not {target}; weights have a shape")
    try:
        if isinstance(target, (list, tuple)):
            target = [t.tolist() if isinstance(t, Tensor) else t for t in target]
        values = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a target is a whole number, one a sample, a tuple of indices, a mask or weights, or "
            f"a function of the output, not {target!r}"
        ) from error
    if values.dim() == 0 and (values.is_floating_point() or values.dtype == torch.bool):
        raise InputError(f"a target is a whole number, not {values.dtype}")
    return values.to(device)


def _places(indices: Tensor, target: Any, output: Tensor) -> tuple[Tensor, ...]:
    """Indices (n, len(rest)) as one tensor a dimension, negative ones counted from the end."""
    rest = tuple(output.shape[1:])
    sizes = torch.tensor(rest, dtype=torch.long)
    indices = indices.cpu().long()
    bad = indices.shape[1] != len(rest) or bool(((indices < -sizes) | (indices >= sizes)).any())
    if bad:
        raise InputError(f"target {target} is out of range for {_wanted(output)}")
    found = indices.remainder(sizes).to(output.device)
    return tuple(found[:, d] for d in range(len(rest)))


def _wanted(output: Tensor) -> str:
    count, *rest = output.shape
    if not rest:
        return "an output of one value a sample: leave it out"
    if len(rest) == 1:
        return (
            f"{rest[0]} classes: one class below {rest[0]}, or one for each of the {count} samples"
        )
    return (
        f"an output of shape {tuple(output.shape)}: one index below {tuple(rest)} for each "
        "dimension behind the batch"
    )


def _weights(values: Tensor, target: Any, output: Tensor) -> Tensor:
    if tuple(values.shape) not in (tuple(output.shape), tuple(output.shape[1:])):
        kind = "a mask" if values.dtype == torch.bool else "weights"
        raise InputError(
            f"{kind} of shape {tuple(values.shape)} does not fit an output of shape "
            f"{tuple(output.shape)}: give it that shape, or {tuple(output.shape[1:])} for all "
            "samples"
        )
    real = output.real if output.is_complex() else output
    weights = values.detach().to(real.dtype).expand(output.shape)
    if not bool(torch.isfinite(weights).all()):
        raise InputError("weights of an output are finite numbers")
    return weights


def _predicted(output: Tensor) -> tuple[Tensor, ...]:
    rest = output.shape[1:]
    if not rest:
        return ()
    output = output.detach()
    best = (output.real if output.is_complex() else output).flatten(1).argmax(1)
    return tuple(torch.unravel_index(best, rest))


def _one_hot(target: Any, output: Tensor, what: str) -> Tensor:
    """The weights of a target that names entries, or has weights of its own."""
    chosen = resolve(target, output)
    if chosen.function is not None:
        raise InputError(f"{what} is of entries or weights of the output, not of a function")
    if chosen.weights is not None:
        return chosen.weights
    real = output.detach().real if output.is_complex() else output.detach()
    weights = torch.zeros_like(real)
    rows = torch.arange(output.shape[0], device=output.device)
    weights[(rows, *(chosen.places or ()))] = 1.0
    return weights


def _contrasted(target: Contrast, output: Tensor) -> Chosen:
    if output.dim() < 2:
        raise InputError("a contrast needs several values a sample; this output has one")
    of = _one_hot(target.of, output, "a contrast")
    if target.against is not None:
        return Chosen(weights=of - _one_hot(target.against, output, "a contrast"))
    others = of == 0
    count = others.sum(-1, keepdim=True).clamp(min=1)
    return Chosen(weights=torch.where(others, -of.sum(-1, keepdim=True) / count, of))


def _softmax_weighted(target: SoftmaxWeighted, output: Tensor) -> Chosen:
    if output.dim() < 2:
        raise InputError("a softmax needs several values a sample; this output has one")
    of = _one_hot(target.of, output, "the softmax's weighting")
    wide = torch.promote_types(of.dtype, torch.float32)
    real = output.detach().real if output.is_complex() else output.detach()
    probabilities = real.to(wide).softmax(-1).to(of.dtype)
    return Chosen(weights=of - of.sum(-1, keepdim=True) * probabilities)


def _called(function: Callable[[Tensor], Tensor], output: Tensor, count: int) -> Tensor:
    made = function(output)
    if not isinstance(made, Tensor):
        raise InputError(f"a target's function returns a tensor, not {type(made).__name__}")
    made = made.real if made.is_complex() else made
    if made.dim() == 0 and count == 1:
        made = made.reshape(1)
    if tuple(made.shape) != (count,):
        raise InputError(
            f"a target's function returns one number a sample, ({count},), not "
            f"{tuple(made.shape)}; its argument has shape {tuple(output.shape)}"
        )
    return made
