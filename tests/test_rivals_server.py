"""The rivals whose server does more than average: each step against the paper's own equations.

The expected numbers are computed here, client by client, with numpy or plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from core_fixture import TRAINING, make_clients, make_updates, net, norm_net, normal, run, simulate
from fedmerge.algorithms import CFL, PPFL, FedAMP, FedEM, FedFomo, FeSEM, MoE, make_method
from fedmerge.engine import Engine
from fedmerge.errors import ConfigError
from fedmerge.local import Mixture, Training, batches
from fedmerge.rng import numpy_generator
from fedmerge.sim.execute import GroupTrainer
from fedmerge.sim.population import Population
from fedmerge.soup import Soup

F64 = torch.float64
NET = net(dtype=F64)
K = 5


def soup_of(method: Any, **options: Any) -> Soup:
    return Soup(method, NET, n_inputs=5, **options)


def names(k: int = K) -> list[str]:
    return [f"c{i}" for i in range(k)]


def one_round(soup: Soup, delta: Tensor, clients: list[str] | None = None, **extra: Tensor) -> None:
    clients = clients or names(len(delta))
    assert soup.fold(make_updates(soup.send(clients), delta, extra=extra)) == []
    soup.commit()


class OneClient:
    """Three clients in float64, one of which is followed by plain autograd."""

    def __init__(self, method: Any, training: Training = TRAINING) -> None:
        clients = [
            replace(c, train=as_f64(c.train), validation=as_f64(c.validation), test=as_f64(c.test))
            for c in make_clients(3)
        ]
        self.soup = soup_of(method.resolve(3))
        self.algorithm, self.setup = self.soup.algorithm, self.soup.setup
        self.client, self.training = clients[1], training.for_data(classes=True)
        engine = Engine(NET(), self.setup.layout, self.training)
        self.trainer = GroupTrainer(engine, Population.of(clients), [0, 1, 2], 0, 1)

    def local(self, message: Tensor, memory: dict[str, Tensor]) -> Any:
        return self.algorithm.local(self.setup, message, memory, self.trainer)

    def batches(self, purpose: str = "train") -> list[Tensor]:
        """The batches of the client that is followed, in their order."""
        drawn = batches(
            len(self.client.train.y),
            self.training.epochs,
            numpy_generator(0, 1, self.client.id, purpose),
        )
        size = self.training.batch_size
        return [part for epoch in drawn for part in torch.from_numpy(epoch).split(size)]

    def outputs(self, row: Tensor, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (self.setup.layout.views(row)[n] for n in PARAMETERS)
        return torch.tanh(x @ w1.T + b1) @ w2.T + b2

    def losses(self, row: Tensor, at: Any = slice(None)) -> Tensor:
        x, y = self.client.train.x[at], self.client.train.y[at]
        return functional.cross_entropy(self.outputs(row, x), y, reduction="none")


PARAMETERS = ("0.weight", "0.bias", "2.weight", "2.bias")


def as_f64(split: Any) -> Any:
    return replace(split, x=split.x.double())


# -- FedAMP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 0.3])
def test_fedamp_mixes_by_cosine(own: float | None) -> None:
    soup = soup_of(FedAMP(sigma=8.0, own=own))
    first = soup.setup.initial(0)
    delta = normal(1, K, len(first), dtype=F64)
    one_round(soup, delta)
    w = (first - delta).numpy()
    for i in range(K):
        share = np.zeros(K)
        for j in range(K):
            if j != i:
                cosine = w[i] @ w[j] / np.linalg.norm(w[i]) / np.linalg.norm(w[j])
                share[j] = math.exp(8.0 * cosine)
        self_share = 1 / K if own is None else own
        share *= (1 - self_share) / share.sum()
        share[i] = self_share
        got = soup.used([f"c{i}"])[0, 0].numpy()
        np.testing.assert_allclose(got, share @ w, rtol=1e-10, atol=1e-12)


def test_fedamp_mixes_by_distance() -> None:
    soup = soup_of(FedAMP(attention="distance", sigma=0.5, own=0.2))
    first = soup.setup.initial(0)
    delta = normal(2, K, len(first), dtype=F64) * torch.arange(1, K + 1)[:, None]
    one_round(soup, delta)
    w = (first - delta).numpy()
    square = np.array([[((a - b) ** 2).sum() for b in w] for a in w])
    width = 0.5 * square.sum() / (K * (K - 1))
    slope = np.exp(-square / width) / width
    np.fill_diagonal(slope, 0)
    xi = slope * (0.8 / slope.sum(1).max())
    xi += np.diag(1 - xi.sum(1))
    assert xi.diagonal().min() == pytest.approx(0.2)
    got = soup.used(names())[:, 0].numpy()
    np.testing.assert_allclose(got, xi @ w, rtol=1e-10, atol=1e-12)


def test_fedamp_mixes_what_absent_clients_have_trained_last() -> None:
    soup = soup_of(FedAMP(sigma=8.0))
    soup.join(names())
    first = soup.setup.initial(0)
    delta = normal(3, 4, len(first), dtype=F64)
    one_round(soup, delta[:1], ["c2"])
    got = soup.used(names())[:, 0]
    # One alone keeps its model; who has not taken part yet is sent the mean of all.
    torch.testing.assert_close(got, (first - delta[0]).repeat(K, 1))
    one_round(soup, delta[1:3], ["c0", "c4"])
    trained = {2: first - delta[0], 0: got[0] - delta[1], 4: got[4] - delta[2]}
    one_round(soup, delta[3:], ["c2"])
    cosine = {k: torch.cosine_similarity(trained[2], trained[k], dim=0) for k in (0, 4)}
    share = torch.softmax(8.0 * torch.stack([cosine[0], cosine[4]]), 0) * 2 / 3
    cloud = trained[2] / 3 + share[0] * trained[0] + share[1] * trained[4]
    trained[2] = cloud - delta[3]
    got = soup.used(names())[:, 0]
    torch.testing.assert_close(got[1], torch.stack(list(trained.values())).mean(0))
    cosine = {k: torch.cosine_similarity(trained[4], trained[k], dim=0) for k in (0, 2)}
    share = torch.softmax(8.0 * torch.stack([cosine[0], cosine[2]]), 0) * 2 / 3
    wanted = trained[4] / 3 + share[0] * trained[0] + share[1] * trained[2]
    torch.testing.assert_close(got[4], wanted)


def test_fedamp_trains_from_the_cloud_model_and_is_held_near_it() -> None:
    one = OneClient(FedAMP(mu=0.7))
    message = normal(4, 3, 1, one.setup.layout.size, dtype=F64)
    done = one.local(message, one.algorithm.memory(one.setup, 3))
    row, cloud = message[1, 0].clone(), message[1, 0]
    for at in one.batches():
        row.requires_grad_()
        loss = one.losses(row, at).mean() + 0.35 * (row - cloud).square().sum()
        row = (row - 0.2 * torch.autograd.grad(loss, row)[0]).detach()
    torch.testing.assert_close(done.own[1], row)
    torch.testing.assert_close(done.memory["model"][1], row)


# -- FedFomo --------------------------------------------------------------------------------------


def test_fedfomo_moves_by_gain_over_distance() -> None:
    one = OneClient(FedFomo(others=2, epsilon=0.0))
    size = one.setup.layout.size
    message = 0.3 * normal(5, 3, 2, size, dtype=F64)
    memory = {n: 0.3 * normal(s, 3, size, dtype=F64) for n, s in (("before", 6), ("trained", 7))}
    done = one.local(message, memory)
    split = one.client.validation

    def loss(row: Tensor) -> float:
        return functional.cross_entropy(one.outputs(row, split.x), split.y).item()

    base = memory["before"][1]
    models = [*message[1], memory["trained"][1]]
    w = [(loss(base) - loss(row)) / float((row - base).norm()) for row in models]
    total = sum(max(x, 0.0) for x in w)
    assert total > 0 > min(w)
    wanted = base + sum(
        max(x, 0.0) / total * (row - base) for x, row in zip(w, models, strict=True)
    )
    torch.testing.assert_close(done.memory["before"][1], wanted)
    torch.testing.assert_close(done.extra["gain"][1].tolist(), w[:2])
    again = one.algorithm.personal(one.setup, message, memory, one.trainer)
    torch.testing.assert_close(again[1], wanted)
    # Nothing gained anywhere: it stays where it was.
    worse = {"before": memory["before"], "trained": 50 * memory["trained"]}
    stays = one.algorithm.personal(one.setup, 50 * message, worse, one.trainer)
    torch.testing.assert_close(stays, memory["before"])


def test_fedfomo_sends_the_models_of_largest_affinity() -> None:
    soup = soup_of(FedFomo(others=2, epsilon=0.0))
    first = soup.setup.initial(0)
    zeros = torch.zeros(K, 2, dtype=F64)
    whole = normal(8, K, len(first), dtype=F64)  # what is sent is minus the trained model
    one_round(soup, whole, gain=zeros)
    chosen = soup.algorithm._chosen(soup.setup, soup.shared, soup.rows(names()))  # type: ignore[attr-defined]
    assert all(i not in chosen[i] for i in range(K))
    gain = normal(9, K, 2, dtype=F64)
    one_round(soup, whole, gain=gain)
    affinity = np.zeros((K, K))
    for i in range(K):
        for slot, j in enumerate(chosen[i].tolist()):
            affinity[i, j] += gain[i, slot].item()
    np.testing.assert_allclose(soup.shared["affinity"].numpy(), affinity, rtol=1e-6)
    got = soup.used(names())
    for i in range(K):
        others = sorted((j for j in range(K) if j != i), key=lambda j: -affinity[i, j])
        best = {j for j in others if affinity[i, j] > affinity[i, others[2]]}
        sent = {j for j in range(K) if any(torch.equal(-whole[j], row) for row in got[i])}
        assert best <= sent
        assert i not in sent
        assert len(sent) == 2


def test_fedfomo_sends_the_initial_model_where_there_is_nobody_else() -> None:
    soup = soup_of(FedFomo(others=2, epsilon=0.0))
    first = soup.setup.initial(0)
    assert torch.equal(soup.send(["a", "b"]).message, first.expand(2, 2, -1))
    sent = soup.send(["a"])
    delta = first - torch.full_like(first, 2.0)
    updates = make_updates(sent, delta[None])
    soup.fold(replace(updates, extra={"gain": torch.zeros(1, 2, dtype=torch.float64)}))
    soup.commit()
    to_a, to_b = soup.send(["a", "b"]).message
    assert torch.equal(to_a, first.expand(2, -1))
    assert not torch.equal(to_b[0], first)
    assert torch.equal(to_b[1], first)


def test_fedfomo_explores_as_often_as_epsilon_says() -> None:
    sent = []
    for epsilon in (0.0, 0.5):
        soup = soup_of(FedFomo(others=2, epsilon=epsilon, decay=0.0))
        whole = normal(8, 30, soup.setup.layout.size, dtype=F64)
        one_round(soup, whole, gain=torch.zeros(30, 2, dtype=F64))
        soup.shared["affinity"] = normal(23, 30, 30).fill_diagonal_(-9)
        liked = soup.shared["affinity"].topk(2, dim=1).indices
        chosen = soup.algorithm._chosen(soup.setup, soup.shared, soup.rows(names(30)))  # type: ignore[attr-defined]
        sent.append((chosen[..., None] == liked[:, None]).any(-1).double().mean().item())
    assert sent[0] == 1
    assert 0.35 < sent[1] < 0.65


# -- FeSEM ----------------------------------------------------------------------------------------


def test_fesem_assigns_by_distance_and_takes_means() -> None:
    soup = soup_of(FeSEM(d=2, warm=1))
    first = soup.setup.initial(0)
    towards = torch.where(torch.arange(K)[:, None] % 2 == 0, 3.0, -3.0)
    delta = towards + 0.1 * normal(10, K, len(first), dtype=F64)
    one_round(soup, delta)
    w = first - delta
    soup.join(["new"])
    got = soup.used([*names(), "new"])[:, 0]
    for i in range(K):
        torch.testing.assert_close(got[i], w[i % 2 :: 2].mean(0))
    torch.testing.assert_close(got[K], w.mean(0))
    # A client whose weights end up nearer to the other centre changes sides.
    delta = 0.1 * normal(11, K, len(first), dtype=F64)
    delta[0] = got[0] - got[1]
    one_round(soup, delta)
    w = got[:K] - delta
    after = soup.used(names())[:, 0]
    torch.testing.assert_close(after[0], w[[0, 1, 3]].mean(0))
    torch.testing.assert_close(after[2], w[[2, 4]].mean(0))


def test_fesem_averages_all_while_it_warms_up() -> None:
    soup = soup_of(FeSEM(d=2, warm=2))
    first = soup.setup.initial(0)
    delta = normal(12, K, len(first), dtype=F64)
    one_round(soup, delta)
    torch.testing.assert_close(soup.used(names())[:, 0], (first - delta.mean(0)).repeat(K, 1))
    one_round(soup, delta)
    assert len(soup.used(names())[:, 0].unique(dim=0)) == 2


def fesem_after(centres: list[list[float]], ends: list[list[float]]) -> np.ndarray[Any, Any]:
    """(4, p) what clients are sent whose first two trained centre 0, and whose others centre 1,
    once they have ended at `ends` (4, p); weights beyond the first p are 0."""
    soup = soup_of(FeSEM(d=2, warm=1))
    soup.join(names(4))
    p = len(ends[0])

    def rows(points: list[list[float]]) -> Tensor:
        return functional.pad(torch.tensor(points, dtype=F64), (0, soup.setup.layout.size - p))

    for points in ([centres[0], centres[0], centres[1], centres[1]], ends):
        one_round(soup, soup.used(names(4))[:, 0] - rows(points), names(4))
    return soup.used(names(4))[:, 0, :p].numpy()


def test_fesem_compares_squares_of_distances() -> None:
    """Client 0 ends 2 from its centre in one coordinate, and 1 from the other in each of three: its
    squares are 4 and 3, its absolute differences 2 and 3."""
    near, far, end = [0.0, 0, 0, 0], [2.0, 1, 1, 1], [2.0, 0, 0, 0]
    got = fesem_after([near, far], [end, near, far, far])
    wanted = (np.array(end) + 2 * np.array(far)) / 3
    np.testing.assert_allclose(got, [wanted, near, wanted, wanted], atol=1e-12)


def test_fesem_measures_from_the_whole_of_a_clients_weights() -> None:
    """Client 0 ends at 1.8 between centres at 1 and 2; half of it would be at the other one."""
    got = fesem_after([[1.0], [2.0]], [[1.8], [1.0], [2.0], [2.0]])
    np.testing.assert_allclose(got[:, 0], [5.8 / 3, 1.0, 5.8 / 3, 5.8 / 3])


def test_a_centre_of_fesem_with_one_client_is_that_client() -> None:
    got = fesem_after([[1.0, 3.0], [9.0, 7.0]], [[8.0, 8.0], [1.5, 2.5], [9.5, 7.0], [9.5, 9.0]])
    others = np.mean([[8.0, 8.0], [9.5, 7.0], [9.5, 9.0]], axis=0)
    np.testing.assert_allclose(got, [others, [1.5, 2.5], others, others])


# -- CFL ------------------------------------------------------------------------------------------


def test_cfl_parts_clients_whose_updates_conflict() -> None:
    soup = soup_of(CFL(eps1=0.5, eps2=0.1, warm=1))
    first = soup.setup.initial(0)
    base = normal(13, len(first), dtype=F64)
    sign = torch.tensor([1.0, -1, 1, -1, -1])[:, None]
    delta = sign * base + 0.05 * normal(14, K, len(first), dtype=F64)
    n = torch.arange(10, 10 + K).double()
    mean = (n / n.sum()) @ delta
    soup.join([*names(), "late"])
    one_round(soup, delta)  # warm: FedAvg
    torch.testing.assert_close(soup.used(names())[:, 0], (first - mean).repeat(K, 1))
    one_round(soup, delta)
    got = soup.used(names())[:, 0]
    for group in ([0, 2], [1, 3, 4]):
        wanted = first - mean - (n[group] / n[group].sum()) @ delta[group]
        torch.testing.assert_close(got[group], wanted.repeat(len(group), 1))
    # One that was absent is sent the last common model, and shows by its update where it belongs.
    torch.testing.assert_close(soup.used(["late"])[0, 0], first - mean)
    one_round(soup, -0.7 * base[None], ["late"])
    torch.testing.assert_close(soup.used(["late", "c1"])[:, 0], got[[1, 1]])


@pytest.mark.parametrize("options", [{"eps1": 0.01}, {"eps2": 5.0}, {"warm": 9}])
def test_cfl_parts_nobody_unless_its_criteria_hold(options: dict[str, float]) -> None:
    soup = soup_of(CFL(**{"eps1": 0.9, "eps2": 0.0, "warm": 0, **options}))  # type: ignore[arg-type]
    one_round(soup, normal(15, K, soup.setup.layout.size, dtype=F64))
    assert len(soup.used(names())[:, 0].unique(dim=0)) == 1
    soup = soup_of(CFL(eps1=0.9, eps2=0.0, warm=0))
    one_round(soup, normal(15, K, soup.setup.layout.size, dtype=F64))
    assert len(soup.used(names())[:, 0].unique(dim=0)) == 2


def cfl_parts(soup: Soup, delta: Tensor, n: Sequence[int] | None = None) -> list[list[int]]:
    """The clients with the same model after a round with these updates (k, P) of n examples."""
    sent = soup.send(names(len(delta)))
    n = n or [10] * len(delta)
    assert soup.fold(make_updates(sent, delta, n_examples=torch.tensor(n))) == []
    soup.commit()
    label = soup.used(names(len(delta)))[:, 0].unique(dim=0, return_inverse=True)[1].tolist()
    return sorted([i for i, x in enumerate(label) if x == y] for y in set(label))


def test_cfl_parts_by_complete_linkage() -> None:
    """Updates at 0, 40, 80, 100 and 170 degrees: {80, 100} and {0, 40} are joined first. Then 170
    is at most 90 from {80, 100}, and {0, 40} up to 100: 1 - cos is 1.00 and 1.17. Their means, by
    average linkage, are .83 and .68, and the least of them, by single, .66 and .23."""
    soup = soup_of(CFL(eps1=1.0, eps2=0.0, warm=0))
    angle = np.radians([0, 40, 80, 100, 170])
    apart = 1 - np.cos(angle[:, None] - angle)
    to_last, to_first = apart[2:4, 4], apart[2:4, :2]
    assert to_last.max() < to_first.max()
    assert to_last.mean() > to_first.mean()
    delta = torch.zeros(K, soup.setup.layout.size, dtype=F64)
    # Lengths have no say.
    length = np.array([1.0, 2.0, 1.5, 0.5, 1.0])
    delta[:, 3] = torch.from_numpy(length * np.cos(angle))
    delta[:, 30] = torch.from_numpy(length * np.sin(angle))
    assert cfl_parts(soup, delta) == [[0, 1], [2, 3, 4]]


def test_cfl_measures_updates_by_the_longest_of_the_first_round() -> None:
    soup = soup_of(CFL(eps1=0.5, eps2=0.4, warm=1))
    away = functional.normalize(normal(25, soup.setup.layout.size, dtype=F64), dim=0)
    sign = torch.tensor([1.0, -1, 1, -1])[:, None] * torch.tensor([[1.0], [0.9], [0.8], [0.9]])
    everybody = [[0, 1, 2, 3]]
    assert cfl_parts(soup, 2 * sign * away) == everybody  # the longest: 2; warm
    assert cfl_parts(soup, 0.75 * sign * away) == everybody  # below .4 * 2
    assert cfl_parts(soup, 0.85 * sign * away) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("sign", "n", "parted"),
    [
        # Means by examples, and by clients: .5 and 0, 0 and .5 of the longest update.
        ([1, 1, -1, -1], [30, 30, 10, 10], False),
        ([1, 1, 1, -1], [10, 10, 10, 30], True),
    ],
)
def test_cfl_weighs_the_mean_update_by_examples(
    sign: list[float], n: list[int], parted: bool
) -> None:
    soup = soup_of(CFL(eps1=0.4, eps2=0.0, warm=0))
    delta = torch.tensor(sign)[:, None] * normal(26, soup.setup.layout.size, dtype=F64)
    assert np.average(sign, weights=n) == (0.0 if parted else 0.5)
    groups = [[i for i in range(4) if sign[i] == s] for s in (1, -1)]
    assert cfl_parts(soup, delta, n) == (groups if parted else [[0, 1, 2, 3]])


# -- FedEM, MoE, PPFL -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FedEM(d=3), MoE(d=3)])
def test_every_component_is_averaged_by_examples(method: Any) -> None:
    soup = soup_of(method)
    start = soup.shared["models"]
    assert torch.equal(start, torch.stack([soup.setup.initial(j) for j in range(3)]))
    delta = normal(16, K, 3, start.shape[1], dtype=F64)
    one_round(soup, delta)
    n = torch.arange(10, 10 + K).double()
    for j in range(3):
        wanted = start[j] - (n / n.sum()) @ delta[:, j]
        torch.testing.assert_close(soup.used(["c0"])[0, j], wanted)


def test_fedem_trains_every_model_by_its_responsibilities() -> None:
    one = OneClient(FedEM(d=3))
    message = 0.5 * normal(17, 3, 3, one.setup.layout.size, dtype=F64)
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    done = one.local(message, {"shares": pi.repeat(3, 1)})
    likelihood = torch.stack([pi[j] * (-one.losses(message[1, j])).exp() for j in range(3)], 1)
    q = likelihood / likelihood.sum(1, keepdim=True)
    torch.testing.assert_close(done.memory["shares"][1], q.mean(0))
    for j in range(3):
        row = message[1, j].clone()
        for at in one.batches():
            row.requires_grad_()
            loss = (q[at, j] * one.losses(row, at)).mean()
            row = (row - 0.2 * torch.autograd.grad(loss, row)[0]).detach()
        torch.testing.assert_close(message[1, j] - done.delta[1, j], row)
    made = one.algorithm.personal(one.setup, message, {"shares": pi.repeat(3, 1)}, one.trainer)
    assert isinstance(made, Mixture)
    assert made.weights is not None
    torch.testing.assert_close(made.weights[1], q.mean(0))


@pytest.mark.parametrize("gate_lr", [1.0, 0.1])
def test_moe_goes_down_the_gradient_of_the_mixture(gate_lr: float) -> None:
    one = OneClient(MoE(d=3, gate_lr=gate_lr))
    message = 0.5 * normal(18, 3, 3, one.setup.layout.size, dtype=F64)
    gate = 0.2 * normal(19, 3, 3, 6, dtype=F64)
    done = one.local(message, {"gate": gate})
    rows, own = message[1].clone(), gate[1].clone()
    for at in one.batches():
        rows.requires_grad_()
        own.requires_grad_()
        x = one.client.train.x[at]
        share = torch.softmax(torch.cat([x, torch.ones(len(x), 1)], 1) @ own.T, dim=1)
        p = torch.stack([(-one.losses(rows[j], at)).exp() for j in range(3)], 1)
        loss = -(share * p).sum(1).log().mean()
        of_rows, of_gate = torch.autograd.grad(loss, (rows, own))
        rows = (rows - 0.2 * of_rows).detach()
        own = (own - 0.2 * gate_lr * of_gate).detach()
    torch.testing.assert_close(message[1] - done.delta[1], rows)
    torch.testing.assert_close(done.memory["gate"][1], own)


def test_ppfl_moves_the_membership_and_then_the_canonical_models() -> None:
    one = OneClient(PPFL(d=3, membership_lr=0.6))
    message = 0.5 * normal(20, 3, 3, one.setup.layout.size, dtype=F64)
    c = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    done = one.local(message, {"membership": c.repeat(3, 1)})
    models = message[1].clone()
    for at in one.batches("membership"):
        c.requires_grad_()
        slope = torch.autograd.grad(one.losses(c @ models, at).mean(), c)[0]
        c = (c * torch.exp(-0.6 * slope)).detach()
        c /= c.sum()
    torch.testing.assert_close(done.memory["membership"][1], c)
    made = one.algorithm.personal(
        one.setup,
        message,
        {"membership": torch.tensor([[0.2, 0.5, 0.3]] * 3, dtype=F64)},
        one.trainer,
    )
    torch.testing.assert_close(made[1], c @ models)
    for at in one.batches():
        models.requires_grad_()
        of_models = torch.autograd.grad(one.losses(c @ models, at).mean(), models)[0]
        models = (models - 0.2 * of_models).detach()
    torch.testing.assert_close(done.own[1], c @ models)
    # What is sent tells the server how far each canonical model has gone.
    torch.testing.assert_close(c[:, None] * done.delta[1], message[1] - models)


def test_ppfl_averages_over_all_clients() -> None:
    soup = soup_of(PPFL(d=3))
    start = soup.shared["models"]
    delta = normal(21, K, start.shape[1], dtype=F64)
    c = normal(22, K, 3, dtype=F64).softmax(1)
    one_round(soup, delta, membership=c)
    n = torch.arange(10, 10 + K).double()
    wanted = start - torch.einsum("k,kd,kp->dp", n / n.sum(), c, delta)
    torch.testing.assert_close(soup.shared["models"], wanted)


# -- all of them ----------------------------------------------------------------------------------

OPTIONS = [
    ("fedamp", "sigma=3"), ("fedamp", "own=0.7"), ("fedamp", "mu=1"),
    ("fedamp", "attention=distance"), ("fedfomo", "others=2"), ("fedfomo:others=2", "decay=0.2"),
    ("fedfomo:others=2", "epsilon=1"), ("fesem:warm=1", "d=2"), ("fesem:warm=1", "warm=3"),
    ("fedem", "d=2"), ("ppfl", "d=2"), ("ppfl", "membership_lr=2"), ("moe", "d=2"),
    ("moe", "gate_lr=1"), ("cfl:warm=0:eps1=1", "eps2=2"), ("cfl:eps1=1:eps2=0", "warm=2"),
    ("cfl:warm=0:eps2=0:eps1=1", "eps1=0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_options_change_the_result(method: str, option: str) -> None:
    key = option.partition("=")[0]
    changed = ":".join([p for p in method.split(":") if not p.startswith(key)] + [option])
    first, second = run(method), run(changed)
    losses = [s.history[-1].metrics["local"]["train"]["loss"] for s in (first, second)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("method", ["fedamp", "fedfomo", "fesem", "cfl", "fedem", "ppfl", "moe"])
def test_models_that_nobody_else_shares_are_personal(method: str) -> None:
    """Of two conflicting kinds of client, each has a model that fits: FedAvg's cannot."""
    method = {"cfl": "cfl:warm=2:eps1=0.9:eps2=0", "fesem": "fesem:warm=3"}.get(method, method)
    clients = make_clients(10)
    options = {"rounds": 40, "training": replace(TRAINING, lr=0.5)}
    own = run(method, clients, **options).history[-1].metrics["merged"]["train"]["accuracy"]
    one = run("fedavg", clients, **options).history[-1].metrics["merged"]["train"]["accuracy"]
    assert own is not None
    assert one is not None
    assert own.mean > one.mean + 0.05


