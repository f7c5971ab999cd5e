"""Packages that not everybody needs: each belongs to an extra of this library.

The extras are `vision`, `plots`, `methods`, `measure`, `fuzz` and `text`, which `all` brings, and
`view` and `parquet`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingExtraError

_CALLED = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "model_explorer": "ai-edge-model-explorer",
}
"""what installs a module, where its name is another"""


def require(module: str, extra: str) -> ModuleType:
    """Import `module` ("timm", "timm.data"), which the named extra of this library installs.

    Raises `MissingExtraError` where it, or a package that it needs itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingExtraError(
            f"{_CALLED.get(package, package)} is not installed: "
            f"pip install 'fullgrad-theory[{extra}]'",
            name=error.name,
        ) from error
