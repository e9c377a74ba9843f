"""What the documentation site has beside the files of this folder: the README, the changes, a page of the API.

Hooks of MkDocs and an extension of griffe, which reads the docstrings. Links that leave this folder lead to copies.
"""

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "src" / "counterstain"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changes.md"}
WIDE = "---\nhide: [navigation]\n---\n"
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
FILE_NAME = re.compile(r"\[(?:docs/)?([\w-]+\.md)\]\(")
ROLE = re.compile(r":\w+:`~?(?:counterstain\.)?([\w.]+)`")
IMPORT = re.compile(r"^from (\.[\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Show pages that the navigation does not name yet among the guides."""
    guides = next(part["How to"] for part in config["nav"] if "How to" in part)
    guides += sorted({page.name for page in DOCS.glob("*.md")} - set(_titles(config["nav"])))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of other files, and copies of the files that pages link to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=(WIDE if source == "README.md" else "") + text))
    files.append(File.generated(config, "api.md", content=_api()))
    for page in files.documentation_pages():
        for path in OUTSIDE.findall(page.content_string):
            if path not in PAGES and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Lead links out of this folder to the copies, and call pages by their titles instead of their files."""
    titles = _titles(config["nav"])
    named = FILE_NAME.sub(lambda found: f"[{titles.get(found[1], found[1])}](", markdown)
    return OUTSIDE.sub(lambda found: f"]({PAGES.get(found[1], found[1])}", named)


def _titles(nav: Any) -> dict[str, str]:
    """Return the title of each page of the navigation by its file."""
    found: dict[str, str] = {}
    for title, place in (entry for part in nav if isinstance(part, dict) for entry in part.items()):
        found |= _titles(place) if isinstance(place, list) else {place: title}
    return found


def _api() -> str:
    """Return a page of every public name, in the groups of the package's docstring."""
    doc = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    places = {
        name: f"counterstain{module}.{name}"
        for module, names in IMPORT.findall((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
        for name in re.findall(r"(\w+) as \1", names)
    }
    lines = [
        "# Python API",
        "",
        "`import counterstain as cs`. Every function is also a command, with the same arguments.",
    ]
    for heading, group in re.findall(r"^(\S.*)\n((?:    .+\n?)+)", doc, re.MULTILINE):
        first = [re.split(r"\s{2,}", line.strip())[0] for line in group.splitlines()]
        names = [name for name in re.findall(r"\w+", " ".join(first)) if name in places]
        if names:
            lines += ["", f"## {heading.partition(':')[0]}", ""]
            lines += [f"::: {places.pop(name)}\n" for name in names if name in places]
    lines += ["", "## Errors, and records that the verbs return", "", *(f"::: {place}\n" for place in places.values())]
    return "\n".join(lines)


class Roles(griffe.Extension):
    """Write roles of reStructuredText, such as :func:`train`, as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
