"""What the site shows and no file in docs/ holds; mkdocs calls it, see mkdocs.yml.

- The API: a page a room, from `fullgrad_theory/__init__.pyi` and each room's `__all__`.
- The table of operations, from the registry.
- Documents of other folders that docs/ links to, and what these link to: they are pages too.

Links in docs/*.md are those of the repository, so that they work on a code forge as well; here they
become the site's. What is no document links to the repository, if pyproject.toml has its address
(`[project.urls]`, Repository or Source), and is plain text otherwise.
"""

from __future__ import annotations

import ast
import posixpath
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fullgrad_theory"
DOCUMENTS = {".md", ".png", ".jpg", ".svg"}
FRONT = "README.md"
"""what a forge shows first; the site has docs/index.md"""

ROOMS = {
    "check": "Check: verdicts, reports, certificates",
    "plan": "Plan: degrees, and the edits that mend",
    "edits": "Edits and policies",
    "backward": "Backward: balanced modules and contributions",
    "attribution": "Attribution: maps",
    "metrics": "Metrics: what a map is worth",
    "data": "Data: images with masks",
    "measure": "Measure: methods on sets of images",
    "operators": "Operators: what each operation is",
    "graph": "Graph: a model as a graph",
    "testing": "Testing: random architectures and their properties",
    "errors": "Errors",
}
"""the API's pages, in the order of the menu"""

BESIDES = (
    "check.certificate.Certificate",
    "check.certificate.verify",
    "check.coq.to_coq",
    "measure.results.Results",
    "measure.results.Interval",
)
"""what the documents use, and no `__all__` names"""


# --------------------------------------------------------------------------- pages that are made


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for where, text in _made():
        files.append(File.generated(config, where, content=text))
    for name in _carried(files):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def _made() -> Iterator[tuple[str, str]]:
    names = _public()
    yield "api/index.md", _contents(names)
    for room, title in _rooms(names).items():
        yield f"api/{room}.md", _room(room, title, names)
    yield "api/table.md", _table()


def _rooms(names: dict[str, str]) -> dict[str, str]:
    """The pages of the API, with those of rooms that have public names and no title here."""
    return ROOMS | {room: room.capitalize() for room in names.values() if room not in ROOMS}


def _public() -> dict[str, str]:
    """Public names -> the room that they come from."""
    stub = ast.parse((ROOT / PACKAGE / "__init__.pyi").read_text())
    return {
        alias.name: str(line.module).split(".")[0]
        for line in stub.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }


def _own(room: str) -> list[str]:
    """What a room's `__all__` names, or all public classes where it is one file."""
    folder = ROOT / PACKAGE / room
    if not folder.is_dir():
        tree = ast.parse(folder.with_suffix(".py").read_text())
        return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    for line in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            return list(ast.literal_eval(line.value))
    return []


def _contents(names: dict[str, str]) -> str:
    rows = "".join(
        f"| [{title}]({room}.md) | "
        + ", ".join(f"[`{n}`][{PACKAGE}.{n}]" for n, home in names.items() if home == room)
        + " |\n"
        for room, title in _rooms(names).items()
    )
    return (
        "# The API\n\nThe names in this table are those of the package itself: `import "
        f"{PACKAGE} as fgt`, then `fgt.check_completeness`. Each page also has what its room "
        "offers besides, by its full path. [Table of operations](table.md): all that the registry "
        f"knows.\n\n| room | names |\n|---|---|\n{rows}"
    )


def _room(room: str, title: str, names: dict[str, str]) -> str:
    paths = [name for name, home in names.items() if home == room]
    paths += [f"{room}.{name}" for name in _own(room) if name not in names]
    paths += [path for path in BESIDES if path.split(".")[0] == room]
    return f"# {title}\n\n" + "".join(f"::: {PACKAGE}.{path}\n\n" for path in paths)


