"""What each method says that it costs, against what a run of it sends, keeps and computes."""

from __future__ import annotations

import dataclasses

import pytest
from torch import Tensor

from core_fixture import ALL_METHODS, make_clients, simulate
from fedmerge import stack
from fedmerge.algorithms import Tensors, make_method
from fedmerge.local import Training
from fedmerge.models import mlp

every_method = pytest.mark.parametrize("method", ALL_METHODS)
M = 6
TRAINING = Training(lr=0.05, batch_size=4)
# Of which every client is of a kind of its own at once.
GREEDY = "cfl:warm=0:eps1=1:eps2=0"


def n_bytes(tables: Tensors) -> int:
    return sum(table.nbytes for table in tables.values())


@pytest.mark.parametrize("epochs", [4, TRAINING.epochs])
@pytest.mark.parametrize("method", [*ALL_METHODS, GREEDY])
def test_a_method_costs_what_it_says(
    method: str, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    gradient = stack._loss_gradient

    def counted(output: Tensor, y: Tensor, share: Tensor, loss: str) -> Tensor:
        nonlocal seen
        seen += int((share > 0).sum())  # the share that an example has in its batch
        return gradient(output, y, share, loss)

    monkeypatch.setattr(stack, "_loss_gradient", counted)
    clients = make_clients(M)
    shape = tuple(clients[0].train.x.shape[1:])
    name = {"ifca-warm": "ifca-warm:warm=2"}.get(method, method)
    # Large enough that counters and the like weigh nothing beside a model.
    training = dataclasses.replace(TRAINING, epochs=epochs)
    simulation = simulate(
        name, clients, lambda: mlp(shape, 3, 64), rounds=6, training=training, evaluate_every=100
    )
    for log in simulation.rounds():
        if log.round == 5:  # under way, and not the last one, which is evaluated
            break
        seen = 0
    layout = simulation.soup.setup.layout
    cost = simulation.algorithm.cost(simulation.soup.setup, M, epochs)
    row = layout.n_bytes
    assert log.bytes_down / row / M == pytest.approx(cost.down, rel=0.02)
    assert log.bytes_up / row / M == pytest.approx(cost.up, rel=0.02)
    assert n_bytes(simulation._memory) / row / M == pytest.approx(cost.client, abs=0.05, rel=0.05)
    server = n_bytes(simulation.soup.shared) + n_bytes(
        simulation.soup.rows(simulation.soup.clients)
    )
    wanted = cost.server + M * cost.server_per_client
    if method in ("fedmerge", "fedmerge-ft"):  # all clients are in every round
        wanted -= M
    if method == "cfl":  # no cluster has been parted yet
        wanted = 2 + M * cost.server_per_client
    if method == GREEDY:  # what is declared is what its tree may grow to
        assert 0.7 * wanted <= server / row <= wanted
    else:
        assert server / row == pytest.approx(wanted, abs=0.2, rel=0.05)
    in_a_pass = epochs * sum(len(client.train) for client in clients)
    assert seen / in_a_pass == pytest.approx(cost.passes, rel=0.04)


def test_with_some_clients_in_a_round_fedmerge_keeps_the_means_of_its_models() -> None:
    clients = make_clients(M)
    shape = tuple(clients[0].train.x.shape[1:])

    def kept(participation: float, method: str = "fedmerge") -> float:
        simulation = simulate(
            method, clients, lambda: mlp(shape, 3, 64), rounds=4, participation=participation
        )
        list(simulation.rounds())
        return n_bytes(simulation.soup.shared) / simulation.soup.setup.layout.n_bytes

    assert kept(0.5) == pytest.approx(kept(1.0) + M, abs=0.01)
    assert kept(0.5, "fedmerge:average=false") == pytest.approx(kept(1.0), abs=0.01)


def test_the_grids_are_short_and_make_methods() -> None:
    for name in ALL_METHODS:
        method = make_method(name)
        assert len(method.grid) <= 8
        assert len({repr(sorted(point.items())) for point in method.grid}) == len(method.grid)
        for point in method.grid:
            options = {k: v for k, v in point.items() if k not in ("lr", "epochs")}
            made = dataclasses.replace(method, **options)  # type: ignore[arg-type]
            assert made != method or not options
