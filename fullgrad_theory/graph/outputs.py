"""What a model returns: which tensors of it are judged, and what of the rest is carried along.

Nothing selected: of what has names, the entries that are logits; of a `ModelOutput` without any,
`last_hidden_state`, or its first tensor that is no loss. Of all else every floating-point tensor,
but those of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import FullgradError, InputError
from .forms import Form, Path, form_of, is_named, is_value, leaves_of, parts, plain, same_form
from .sources import first_line

Selection = str | int | Callable[[Any], Any] | Sequence["str | int"] | None
"""a name, a position, a function of what the model returns; several names or positions"""


@dataclass(frozen=True)
class Reading:
    """What of a model's output is judged, as one call showed it.

    `judged`: places among the leaves of its plain form, of which `spec` is the structure; `form`:
    how to make what the model returned of that, None where it is that. `names`: the paths of what
    is judged; `aside`: of tensors that are not; `lost`: of what cannot be returned, as a cache.
    """

    selection: Selection = None
    judged: tuple[int, ...] = ()
    spec: Any = None
    form: Form | None = None
    names: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def tensors(self, output: Any) -> list[Tensor]:
        """The tensors that are judged of what a call of the model itself returned."""
        chosen = selected(output, self.selection)
        wanted = {*judged_paths(chosen)}
        return [leaf for path, leaf in leaves_of(chosen) if path in wanted]

    def returned(self, values: Any) -> Any:
        """What the model returns, of its plain form."""
        return values if self.form is None else self.form.restored(values)

    def alone(self, judged: Any) -> Any:
        """The same of the judged tensors alone; the rest is None."""
        flat: list[Any] = [None] * self.spec.num_leaves
        for place, value in zip(self.judged, pytree.tree_leaves(judged), strict=True):
            flat[place] = value
        return pytree.tree_unflatten(flat, self.spec)


@dataclass
class Watch:
    """A hook on a model's outermost call, which selects; `reading` is what it saw last."""

    name: str
    selection: Selection = None
    reading: Reading = field(default_factory=Reading)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        chosen = selected(output, self.selection)
        made, wanted = plain(chosen), judged_paths(chosen)
        leaves = list(leaves_of(chosen))
        if self.selection is not None and not wanted:
            raise InputError(
                f"output={_shown(self.selection)} of {self.name} holds no floating-point tensor; "
                f"it returns {described(output)}"
            )
        if not wanted:  # a hook that returns None changes nothing: it cannot be left to the trace
            raise InputError(
                f"{self.name} returns no floating-point tensor, but {described(output)}; there is "
                "nothing to attribute, unless output= takes a tensor out of it"
            )
        floats = [path for path, leaf in leaves if _is_ray(leaf)]
        lost = [path for path, leaf in leaves if not is_value(leaf)]
        aside = [p for p in floats if p not in wanted]
        self.reading = Reading(
            self.selection,
            tuple(i for i, (path, _) in enumerate(leaves) if path in wanted),
            pytree.tree_structure(made),
            _form(chosen),
            tuple(map(_dotted, wanted)),
            tuple(map(_dotted, aside)),
            tuple(map(_dotted, lost)),
        )
        return made


def judged_paths(value: Any) -> list[Path]:
    """The paths of the tensors that are judged where nothing is selected."""
    return list(dict.fromkeys(_judged(value, ())))


def _judged(value: Any, path: Path) -> Iterator[Path]:
    held = parts(value)
    if held is None:
        if _is_ray(value):
            yield path
        return
    floats = [(n, v) for n, v in held if any(_is_ray(leaf) for _, leaf in leaves_of(v))]
    if is_named(value):
        for chosen in _by_name(value, floats):
            yield from (
                (*path, *inner)
                for name, part in chosen
                for inner, leaf in leaves_of(part, (name,))
                if _is_ray(leaf)
            )
            return
    for name, part in floats:
        yield from _judged(part, (*path, name))


def _by_name(value: Any, floats: list[tuple[Any, Any]]) -> Iterator[list[tuple[Any, Any]]]:
    """The parts that are the answer by their names, the surest first."""
    yield from filter(
        None,
        (
            [(n, v) for n, v in floats if n == "logits"],
            [(n, v) for n, v in floats if "logits" in str(n)],
            [(n, v) for n, v in floats if n == "last_hidden_state"],
        ),
    )
    if isinstance(value, Mapping) and is_dataclass(value):
        yield [(n, v) for n, v in floats if n != "loss"][:1] or floats


def selected(output: Any, selection: Selection) -> Any:
    """What a user's `output=` takes of what the model returned; raises `InputError`."""
    if selection is None:
        return output
    if callable(selection):
        try:
            return selection(output)
        except FullgradError:
            raise
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"output= raised {first_line(error)} on what the model returns, {described(output)}"
            ) from error
    if isinstance(selection, (tuple, list)):
        return tuple(selected(output, one) for one in selection)
    if isinstance(selection, int) and not isinstance(selection, bool):
        return _at(output, selection)
    if not isinstance(selection, str):
        raise InputError(
            f"output={selection!r}: pass a name, a position, several of them, or a function of "
            "what the model returns"
        )
    found = output
    for name in selection.split("."):
        found = _named(found, name, selection)
    return found


def _at(output: Any, place: int) -> Any:
    held = [(0, output)] if isinstance(output, Tensor) else parts(output) or []
    if not -len(held) <= place < len(held):
        raise InputError(f"output={place}: the model returns {described(output)}")
    return held[place][1]


def _named(value: Any, name: str, selection: str) -> Any:
    held = dict(parts(value) or ())
    if name in held:
        return held[name]
    if name.isdecimal() and int(name) in held:
        return held[int(name)]
    if held and not isinstance(value, Tensor) and hasattr(value, name):
        return getattr(value, name)
    raise InputError(f"output={selection!r}: there is no {name!r} in {described(value)}")


def described(output: Any) -> str:
    """A container for a reader: `CausalLMOutput(logits, past_key_values)`."""
    held = parts(output)
    if held is None:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        kind = "a tensor" if isinstance(output, Tensor) else f"an object {type(output).__name__}"
        return kind + shape
    return f"{type(output).__name__}({', '.join(str(name) for name, _ in held)})"


def _form(value: Any) -> Form | None:
    form = form_of(value)
    return None if form is None or same_form(form) else form


def _is_ray(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "the output"


def _shown(selection: Selection) -> str:
    return getattr(selection, "__name__", "") if callable(selection) else repr(selection)
