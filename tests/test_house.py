"""The house rules, as tests: style, types, who imports whom, and documents that do not lie."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
DOCUMENTS = (
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
    *TUTORIALS,
)
BINARY = {".png", ".jpg", ".pt", ".npz"}


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"$ {' '.join(command)}\n{done.stdout}\n{done.stderr}"


def tool(name: str) -> str:
    """A command line tool of the environment the tests run in."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: pip install -e '.[test]'"
    return found


def test_ruff_finds_nothing() -> None:
    run(tool("ruff"), "check", ".")


def test_ruff_would_format_nothing() -> None:
    run(tool("ruff"), "format", "--check", ".")


@pytest.mark.slow
def test_types(tmp_path: Path) -> None:
    run(sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path))


def test_rooms_import_only_rooms_before_them() -> None:
    run(tool("lint-imports"), "--no-cache")


def test_every_module_has_a_docstring() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "fullgrad_theory").rglob("*.py")
        if not path.read_text().startswith('"""')
    ]
    assert not bare


def modules() -> list[Path]:
    return sorted((ROOT / "fullgrad_theory").rglob("*.py"))


def test_no_module_defines_its_own_name() -> None:
    """Or `from .trace import trace` would hide the module behind the function."""
    twice = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == path.stem
    ]
    assert not twice


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of the strings that stand alone: of modules, classes, functions and values."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def test_only_the_tables_and_the_evidence_name_operations() -> None:
    """A room asks for a role or a class; what an operation is stands in its record alone."""
    named = []
    for path in modules():
        if path.relative_to(ROOT / "fullgrad_theory").parts[0] in ("operators", "testing"):
            continue
        tree = ast.parse(path.read_text())
        words = docstrings(tree)
        named += [
            f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.search(r"\baten\.\w+\.\w+", node.value)
            and id(node) not in words
        ]
    assert not named


def test_the_package_is_typed() -> None:
    assert (ROOT / "fullgrad_theory" / "py.typed").exists()


def test_public_names_exist() -> None:
    import fullgrad_theory

    missing = [n for n in fullgrad_theory.__all__ if not hasattr(fullgrad_theory, n)]
    assert not missing


# --------------------------------------------------------------------------- documents


def shell_blocks(document: Path) -> list[str]:
    return re.findall(r"```(?:sh|bash|console)\n(.*?)```", document.read_text(), flags=re.S)


def test_the_first_screen_has_the_two_commands() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "fullgrad-theory check vit_tiny_patch16_224" in screen
    assert "python -m pytest" in screen
    assert screen.count("python3 -m venv .venv && ") == 2


def test_ci_runs_the_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    text = script.read_text()
    assert "set -euo pipefail" in text
    commands = [
        line
        for block in shell_blocks(ROOT / "README.md")
        for line in block.splitlines()
        if "-m pytest" in line
    ]
    assert commands and commands[0] in text.splitlines()


def test_constraints_hold_versions_only_and_cover_what_is_needed() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pinned = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert all(pinned), "a line is not name==version"
    names = {m[1].lower() for m in pinned if m}
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    needed = [*project["dependencies"], *(line for extra in extras for line in extra)]
    wanted = {re.split(r"[<>=!~ \[]", requirement)[0] for requirement in needed}
    assert wanted - {project["name"]} <= names


def test_the_first_command_installs_what_it_needs() -> None:
    """And no more; a pip that knows no extra of that name would only warn."""
    (first, second) = re.findall(r"install -e '\.\[(\w+)\]'", (ROOT / "README.md").read_text())[:2]
    assert (first, second) == ("vision", "test")
    assert {first, second} <= set(PROJECT["project"]["optional-dependencies"])


def python_blocks() -> list[tuple[str, str]]:
    """Of all documents but tutorials, whose blocks are one session: test_tutorials.py."""
    return [
        (f"{document.name}-{index}", block)
        for document in DOCUMENTS
        if document not in TUTORIALS
        for index, block in enumerate(
            re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.S)
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", [pytest.param(b, id=name) for name, b in python_blocks()])
def test_python_in_the_documents_runs(block: str, tmp_path: Path) -> None:
    """Each block stands by itself, in a process of its own (one registers an operation)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_links_within_the_documents_exist() -> None:
    dead = [
        f"{document.name}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not dead


def anchors(document: Path) -> set[str]:
    """What a link may name within a document: its headings, as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_to_headings_exist() -> None:
    dead = [
        f"{document.name}: {target}#{anchor}"
        for document in DOCUMENTS
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text())
        if anchor not in anchors(document.parent / target if target else document)
    ]
    assert not dead


def test_files_named_in_the_documents_exist() -> None:
    """By their path, or its end; the changelog also names what is gone, a tutorial what the reader
    saves."""
    files = [f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*") if ".venv" not in path.parts]
    lost = [
        f"{document.name}: {name}"
        for document in DOCUMENTS
        if document.name != "CHANGELOG.md"
        for name in re.findall(r"`([\w./]+\.(?:pyi?|md|toml|txt))`", document.read_text())
        if not any(file.endswith(f"/{name}") for file in files)
        and f'title="{name}"' not in document.read_text()
    ]
    assert not lost


def test_every_page_can_be_reached() -> None:
    linked = "".join(document.read_text() for document in DOCUMENTS)
    lost = [d.name for d in DOCUMENTS if d.name != "README.md" and f"{d.name}" not in linked]
    assert not lost


def test_every_planted_fault_finds_its_place() -> None:
    """What is replaced stands once in its file: a fault that is not planted proves nothing."""
    sys.path.insert(0, str(ROOT / "experiments" / "mutants"))
    from table import MUTANTS

    lost = [
        m.name
        for m in MUTANTS
        if (ROOT / "fullgrad_theory" / m.file).read_text().count(m.find) != 1
    ]
    assert not lost, lost


def test_no_machine_is_named() -> None:
    """Neither a path of one machine nor the address of a registry is in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    telling = re.compile(r"/(?:home|Users|root|work|opt)/\w|--(?:extra-)?index-url|--find-links")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file() or path.suffix in BINARY:
            continue
        text = path.read_text(errors="replace")
        found += [f"{name}: {m[0]}" for m in telling.finditer(text)]
    assert not found
