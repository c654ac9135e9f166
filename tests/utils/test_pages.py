"""HTML pages: one set of colours for all, and data that stays data."""

from pathlib import Path

import pytest

from mos_cli.images import gallery
from mos_cli.routing.views import html
from mos_cli.server import page
from mos_cli.utils.pages import SHARED_STYLE, fill_page


@pytest.mark.parametrize("parts", [html.PARTS, gallery.PARTS, page.PARTS], ids=["report", "gallery", "server"])
def test_all_pages_have_the_same_colours(parts: Path) -> None:
    shared = SHARED_STYLE.read_text()
    filled = fill_page(parts, ())
    assert shared in filled
    assert filled.count("--accent:") == shared.count("--accent:") == 1


def test_data_cannot_close_its_script(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<script>$data</script>$script")
    (tmp_path / "page.css").write_text("")
    (tmp_path / "page.js").write_text("`${data}`")
    assert fill_page(tmp_path, data="</script>$style") == r'<script>"\u003c/script>$style"</script>`${data}`'
