"""Hooks of `mkdocs build`: pages of this repository that lie outside docs/, and sources that a page links to.

A link in a page is a path of the repository, as GitHub follows it. On the site, documents outside docs/ are pages, and
a linked source file is shown on a page of its own, so that every link works without a network.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    "README.md": "README.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CODE_OF_CONDUCT.md": "CODE_OF_CONDUCT.md",
    "recipes/README.md": "recipes.md",
}
"""By path in the repository: documents outside docs/, and their place on the site. The README's is docs/README.md."""
_LINK = re.compile(r"(?<=\]\()([^)\s:]+)(?=\))")
_CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".ipynb": "python"}


def on_config(config: Any) -> Any:
    """Put the page of every method into the menu."""
    paths = Path(config.docs_dir, "methods").glob("[a-z]*.md")
    methods = sorted(paths, key=lambda path: (path.name.startswith("train-"), path.name))
    for entry in config.nav:
        for pages in entry.values():
            if pages == ["methods/README.md"]:
                pages += [f"methods/{path.name}" for path in methods]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add documents outside docs/, and the sources that pages link to."""
    for path, place in DOCUMENTS.items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=(ROOT / path).read_text("utf-8")))
    for path in sorted({path for file in files.documentation_pages() for path in _sources(file)}):
        text = (ROOT / path).read_text("utf-8")
        if path.endswith(".ipynb"):
            text = _script(text)
        shown = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{_LANGUAGES[Path(path).suffix]}\n{text}````\n"
        files.append(File.generated(config, _place(path), content=shown))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page whose links lead to pages of the site."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    home = _home(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def followed(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        if not path:
            return match[1]
        place = _place(posixpath.normpath(posixpath.join(posixpath.dirname(home), path)))
        return posixpath.relpath(place, here or ".") + (f"#{anchor}" if anchor else "")

    return "".join(
        part if number % 2 else _LINK.sub(followed, part) for number, part in enumerate(_CODE.split(markdown))
    )


def _script(notebook: str) -> str:
    """Return a notebook's code without outputs, with its texts as comments."""
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(notebook)["cells"]]
    return "\n\n".join(text if kind == "code" else re.sub("(?m)^", "# ", text) for text, kind in cells) + "\n"


def _home(place: str) -> str:
    """Return the path in the repository of a page of the site."""
    outside = {page: path for path, page in DOCUMENTS.items() if path != "README.md"}
    return outside.get(place, f"docs/{place}")


def _place(path: str) -> str:
    """Return where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return DOCUMENTS.get(path, f"source/{path}.md" if Path(path).suffix in _LANGUAGES else path)


def _sources(file: Any) -> set[str]:
    """Return the paths in the repository of the sources outside docs/ that a page links to."""
    folder = posixpath.dirname(_home(file.src_uri))
    links = [match[1] for part in _CODE.split(file.content_string)[::2] for match in _LINK.finditer(part)]
    paths = {posixpath.normpath(posixpath.join(folder, link.partition("#")[0])) for link in links}
    outside = {path for path in paths if not path.startswith("docs/")}
    return {path for path in outside if Path(path).suffix in _LANGUAGES and os.path.isfile(ROOT / path)}
