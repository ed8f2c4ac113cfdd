"""What a method tries when it is tuned: the first points of a short grid of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ..errors import ConfigError
from .cells import TUNED, chosen_text

MOST = 8
"""Points of a method's grid: with more to choose from, the best of them is more often luck."""
RATE = 0.3
"""The usual learning rate that those in grids are written for."""
Point = Mapping[str, object]
"""Values for some options of a method, or for lr and epochs; {} for the defaults."""


def grid_points(
    method: str, trials: int, n_clients: int | None, usual: Mapping[str, object] | None = None
) -> tuple[Point, ...]:
    """Return the first `trials` points of a method's grid, with the defaults in front.

    Learning rates of a grid are for a usual one of `RATE`, and in proportion for another. Points
    that change an option which `method`, a text such as "ditto:lam=0.3", sets are left out, and so
    are those that do not go with the number of clients, and those that are another point again.

    Args:
        usual: settings of a run, of which `lr` and `epochs` count; without them grids are as
            written.

    Raises:
        ConfigError: an unknown method or option, or a grid of no points or of more than `MOST`.
    """
    from ..algorithms import make_method

    grid = make_method(method).grid
    if len(grid) > MOST:
        raise ConfigError(
            f'method "{method}": its grid has {len(grid)} points, wanted at most {MOST}; keep the '
            "most promising"
        )
    if not all(isinstance(point, Mapping) for point in grid):
        raise ConfigError(
            f'method "{method}": its grid is {grid!r}, wanted points in a row; write e.g. '
            'grid = ({"lr": 0.1},)'
        )

    fixed = {pair.partition("=")[0] for pair in method.split(":")[1:]}
    points: list[Point] = [{}]
    for written in grid:
        if len(points) > trials:
            break
        if fixed & written.keys():
            continue
        point = _changed(written, usual or {})
        own = chosen_text({key: value for key, value in point.items() if key not in TUNED})
        tried = make_method(f"{method}:{own}" if own else method)
        try:
            tried.resolve(n_clients)
        except ConfigError:
            continue
        if point not in points:
            points.append(point)
    return tuple(points)


def _changed(point: Point, usual: Mapping[str, object]) -> Point:
    """Return what `point` changes of a run that has the settings `usual`."""
    changed = dict(point)
    if "lr" in point and "lr" in usual:
        changed["lr"] = float(f"{cast(float, point['lr']) * cast(float, usual['lr']) / RATE:.3g}")
    return {k: v for k, v in changed.items() if k not in TUNED or usual.get(k) != v}
