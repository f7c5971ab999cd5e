"""Where a node comes from: the submodule, and the line of the user's code."""

from __future__ import annotations

import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

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


_OURS = (f"{_HERE}/", f"{_TORCH}/")
_STANDARD = (sysconfig.get_path("stdlib"), "<")


def _distance(file: str) -> int:
    """0 for the user's own code, 1 for a library, 2 for torch, this package and Python itself."""
    if file.startswith(_OURS):
        return 2
    if {"site-packages", "dist-packages"} & set(Path(file).parts):
        return 1
    return 2 if file.startswith(_STANDARD) else 0


def frames_of(error: BaseException) -> Iterator[tuple[FrameType, int, int]]:
    """Frame, line and instruction of each step to where an error was raised, innermost last."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno, step.tb_lasti
        step = step.tb_next


def raised_at(error: BaseException) -> str:
    """The innermost line of the user's code, rather than of a library they call; "" if none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shorten(error.filename)}:{error.lineno}"
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    least = min((_distance(file) for file, _ in frames), default=2)
    theirs = [f"{shorten(file)}:{line}" for file, line in frames if _distance(file) == least]
    return theirs[-1] if least < 2 else ""


def is_written_outside(file: str) -> bool:
    """Whether a file is neither torch's, nor this library's, nor Python's own."""
    return _distance(file) < 2


def said(error: BaseException) -> str:
    """What an error says; an error may fail even at that."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  it is the user's class
        return ""


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = [line.strip() for line in said(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
