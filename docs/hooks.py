"""Add pages from outside of docs/ to the site, and adapt the links between pages.

Links on a page are those of the repository. A link to a file that the site does not
contain becomes plain text. The reason why a block does not run is removed.
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
"""Pages outside of docs/, and their names on the site."""
_REPOSITORY_PATHS = {page: path for path, page in OUTSIDE.items()}
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
    folder = posixpath.dirname(_REPOSITORY_PATHS.get(uri, f"docs/{uri}"))

    def adapt(link: re.Match[str]) -> str:
        image, text, anchor = link[1], link[2], link[4] or ""
        path = posixpath.normpath(posixpath.join(folder, link[3]))
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            if not (ROOT / path).exists():
                raise FileNotFoundError(
                    f"{uri} links to {path}, which does not exist: correct the link"
                )
            return text
        relative = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        return f"{image}[{text}]({relative}{anchor})"

    return _LINK.sub(adapt, _NO_RUN.sub(r"\1", markdown))
