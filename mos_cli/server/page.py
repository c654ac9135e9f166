"""The page at the root of the server: one file with its style and its script, which loads nothing from elsewhere."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from mos_cli.utils.pages import fill_page

PARTS = Path(__file__).with_name("web_page")


@cache
def page() -> str:
    return fill_page(PARTS)


@cache
def page_policy() -> str:
    """The content security policy of the page: its own style and script, and this server."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes('script')}",
            f"style-src {_hashes('style')}",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hashes(element: str) -> str:
    texts = re.findall(rf"<{element}>(.*?)</{element}>", page(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
