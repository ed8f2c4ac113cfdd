"""The steps of APFL, FedPer, FedRep, FedBABU, FedALA and APPLE against their papers' equations.

The equations are written out here for one client at a time, with plain autograd in float64, and
clients' batches are all of their data. What every method must hold to is in `test_conformance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from core_fixture import N_CLASSES, net, normal, run, simulate
from fedmerge.algorithms import (
    APFL,
    APPLE,
    FedALA,
    FedBABU,
    FedPer,
    FedRep,
    Fold,
    Setup,
    Tensors,
    Ticket,
    Updates,
)
from fedmerge.errors import ConfigError
from fedmerge.local import Proximal
from fedmerge.params import Layout

SIZES = (6, 9, 13)
P, HEAD = 39, slice(24, 39)  # of the network with 4 hidden units: 20 + 4, and 12 + 3 in the head
LR = 0.2
LAYOUT = Layout.of(net(dtype=torch.float64)())
FIRST = 0.5 * normal(1, P, dtype=torch.float64)
SETUP = Setup(LAYOUT, lambda j: FIRST.clone(), 0)
DATA = tuple(
    (normal(10 + i, n, 5, dtype=torch.float64), normal(20 + i, n, N_CLASSES).argmax(1))
    for i, n in enumerate(SIZES)
)


def loss(row: Tensor, i: int, some: slice = slice(None)) -> Tensor:
    """Mean cross-entropy on client i's data of the network whose parameters are row (P,)."""
    x, y = (part[some] for part in DATA[i])
    hidden = torch.tanh(x @ row[:20].view(4, 5).T + row[20:24])
    output = hidden @ row[24:36].view(3, 4).T + row[36:]
    return (output.logsumexp(1) - output[torch.arange(len(y)), y]).mean()


def slope(row: Tensor, i: int, some: slice = slice(None)) -> Tensor:
    """(P,) gradient of `loss`."""
    at = row.clone().requires_grad_()
    return torch.autograd.grad(loss(at, i, some), at)[0]


def descend(row: Tensor, i: int, steps: int, part: slice = slice(0, P)) -> Tensor:
    """`row` after SGD steps on some of its parameters."""
    row = row.clone()
    for _ in range(steps):
        row[part] -= LR * slope(row, i)[part]
    return row


