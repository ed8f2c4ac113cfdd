"""What is measured in a process of its own: its peak of memory, and its seconds.

`ask` runs one of `JOBS` in a fresh interpreter and returns what it found; nothing here compares.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .measure import seconds
from .simulated import NEVER, clients_of, pin_threads

Found = dict[str, list[float]]
MIB = 2**20


def peak_rss() -> int:
    """Most bytes of memory that this process has held at once."""
    try:
        # Not ru_maxrss: on Linux a process is born with its parent's.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def ask(job: str, *, fresh: bool = True, **options: float | str) -> Found:
    """Run `job` and return what it measured: bytes as "peak" and "before", the rest in seconds.

    Raises:
        RuntimeError: the process failed; its last line of errors is the text.
    """
    if not fresh:
        return JOBS[job](**options)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.child", job, json.dumps(options)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{job}: {last[0]}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def simulation(method: str, clients: int, cohort: int, rounds: int = 6) -> Found:
    """Rounds with `cohort` out of `clients`, each of 4 generated examples of 16 features."""
    from fedmerge import Simulation, Training, make_method

    draw = torch.Generator().manual_seed(0)
    x = torch.split(torch.randn(clients * 4, 16, generator=draw), 4)
    y = torch.split(torch.randint(0, 4, (clients * 4,), generator=draw), 4)
    data = clients_of(list(zip(x, y, strict=True)))
    before = peak_rss()
    made: list[Simulation] = []

    def build() -> None:
        training = Training(lr=0.05, epochs=1, batch_size=4)
        share = cohort / clients
        make = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        made.append(
            Simulation(
                make_method(method),
                data,
                make,
                training=training,
                rounds=NEVER,
                participation=share,
                evaluate_every=NEVER,
            )
        )

    set_up = seconds(build)
    running = made[0].rounds()
    taken = [seconds(lambda: next(running)) for _ in range(rounds)]
    running.close()
    return {
        "peak": [peak_rss()],
        "before": [before],
        "set_up": [set_up],
        "round": taken[1:],
    }


def server(
    method: str, parameters: int, cohort: int, chunk: int, clients: int = 0, rounds: int = 2
) -> Found:
    """Rounds of a server that folds `cohort` updates, `chunk` at a time, out of `clients`."""
    from fedmerge import make_method

    from .server import server_round
    from .tasks import names

    before = peak_rss()
    one_round = server_round(
        make_method(method), nn.Linear(parameters, 1, bias=False), cohort, chunk
    )
    one_round.soup.join(names(max(clients, cohort)))
    one_round.clients = list(names(max(clients, cohort)))[:cohort]
    taken = [seconds(one_round) for _ in range(rounds)]
    return {"peak": [peak_rss()], "before": [before], "round": taken[1:]}


def table(clients: int, d: int, cohort: int = 50, repeats: int = 5) -> Found:
    """A table of `clients` rows of d merging weights: joined, committed, saved and loaded."""
    from fedmerge import FedMerge, Soup

    from .server import server_round
    from .tasks import names

    method = FedMerge(d=d, leave_one_out=False, peers=0)  # rows of weights alone
    make = nn.Linear(8, 4)
    everyone = names(clients)
    one_round = server_round(method, make, min(cohort, clients), cohort)
    one_round.clients = list(everyone[:: max(1, clients // cohort)][:cohort])
    found: Found = {"join": [seconds(lambda: one_round.soup.join(everyone))]}
    for name in ("round", "commit", "save", "load"):
        found[name] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            found["round"].append(seconds(one_round))
            sent = one_round.soup.send(one_round.clients)
            one_round.soup.fold(one_round.updates(sent.tickets))
            found["commit"].append(seconds(one_round.soup.commit))
            found["save"].append(seconds(lambda: one_round.soup.save(folder)))
            found["load"].append(seconds(lambda: Soup.open(folder, method, make)))
    return {**found, "peak": [peak_rss()]}


JOBS: dict[str, Callable[..., Found]] = {
    "simulation": simulation,
    "server": server,
    "table": table,
}


if __name__ == "__main__":
    pin_threads()
    print(json.dumps(JOBS[sys.argv[1]](**json.loads(sys.argv[2]))))
