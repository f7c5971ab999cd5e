"""Foreign errors: what the user's code, or torch, raises becomes an error of this library's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from ..errors import FullgradError, InputError
from .sources import first_line, raised_at


@contextmanager
def met(what: str, way_out: str = "", unless: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever the user's code raises within is an `InputError`: what failed, with what, and where.

    `SystemExit` and the like included, as `sys.exit(0)` in a forward is no verdict; Ctrl-C is not,
    and what `unless` names passes.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (FullgradError, KeyboardInterrupt, *unless)):
            raise
        raise InputError(told(what, error, way_out)) from without_page(error)


P = ParamSpec("P")
T = TypeVar("T")


def ours(function: Callable[P, T]) -> Callable[P, T]:
    """Foreign errors out of the user's code, wherever it is called from, are an `InputError`.

    What is raised elsewhere is a fault of this library, and stays what it is.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (FullgradError, KeyboardInterrupt):
            raise
        except BaseException as error:
            if not raised_at(error):
                raise
            raise InputError(told("the model's code fails", error)) from without_page(error)

    return guarded


def told(what: str, error: BaseException, way_out: str = "") -> str:
    """`'what: KeyError: 'boom' (at model.py:12); way out'`, in one line."""
    at = raised_at(error)
    text = f"{what}: {first_line(error)}" + (f" (at {at})" if at else "")
    return f"{text}; {way_out}" if way_out else text


_PAGES = ("\n\nWhile executing ", "\n\nThe error above occurred when calling torch.export")


def without_page(error: BaseException) -> BaseException:
    """The error without the page on the graph that torch writes behind what it says."""
    if error.args and isinstance(error.args[0], str):
        text = error.args[0]
        for page in _PAGES:
            text = text.split(page)[0]
        if text != error.args[0]:
            error.args = (text, *error.args[1:])
    return error
