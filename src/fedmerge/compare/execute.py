"""One run from its settings to its result, in a folder that a kill at any instant leaves usable.

It is the only way to a run folder, for a single run and for the cell of a comparison alike; the
rounds themselves, and the checkpoint, are the simulation's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import folder as files
from .cells import chosen_values
from .profile import Profile

if TYPE_CHECKING:
    from ..sim import RoundLog, Simulation


def execute(
    config: Mapping[str, Any],
    build: Callable[[Path | None], Simulation],
    folder: Path | None = None,
    on_round: Callable[[RoundLog], object] = lambda log: None,
    profile: Profile | None = None,
    trial: bool = False,
) -> dict[str, Any]:
    """Return the result of a run; go on with the one in `folder`, or return it if it is finished.

    Args:
        config: every setting of the run, JSON values.
        build: makes the simulation of these settings, given where to keep its checkpoint.
        folder: run folder, or None to keep nothing.
        on_round: called with the log of each round that is run now.
        profile: takes in the seconds of what is run now.
        trial: keep the log alone, by which a trial is judged: there are three times as many trials
            as cells, and nobody uses their models.

    Raises:
        StateError: the folder cannot be written, or holds a run with other settings.
    """
    profile = profile or Profile()
    if folder is None:
        with profile("data"):
            simulation = build(None)
        with closing(_rounds(simulation)) as rounds:
            for log in rounds:
                profile.round(log)
                with profile("log"):
                    on_round(log)
        with profile("result"):
            result = _result(config, simulation, trial)
        profile.finish(simulation.saving, simulation.chosen)
        return result
    files.check_writable(folder)
    files.check_config(folder, config)
    finished = files.read_result(folder)
    if finished is not None:
        return finished
    # Settings that cannot be run must not claim the folder, so they are written after this.
    with profile("data"):
        simulation = build(folder / files.CHECKPOINT)
    simulation.saves_last = not trial
    files.write_config(folder, config)
    if simulation.history or (folder / files.LOG).exists():
        # The checkpoint decides: rounds after it are run, and logged, again.
        files.write_log(folder, [log.to_json() for log in simulation.history])
    # Closed at once on Ctrl-C: that is when the simulation saves what it has.
    with closing(_rounds(simulation)) as rounds:
        for log in rounds:
            profile.round(log)
            with profile("log"):
                files.append_log(folder, log.to_json())
                on_round(log)
    with profile("result"):
        weights = {} if trial else simulation.weight_history()
        if weights:
            files.write_arrays(folder / files.WEIGHTS, weights)
        result = _result(config, simulation, trial)
        files.settle_log(folder)
        files.write_result(folder, result)
        if trial:  # of a long one, saved on the way
            shutil.rmtree(folder / files.CHECKPOINT, ignore_errors=True)
    profile.finish(simulation.saving, simulation.chosen)
    return result


def _rounds(simulation: Simulation) -> Generator[RoundLog]:
    """The log of each round that is run now, also of one at whose end Ctrl-C came."""
    seen = len(simulation.history)
    with closing(simulation.rounds()) as rounds:
        try:
            for log in rounds:
                seen = log.round
                yield log
        except KeyboardInterrupt:
            yield from simulation.history[seen:]
            raise


def _result(config: Mapping[str, Any], simulation: Simulation, trial: bool) -> dict[str, Any]:
    found = {"rounds": len(simulation.history)} if trial else simulation.result()
    # Summed over the rounds, so that it does not matter how often the run was stopped.
    seconds = sum(sum(log.seconds.values()) for log in simulation.history)
    named = {key: config[key] for key in ("setting", "data", "method", "seed")}
    named["chosen"] = chosen_values(config.get("chosen"))
    run = {"rounds": found["rounds"], "seconds": seconds, "execution": simulation.chosen}
    return {**named, **run, **found}