def _table() -> str:
    from fullgrad_theory.operators.classes import CLASSES
    from fullgrad_theory.operators.registry import registered

    known = list(registered())
    text = (
        "# Table of operations\n\n"
        f"The {len(known)} operations of the registry, by class; `fullgrad-theory operators` "
        "prints the same list. A degree rule is a sum of products of argument names: "
        "[the theorem](../theory.md#the-theorem) says what it means, and [operations of your own]"
        "(../operations.md) how to add one. Besides an edit of its own, any edge may be pruned and "
        "any node of a degree above 0 scaled. *Proved*: its meaning was proved to obey the rule; "
        "the verdicts of others are *numeric* at most.\n"
    )
    for algebra, kind in CLASSES.items():
        rows = [o for o in known if o.algebra is algebra]
        if not rows:
            continue
        edits = ", ".join(kind.edits) or "none"
        text += (
            f"\n## {str(algebra).capitalize()}\n\n{_escaped(kind.lemma)}\n\n"
            f"Edits of its own: {edits}.\n\n"
            "| operation | degree rule | used for | proved |\n|---|---|---|---|\n"
        )
        for entry in rows:
            roles = ", ".join(sorted(map(str, entry.roles)))
            proved = "yes" if entry.proved else "no"
            rule = f"`{entry.signature}`" if entry.signature else ""
            text += f"| `{entry.name}` | {rule} | {roles} | {proved} |\n"
    return text


def _escaped(text: str) -> str:
    """Prose that holds formulas, as Markdown: nothing of it is a tag. Code is left alone."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts)


# --------------------------------------------------------------------------- documents and links


_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def _links(text: str, change: Callable[[re.Match[str]], str]) -> str:
    """Markdown with its relative links changed; code blocks are left alone."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else _LINK.sub(change, part) for part in parts)


def _home(page: str) -> str:
    """Where a page's text stands in the repository."""
    return page if not (ROOT / "docs" / page).exists() else f"docs/{page}"


def _target(home: str, link: str) -> str:
    """What a link names, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def _is_carried(name: str) -> bool:
    file = ROOT / name
    return (
        not name.startswith(("docs/", ".."))
        and name != FRONT
        and file.suffix in DOCUMENTS
        and file.is_file()
    )


def _carried(files: Files) -> list[str]:
    """The documents of other folders that one comes to by links, from those in docs/ on."""
    waiting = [f"docs/{f.src_uri}" for f in files.documentation_pages() if f.generated_by is None]
    found: dict[str, None] = {}
    while waiting:
        home = waiting.pop()
        if not home.endswith(".md"):
            continue
        for match in _LINK.finditer((ROOT / home).read_text()):
            name = _target(home, match[3])
            if _is_carried(name) and name not in found:
                found[name] = None
                waiting.append(name)
    return list(found)


def _repository() -> str | None:
    """The address under which files can be read, None where pyproject.toml has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    urls = {key.lower(): address for key, address in project.get("urls", {}).items()}
    address = urls.get("repository") or urls.get("source")
    return f"{address.rstrip('/')}/blob/HEAD" if address else None


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    here, home, repository = page.file.src_uri, _home(page.file.src_uri), _repository()

    def change(match: re.Match[str]) -> str:
        picture, words, link, anchor = match[1], match[2], match[3], match[4] or ""
        if here.startswith("api/"):
            return match[0]
        name = _target(home, link)
        inside = "index.md" if name == FRONT else name.removeprefix("docs/")
        if (name.startswith("docs/") or name == FRONT or _is_carried(name)) and (
            files.get_file_from_path(inside) is not None
        ):
            link = posixpath.relpath(inside, posixpath.dirname(here) or ".")
            return f"{picture}[{words}]({link}{anchor})"
        if not (ROOT / name).exists():
            return match[0]  # mkdocs says that there is no such file
        return f"[{words}]({repository}/{name}{anchor})" if repository else words

    return _links(markdown, change)


# --------------------------------------------------------------------------- docstrings


class Prose(griffe.Extension):
    """Docstrings are prose, with formulas such as <c, f> in it, and no HTML.

    A name of an enumeration that has none says its value.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _escaped(obj.docstring.value)
        elif (
            isinstance(obj, griffe.Attribute)
            and isinstance(obj.parent, griffe.Class)
            and any(str(base).endswith("Enum") for base in obj.parent.bases)
        ):
            obj.docstring = griffe.Docstring(f"`{obj.value}`", parent=obj)