@pytest.mark.parametrize(
    "text", ["fedamp:attention=loud", "fedamp:own=2", "fedfomo:epsilon=2", "fesem:d=0", "moe:d=0"]
)
def test_options_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        make_method(text)


def test_more_models_than_clients_are_refused_and_defaults_fit() -> None:
    for name in ("fedem", "moe", "ppfl", "fesem"):
        with pytest.raises(ConfigError, match="d = 7"):
            simulate(f"{name}:d=7", make_clients(6))
        assert simulate(name, make_clients(2)).algorithm.d == 2  # type: ignore[attr-defined]
    alone = soup_of(FedFomo().resolve(1))
    whole = normal(24, 1, alone.setup.layout.size, dtype=F64)
    one_round(alone, whole, gain=torch.zeros(1, 0, dtype=F64))
    assert alone.used(["c0"]).shape == (1, 0, alone.setup.layout.size)


def test_updates_of_another_shape_are_refused() -> None:
    soup = soup_of(FedEM(d=3))
    size = soup.setup.layout.size
    sent = soup.send(names())
    refused = soup.fold(make_updates(sent, torch.zeros(K, 2, size, dtype=F64)))
    assert {r.reason for r in refused} == {"shape"}
    delta = torch.zeros(K, 3, size, dtype=F64)
    delta[1, 2, 0] = math.nan
    refused = soup.fold(make_updates(sent, delta))
    assert [(r.client, r.reason) for r in refused] == [("c1", "non-finite")]


def test_counters_stay_whole_under_mixing() -> None:
    simulation = run("ppfl", make_clients(4), norm_net, training=replace(TRAINING, batch_size=100))
    models = simulation.soup.shared["models"][:, simulation.soup.setup.layout.counters]
    assert torch.equal(models, models.round())
