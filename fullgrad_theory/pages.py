"""Pages for a browser: templates filled in, with whatever comes from a model escaped. No torch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _templates() -> Environment:
    import jinja2  # when there is a page to be made

    return jinja2.Environment(
        loader=jinja2.PackageLoader("fullgrad_theory", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def filled(template: str, **values: Any) -> str:
    """A template of the folder `templates` with these values, as HTML that stands by itself.

    Text is escaped; JSON (`tojson`) is made safe inside a script.
    """
    return _templates().get_template(template).render(values)


def framed(page: str, height: int = 640) -> str:
    """A whole page as a part of a notebook, where neither disturbs the other's styles or scripts.

    The frame may run the page's own script and nothing else.
    """
    return _templates().get_template("frame.html").render(page=page, height=height)
