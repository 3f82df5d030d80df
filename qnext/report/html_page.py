"""What all HTML files of qnext have in common: one style, a policy that lets nothing else in, charts.

Nothing is fetched when a page is opened, and a policy in its head lets no script or style run but its own.
Names from outside reach a page through Jinja's escaping or as text of an SVG element.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from qnext.report.html_charts import Line, draw
from qnext.report.html_summary import percent, seconds
from qnext.report.words import digits
from qnext.units import format_bytes

if TYPE_CHECKING:
    from markupsafe import Markup

    from qnext.report.html_figures import Figure


def render_page(template: str, **values: Any) -> str:
    """The page of a template in `qnext/report/page`, with the style and script that stand there."""
    import jinja2
    from markupsafe import Markup

    from qnext import __version__

    page = files("qnext.report") / "page"
    style, script = ((page / file).read_text(encoding="utf-8") for file in ("report.css", "report.js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"digits": digits, "seconds": seconds, "size": _size, "percent": percent}
    return environment.from_string((page / template).read_text(encoding="utf-8")).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=__version__,
        **values,
    )


def drawings(figure: Figure) -> list[Markup]:
    """The charts of a figure as they stand in a page."""
    from markupsafe import Markup

    return [Markup(draw(chart)) for chart in figure.charts]


def legend(figure: Figure) -> list[Line]:
    """All lines of the figure's charts, each name once."""
    lines = {line.name: line for chart in figure.charts for line in chart.lines}
    return sorted(lines.values(), key=lambda line: (line.colour, -line.dots))


def _size(count: int | None) -> str:
    return "–" if count is None else format_bytes(count)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
