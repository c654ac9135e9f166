"""HTML pages with their style, script and data inside, so that they need nothing from elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

SHARED_STYLE = Path(__file__).with_name("page.css")
"""The colours, light and dark, of all pages."""


def fill_page(parts: Path, scripts: Sequence[str] = ("page.js",), data: Any = None) -> str:
    """The page.html of a folder, filled with the style that all pages share, its page.css, scripts and data.

    Args:
        scripts: files in `parts`, in order.
        data: what the scripts read as JSON, where the page has a place for it.
    """
    # "<" is escaped, so that text in the data cannot close the script element.
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_text(parts / "page.html")).substitute(
        style=_text(SHARED_STYLE) + _text(parts / "page.css"),
        script="\n".join(_text(parts / name) for name in scripts),
        data=packed,
    )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
