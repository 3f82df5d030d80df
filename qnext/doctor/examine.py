"""The examination: all rules over one case, worst first, with levels that follow the price."""

from __future__ import annotations

from dataclasses import replace

from qnext.doctor.case import Case
from qnext.doctor.cpu_rules import cpu_findings
from qnext.doctor.disk_rules import disk_findings
from qnext.doctor.engine_rules import engine_findings
from qnext.doctor.gpu_rules import gpu_findings
from qnext.doctor.memory_rules import memory_findings
from qnext.doctor.values import LEVELS, Finding

CHEAP_SHARE = 0.03
"""A warning whose price is a smaller loss than this is only information: the forecast is not that exact."""

_RULES = (memory_findings, cpu_findings, gpu_findings, engine_findings, disk_findings)


def examine(case: Case) -> tuple[Finding, ...]:
    """Every finding, worst first: by level, then by what it costs."""
    found = [_weighed(finding) for rules in _RULES for finding in rules(case)]
    return tuple(sorted(found, key=_badness))


def _weighed(finding: Finding) -> Finding:
    if finding.level == "warning" and finding.price and finding.price.worst > -CHEAP_SHARE:
        return replace(finding, level="info")
    return finding


def _badness(finding: Finding) -> tuple[int, float]:
    return LEVELS.index(finding.level), finding.price.worst if finding.price else 0.0
