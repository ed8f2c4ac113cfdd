"""`python -m benchmarks.peers`: rounds of W1 and W2 in other libraries, against the bare loop.

A peer that cannot be installed or run is reported with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..measure import Figure, Spread, alternate, ratios
from ..output import machine, show, write
from ..rounds import BARE
from ..simulated import one_line, pin_threads
from ..sizes import FULL, TINY, Sizes
from ..tasks import Task, w1, w2
from .install import environment
from .turn_taker import TurnTaker

CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Peer:
    """A library, the module that runs it with `workers` processes, and how it is installed.

    Without a requirement it runs in the environment that is running already.
    """

    module: str
    workers: int = 1
    folder: str = ""
    requirement: str = ""


AGAIN = "bare loop, again"
FLOWER = "flwr[simulation]==1.41.*"
PEERS = {
    # The reference twice: how far two processes that do the same are apart.
    AGAIN: Peer("run_bare"),
    "fedmerge": Peer("run_fedmerge"),
    f"fedmerge, {CORES} workers": Peer("run_fedmerge", CORES),
    "pfl-research": Peer("run_pfl", 1, "pfl", "pfl[pytorch]==0.6.*"),
    "fluke": Peer("run_fluke", 1, "fluke", "fluke-fl==0.8.*"),
    "flower, 1 worker": Peer("run_flower", 1, "flower", FLOWER),
    f"flower, {CORES} workers": Peer("run_flower", CORES, "flower", FLOWER),
}
if CORES == 1:
    PEERS = {name: peer for name, peer in PEERS.items() if not name.endswith("1 workers")}


def figures(task: Task, name: str, peer: Peer, repeats: int, folder: Path) -> Iterator[Figure]:
    """Rounds of a peer in turn with the bare loop, each in a process of its own.

    Not the bare loop in this process: what a process did before can be seen in its speed, by how
    its memory is laid out.
    """
    path = folder / f"{task.name}.npz"
    task.save(path)
    each = 2 if task.short else 1  # rounds a turn, of which the last is timed
    started: dict[str, TurnTaker] = {}
    try:
        python = Path(sys.executable)
        if peer.requirement:
            python = environment(folder / peer.folder, peer.requirement)
        paired = {name: (peer, python), BARE: (PEERS[AGAIN], Path(sys.executable))}
        for label, (runner, of) in paired.items():
            log = folder / f"{task.name}-{runner.module}-{len(started)}.log"
            rounds = (repeats + 1) * each
            started[label] = TurnTaker(of, runner.module, path, rounds, runner.workers, log)
        alternate({k: v.round for k, v in started.items()}, repeats, settle=task.short)
        for running in started.values():
            if running.steps != task.steps:
                raise RuntimeError(f"it took {running.steps} SGD steps, wanted {task.steps}")
    except (RuntimeError, OSError, ValueError) as error:
        yield Figure("peers", task.name, name, "s", None, note=f"not run: {one_line(error)}")
        return
    finally:
        for running in started.values():
            running.close()
    own, bare = (v.seconds[each:][each - 1 :: each] for v in started.values())
    running = started[name]
    note = f"bare loop {Spread.of(bare).median:.3g} s; ready after {running.start:.1f} s, "
    note += f"first round {running.seconds[0]:.2g} s"
    at = {"steps": running.steps, "workers": peer.workers}
    yield Figure("peers", task.name, name, "s", Spread.of(own), ratios(own, bare), note, at)


def main(line: Sequence[str] | None = None) -> None:
    """Run the peers that are asked for, all without an argument."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Run peers.")
    parser.add_argument("peer", nargs="*", help=f"of {'; '.join(PEERS)}; all if none is given")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--out", type=Path, default=Path("out/peers"), help="folder")
    parser.add_argument("--workload", choices=("W1", "W2"), action="append", help="both by default")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: see that everything runs")
    given = parser.parse_args(line)
    unknown = [name for name in given.peer if name not in PEERS]
    if unknown:
        parser.error(f'there is no peer "{unknown[0]}": choose from {"; ".join(PEERS)}')
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: wanted 1 or more")
    pin_threads()
    sizes: Sizes = TINY if given.tiny else FULL
    console = Console()
    console.print(machine())
    made: list[Figure] = []
    for task in (w1(sizes.w1_clients), w2(sizes.w2_clients, sizes.w2_images)):
        if given.workload and task.name not in given.workload:
            continue
        for name in given.peer or PEERS:
            console.print(f"{task.name}: {name}")
            made += figures(task, name, PEERS[name], given.repeats, given.out)
        write(given.out, made, "peers")
    show("peers", made, console)
    console.print(f"written to {given.out}")


if __name__ == "__main__":
    main()
