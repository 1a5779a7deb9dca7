"""What `make docs` does to pages beyond Markdown: links into the code, and CONTRIBUTING.md as a page.

On the repository's page a link such as ``[loop](../pipeline/loop.py)`` opens the file. The site holds no code, so there
the link becomes its text; one whose file is missing is a warning, which ends the strict build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("mkdocs.hooks.isentrope")
INTO_CODE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """CONTRIBUTING.md, the map of the code, is a page of the site too."""
    files.append(File.generated(config, "contributing.md", content=(ROOT / "CONTRIBUTING.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page, with links into the code as plain text."""

    def plain(link: re.Match[str]) -> str:
        text, path = link.groups()
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_path, path)
        return text if text.startswith("`") else f"`{text}`"

    return INTO_CODE.sub(plain, markdown)
