"""Brings pages from outside of docs/ into the site, and turns the links between them into links of the site.

A link is written as it is right in the repository. One to a file that the site does not have becomes plain text. What
`tests/test_docs.py` reads of a block's first line is taken out.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "readme.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages outside of docs/, and what the site calls them."""
_INSIDE = {page: path for path, page in OUTSIDE.items()}
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")
_NO_RUN = re.compile(r'^( *```\w+) no_run="[^"]*"$', re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(
    markdown: str, page: Any, config: MkDocsConfig, files: Files
) -> str:
    uri: str = page.file.src_uri
    folder = posixpath.dirname(_INSIDE.get(uri, f"docs/{uri}"))

    def link(found: re.Match[str]) -> str:
        image, words, anchor = found[1], found[2], found[4] or ""
        path = posixpath.normpath(posixpath.join(folder, found[3]))
        there = OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            if not (ROOT / path).exists():
                raise FileNotFoundError(f"{uri} links to {path}, which is not there")
            return words
        return f"{image}[{words}]({posixpath.relpath(there, posixpath.dirname(uri) or '.')}{anchor})"

    return _LINK.sub(link, _NO_RUN.sub(r"\1", markdown))
