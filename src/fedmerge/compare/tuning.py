"""Equal tuning: every method tries the same number of points, judged on validation data only.

The points of a method race on the tuning seeds (`race`). It says which runs are to be made and
chooses by what they have written; it runs none, and never looks at a test split or at a seed that
is reported.
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import StateError
from .cells import Cell, chosen_text, group_name, safe
from .folder import CONFIG, RESULT, check_config, read_json, read_result, write_json
from .grids import Point
from .race import contenders, mean, score

if TYPE_CHECKING:
    from .runner import Outcome

TUNING = "tuning"


@dataclass(frozen=True)
class Group:
    """One method on one data set in one setting: what is tuned together.

    Attributes:
        name: as the names of its cells begin.
        cells: what is reported, with the method's defaults.
        points: what is tried, the defaults first; the defaults alone without tuning.
        trials: for each point, the runs that it may need, one for each tuning seed.
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
        scores: of the points, by validation data (`race.score`), higher is better, in the mean over
            the seeds that the point was tried with; None for a point that diverged.
        seeds: how many those were, of each point.
        failed: trials that ended in an error, with its text. Then the defaults are used.
    """

    values: Point
    scores: tuple[float | None, ...]
    seeds: tuple[int, ...]
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
    # Only the last round is judged, and to evaluate others would take a fifth of the time.
    own = {"seed": seed, "track": None, "evaluate_every": cell.config["rounds"]}
    return Cell(name, {**cell.config, **own}, TUNING).with_chosen(point)


class Tuning:
    """The runs of a comparison in the order in which they may be made: trials, then cells.

    A choice is written down when it is made, and stands: no cell that was run with it is ever
    beside one that was run with another. Only the defaults that were taken because trials failed
    make way for a choice, as long as no cell has finished with them.

    Attributes:
        done: how many runs, trials and cells, were finished before.

    Raises:
        StateError: a folder that holds a run with other settings, or a choice among other points.
    """

    def __init__(self, groups: Sequence[Group], out: Path) -> None:
        self._out = out
        self._groups = {group.name: group for group in groups}
        self._home = {t.name: g for g in groups for point in g.trials for t in point}
        self._choices: dict[str, Choice] = {}
        self._open: dict[str, set[str]] = {}  # the trials of a heat that have not ended
        self._later: dict[str, tuple[Cell, ...]] = {}  # trials that a group may need after those
        self._ran: dict[str, int] = {}  # how many trials of a group are in this heat and before
        self._scores: dict[str, float | None] = {}
        self._failed: dict[str, dict[str, str]] = {}
        self._ready: list[Cell] = []
        for group in groups:
            self._begin(group)
        self.done = self.total - len(self.unfinished())

    @property
    def total(self) -> int:
        """How many runs there are in all, at most: less whenever a race ends early."""
        trials = sum(self._ran.values()) + sum(map(len, self._later.values()))
        return trials + sum(len(group.cells) for group in self._groups.values())

    def ready(self) -> tuple[Cell, ...]:
        """Return the runs that are not finished and need wait for nothing."""
        return tuple(self._ready)

    def unfinished(self) -> tuple[Cell, ...]:
        """Return all runs that are not finished, those that have to wait as well."""
        waiting = [(*self._later[name], *self._groups[name].cells) for name in self._open]
        return (*self._ready, *(cell for cells in waiting for cell in cells))

    def after(self, outcome: Outcome) -> tuple[Cell, ...]:
        """Return the runs that need not wait any more, now that one has ended so."""
        group = self._home.get(outcome.cell.name) if outcome.cell.root == TUNING else None
        if group is None:
            return ()
        self._open[group.name].discard(outcome.cell.name)
        if outcome.error is not None:
            self._failed.setdefault(group.name, {})[outcome.cell.name] = outcome.error
        return () if self._open[group.name] else self._go_on(group)

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

    def finished(self, name: str) -> bool:
        """Whether a cell of the group `name` has a result, which its choice stands for."""
        cells = self._groups[name].cells
        return any((cell.folder(self._out) / RESULT).is_file() for cell in cells)

    # -- one group ---------------------------------------------------------------------------------

    def _begin(self, group: Group) -> None:
        if not group.trials:
            self._ready += self._unfinished(group.cells)
            return
        choice = _read_choice(self._path(group), group)
        # Until a cell has finished with defaults that were taken for want of trials, nothing
        # depends on them: the trials are run again.
        if choice is not None and (self.finished(group.name) or not choice.failed):
            self._choices[group.name] = choice
            trials = [trial for point in group.trials for trial in point]
            self._ran[group.name] = len(trials) - len(self._unfinished(trials))
            self._ready += self._unfinished(self._cells(group))
            return
        self._ready += self._go_on(group)

    def _go_on(self, group: Group) -> tuple[Cell, ...]:
        """Return the runs of a group that come next: trials of its race, then its cells."""
        if self._failed.get(group.name):
            return self._choose(group, ())
        field: tuple[int, ...] = tuple(range(len(group.points)))
        ran = 0
        for seed in range(len(group.trials[0])):
            if len(field) < 2 and seed:
                break
            heat = [group.trials[point][seed] for point in field]
            ran += len(heat)
            self._ran[group.name] = ran
            self._later[group.name] = tuple(t for p in field for t in group.trials[p][seed + 1 :])
            todo = self._unfinished(heat)
            if todo:
                self._open[group.name] = {cell.name for cell in todo}
                return tuple(todo)
            field = contenders({p: self._tried(group, p)[: seed + 1] for p in field})
        return self._choose(group, field)

    def _tried(self, group: Group, point: int) -> list[float | None]:
        """The scores of a point with the seeds that it was tried with."""
        scores = []
        for trial in group.trials[point]:
            if trial.name not in self._scores:
                if read_result(trial.folder(self._out)) is None:
                    break
                self._scores[trial.name] = score(trial.folder(self._out))
            scores.append(self._scores[trial.name])
        return scores

    def _choose(self, group: Group, field: Sequence[int]) -> tuple[Cell, ...]:
        """Settle a group whose race has ended with `field`; return its cells that are to be run."""
        self._open.pop(group.name, None)
        self._later[group.name] = ()
        failed = self._failed.get(group.name, {})
        tried = [self._tried(group, point) for point in range(len(group.points))]
        scores = tuple(map(mean, tried))
        best = 0
        if field and not failed:
            # Of equals max() takes the first, so the defaults stay unless something is better.
            best = max(field, key=lambda point: cast(float, scores[point]))
        choice = Choice(group.points[best], scores, tuple(map(len, tried)), failed)
        self._forget(group, choice)
        _write_choice(self._path(group), group, choice)
        self._choices[group.name] = choice
        return tuple(self._unfinished(self._cells(group)))

    def _forget(self, group: Group, choice: Choice) -> None:
        """Remove cells that only began, with the defaults, where these are not what is chosen."""
        for cell in group.cells if choice.values else ():
            folder = cell.folder(self._out)
            if (folder / CONFIG).is_file() and not (folder / RESULT).is_file():
                check_config(folder, cell.config)
                shutil.rmtree(folder)

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


def _write_choice(path: Path, group: Group, choice: Choice) -> None:
    tried = {"points": list(group.points), "scores": choice.scores, "seeds": choice.seeds}
    write_json(path, {**tried, "chosen": choice.values, "failed": choice.failed})


def _read_choice(path: Path, group: Group) -> Choice | None:
    made = read_json(path)
    if made is None:
        return None
    try:
        points, values = made["points"], made["chosen"]
        scores = tuple(None if one is None else float(one) for one in made["scores"])
        seeds = tuple(map(operator.index, made["seeds"]))
        choice = Choice(values, scores, seeds, dict(made["failed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} is damaged ({error!r}); remove it to tune again") from error
    if points != [dict(point) for point in group.points] or values not in points:
        raise StateError(
            f"{path} is a choice among {json.dumps(points)}, and "
            f"{json.dumps([dict(point) for point in group.points])} would be tried now; "
            "choose another --out"
        )
    return choice
