"""The log of a run read back: what was measured in each round.

It only reads and checks; a run that was resumed may have logged a round twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmerge.report.files import number, read_lines, wrong_form
from fedmerge.report.runs import RoundPoint


def load_log(path: Path) -> tuple[RoundPoint, ...]:
    """Return the rounds of log.jsonl in their order; of one logged twice the last holds."""
    points: dict[int, RoundPoint] = {}
    for line, record in read_lines(path):
        try:
            point = _point(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise wrong_form(path, error, line) from error
        points[point.round] = point
    return tuple(points[round_] for round_ in sorted(points))


def _point(record: Mapping[str, Any]) -> RoundPoint:
    means: dict[str, dict[str, float]] = {"accuracy": {}, "loss": {}}
    for model, splits in record["metrics"].items():
        for metric, values in means.items():
            summary = splits["test"][metric]
            mean = None if summary is None else number(summary["mean"])
            if mean is not None:
                values[str(model)] = mean
            elif metric == "loss":  # files hold null for a loss that is not finite
                values[str(model)] = float("nan")
    return RoundPoint(
        round=int(record["round"]),
        accuracy=means["accuracy"],
        loss=means["loss"],
        gap_train=number(record["gap_train"]),
        gap_test=number(record["gap_test"]),
    )
