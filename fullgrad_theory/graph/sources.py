"""Where a node comes from: the submodule, and the line of the user's code."""

from __future__ import annotations

import re
import site
import sys
from pathlib import Path

import torch
from torch.fx import Node


def module_path(node: Node) -> str:
    """The innermost submodule a node was traced in, `'blocks.3.attn'`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values()][-1:] or [""]
    return "" if path[0].startswith("_empty_nn") else re.sub(r"@\d+$", "", path[0])


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.*)')
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


def source_frame(node: Node) -> tuple[str, int] | None:
    """File and line of the user's code (not torch's) that made a node."""
    frames = [
        (m["file"], int(m["line"])) for m in _FRAME.finditer(node.meta.get("stack_trace") or "")
    ]
    own = [f for f in frames if is_users(f[0])]
    best = own or frames
    return best[-1] if best else None


def source_line(node: Node) -> str:
    """`'timm/layers/mlp.py:49'`, relative to site-packages or to the working folder."""
    frame = source_frame(node)
    return f"{shorten(frame[0])}:{frame[1]}" if frame else ""


def shorten(file: str) -> str:
    """A path relative to site-packages, else to the working folder, else to an entry of sys.path.

    The working folder goes before a longer entry (`src`): an editor or a CI finds the file again.
    """
    for roots in (site.getsitepackages(), [str(Path.cwd())], sys.path):
        fitting = [r.rstrip("/") for r in roots if r and file.startswith(r.rstrip("/") + "/")]
        if fitting:
            return file[len(max(fitting, key=len)) + 1 :]
    return file


def is_users(file: str) -> bool:
    """Whether a file is neither torch's nor this library's."""
    return not file.startswith((_TORCH, _HERE))


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