@dataclass(frozen=True)
class AllData:
    """One batch of all its data, for each client."""

    @property
    def active(self) -> Tensor:
        return torch.ones(len(SIZES), dtype=torch.bool)

    @property
    def real(self) -> Tensor:
        return torch.arange(max(SIZES))[None] < torch.tensor(SIZES)[:, None]

    @property
    def inputs(self) -> Tensor:
        raise NotImplementedError

    def take(self, table: Tensor) -> Tensor:
        raise NotImplementedError

    def losses(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        return torch.stack([slope(row, i) for i, row in enumerate(rows)])

    def descend(self, rows: Tensor, lr: float | Tensor, weight: object = None) -> None:
        assert weight is None
        rows -= lr * self.gradient(rows)


@dataclass(frozen=True)
class Clients:
    """Local training of the three clients; `epochs` are those of the run."""

    epochs: int = 2
    lr: float = LR

    @property
    def n_examples(self) -> Tensor:
        return torch.tensor(SIZES)

    def fit(
        self,
        rows: Tensor,
        *,
        epochs: int | None = None,
        proximal: Proximal | None = None,
        only: tuple[int, int] | None = None,
        purpose: str = "train",
    ) -> tuple[Tensor, Tensor]:
        steps = self.epochs if epochs is None else epochs
        part = slice(*only) if only else slice(0, P)
        ends = [descend(row, i, steps, part) for i, row in enumerate(rows)]
        return torch.stack(ends), torch.full((len(rows),), steps)

    def steps(self, *, epochs: int | None = None, purpose: str = "train") -> Iterator[AllData]:
        yield from [AllData()] * (self.epochs if epochs is None else epochs)

    def loss(self, rows: Tensor, split: str = "train") -> Tensor:
        return torch.stack([loss(row, i) for i, row in enumerate(rows)])

    def losses(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


def drawn(seed: int, *shape: int) -> Tensor:
    return 0.5 * normal(seed, *shape, dtype=torch.float64)


same: Callable[[Tensor, Tensor], None] = torch.testing.assert_close


# -- APFL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_step_of_apfl(adaptive: bool) -> None:
    v, w = drawn(2, 3, P), drawn(3, P)
    alpha = torch.tensor([[0.1], [0.5], [0.8]], dtype=torch.float64)
    made = APFL(adaptive=adaptive).local(
        SETUP, w.repeat(3, 1)[:, None], {"model": v, "alpha": alpha}, Clients(3)
    )
    assert made.steps.tolist() == [3, 3, 3]
    for i in range(3):
        own, received, a = v[i].clone(), w.clone(), float(alpha[i])
        for t in range(3):
            g_mixed, g_global = slope(a * own + (1 - a) * received, i), slope(received, i)
            shift = own - received
            own, received = own - LR * a * g_mixed, received - LR * g_global
            if adaptive and t == 0:
                a = min(1.0, max(0.0, a - LR * float(shift @ g_mixed)))
        same(made.memory["model"][i], own)
        assert float(made.memory["alpha"][i]) == pytest.approx(a)
        assert (a != float(alpha[i])) == adaptive
        same(made.delta[i], w - received)
        same(made.own[i], a * own + (1 - a) * received)  # type: ignore[index]


def test_the_model_of_apfl_is_mixed_with_the_global_one_of_the_day() -> None:
    v, alpha = drawn(2, 3, P), torch.tensor([[0.0], [0.25], [1.0]], dtype=torch.float64)
    w = drawn(3, 3, P)
    found = APFL().personal(SETUP, w[:, None], {"model": v, "alpha": alpha}, Clients())
    same(found[0], w[0])
    same(found[1], 0.25 * v[1] + 0.75 * w[1])
    same(found[2], v[2])


# -- personal heads -------------------------------------------------------------------------------


def test_the_step_of_fedper() -> None:
    w, heads = drawn(2, P), drawn(3, 3, 15)
    method = FedPer()
    made = method.local(SETUP, w.repeat(3, 1)[:, None], {"head": heads}, Clients())
    for i in range(3):
        end = descend(torch.cat([w[:24], heads[i]]), i, 2)
        same(made.own[i], end)  # type: ignore[index]
        same(made.delta[i, :24], w[:24] - end[:24])
        assert not made.delta[i, HEAD].any()
        same(made.memory["head"][i], end[HEAD])
    used = method.personal(SETUP, w.repeat(3, 1)[:, None], {"head": heads}, Clients())
    same(used[:, HEAD], heads)
    same(used[1, :24], w[:24])


@pytest.mark.parametrize(("body_epochs", "steps"), [(None, 2), (3, 3)])
def test_the_step_of_fedrep(body_epochs: int | None, steps: int) -> None:
    w, heads = drawn(2, P), drawn(3, 3, 15)
    method = FedRep(head_epochs=4, body_epochs=body_epochs)
    made = method.local(SETUP, w.repeat(3, 1)[:, None], {"head": heads}, Clients())
    assert made.steps.tolist() == [4 + steps] * 3
    for i in range(3):
        fitted = descend(torch.cat([w[:24], heads[i]]), i, 4, HEAD)
        end = descend(fitted, i, steps, slice(0, 24))
        same(end[HEAD], fitted[HEAD])
        same(made.own[i], end)  # type: ignore[index]
        same(made.delta[i, :24], w[:24] - end[:24])
        assert not made.delta[i, HEAD].any()


def test_the_step_of_fedbabu() -> None:
    w = drawn(2, P)
    message = w.repeat(3, 1)[:, None]
    made = FedBABU().local(SETUP, message, {}, Clients())
    whole = FedBABU(finetune=3).personal(SETUP, message, {}, Clients())
    head = FedBABU(finetune=3, part="head").personal(SETUP, message, {}, Clients())
    for i in range(3):
        end = descend(w, i, 2, slice(0, 24))
        same(made.delta[i], w - end)
        assert torch.equal(end[HEAD], w[HEAD])
        same(whole[i], descend(w, i, 3))
        same(head[i], descend(w, i, 3, HEAD))
    assert torch.equal(FedBABU(finetune=0).personal(SETUP, message, {}, Clients()), message[:, 0])


@pytest.mark.parametrize("method", ["fedper", "fedrep", "fedbabu"])
def test_a_head_does_not_travel(method: str) -> None:
    simulation = run(method)
    start, stop = simulation.soup.setup.layout.last_layer
    assert (start, stop) == (24, 39)
    assert simulation.algorithm.travels(simulation.soup.setup.layout) == ((0, 24),)
    first, now = simulation.soup.setup.initial(0), simulation.soup.shared["models"][0]
    assert torch.equal(now[start:], first[start:])
    assert bool((now[:start] != first[:start]).all())
    for log in simulation.history:
        assert log.bytes_up == log.bytes_down == 24 * 4 * log.cohort
    used = simulation.personal([client.id for client in simulation.clients])
    # Every client has a head of its own; those of FedBABU are fitted anew each time.
    assert len(used[:, start:].unique(dim=0)) == len(simulation.clients)


@pytest.mark.parametrize("method", ["fedper", "fedrep", "fedbabu"])
def test_a_model_that_is_all_head_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method}: the model has one layer only"):
        simulate(method, model=lambda: nn.Linear(5, 3))


# -- FedALA ---------------------------------------------------------------------------------------


def ala_by_hand(
    own: Tensor, received: Tensor, weights: Tensor, i: int, passes: int, mixed: slice, eta: float
) -> tuple[Tensor, Tensor]:
    """Where client i starts, and its weights, after so many passes over all of its data."""
    gap = (received - own)[mixed]
    row = received.clone()
    row[mixed] = own[mixed] + gap * weights
    for _ in range(passes):
        weights = (weights - eta * slope(row, i)[mixed] * gap).clamp(0, 1)
        row[mixed] = own[mixed] + gap * weights
    return row, weights


@pytest.mark.parametrize(("layers", "mixed"), [(1, HEAD), (2, slice(0, P))])
def test_the_step_of_fedala(layers: int, mixed: slice) -> None:
    """The first client has no model, the second learns its first weights, the third its next."""
    w, own = drawn(2, P), drawn(3, 3, P)
    size = mixed.stop - mixed.start
    weights = torch.ones(3, size, dtype=torch.float64)
    weights[2] = torch.linspace(0, 1, size, dtype=torch.float64)
    memory = {"model": own, "weights": weights, "rounds": torch.tensor([0, 1, 2])}
    # The loss settles at once by so large a threshold, once there are ten losses.
    method = FedALA(layers=layers, eta=0.7, threshold=100.0)
    made = method.local(SETUP, w.repeat(3, 1)[:, None], memory, Clients())
    used = method.personal(SETUP, w.repeat(3, 1)[:, None], memory, Clients())
    assert made.memory["rounds"].tolist() == [1, 2, 3]
    for i, passes in ((1, 10), (2, 1)):
        start, learned = ala_by_hand(own[i], w, weights[i], i, passes, mixed, 0.7)
        same(used[i], start)
        same(made.memory["weights"][i], learned)
        assert bool(((learned != weights[i]) & (learned > 0)).any())
        end = descend(start, i, 2)
        same(made.memory["model"][i], end)
        same(made.delta[i], w - end)
    same(used[0], w)
    assert torch.equal(made.memory["weights"][0], weights[0])
    same(made.delta[0], w - descend(w, 0, 2))


def test_fedala_learns_its_first_weights_until_the_loss_has_settled() -> None:
    w, own = drawn(2, P), drawn(3, 3, P)
    memory = {"model": own, "weights": torch.ones(3, 15, dtype=torch.float64)}
    memory["rounds"] = torch.ones(3, dtype=torch.int64)
    needed = []
    for i in range(3):
        losses: list[float] = []
        while len(losses) < 10 or torch.tensor(losses[-10:]).std(correction=0) >= 0.004:
            row, _ = ala_by_hand(own[i], w, memory["weights"][i], i, len(losses) + 1, HEAD, 1.0)
            losses.append(float(loss(row, i)))
        needed.append(len(losses))
    assert len(set(needed)) > 1  # each goes on for as long as it needs
    for most in (50, 12):
        method = FedALA(threshold=0.004, passes=most)
        used = method.personal(SETUP, w.repeat(3, 1)[:, None], memory, Clients())
        for i in range(3):
            passes = min(most, needed[i])
            same(used[i], ala_by_hand(own[i], w, torch.ones(15), i, passes, HEAD, 1.0)[0])


@dataclass(frozen=True)
class Pair(AllData):
    """Examples `first` and the next one of each client, as far as it has them."""

    first: int

    @property
    def active(self) -> Tensor:
        return self.real.any(1)

    @property
    def real(self) -> Tensor:
        return torch.tensor([self.first, self.first + 1]) < torch.tensor(SIZES)[:, None]

    def gradient(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        some = slice(self.first, self.first + 2)
        there = self.active.tolist()
        return torch.stack([slope(r, i, some) if there[i] else 0 * r for i, r in enumerate(rows)])


class InPairs(Clients):
    """The three clients, whose batches are of two examples."""

    def steps(self, *, epochs: int | None = None, purpose: str = "train") -> Iterator[AllData]:
        assert epochs == 1
        yield from [Pair(first) for first in range(0, max(SIZES), 2)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_fedala_learns_weights_on_a_share_of_the_examples(share: float) -> None:
    """In whole batches of two, the last of which brings a client's examples up to the share."""
    w, own = drawn(2, P), drawn(3, 3, P)
    memory = {"model": own, "weights": torch.full((3, 15), 0.5, dtype=torch.float64)}
    memory["rounds"] = torch.full((3,), 2)
    used = FedALA(share=share).personal(SETUP, w.repeat(3, 1)[:, None], memory, InPairs())
    for i, n in enumerate(SIZES):
        row, weights = w.clone(), memory["weights"][i]
        gap = (w - own[i])[HEAD]
        row[HEAD] = own[i][HEAD] + gap * weights
        for number in range(math.ceil(share * n / 2)):
            gradient = slope(row, i, slice(2 * number, 2 * number + 2))[HEAD]
            weights = (weights - gradient * gap).clamp(0, 1)
            row[HEAD] = own[i][HEAD] + gap * weights
        same(used[i], row)


# -- APPLE ----------------------------------------------------------------------------------------


def apple_by_hand(
    cores: Tensor, p: Tensor, i: int, steps: int, rate: float, weight_lr: float, pull: float
) -> tuple[Tensor, Tensor]:
    """Client i's core, the first of `cores` (3, P), and weights (3,) after the paper's steps."""
    cores, p = cores.clone(), p.clone()
    for _ in range(steps):
        gradient = slope(p @ cores, i)
        slopes = cores @ gradient + pull * (p - 1 / 3)
        cores[0] -= rate * p[0] * gradient
        p = p - weight_lr * slopes
    return cores[0], p


def apple_state(rounds: int) -> tuple[Tensor, Tensors]:
    weights = torch.tensor([[0.5, 0.3, 0.1], [0.2, 0.2, 0.6], [0.4, -0.1, 0.3]]).double()
    return drawn(2, 3, 3, P), {"weights": weights, "rounds": torch.full((3, 1), rounds)}


@pytest.mark.parametrize("rounds", [0, 2, 4])
def test_the_step_of_apple(rounds: int) -> None:
    """The pull is 0.6 at first, would be a thousandth of it in the fourth round, and is none."""
    message, memory = apple_state(rounds)
    method = APPLE(clients=3, core_scale=1.5, weight_lr=0.05, mu=0.6, fade=4)
    made = method.local(SETUP, message, memory, Clients(1))
    pull = {0: 0.6, 2: 0.6 * 0.001**0.5, 4: 0.0}[rounds]
    assert made.memory["rounds"].unique().tolist() == [rounds + 1]
    for i in range(3):
        core, p = apple_by_hand(message[i], memory["weights"][i], i, 1, 0.3, 0.05, pull)
        same(made.memory["weights"][i], p)
        same(made.delta[i], message[i, 0] - core)
        same(made.own[i], p @ torch.cat([core[None], message[i, 1:]]))  # type: ignore[index]


def test_more_steps_of_apple_are_those_of_the_paper_but_for_what_is_put_off() -> None:
    """It changes weights in the second order: by a hundredth at a tenth of the rate."""
    message, memory = apple_state(0)
    far = []
    for weight_lr in (0.01, 0.001):
        method = APPLE(clients=3, core_scale=1.5, weight_lr=weight_lr, mu=0.6)
        made = method.local(SETUP, message, memory, Clients(4))
        for i in range(3):
            core, p = apple_by_hand(message[i], memory["weights"][i], i, 4, 0.3, weight_lr, 0.6)
            moved = (p - memory["weights"][i]).abs().max()
            error = (made.memory["weights"][i] - p).abs().max()
            assert float(error) < 0.05 * float(moved)
            # The own core's weight and the others' mean are put off only through the sum they feed.
            torch.testing.assert_close(message[i, 0] - made.delta[i], core, rtol=0.02, atol=1e-3)
            far.append(float(error))
    for coarse, fine in zip(far[:3], far[3:], strict=True):
        assert fine < 0.02 * coarse


def test_apple_starts_from_the_mean_of_the_cores_and_learns_at_the_rate_named() -> None:
    method = APPLE().resolve(4)
    assert method.clients == 4
    memory = method.memory(SETUP, 3)
    assert torch.equal(memory["weights"], torch.full((3, 4), 0.25, dtype=torch.float64))
    message = FIRST.repeat(3, 4, 1)
    same(method.personal(SETUP, message, memory, Clients()), message[:, 0])
    made = method.local(SETUP, message, memory, Clients(1))
    for i in range(3):  # square root of four clients, and a weight of a quarter
        same(made.delta[i], 2 * LR * 0.25 * slope(FIRST, i))
    with pytest.raises(ConfigError, match="clients is not given"):
        APPLE().memory(SETUP, 1)


def update(places: list[int], delta: Tensor) -> Updates:
    k = len(places)
    ones = torch.ones(k, dtype=torch.int64)
    return Updates(tuple(Ticket(f"c{p}", 0, "") for p in places), delta, ones, ones, ones.double())


def test_the_server_of_apple_keeps_each_core_and_sends_the_others_in_the_order_of_joining() -> None:
    method = APPLE(clients=4)
    cores = drawn(5, 4, P)
    rows = method.rows(SETUP, 2) | {"place": torch.tensor([2, 0])}
    sent = method.send(SETUP, {"models": cores}, rows, 2)
    assert torch.equal(sent[0], cores[[2, 0, 1, 3]])
    assert torch.equal(sent[1], cores[[0, 1, 2, 3]])
    delta = drawn(6, 2, P)
    shared, fold = {"models": cores}, Fold()
    method.fold(SETUP, shared, rows, update([2, 0], delta), fold, 0)
    new, moved = method.commit(SETUP, shared, fold, 0)
    assert moved["rounds"].tolist() == [[1], [1]]
    assert torch.equal(new["models"][[1, 3]], cores[[1, 3]])
    same(new["models"][2], cores[2] - delta[0])
    same(new["models"][0], cores[0] - delta[1])
    # A fifth client joins: its own core is a new one, and the others do not know it.
    late = method.rows(SETUP, 1) | {"place": torch.tensor([4])}
    assert torch.equal(method.send(SETUP, new, late, 1)[0, 0], FIRST)
    fold = Fold()
    method.fold(SETUP, new, late, update([4], delta[:1]), fold, 1)
    grown, _ = method.commit(SETUP, new, fold, 1)
    same(grown["models"], torch.cat([new["models"], (FIRST - delta[0])[None]]))


def test_limited_downloads_of_apple_come_in_turn_and_the_rest_is_kept() -> None:
    method = APPLE(clients=4, downloads=2)
    cores, place = drawn(5, 4, P), torch.tensor([1, 1, 1])
    memory = method.memory(SETUP, 3)
    known = FIRST.repeat(4, 1)
    for rounds, slots in enumerate(([1, 2], [3, 1], [2, 3])):
        rows = {"place": place, "rounds": torch.full((3, 1), rounds)}
        cores = cores + 1
        message = method.send(SETUP, {"models": cores}, rows, 3)
        order = torch.tensor([1, 0, 2, 3])  # the second client's: its own first
        assert torch.equal(message[0], cores[order[[0, *slots]]])
        known[0] = cores[1]
        known[slots] = cores[order[slots]]
        used = method.personal(SETUP, message, memory, Clients())
        same(used[2], memory["weights"][2] @ known)
        memory = method.local(SETUP, message, memory, Clients()).memory
        same(memory["cores"][0, 1:], known[1:])


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["apfl", "fedper", "fedrep", "fedbabu", "fedala", "apple"])
def test_the_personal_model_trains(method: str) -> None:
    """Two kinds of clients that contradict each other: who has no model of its own, fails."""

    def found(name: str) -> float:
        summary = run(name, rounds=24).history[-1].metrics["merged"]["train"]["loss"]
        assert summary is not None
        return float(summary.mean)

    assert found(method) < 0.75 * found("fedavg")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("apfl:alpha=1.5", "alpha = 1.5: wanted 0 to 1"),
        ("fedrep:head_epochs=0", "head_epochs = 0: wanted 1 or more"),
        ("fedbabu:part=haed", 'part = "haed"; did you mean "head"'),
        ("fedala:share=0", "share = 0.0: wanted above 0, at most 1"),
        ("fedala:layers=0", "layers = 0: wanted 1 or more"),
        ("apple:downloads=0", "downloads = 0: wanted 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(text: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as raised:
        simulate(text)
    assert wanted in str(raised.value)
