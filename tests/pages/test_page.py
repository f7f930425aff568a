"""Pages: data goes in as JSON and comes out as it was, whatever it holds, and nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.pages import page
from library.pages.page import as_json, data_url, read_data, render

TEMPLATES = sorted(file.name for file in Path(page.__file__).parent.glob("*.html"))
NASTY = [
    "</script><script>alert(1)</script>",
    "<!--",
    "]]>",
    "&lt;",
    "\u2028 \x00 \\",
    "ü ← 例",
    "\udcff",
    "@data@",
    "@title@",
]
TEXTS = st.text(st.characters(blacklist_categories=()))


def test_there_are_templates():
    assert TEMPLATES == ["grid.html", "results.html"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_data_comes_back_as_it_was(template, tmp_path):
    data = {text: [text, None, 1.5, True, {"": text}] for text in NASTY}
    path = tmp_path / "page.html"
    path.write_text(render(template, "</title><b>", data), encoding="utf-8")
    assert read_data(path) == data
    text = path.read_text(encoding="utf-8")
    assert "<title>&lt;/title&gt;&lt;b&gt;</title>" in text
    assert text.count("</script>") == 2  # the data's and the script's
    assert "alert(1)<" not in text
    assert "@include" not in text


@given(TEXTS)
def test_no_text_can_leave_its_script_element(text):
    assert not re.search("[<>&]|[^\x20-\x7e]", as_json([text]))


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json([float("nan")])


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_page_needs_nothing_beside_it(template):
    text = render(template, "t", {}).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|@import|url\((?!#)|<link|\bsrc=|\bfetch\(|XMLHttpRequest|innerHTML|\beval\(", text)


def test_another_page_is_none_of_ours(tmp_path):
    for text in ("<html></html>", '<script type="application/json" id="data">{"cut":'):
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"holds no data"):
            read_data(tmp_path / "page.html")


def test_images_are_embedded_small():
    url = data_url(Image.new("RGBA", (900, 600), (200, 0, 0, 128)), longest=300)
    kind, _, data = url.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.size, image.mode) == ((300, 200), "RGBA")
    assert Image.open(io.BytesIO(base64.b64decode(data_url(Image.new("L", (8, 4)), 300).partition(",")[2]))).size == (
        8,
        4,
    )
