"""Seconds of a round, as ratios to a bare loop that does the same SGD steps in the same run.

Evaluation is left out; how good the models become is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedmerge import Algorithm, FedAvg, FedMerge

from .measure import Figure, Spread, alternate, ratios
from .simulated import Failure, Simulated, executions, one_line
from .sizes import Sizes
from .tasks import BareLoop, Task, w1, w2

BARE = "bare loop"
APART = ("ray",)
"""Their background processes would slow the others down, so these take turns with nothing else."""


def run(sizes: Sizes, repeats: int) -> Iterator[Figure]:
    """W1 and W2 by every execution, with the share of a round that is not local training."""
    for task in (w1(sizes.w1_clients), w2(sizes.w2_clients, sizes.w2_images)):
        yield from _in_turn(task, repeats, [e for e in executions() if e not in APART], True)
        for name in APART:
            if name in executions():
                yield from _in_turn(task, repeats, [name], False)


def _in_turn(task: Task, repeats: int, names: list[str], fedmerge: bool) -> Iterator[Figure]:
    started: dict[str, Simulated] = {}
    failed: dict[str, str] = {}
    planned: list[tuple[str, Algorithm, dict[str, object]]] = [
        (name, FedAvg(), {"execution": name}) for name in names
    ]
    if fedmerge:
        planned.append(("auto, fedmerge", FedMerge(), {"execution": "auto"}))
    try:
        for label, method, options in planned:
            try:
                simulated = Simulated(task, method, **options)
                started[label] = simulated
                simulated.round()
            except Failure as error:
                failed[label] = one_line(error)
                if label in started:
                    started.pop(label).close()
        yield from _measure(task, repeats, started)
    finally:
        for simulated in started.values():
            simulated.close()
    for label, reason in failed.items():
        yield Figure("rounds", task.name, label, "s", None, note=f"not run: {reason}")


def _measure(task: Task, repeats: int, started: dict[str, Simulated]) -> Iterator[Figure]:
    bare = BareLoop(task)
    works = {BARE: bare.round, **{name: s.round for name, s in started.items()}}
    taken = alternate(works, repeats, settle=task.short)
    at = {"clients": len(task.data), "steps": task.steps}
    for name, values in taken.items():
        ratio = ratios(values, taken[BARE])
        note = f"{task.steps} steps" if name == BARE else ""
        yield Figure("rounds", task.name, name, "s", Spread.of(values), ratio, note, at)
    each = 2 if task.short else 1  # rounds a turn, of which the last is timed
    for name, simulated in started.items():
        timed = simulated.overhead[-repeats * each :][each - 1 :: each]
        share = Spread.of([100 * value for value in timed])
        note = "of a round; evaluation excluded"
        yield Figure("rounds", task.name, f"{name}: not local SGD", "%", share, None, note, at)
