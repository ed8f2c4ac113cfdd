"""Peak memory of a ServerApp and a SuperLink with a large model, by the number of SuperNodes.

    python -m benchmarks.federation_memory --out DIR [--nodes 3,12] [--numbers 26000000]

Real processes, TLS and keys. A node with such a model needs a few times its size while it trains:
with `--in-flight 2` only two do so at once. Seconds are measured in `federation.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from fedmerge.deploy.create import create_app
from fedmerge.deploy.local import LocalFederation

from .watch import Watch

INPUTS = 1000
MODEL = """
from torch import nn


def model():
    return nn.Sequential(nn.Linear({inputs}, {width}), nn.ReLU(), nn.Linear({width}, 2))
"""
DATA = """
import torch
from fedmerge import Split


def data(node_config):
    draw = torch.Generator().manual_seed(node_config["number"])
    x = torch.randn(48, {inputs}, generator=draw)
    y = (x[:, 0] > 0).long()
    return [Split(x[a:b], y[a:b]) for a, b in ((0, 32), (32, 40), (40, 48))]
"""


def peak_of(pid: int) -> float:
    """Most MiB of memory that a process has held so far; 0 for one that has ended."""
    with contextlib.suppress(OSError):
        for line in (Path("/proc") / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


class Peaks(Watch):
    """Peaks of a federation's ServerApp and SuperLink, in MiB, while it is entered."""

    def __init__(self, federation: LocalFederation) -> None:
        super().__init__()
        self._federation = federation
        self.server = self.link = 0.0

    def look(self) -> None:
        """See `Watch`."""
        servers = self._federation.descendants("flwr-serverapp")
        self.server = max([self.server, *map(peak_of, servers)])
        self.link = max(self.link, peak_of(self._federation.pid("superlink")))


def measure(out: Path, n: int, numbers: int, rounds: int, in_flight: int) -> Peaks:
    """Peaks with `n` nodes and a model of about so many numbers."""
    app = out / "app"
    create_app(app, clients=n)
    values = {"inputs": INPUTS, "width": max(1, numbers // (INPUTS + 3))}
    (app / "app" / "model.py").write_text(MODEL.format(**values))
    (app / "app" / "data.py").write_text(DATA.format(**values))
    options = {"rounds": rounds, "evaluate_every": 0, "method": "fedmerge:d=2"}
    options |= {"in_flight": in_flight}
    nodes = {f"site-{i}": {"number": i} for i in range(n)}
    environment = {"OMP_NUM_THREADS": "1"}
    # Without a database on disk, which would measure the disk.
    with LocalFederation(
        out / "flower", nodes, environment=environment, database=False
    ) as federation:
        with Peaks(federation) as peaks:
            run = federation.run(app, {f"fedmerge.{k}": v for k, v in options.items()})
            ended = federation.wait(run, 3600)
        if ended != "finished:completed":
            raise SystemExit(f"{n} nodes: {ended}; {federation.tail('superlink')}")
    return peaks


def main() -> int:
    """Run what the command line asks for, and print a table."""
    parser = argparse.ArgumentParser(description="Peak memory of a federation's server")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nodes", default="3,12")
    parser.add_argument("--numbers", type=int, default=26_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=8)
    given = parser.parse_args()
    print("peak in MiB    ServerApp   SuperLink")
    for n in map(int, given.nodes.split(",")):
        out = given.out.resolve() / str(n)
        peaks = measure(out, n, given.numbers, given.rounds, given.in_flight)
        print(f"{n:>4} nodes     {peaks.server:>9.0f}   {peaks.link:>9.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
