"""What a page leaves out, and in which order, where a comparison would make it too large.

Clients and rounds are bounded before anything is drawn, by an equal share for each setting; what is
still too much is dropped from the content, whole parts at a time, and the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fedmerge.report.panels import embedded

LIMIT = 4_900_000
"""Bytes of a page, so that it stays below 5 MB."""
_CLIENTS = 2_400_000  # bytes for the clients of all settings together


def share(settings: int) -> float:
    """Return the bytes that the clients of one of so many settings may take."""
    return _CLIENTS / max(settings, 1)


def fitted(render: Callable[[Mapping[str, Any]], str], content: dict[str, Any]) -> str:
    """Render `content`, without as many of its parts as it takes to stay within the limit."""
    left_out: list[str] = []
    page = render(content)
    for name, leave_out in _CUTS:
        if len(page.encode()) <= LIMIT:
            break
        leave_out(content)
        left_out.append(name)
        notice = (
            f"To stay below 5 MB this page leaves out {', '.join(left_out)}; "
            "fedmerge report --figures writes pictures and tables as files."
        )
        page = render({**content, "notices": [*content["notices"], notice]})
    return page


def _without(*names: str) -> Callable[[dict[str, Any]], None]:
    def leave_out(content: dict[str, Any]) -> None:
        for panel in content["panels"]:
            panel.update(dict.fromkeys(names))

    return leave_out


def _clients(content: dict[str, Any]) -> None:
    for panel in content["panels"]:
        methods = json.loads(panel["data"])["methods"]
        panel.update(heatmap=None, map=None, worth=None)
        panel["listed"] = {"methods": [], "rows": []}
        panel["data"] = embedded({"methods": methods, "clients": []})


def _views(content: dict[str, Any]) -> None:
    del content["views"][1:]


def _settings(content: dict[str, Any]) -> None:
    content["panels"] = []


def _tables(content: dict[str, Any]) -> None:
    content["views"] = []


_CUTS: tuple[tuple[str, Callable[[dict[str, Any]], None]], ...] = (
    ("what each model is worth", _without("worth")),
    ("the gap over rounds", _without("gap")),
    ("the clients under both methods", _without("scatter")),
    ("the clients and their weights", _clients),
    ("the differences", _without("duels")),
    ("the learning curves", _without("curves")),
    ("all but one view of the table", _views),
    ("the single settings", _settings),
    ("the table of all settings", _tables),
)
