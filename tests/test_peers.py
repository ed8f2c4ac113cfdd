"""What rows learn from peers, against numbers made by hand; the whole rule is in `test_merging`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from core_fixture import made_delta, make_updates, net
from fedmerge import FedMerge, Soup
from fedmerge.peers import AGREEMENT, FURTHEST, SUMMED, drawn, likeness, no_peers, renewed
from fedmerge.privacy import Privacy
from fedmerge.safety import Safety

F64 = torch.float64


def table(sketch: Tensor, step: Tensor | None = None, logits: Tensor | None = None) -> dict:
    """Peers 0, 1, ... with sketches (n, b, s), and steps and rows (n, b, 2)."""
    n, b, _ = sketch.shape
    none = torch.zeros(n, b, 2, dtype=F64)
    return {
        "place": torch.arange(n),
        "sketch": sketch,
        "step": none if step is None else step,
        "logits": none if logits is None else logits,
        "past": sketch,
        "home": torch.full((n, b), -1),
    }


def test_likeness_is_the_fourth_power_of_a_positive_cosine_of_what_differs_from_the_mean() -> None:
    # About their mean (5, 5) the peers point right, up, left and down.
    peers = table(torch.tensor([[[9.0, 5]], [[5, 9]], [[1, 5]], [[5, 1]]]))
    update = torch.tensor([[[5 + math.cos(0.6), 5 + math.sin(0.6)]]])
    found = likeness(update, torch.tensor([7]), peers)
    np.testing.assert_allclose(found[0, 0], [math.cos(0.6) ** 4, math.sin(0.6) ** 4, 0, 0], 1e-6)
    # The same client is not its own peer.
    found = likeness(update, torch.tensor([0]), peers)
    np.testing.assert_allclose(found[0, 0], [0, math.sin(0.6) ** 4, 0, 0], 1e-6)


def test_a_row_goes_with_the_steps_of_its_peers_no_further_than_allowed() -> None:
    step = torch.tensor([[[0.01, -0.01]], [[0.02, -0.02]]], dtype=F64)
    peers = table(torch.zeros(2, 1, 3), step=step)
    alike = torch.tensor([[[0.5, 0.25]]], dtype=F64)
    rows = torch.log(torch.full((1, 1, 2), 0.5, dtype=F64))
    moved = drawn(rows, alike, peers, pull=10.0) - rows
    # Peers whose rows are as even as its own do not change it by their rows.
    assert float(moved[0, 0, 0] - moved[0, 0, 1]) == pytest.approx(2 * 10 * (0.005 + 0.005))
    far = drawn(rows, alike, peers, pull=1000.0) - rows
    assert float(far[0, 0, 0] - far[0, 0, 1]) == pytest.approx(2 * FURTHEST)


def test_of_many_peers_a_share_of_the_sum_is_taken() -> None:
    n = 2 * SUMMED
    step = torch.tensor([[0.001, -0.001]], dtype=F64).repeat(n, 1, 1)
    rows = torch.zeros(1, 1, 2, dtype=F64)
    alike = torch.full((1, 1, n), 0.1, dtype=F64)
    moved = drawn(rows, alike, table(torch.zeros(n, 1, 3), step=step), pull=1.0)
    assert float(moved[0, 0, 0] - moved[0, 0, 1]) == pytest.approx(0.002 * 0.1 * SUMMED)


def test_rows_draw_together() -> None:
    peers = table(torch.zeros(1, 1, 3), logits=torch.tensor([[[1.0, -1.0]]], dtype=F64))
    rows = torch.zeros(1, 1, 2, dtype=F64)
    moved = drawn(rows, torch.ones(1, 1, 1, dtype=F64), peers, pull=3.0)
    assert float(moved[0, 0, 0] - moved[0, 0, 1]) == pytest.approx(2 * AGREEMENT * 3 / 4)


def test_the_table_keeps_the_latest_in_any_order_of_coming() -> None:
    def seen(*places: int) -> dict:
        made = table(torch.tensor([[[float(p), 0, 0]] for p in places]))
        return made | {"place": torch.tensor(places)}

    none = no_peers(1, 2, 3)
    first = renewed(none, seen(0, 1, 2), 4)
    assert sorted(first["place"].tolist()) == [0, 1, 2]
    second = renewed(first, seen(5, 1), 4)
    assert sorted(second["place"].tolist()) == [0, 1, 2, 5]
    assert set(second["place"][:2].tolist()) == {1, 5}
    assert torch.equal(second["sketch"][:, 0, 0].long(), second["place"])
    third = renewed(second, seen(8, 9, 7), 4)
    assert set(third["place"][:3].tolist()) == {7, 8, 9}
    assert third["place"][3] in (1, 5)
    places = list(range(50))
    one = renewed(none, seen(*places), 10)
    other = renewed(none, seen(*reversed(places)), 10)
    assert len(one["place"]) == 10
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_peers_nothing_is_kept_of_them_and_clients_do_not_touch_each_other() -> None:
    def run(peers: int, others: float) -> Tensor:
        method = FedMerge(d=3, peers=peers, init_noise=1, leave_one_out=False)
        soup = Soup(method, net(dtype=F64), seed=1)
        for _ in range(3):
            sent = soup.send(["a", "b", "c", "d"])
            one = made_delta(soup, 1, 2)
            delta = torch.cat([one, one, -one, -one])  # two plain kinds
            delta[1:] *= others
            soup.fold(make_updates(sent, delta))
            models = soup.shared["models"].clone()
            soup.commit()
            # They stay, so that a row can learn of the others in no other way.
            soup.shared["models"] = models
        assert any(name.startswith("peers.") for name in soup.shared) == bool(peers)
        weights = soup.weights(["a"])
        assert weights is not None
        return weights

    assert torch.equal(run(0, 1.0), run(0, 0.1))
    assert not torch.allclose(run(8, 1.0), run(8, 0.1))


def test_with_privacy_rows_learn_from_nobody_else() -> None:
    private = Safety(privacy=Privacy(clip=1.0, noise=1.0))
    assert Soup(FedMerge(d=2), net(), safety=private).algorithm == FedMerge(d=2, peers=0)
    assert Soup(FedMerge(d=2), net()).algorithm == FedMerge(d=2)
