"""The report of a comparison: finished runs read back, compared, drawn and written as one page.

It trains and evaluates nothing; it needs the extra `report` for pictures and for the page.
"""

from __future__ import annotations

from fedmerge.report.page import write_report
from fedmerge.report.tables import (
    Findings,
    Run,
    Table,
    comparison,
    findings,
    load_runs,
    print_table,
    to_markdown,
)

__all__ = [
    "Findings",
    "Run",
    "Table",
    "comparison",
    "findings",
    "load_runs",
    "print_table",
    "to_markdown",
    "write_report",
]
