"""Equal tuning: every method tries the same number of points, judged on validation data only.

It says which runs are to be made and chooses by what they have written; it runs none, and never
looks at a test split or at a seed that is reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, StateError
from .cells import TUNED, Cell, chosen_text, group_name, safe
from .folder import CONFIG, LOG, check_config, read_json, read_result, write_json

if TYPE_CHECKING:
    from .runner import Outcome

TUNING = "tuning"
Point = Mapping[str, object]
"""Values for some options of a method, or for lr and epochs; {} for the defaults."""


def grid_points(method: str, trials: int, n_clients: int | None) -> tuple[Point, ...]:
    """Return the first `trials` points of a method's grid, with the defaults in front.

    Points that change an option which `method`, a text such as "ditto:lam=0.3", sets are left out,
    and so are those that do not go with the number of clients.

    Raises:
        ConfigError: an unknown method or option.
    """
    from ..algorithms import make_method

    fixed = {pair.partition("=")[0] for pair in method.split(":")[1:]}
    points: list[Point] = [{}]
    for point in make_method(method).grid:
        if len(points) > trials:
            break
        if fixed & point.keys():
            continue
        own = chosen_text({key: value for key, value in point.items() if key not in TUNED})
        tried = make_method(f"{method}:{own}" if own else method)
        try:
            tried.resolve(n_clients)
        except ConfigError:
            continue
        points.append(dict(point))
    return tuple(points)


@dataclass(frozen=True)
class Group:
    """One method on one data set in one setting: what is tuned together.

    Attributes:
        name: as the names of its cells begin.
        cells: what is reported, with the method's defaults.
        points: what is tried, the defaults first; the defaults alone without tuning.
        trials: for each point, its runs, one for each tuning seed.
    """

    name: str
    cells: tuple[Cell, ...]
    points: tuple[Point, ...] = ({},)
    trials: tuple[tuple[Cell, ...], ...] = ()


@dataclass(frozen=True)
class Choice:
    """What tuning chose for a group.

    Attributes:
        values: the point; {} for the defaults.
        scores: of the points, higher is better: mean validation accuracy, or minus the loss where
            there is no accuracy; None for a point that diverged.
        failed: trials that ended in an error, with its text. Then the defaults are used.
    """

    values: Point
    scores: tuple[float | None, ...]
    failed: Mapping[str, str]


def make_groups(
    cells: Iterable[Cell],
    points: Callable[[str, str, str], tuple[Point, ...]],
    tuning_seeds: Sequence[int],
) -> tuple[Group, ...]:
    """Return the groups of `cells`, in their order.

    Args:
        points: returns the points to try for a data set, a setting and a method.
        tuning_seeds: seeds of the trials; none for no tuning.
    """
    members: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        key = (cell.config["data"], cell.config["setting"], cell.config["method"])
        members.setdefault(key, []).append(cell)
    groups = []
    for key, own in members.items():
        group = Group(group_name(*key), tuple(own))
        if tuning_seeds:
            tried = points(*key)
            trials = tuple(
                tuple(_trial(group.name, own[0], point, seed) for seed in tuning_seeds)
                for point in tried
            )
            group = replace(group, points=tried, trials=trials)
        groups.append(group)
    return tuple(groups)


def _trial(group: str, cell: Cell, point: Point, seed: int) -> Cell:
    name = f"{group}--{safe(chosen_text(point) or 'defaults')}--s{seed}"
    return Cell(name, {**cell.config, "seed": seed, "track": None}, TUNING).with_chosen(point)


class Tuning:
    """The runs of a comparison in the order in which they may be made: trials, then cells.

    A choice is written down when it is made, and stands: no cell that was run with it is ever
    beside one that was run with another.

    Attributes:
        total, done: runs in all, trials and cells, and how many of them were finished before.

    Raises:
        StateError: a folder that holds a run with other settings, or a choice among other points.
    """

    def __init__(self, groups: Sequence[Group], out: Path) -> None:
        self._out = out
        self._groups = {group.name: group for group in groups}
        self._home = {t.name: g for g in groups for point in g.trials for t in point}
        self._choices: dict[str, Choice] = {}
        self._open: dict[str, set[str]] = {}  # the trials of a group that have not ended
        self._failed: dict[str, dict[str, str]] = {}
        self._ready: list[Cell] = []
        for group in groups:
            self._begin(group)
        self.total = len(self._home) + sum(len(group.cells) for group in groups)
        self.done = self.total - len(self.unfinished())

    def ready(self) -> tuple[Cell, ...]:
        """Return the runs that are not finished and need wait for nothing."""
        return tuple(self._ready)

    def unfinished(self) -> tuple[Cell, ...]:
        """Return all runs that are not finished, those that have to wait as well."""
        waiting = (c for g in self._groups.values() if g.name in self._open for c in g.cells)
        return (*self._ready, *waiting)

    def after(self, outcome: Outcome) -> tuple[Cell, ...]:
        """Return the runs that need not wait any more, now that one has ended so."""
        group = self._home.get(outcome.cell.name) if outcome.cell.root == TUNING else None
        if group is None:
            return ()
        self._open[group.name].discard(outcome.cell.name)
        if outcome.error is not None:
            self._failed.setdefault(group.name, {})[outcome.cell.name] = outcome.error
        return () if self._open[group.name] else self._choose(group)

    def cells(self) -> tuple[Cell, ...]:
        """Return all that is reported, in the order asked for, each with its choice if made."""
        return tuple(cell for group in self._groups.values() for cell in self._cells(group))

    def choices(self) -> dict[str, Choice]:
        """Return what was chosen so far, by group."""
        return dict(self._choices)

    def short(self, trials: int) -> dict[str, int]:
        """Return the methods that have fewer points than `trials` to try, with their numbers."""
        found: dict[str, int] = {}
        for group in self._groups.values():
            method, n = group.cells[0].config["method"], len(group.points) - 1
            if n < trials:
                found[method] = min(n, found.get(method, n))
        return found

    def failures(self) -> dict[str, Choice]:
        """Return the choices that a failed trial has turned into the defaults, by group."""
        return {name: choice for name, choice in self._choices.items() if choice.failed}

    # -- one group ---------------------------------------------------------------------------------

    def _begin(self, group: Group) -> None:
        if not group.trials:
            self._ready += self._unfinished(group.cells)
            return
        choice = _read_choice(self._path(group), group)
        started = any((cell.folder(self._out) / CONFIG).exists() for cell in group.cells)
        # Nothing depends yet on defaults that were taken for want of trials: these are run again.
        if choice is not None and (started or not choice.failed):
            self._choices[group.name] = choice
            self._ready += self._unfinished(self._cells(group))
            return
        todo = self._unfinished(cell for trials in group.trials for cell in trials)
        self._open[group.name] = {cell.name for cell in todo}
        self._ready += todo if todo else self._choose(group)

    def _choose(self, group: Group) -> tuple[Cell, ...]:
        """Settle a group whose trials have all ended; return its cells that are to be run."""
        self._open.pop(group.name, None)
        failed = self._failed.get(group.name, {})
        scores = tuple(
            _mean(score(trial.folder(self._out)) for trial in trials)
            if not any(trial.name in failed for trial in trials)
            else None
            for trials in group.trials
        )
        best = 0
        if not failed:
            # Of equals max() takes the first, so the defaults stay unless something is better.
            ranks = [-math.inf if value is None else value for value in scores]
            best = ranks.index(max(ranks))
        choice = Choice(group.points[best], scores, failed)
        _write_choice(self._path(group), group, choice)
        self._choices[group.name] = choice
        return tuple(self._unfinished(self._cells(group)))

    def _cells(self, group: Group) -> tuple[Cell, ...]:
        choice = self._choices.get(group.name)
        if choice is None:
            return group.cells
        return tuple(cell.with_chosen(choice.values) for cell in group.cells)

    def _unfinished(self, cells: Iterable[Cell]) -> list[Cell]:
        todo = []
        for cell in cells:
            check_config(cell.folder(self._out), cell.config)
            if read_result(cell.folder(self._out)) is None:
                todo.append(cell)
        return todo

    def _path(self, group: Group) -> Path:
        return self._out / TUNING / f"{group.name}.json"


def score(folder: Path) -> float | None:
    """Return the score of a finished trial, higher is better; None where it diverged.

    It is the mean over clients of the merged model's validation accuracy, minus its validation loss
    where there is no accuracy, in the last evaluated round: the one of which figures are reported.
    The round of least loss would misjudge methods that overfit, whose accuracy still rises then.
    """
    last: dict[str, Any] | None = None
    for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
        last = json.loads(line)["metrics"].get("merged", last)
    if last is None or last["validation"]["loss"] is None:
        return None
    accuracy = last["validation"]["accuracy"]
    if accuracy is None:
        return -float(last["validation"]["loss"]["mean"])
    return float(accuracy["mean"])


def _mean(scores: Iterable[float | None]) -> float | None:
    """The mean over tuning seeds; a point that diverged with one of them has none."""
    known = list(scores)
    numbers = [value for value in known if value is not None]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(known) else None


def _write_choice(path: Path, group: Group, choice: Choice) -> None:
    made = {"points": list(group.points), "scores": list(choice.scores)}
    write_json(path, {**made, "chosen": choice.values, "failed": choice.failed})


def _read_choice(path: Path, group: Group) -> Choice | None:
    made = read_json(path)
    if made is None:
        return None
    try:
        points, values = made["points"], made["chosen"]
        choice = Choice(values, tuple(made["scores"]), dict(made["failed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} is damaged ({error!r}); remove it to tune again") from error
    if points != [dict(point) for point in group.points] or values not in points:
        raise StateError(
            f"{path} is a choice among {json.dumps(points)}, and "
            f"{json.dumps([dict(point) for point in group.points])} would be tried now; "
            "choose another --out"
        )
    return choice
