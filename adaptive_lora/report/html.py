"""The page: one file that opens from disk. Template, style and script are in `page/`, the data
travel as JSON."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

SCRIPTS = ("dom.js", "charts.js", "results.js", "one_run.js", "main.js")


def render(title: str, data: dict[str, Any]) -> str:
    """Return the page that shows `data`. The same data give the same bytes.

    Nothing in `data` can end its script element or start markup: `<`, `>` and `&` are written as
    JSON escapes, and the page's security policy runs and styles only what is hashed here and
    fetches nothing.

    Raises `ValueError` when a number in `data` is not finite: JSON has no word for it.
    """
    folder = files("adaptive_lora.report") / "page"
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join(
        (folder / name).read_text(encoding="utf-8") for name in SCRIPTS
    )
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 is escaped too
    parts = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
