"""A page of pictures with the texts that were kept, in green, and dropped, in red (BLIP, figure 4)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from typing import Any

from vlm.data.images import decode_image
from vlm.data.sources import Source

SIDE = 224
"""Longest side of a picture on the page, in pixels."""
LETTERS = {"web": "T<sub>w</sub>", "synthetic": "T<sub>s</sub>"}
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222;
  background: #fff; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; }
img { width: 100%; height: 14rem; object-fit: contain; background: #f4f4f4; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.kept { color: #136c2e; }
.dropped { color: #b3261e; }
small { color: #555; }
"""


def as_page(rows: Iterable[Mapping[str, Any]], source: Source) -> str:
    """An HTML page that needs nothing beside it.

    rows: of records (`vlm.tasks.capfilt.work.write_unit`), whose numbers are those of `source`.
    """
    figures = "\n".join(_figure(row, source) for row in rows)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>CapFilt</title><style>{STYLE}</style>'
        "</head><body>\n<h1>CapFilt</h1>\n"
        "<p>T<sub>w</sub>: text from the web, if there was one. T<sub>s</sub>: synthetic text. "
        '<span class="kept">Green ✓: kept by the filter.</span> <span class="dropped">Red ✗: dropped.</span> '
        "Beside each: its matched probability.</p>\n"
        f"<main>\n{figures}\n</main>\n</body></html>\n"
    )


def _figure(row: Mapping[str, Any], source: Source) -> str:
    texts = "".join(_text(text) for text in row["texts"])
    name = html.escape(str(row["key"]), quote=True)
    image = f'<img alt="{name}" title="{name}" src="{_address(row, source)}">'
    return f"<figure>{image}<figcaption>{texts}</figcaption></figure>"


def _text(text: Mapping[str, Any]) -> str:
    kind, mark = ("kept", "✓") if text["kept"] else ("dropped", "✗")
    score = "" if text["itm"] is None else f" <small>{text['itm']:.2f}</small>"
    letter = LETTERS.get(text["provenance"], html.escape(text["provenance"]))
    return f'<p class="{kind}">{letter} {mark} “{html.escape(text["text"])}”{score}</p>'


def _address(row: Mapping[str, Any], source: Source) -> str:
    image = decode_image(source[row["number"]].image, name=row["key"])
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
