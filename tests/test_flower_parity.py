"""The server and the clients on Flower do what a simulation of the same clients does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from fedmerge import Simulation, Training, make_method
from fedmerge.flower import ServerConfig, client_app
from fedmerge.flower.server import Server
from flower_fixture import LocalGrid, Node, make_clients, network

TRAINING = Training(lr=0.2, epochs=2, batch_size=8)


def federation(clients: list[Any], training: Training = TRAINING) -> LocalGrid:
    nodes = {}
    for i, client in enumerate(clients):
        app = client_app(network, lambda config, c=client: c, training)
        nodes[100 + i] = Node(app, {"client-id": client.id})
    return LocalGrid(nodes)


@pytest.mark.parametrize(
    ("method", "participation"),
    [
        ("fedmerge", 1.0),
        ("fedmerge:d=2", 0.5),
        ("fedmerge-ft:finetune=1", 1.0),
        ("fedavg", 1.0),
        ("ditto", 1.0),
        ("ifca:d=2", 1.0),
        ("local", 1.0),
        ("fedprox", 1.0),
        ("fedper", 1.0),
        ("fedem", 1.0),
        ("apfl", 1.0),
        ("fedfomo", 1.0),
        ("apple", 0.5),
    ],
)
def test_a_federation_is_the_simulation(tmp_path: Path, method: str, participation: float) -> None:
    clients = make_clients(4)
    simulation = Simulation(
        make_method(method),
        clients,
        network,
        training=TRAINING,
        rounds=5,
        participation=participation,
        seed=3,
    )
    wanted = list(simulation.rounds())
    settings = ServerConfig(
        state=str(tmp_path),
        method=method,
        rounds=5,
        clients=4,
        participation=participation,
        seed=3,
        poll=0.001,
        deadline=30,
    )
    server = Server(federation(clients), settings, network)
    server.run()
    assert server.soup.version == 5
    for name, tensor in simulation.soup.shared.items():
        torch.testing.assert_close(server.soup.shared[name], tensor, rtol=1e-5, atol=1e-6)
    ids = [c.id for c in clients]
    for name, rows in simulation.soup.rows(ids).items():
        # Of numbers kept in 16 bits, one may be rounded the other way.
        off = 1 if rows.dtype == torch.int16 else 1e-5
        torch.testing.assert_close(server.soup.rows(ids)[name], rows, rtol=1e-4, atol=off)
    for mine, theirs in zip(server.progress.history, wanted, strict=True):
        assert (mine.round, mine.cohort, mine.refused) == (theirs.round, theirs.cohort, {})
        assert (mine.bytes_up, mine.bytes_down) == (theirs.bytes_up, theirs.bytes_down)
        if participation == 1.0:
            assert flat(mine.metrics) == pytest.approx(flat(theirs.metrics), abs=1e-5)
            assert mine.gap_test == pytest.approx(theirs.gap_test, abs=1e-5)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4, 5]


def flat(metrics: Any) -> dict[str, float]:
    made = {}
    for model, splits in metrics.items():
        for split, measures in splits.items():
            for measure, summary in measures.items():
                if summary is not None:
                    made[f"{model} {split} {measure}"] = summary.mean
    return made
