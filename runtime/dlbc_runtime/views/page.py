"""The frame of every page: one file that needs nothing else, in light and dark, and that may run one script only.

A page forbids itself everything (Content-Security-Policy) but its own style and its one script, which is named by
its hash; so text from a model or a user stays text even if escaping had a hole.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dlbc_runtime.arrays import Json
from dlbc_runtime.views import colour

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def rendered(name: str, title: str, styles: Sequence[str], scripts: Sequence[str], **fields: object) -> str:
    """The page of the template `name`, which extends `frame.html.jinja`, with these style sheets and scripts in it."""
    script = "\n".join(_text(one) for one in ("frame.js", *scripts))
    return _environment().get_template(name).render(
        title=title, style="\n".join(_text(one) for one in ("frame.css", *styles)), script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        colours=_colours(), **fields)


def framed(page: str, title: str, height: int) -> str:
    """A page in a frame of its own for a notebook, so that the notebook's style and the page's leave each other
    alone; `height` in pixels."""
    return (f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts" title="{html.escape(title)}" '
            f'style="width:100%;height:{height}px;border:0;resize:vertical;overflow:auto"></iframe>')


def embedded(data: Json) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def packed(array_bytes: bytes) -> str:
    """Numbers inside a page: base64 of their bytes."""
    return base64.b64encode(array_bytes).decode("ascii")


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8").rstrip("\n")


def _colours() -> dict[str, dict[str, str]]:
    """The ends of the scale as CSS variables, for light and dark pages."""
    return {theme: {"none": text.hex(0), "for": text.hex(1), "against": text.hex(-1),
                    "bar-for": bars.hex(1), "bar-against": bars.hex(-1)}
            for theme, text, bars in (("light", colour.LIGHT, colour.HEAT), ("dark", colour.DARK, colour.HEAT_DARK))}


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)
