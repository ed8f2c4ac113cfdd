"""A comparison from its protocol to its tables: what `fedmerge compare` does, here and in workers.

The parts are in `compare`; here they are put together with the settings of runs. What takes long to
import is imported where it is used.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare import cells as parts
from .compare import folder, screen, trackers
from .compare.presets import Names, Protocol
from .config import RunConfig, import_core, load_config
from .errors import blaming
from .lines import StoppedError, complain, debugging

if TYPE_CHECKING:
    from .compare.tuning import Tuning
    from .data import Federation

ROOM = 2**28
"""Bytes of inputs, of clients that were made for earlier cells, that a worker keeps: five seeds of
all settings of a few thousand small images."""


def run_comparison(
    protocol: Protocol,
    overrides: Mapping[str, str],
    out: Path,
    workers: int | None = None,
    tracked: Sequence[str] = (),
    quiet: bool = False,
) -> bool:
    """Run what is not finished of a comparison, and print its tables.

    Args:
        overrides: settings of all runs, in place of the protocol's.
        workers: processes, None for one for each CPU. tracked: names of trackers.

    Returns:
        Whether all runs were made and every method was tuned; if not, it has been said why.

    Raises:
        FedmergeError: settings that do not fit each other, a folder that cannot be used, or a stop.
    """
    done = total = 0
    try:
        from .compare.grids import grid_points
        from .compare.runner import Crew
        from .compare.tuning import Tuning, make_groups

        def configure(data: str, setting: str, method: str, seed: int) -> dict[str, Any]:
            own = {"data": data, "setting": setting, "method": method, "seed": seed}
            sizes = protocol.sizes(data, setting, overrides)
            return load_config(None, {**sizes, **own}).model_dump(mode="json")

        @cache
        def n_clients(data: str, setting: str) -> int:
            config = load_config(None, configure(data, setting, "fedavg", protocol.seeds[0]))
            if config.clients:
                return config.clients
            with screen.waiting(f"{data}: loading", quiet):
                return len(config.federation().clients)

        def points(data: str, setting: str, method: str) -> Any:
            usual = configure(data, setting, method, protocol.seeds[0])
            clients = n_clients(data, setting)
            with blaming(method, f" in {data}/{setting}"):
                return grid_points(method, protocol.trials, clients, usual)

        cells = parts.make_cells(configure, protocol.pairs, protocol.methods, protocol.seeds)
        groups = make_groups(cells, points, protocol.tuning_seeds)
        folder.check_writable(out)
        failures = []
        with folder.locked(out):
            folder.check_facts(out, protocol.facts())
            folder.check_beside(out, [cell.config for cell in cells])
            plan = Tuning(groups, out)
            total, done = plan.total, plan.done
            size = min(workers or os.cpu_count() or 1, total - done)
            down = trackers.prepare(tracked if size else (), out)
            try:
                check_cells(plan.unfinished(), quiet, out)
                folder.claim_comparison(out, protocol.facts())
                crew = Crew(run_cell, size, partial(prepare_worker, down))
                bar = screen.cells_bar(total, done, quiet, tuned=bool(protocol.trials))
                with crew, bar as show:
                    for outcome in crew.run(plan.ready(), out, plan.after):
                        total = plan.total
                        show(outcome.cell, total)
                        done += outcome.error is None
                        if outcome.error is not None:
                            failures.append(outcome)
                notes = screen.tuning_notes(plan, protocol.trials)
                screen.print_comparison(plan.cells(), out, notes)
            finally:  # whatever else went wrong: it may well be the same
                for failure in failures:
                    if debugging():
                        print(failure.details, file=sys.stderr)
                    complain(f"{failure.cell.name}: {failure.error}")
    except KeyboardInterrupt as error:
        what = "runs (trials and cells)" if protocol.trials else "cells"
        kept = (
            f"{done} of {total} {what} are finished and kept in {out}"
            if total
            else "no cell has run"
        )
        raise StoppedError(f"stopped; {kept}; the same command goes on from there") from error
    _tell_untuned(plan, out)
    lost = [failure.cell for failure in failures if failure.cell.root == parts.RUNS]
    if lost:
        complain(
            f"{len(lost)} of {len(cells)} cells failed; the others are kept in {out}, "
            "and the same command runs only those that failed again"
        )
    return not failures and not plan.failures()


def _tell_untuned(plan: Tuning, out: Path) -> None:
    for name, choice in plan.failures().items():
        again = "the same command tries them again"
        if plan.finished(name):
            again = (
                f"remove {out}/tuning/{name}.json and {out}/runs/{name}--s* and give the same "
                "command to tune it again"
            )
        complain(
            f"{name} was not tuned, as {len(choice.failed)} of its trials failed: it has the "
            f"method's defaults; {again}"
        )


def _every_setting() -> Iterable[str]:
    from .data import SETTINGS

    return SETTINGS


def _every_method() -> Iterable[str]:
    from .algorithms import METHODS

    return METHODS


def _fits(data: str, setting: str) -> bool:
    from .data.catalog import fits
    from .data.settings import is_natural

    return fits(data, is_natural(setting))


NAMES = Names(_every_setting, _every_method, _fits)


def check_cells(cells: Sequence[parts.Cell], quiet: bool = False, out: Path | None = None) -> None:
    """Build each method in each setting once, so that what cannot run is said before all work.

    So is what is odd about the clients of the first seed where anything is, which workers do not
    say, and that finished runs in the folder `out` had other examples.
    """
    from .data import DataWarning
    from .sim.population import Population

    first: dict[tuple[str, str], dict[str, RunConfig]] = {}
    seeds: dict[tuple[str, str], dict[int, RunConfig]] = {}
    for cell in cells:
        config = load_config(None, cell.config)
        first.setdefault((config.data, config.setting), {}).setdefault(config.method, config)
        seeds.setdefault((config.data, config.setting), {}).setdefault(config.seed, config)
    examples: dict[tuple[str, str, int], Any] = {}
    for pair, methods in first.items():
        for seed, config in seeds[pair].items():
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always", DataWarning)
                with screen.waiting(
                    f"{config.data}, {config.setting}: loading and dividing", quiet
                ):
                    federation = config.federation()
                    examples[*pair, seed] = Population.of(federation.clients).summary()
            for one in found:
                warnings.warn(one.message, stacklevel=2)
            if any(issubclass(one.category, DataWarning) for one in found):
                break
        for config in methods.values():
            with blaming(config.method, f" in {config.data}/{config.setting}"):
                config.simulation(federation)
    if out is not None:
        folder.check_examples(out, examples)


def prepare_worker(trackers_down: Collection[str] = ()) -> None:
    """Import the core; what there is to say of data and trackers, the command itself has said."""
    import_core()
    from .data import DataWarning

    trackers.leave_out(trackers_down)
    warnings.simplefilter("ignore", DataWarning)


def run_cell(config: dict[str, Any], out: Path) -> None:
    """Run the settings `config` in the folder `out`."""
    from .compare.tuning import TUNING

    trial = out.parent.name == TUNING
    load_config(None, config).run(out, clients=_kept_federation, trial=trial)


_kept: dict[tuple[object, ...], Federation] = {}
"""Clients of the last cells, the latest last: many methods are run on the same."""


def _kept_federation(config: RunConfig) -> Federation:
    key = (config.data, config.setting, config.clients, config.seed, config.train_fraction)
    found = _kept.pop(key, None)
    if found is None:
        # First, since there may be room for one only.
        while sum(map(_bytes, _kept.values())) > ROOM:
            del _kept[next(iter(_kept))]
        found = config.federation()
    _kept[key] = found
    return found


def _bytes(federation: Federation) -> int:
    """Those of all inputs, also of inputs that stay on the disk."""
    examples = sum(len(split) for client in federation.clients for _, split in client.splits())
    return 4 * examples * math.prod(federation.input_shape)
