"""Seconds a round of a federation of real processes, against an empty app on the same SuperNodes.

    python -m benchmarks.federation --out DIR [--rounds 8] [--repeats 2] [--cold]

Runs alternate, so that a busy machine slows all of them alike. It measures waiting and starting of
processes; what the server computes is in `server.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

from fedmerge.deploy.local import LocalFederation

from .watch import Watch

HOSPITALS = Path(__file__).parents[1] / "examples" / "hospitals"
NAMES = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "empty"
version = "1.0.0"
description = "Sends an empty message to every node and back"
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.hatch.build.targets.wheel]
packages = ["empty"]
[tool.flwr.app]
publisher = "fedmerge"
[tool.flwr.app.components]
serverapp = "empty.server:app"
clientapp = "empty.client:app"
[tool.flwr.app.config]
rounds = 10
out = ""
torch = false
"""
SERVER = """
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config, seconds = context.run_config, []
    while len(nodes := [node.node_id for node in grid.get_nodes()]) < 4:
        time.sleep(0.5)
    for number in range(config["rounds"]):
        start, waiting = time.monotonic(), []
        for node in nodes:
            records = RecordDict({"c": ConfigRecord({"torch": config["torch"]})})
            waiting += grid.push_messages([Message(records, node, "train")])
        while waiting:
            for name in list(waiting):
                if list(grid.pull_messages([name])):
                    waiting.remove(name)
            time.sleep(0.2)
        seconds.append(time.monotonic() - start)
    with open(config["out"], "w") as file:
        json.dump(seconds, file)
"""
CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    if message.content["c"]["torch"]:
        import torch
    return Message(RecordDict({"c": ConfigRecord({})}), reply_to=message)
"""


def write_empty_app(folder: Path) -> None:
    """Write an app that does nothing: the floor that Flower sets."""
    (folder / "empty").mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "empty" / "__init__.py").write_text("")
    (folder / "empty" / "server.py").write_text(SERVER)
    (folder / "empty" / "client.py").write_text(CLIENT)


class Commits(Watch):
    """Watches when rounds are committed: all that a server does counts, not only what it logs."""

    interval = 0.05

    def __init__(self, status: Path) -> None:
        super().__init__()
        self._status = status
        self._times: dict[int, float] = {}

    def look(self) -> None:
        """See `Watch`."""
        with contextlib.suppress(OSError):
            number = json.loads(self._status.read_text())["round"]
            self._times.setdefault(number, time.monotonic())

    def seconds(self) -> list[float]:
        """From each commit to the next, the first to the second first."""
        times = [at for number, at in sorted(self._times.items()) if number > 0]
        return [after - before for before, after in pairwise(times)]


def measure(federation: LocalFederation, kind: str, out: Path, rounds: int) -> list[float]:
    """Seconds of each round but the first, in which nodes and processes are still starting."""
    if kind == "fedmerge":
        given = {"fedmerge.state": str(out), "fedmerge.rounds": rounds}
        commits = Commits(out / "status.json")
        with commits:
            ended = federation.wait(federation.run(HOSPITALS, given), 1200)
        seconds = [0.0, *commits.seconds()]
    else:
        options = {"rounds": rounds, "out": str(out), "torch": kind == "empty, with torch"}
        ended = federation.wait(federation.run(out.parent / "app", options), 1200)
        seconds = json.loads(out.read_text())
    if ended != "finished:completed":
        raise SystemExit(f"{kind}: {ended}; {federation.tail('superlink')}")
    return seconds[1:]


def main() -> int:
    """Run what the command line asks for, and print a table."""
    parser = argparse.ArgumentParser(description="Seconds a round, against Flower's own floor")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="Flower's own SuperNodes")
    given = parser.parse_args()
    out = given.out.resolve()
    write_empty_app(out / "app")
    nodes = {name.lower().replace(" ", "-"): {"hospital": name} for name in NAMES}
    found: dict[str, list[float]] = {"empty": [], "empty, with torch": [], "fedmerge": []}
    environment = {"OMP_NUM_THREADS": "1"}
    with LocalFederation(
        out / "flower", nodes, environment=environment, warm=not given.cold
    ) as federation:
        for repeat in range(given.repeats):
            for kind, seconds in found.items():
                place = out / f"{kind.replace(', ', '-').replace(' ', '-')}-{repeat}"
                seconds += measure(federation, kind, place, given.rounds)
    print(f"{'cold' if given.cold else 'warm'} start, seconds a round: median (least, most)")
    for kind, seconds in found.items():
        middle = statistics.median(seconds)
        print(f"  {kind:<18} {middle:6.2f}  ({min(seconds):.2f}, {max(seconds):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
