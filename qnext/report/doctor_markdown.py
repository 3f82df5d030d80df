"""The doctor's page as a Markdown block for a bug report: the same rows and findings, nothing personal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qnext import __version__
from qnext.doctor.words import price_text
from qnext.hardware.redact import redact_text
from qnext.pipeline.doctoring import Examination
from qnext.report.doctor_view import priced_for, sections_of, summary
from qnext.report.machine_words import headline

_SPECIAL = re.compile(r"([\\`*_|<>\[\]])")


def doctor_markdown(found: Examination) -> str:
    """One `<details>` block with a table of facts and a list of findings."""
    return "\n".join(_lines(found))


def _lines(found: Examination) -> Iterator[str]:
    yield f"<details><summary>qnext {__version__} doctor: {_plain(headline(found.machine))}</summary>"
    yield ""
    yield f"{summary(found.findings)}; prices are for {_plain(priced_for(found))}"
    yield ""
    for finding in found.findings:
        yield f"- **{finding.level}** `{finding.id}` {_plain(finding.what)}: {_plain(price_text(finding))}"
    if found.findings:
        yield ""
    yield "| part | fact | value | |"
    yield "| --- | --- | --- | --- |"
    for section in sections_of(found):
        for row in section.rows:
            cells = (section.title, row.label, row.value, row.meaning)
            yield f"| {' | '.join(_plain(cell) for cell in cells)} |"
    yield ""
    yield "</details>"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, without what is personal."""
    return _SPECIAL.sub(r"\\\1", " ".join(redact_text(text).split()))
