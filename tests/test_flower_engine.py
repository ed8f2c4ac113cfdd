"""Flower's own simulation engine (on Ray) runs the same app, with the same result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("ray")

from fedmerge import Client, Simulation, Training, make_method
from fedmerge.flower import ServerConfig
from fedmerge.flower.progress import load
from flower_fixture import make_clients, network

pytestmark = pytest.mark.federation

SCRIPT = """
import sys
from flwr.simulation import run_simulation
from fedmerge import Training
from fedmerge.flower import ServerConfig, client_app, server_app
sys.path.insert(0, {tests!r})
from flower_fixture import make_clients, network

def data(node_config):
    return make_clients(3)[node_config["partition-id"]]

settings = ServerConfig(state={state!r}, rounds=3, clients=3, seed=4, poll=0.05, deadline=100.0)
client = client_app(network, data, Training(lr=0.2, epochs=2, batch_size=8))
run_simulation(
    server_app(settings, network),
    client,
    num_supernodes=3,
    backend_config={{"client_resources": {{"num_cpus": 1, "num_gpus": 0.0}},
                     "init_args": {{"address": "local", "num_cpus": 1,
                                   "include_dashboard": False}}}},
)
"""


def test_the_simulation_engine_runs_the_same_app(tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), state=str(tmp_path / "state"))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(tmp_path / "flower"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": "/tmp",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    clients = [
        Client(f"partition-{i}", c.train, c.validation, c.test)
        for i, c in enumerate(make_clients(3))
    ]
    simulation = Simulation(
        make_method("fedmerge"),
        clients,
        network,
        training=Training(lr=0.2, epochs=2, batch_size=8),
        rounds=3,
        seed=4,
    )
    list(simulation.rounds())
    settings = ServerConfig(state=str(tmp_path / "state"), clients=3, seed=4)
    soup = settings.soup(network)
    load(settings.folder, soup)
    assert soup.version == 3
    torch.testing.assert_close(
        soup.shared["models"], simulation.soup.shared["models"], rtol=1e-5, atol=1e-6
    )
