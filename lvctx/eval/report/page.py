"""Write the page: one HTML file that loads nothing, whose texts are data and never markup.

The content is JSON in an element that is not run, with every `<` escaped, and the page's script puts it into the
document as text. The Content-Security-Policy admits this script and this style by their hashes, and images from the
file itself; anything else is refused by the browser.
"""

import base64
import hashlib
import json
from importlib.resources import files
from math import isfinite
from pathlib import Path
from string import Template
from typing import Any

from lvctx.artifacts.store import atomic_file
from lvctx.errors import InputError
from lvctx.eval.report.collect import ReportData

SCRIPTS = ("elements.js", "charts.js", "runs.js", "needles.js", "questions.js", "report.js")
"""The parts of the page's script, in their order."""


def write_page(data: ReportData, target: Path) -> None:
    """Write the report; equal data gives equal bytes. Raises InputError for data nested too deeply."""
    page = render_page(data)
    with atomic_file(target) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


def render_page(data: ReportData) -> str:
    """The page as text."""
    html, style, *scripts = (
        files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("report.html", "report.css", *SCRIPTS)
    )
    script = "\n".join(scripts)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    content = {key: value for key, value in vars(data).items() if key != "images"}
    return Template(html).substitute(
        policy=policy, style=style, script=script, content=_embedded(content), images=_embedded(data.images)
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value: Any) -> str:
    """JSON that no HTML parser takes for markup: it has no `<`. Numbers that JSON lacks are null."""
    try:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise InputError("a row is nested too deeply") from None
    return text.replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
