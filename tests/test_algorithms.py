"""Each method's step against one computed by hand, and the texts that name methods.

The trainer here is a stand-in whose clients have the loss ||p - c||^2 / 2, so that every step has a
closed form; what all methods have in common is tested in `test_conformance`.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import test_rivals_server
from core_fixture import TRAINING, make_clients, net, normal, plain, run, simulate
from fedmerge import algorithms
from fedmerge.algorithms import (
    IFCA,
    METHODS,
    Algorithm,
    Ditto,
    FedAvg,
    FedAvgFT,
    FedMerge,
    FedMergePaper,
    FedProx,
    Fold,
    LocalOnly,
    Setup,
    Ticket,
    Updates,
    make_method,
)
from fedmerge.data import Split
from fedmerge.engine import Engine
from fedmerge.errors import ConfigError
from fedmerge.local import Proximal
from fedmerge.params import Layout, build
from fedmerge.sim import Simulation
from fedmerge.sim.execute import GroupTrainer
from fedmerge.sim.population import Population
from fedmerge.soup import Soup

F64 = torch.float64
LR = 0.25
N = torch.tensor([1, 2, 5])


@dataclass
class Quadratic:
    """Client i has loss ||p - centre_i||^2 / 2; an epoch is one step of LR."""

    centre: Tensor
    n_examples: Tensor = field(default_factory=lambda: N)
    calls: list[tuple[str, int]] = field(default_factory=list)

    def fit(
        self,
        rows: Tensor,
        *,
        epochs: int | None = None,
        proximal: Proximal | None = None,
        lr_scale: float = 1.0,
        purpose: str = "train",
    ) -> tuple[Tensor, Tensor]:
        steps = 2 if epochs is None else epochs
        self.calls.append((purpose, steps))
        for _ in range(steps):
            gradient = rows - self.centre
            if proximal is not None:
                gradient = gradient + proximal.mu * (rows - proximal.anchor)
            rows = rows - lr_scale * LR * gradient
        return rows, torch.full((len(rows),), steps)

    def loss(self, rows: Tensor, split: str = "train") -> Tensor:
        return (rows - self.centre).square().sum(-1) / 2

    def wrong(self, rows: Tensor, split: str = "train") -> Tensor:
        return torch.full((len(rows),), torch.nan)  # it predicts values

    def gain(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.loss(before) - self.loss(after)
        return mean, torch.zeros_like(mean)


@pytest.fixture
def setup() -> Setup:
    model = net(hidden=2, dtype=F64)
    layout = Layout.of(model())
    return Setup(layout, lambda j: layout.row(build(model, 0, j)), 0)


@pytest.fixture
def trainer(setup: Setup) -> Quadratic:
    return Quadratic(normal(1, 3, setup.layout.size, dtype=F64))


def after(start: Tensor, centre: Tensor, steps: int = 2, rate: float = LR) -> Tensor:
    """`steps` plain steps towards `centre`, in closed form."""
    return centre + (1 - rate) ** steps * (start - centre)


def updates(delta: Tensor, **extra: Tensor) -> Updates:
    k = len(delta)
    tickets = tuple(Ticket(str(i), 0, "") for i in range(k))
    return Updates(tickets, delta, N[:k], torch.full((k,), 2), torch.full((k,), LR), extra)


def one_round(
    method: Algorithm, setup: Setup, trainer: Quadratic, shared: dict[str, Tensor], version: int = 0
) -> tuple[dict[str, Tensor], Any]:
    """One round of three clients that are new; the new shared state and the local results."""
    rows, memory = method.rows(setup, 3), method.memory(setup, 3)
    done = method.local(setup, method.send(setup, shared, rows, 3), memory, trainer)
    fold = Fold()
    method.fold(setup, shared, rows, updates(done.delta, **done.extra), fold, version)
    return method.commit(setup, shared, fold, version)[0], done


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# -- each method ----------------------------------------------------------------------------------


def test_fedavg_takes_the_mean_weighted_by_examples(setup: Setup, trainer: Quadratic) -> None:
    method = FedAvg()
    shared = method.shared(setup)
    start = setup.initial(0)
    close(shared["models"], start[None])
    made, done = one_round(method, setup, trainer, shared)
    ends = after(start, trainer.centre)
    close(done.delta, start - ends)
    close(made["models"], (1 * ends[0] + 2 * ends[1] + 5 * ends[2])[None] / 8)


def test_fine_tuning_goes_on_as_long_as_it_helps(setup: Setup) -> None:
    """Validation losses before and after 3, 6 and 12 epochs, the standard error of what one has
    lowered, what the server says of training, and the epochs that are kept."""
    nan, inf = float("nan"), float("inf")
    clients = [
        ((2.0, 2.1, 0.1, 0.1), 0.1, 0.0, 0),  # none at first: it is not tried further
        ((2.0, 1.9, 1.91, 0.1), 0.09, 0.0, 3),
        ((2.0, 1.9, 3.0, 3.0), 0.09, 0.0, 3),
        ((2.0, 1.9, 1.89, 1.89), 0.1, 0.0, 6),  # any further gain counts
        ((2.0, 1.9, 1.89, 1.88), 0.13, 0.0, 0),  # in the end it is less than an error
        ((2.0, 1.9, 1.89, 1.88), 0.11, 0.0, 12),
        ((2.0, 1.9, 1.89, 1.88), 0.13, 0.02, 12),  # training helps all: .92 of it will do
        ((2.0, 1.9, 1.89, 1.88), 0.11, -0.03, 0),  # it harms all: 1.12 of it are asked for
        ((2.0, 1.9, 1.89, 1.88), 9.0, 0.3, 12),  # it helps so much that any gain counts
        ((2.0, 2.1, 1.89, 1.88), 9.0, 0.3, 0),  # but no loss
        ((2.0, inf, 0.1, 0.1), 0.1, 0.0, 0),
        ((2.0, 1.0, inf, 0.1), 0.1, 0.0, 3),
        ((nan, nan, nan, nan), nan, 0.0, 0),  # not known
        ((2.0, 1.0, 0.9, 0.8), nan, 0.0, 0),  # a single example
    ]
    losses, errors, overall, epochs = (torch.tensor(v) for v in zip(*clients, strict=True))
    start = setup.initial(0).repeat(len(clients), 1)

    class Clients(Quadratic):
        def gain(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
            return self.reached(before) - self.reached(after), errors

        def reached(self, rows: Tensor) -> Tensor:
            # At three tenths of the run's rate.
            ends = torch.stack([after(start, self.centre, n, 0.3 * LR) for n in (0, 3, 6, 12)])
            stage = (ends - rows).square().sum(-1).argmin(0)
            return losses.gather(1, stage[:, None])[:, 0]

    trainer = Clients(normal(1, len(clients), setup.layout.size, dtype=F64))
    said = {"helped": overall.double()}
    found = FedMerge(finetune=3).personal(setup, start[:, None], said, trainer)
    kept = [after(start, trainer.centre, n, 0.3 * LR)[i] for i, n in enumerate(epochs.tolist())]
    close(found, torch.stack(kept))
    # Other draws each time, so that it is not the same batches again.
    assert trainer.calls == [("finetune", 3), ("finetune to 2", 3), ("finetune to 4", 6)]


def test_a_gain_is_the_mean_over_examples_and_its_standard_error(setup: Setup) -> None:
    clients = make_clients(4)
    for i, n in ((1, 1), (2, 0)):
        few = Split(clients[i].validation.x[:n], clients[i].validation.y[:n])
        clients[i] = replace(clients[i], validation=few)
    module = net(hidden=2)()
    layout = Layout.of(module)
    engine = Engine(module, layout, TRAINING.for_data(classes=True))
    trainer = GroupTrainer(engine, Population.of(clients), [3, 1, 2, 0], 0, 1)
    before, after = (normal(seed, 4, layout.size) for seed in (1, 2))
    after[3] = torch.nan
    mean, error = trainer.gain(before, after)
    losses = []
    for row in (before[0], after[0]):
        layout.load(module, row)
        out = module(clients[3].validation.x)
        each = functional.cross_entropy(out, clients[3].validation.y, reduction="none")
        losses.append(each.detach())
    lower = (losses[0] - losses[1]).double()
    torch.testing.assert_close(mean[0], lower.mean(), rtol=1e-5, atol=1e-6)
    wanted = lower.std() / len(lower) ** 0.5
    torch.testing.assert_close(error[0], wanted, rtol=1e-5, atol=1e-6)
    assert mean[1].isfinite()
    assert error[1].isnan()
    assert mean[2:].isnan().all()


def test_fine_tuning_asks_for_a_standard_error_where_nothing_is_said(setup: Setup) -> None:
    class Clients(Quadratic):
        def gain(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full((3,), 0.1), torch.tensor([0.09, 0.1, 0.11])

    trainer = Clients(normal(1, 3, setup.layout.size, dtype=F64))
    start = setup.initial(0).repeat(3, 1)
    found = FedMerge(finetune=3).personal(setup, start[:, None], {}, trainer)
    close(found[0], after(start, trainer.centre, 12, 0.3 * LR)[0])
    assert torch.equal(found[1:], start[1:])


def test_clients_that_fine_tune_are_told_what_training_does_for_all(
    setup: Setup, trainer: Quadratic
) -> None:
    method = FedMerge(finetune=3).resolve(20)
    shared = one_round(method, setup, trainer, method.shared(setup))[0]
    told = method.told(shared, 5)
    assert told.keys() == {"helped"}
    assert torch.equal(told["helped"], shared["helped"].expand(5))
    assert shared["helped"] > 0
    for other in (FedMerge(), FedMerge(finetune=3, peers=0), FedMerge(finetune=3, d=1), FedAvg()):
        resolved = other.resolve(20)
        assert resolved.told(resolved.shared(setup), 5) == {}


def test_fine_tuning_that_helps_nobody_ends_at_once(setup: Setup, trainer: Quadratic) -> None:
    start = trainer.centre.clone()  # each client's best
    assert torch.equal(FedMerge(finetune=3).personal(setup, start[:, None], {}, trainer), start)
    assert trainer.calls == [("finetune", 3)]


@pytest.mark.parametrize(
    ("method", "plain", "rate"),
    [(FedAvgFT(finetune=12), FedAvg(), LR), (FedMerge(finetune=3), FedMerge(), 0.3 * LR)],
)
def test_fine_tuning_is_at_the_client_and_changes_what_is_used_only(
    method: Algorithm, plain: Algorithm, rate: float, setup: Setup, trainer: Quadratic
) -> None:
    message = setup.initial(0).repeat(3, 1)[:, None]
    wanted = after(message[:, 0], trainer.centre, 12, rate)
    close(method.personal(setup, message, {}, trainer), wanted)
    done = len(trainer.calls)
    close(plain.personal(setup, message, {}, trainer), message[:, 0])
    assert len(trainer.calls) == done
    shared = method.shared(setup)
    tuned, _ = one_round(method, setup, trainer, shared)
    close(tuned["models"], one_round(plain, setup, trainer, shared)[0]["models"])


def test_fedprox_is_pulled_towards_what_it_received(setup: Setup, trainer: Quadratic) -> None:
    mu, start = 0.8, setup.initial(0)
    made, _ = one_round(FedProx(mu=mu), setup, trainer, {"models": start[None]})
    first = start - LR * (start - trainer.centre)
    ends = first - LR * ((first - trainer.centre) + mu * (first - start))
    close(made["models"], (N.double() / 8 @ ends)[None])


def test_ditto_trains_a_global_and_a_personal_model(setup: Setup, trainer: Quadratic) -> None:
    lam, method = 0.8, Ditto(lam=0.8)
    size = setup.layout.size
    start, own = normal(2, 1, size, dtype=F64), normal(3, 3, size, dtype=F64)
    message = start.repeat(3, 1)[:, None]
    done = method.local(setup, message, {"model": own}, trainer)
    close(done.delta, start - after(start, trainer.centre))
    v = own
    for _ in range(2):
        v = v - LR * ((v - trainer.centre) + lam * (v - start))
    close(done.memory["model"], v)
    close(done.own, v)
    close(method.personal(setup, message, done.memory, trainer), v)
    close(method.memory(setup, 2)["model"], setup.initial(0).repeat(2, 1))
    # The two trainings draw their batches apart.
    assert [purpose for purpose, _ in trainer.calls] == ["train", "personal"]


def test_local_only_sends_nothing(setup: Setup, trainer: Quadratic) -> None:
    method, own = LocalOnly(), normal(3, 3, setup.layout.size, dtype=F64)
    message = method.send(setup, {}, {}, 3)
    assert message.shape == (3, 0, setup.layout.size)
    done = method.local(setup, message, {"model": own}, trainer)
    assert done.delta.shape == (3, 0)
    close(done.memory["model"], after(own, trainer.centre))
    close(method.personal(setup, message, {"model": own}, trainer), own)
    assert method.commit(setup, {}, Fold(), 0) == ({}, {})


def test_ifca_trains_the_model_that_fits_best_and_averages_by_cluster(
    setup: Setup, trainer: Quadratic
) -> None:
    method = IFCA(d=3)
    shared = method.shared(setup)
    close(shared["models"], torch.stack([setup.initial(j) for j in range(3)]))
    # Clients 0 and 2 lie near model 1, client 1 near model 0; nobody takes model 2.
    near = shared["models"][[1, 0, 1]]
    trainer.centre = near + 0.01 * trainer.centre
    message = method.send(setup, shared, {}, 3)
    assert message.shape == (3, 3, setup.layout.size)
    close(method.personal(setup, message, {}, trainer), near)
    made, done = one_round(method, setup, trainer, shared)
    assert done.extra["choice"].tolist() == [1, 0, 1]
    ends = after(near, trainer.centre)
    close(done.own, ends)
    close(made["models"][0], ends[1])
    close(made["models"][1], (1 * ends[0] + 5 * ends[2]) / 6)
    assert torch.equal(made["models"][2], shared["models"][2])


def test_ifca_warm_is_fedavg_and_then_clusters_the_updates(
    setup: Setup, trainer: Quadratic
) -> None:
    method = IFCA(d=2, warm=3)
    shared = method.shared(setup)
    assert len(shared["models"]) == 1
    start = shared["models"][0]
    # Two clients pull one way, one the other.
    way = normal(5, setup.layout.size, dtype=F64)
    trainer.centre = start + torch.stack([way, -way, 1.1 * way])
    ends = after(start, trainer.centre)
    for version in (0, 1):
        made, _ = one_round(method, setup, trainer, shared, version)
        close(made["models"], (N.double() / 8 @ ends)[None])
    made, _ = one_round(method, setup, trainer, shared, 2)
    clusters = sorted(made["models"], key=lambda row: float((row - start) @ way))
    close(clusters[0], ends[1])
    close(clusters[1], (1 * ends[0] + 5 * ends[2]) / 6)
    # After that it is IFCA.
    again, done = one_round(method, setup, trainer, made, 3)
    assert len(again["models"]) == 2
    assert done.extra["choice"][0] == done.extra["choice"][2] != done.extra["choice"][1]


def test_ifca_warm_with_fewer_different_updates_than_clusters(
    setup: Setup, trainer: Quadratic
) -> None:
    trainer.centre = trainer.centre[:1].repeat(3, 1)
    method = IFCA(d=3, warm=1)
    shared = method.shared(setup)
    made, _ = one_round(method, setup, trainer, shared)
    moved = after(shared["models"][0], trainer.centre[0])
    found = (made["models"] - shared["models"]).abs().sum(1) > 0
    assert int(found.sum()) == 1
    close(made["models"][found][0], moved)


def test_the_paper_rule_pulls_twice_its_weight(setup: Setup, trainer: Quadratic) -> None:
    """Its penalty is ||p - received||^2, without the half of a proximal term."""
    method, start = FedMergePaper(d=2, prox=0.4), normal(2, 3, setup.layout.size, dtype=F64)
    done = method.local(setup, start[:, None], {}, trainer)
    first = start - LR * (start - trainer.centre)
    ends = first - LR * ((first - trainer.centre) + 2 * 0.4 * (first - start))
    close(done.delta, start - ends)


def test_the_paper_rule_starts_from_independent_models_and_equal_rows(setup: Setup) -> None:
    method = FedMergePaper(d=3)
    models = method.shared(setup)["models"]
    close(models, torch.stack([setup.initial(j) for j in range(3)]))
    message = method.send(setup, {"models": models}, method.rows(setup, 2), 2)
    close(message[:, 0], models.mean(0).repeat(2, 1))


def test_fedmerge_starts_near_one_model_and_from_equal_rows(setup: Setup) -> None:
    wide = Layout.of(net(300)())
    big = Setup(wide, lambda j: wide.row(build(net(300), 0, j)), 0)
    models = FedMerge(d=5, init_noise=0.3).shared(big)["models"]
    centre = big.initial(0)
    away = models - centre
    assert away.std(1).tolist() == pytest.approx([0.3 * float(centre.std())] * 5, rel=0.1)
    assert not torch.equal(away[0], away[1])
    assert torch.equal(FedMerge(d=1).shared(setup)["models"][0], setup.initial(0))
    rows = FedMerge(d=5).rows(setup, 2)
    weights = FedMerge(d=5).weights(setup, rows)
    close(weights, torch.full((2, 2, 5), 0.2, dtype=F64))


# -- names and options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("fedmerge", FedMerge()),
        ("fedmerge:d=8:cap=0.2", FedMerge(d=8, cap=0.2)),
        ("fedmerge:leave_one_out=false", FedMerge(leave_one_out=False)),
        ("fedmerge:rule=default:d=3", FedMerge(d=3)),
        ("fedmerge:rule=paper", FedMergePaper()),
        ("fedmerge-ft", FedMerge(finetune=10)),
        ("fedmerge-ft:d=3:finetune=2", FedMerge(d=3, finetune=2)),
        ("fedmerge:logit_step=0.1:rule=paper", FedMergePaper(logit_step=0.1)),
        ("fedavg", FedAvg()),
        ("fedavg-ft", FedAvgFT()),
        ("fedavg-ft:finetune=2", FedAvgFT(finetune=2)),
        ("fedprox:mu=1", FedProx(mu=1.0)),
        ("local", LocalOnly()),
        ("ifca:d=8", IFCA(d=8)),
        ("ifca-warm:d=8", IFCA(d=8, warm=5)),
        ("ditto:lam=1e-2", Ditto(lam=0.01)),
    ],
)
def test_a_text_names_a_method_and_its_options(text: str, method: Algorithm) -> None:
    assert make_method(text) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedmerg", 'there is no method "fedmerg"; did you mean "fedmerge"?'),
        ("", 'there is no method ""; choose from apfl, apple'),
        ("fedmerge:dd=3", 'method "fedmerge" has no option "dd"; did you mean "d"?'),
        ("fedmerge:ruel=paper", 'did you mean "rule"?'),
        ("fedmerge:rule=papr", 'there is no rule "papr"; did you mean "paper"?'),
        ("fedmerge-ft:rule=paper", 'method "fedmerge-ft" has no option "rule"'),
        ("fedavg:rule=paper", 'method "fedavg" has no option "rule"; it has no options'),
        ("fedmerge:rule=paper:cap=1", 'method "fedmerge" has no option "cap"'),
        ("local:d=3", 'method "local" has no option "d"; it has no options'),
        ("fedmerge:d", '"d" is not of the form key=value'),
        ("fedmerge:d=", '"d=" is not of the form key=value'),
        ("fedmerge:d=3:d=4", '"d" is given twice'),
        ("fedmerge:d=three", 'd = "three": wanted a whole number'),
        ("fedmerge:d=2.5", 'd = "2.5": wanted a whole number'),
        ("fedmerge:cap=big", 'cap = "big": wanted a number'),
        ("fedmerge:leave_one_out=maybe", 'leave_one_out = "maybe": wanted true or false'),
        ("fedmerge:d=0", "d = 0: wanted 1"),
        ("fedmerge:cap=0", "cap = 0.0: wanted above 0"),
        ("fedmerge:cap=nan", "cap = nan"),
        ("fedmerge:cap=inf", "cap = inf"),
        ("fedprox:mu=1e7", "mu = 10000000.0: wanted 0"),
        ("fedmerge:init_noise=-1", "init_noise = -1.0: wanted above 0"),
        ("fedmerge:horizon=0", "horizon = 0: wanted 1"),
        ("fedmerge:sketch=0", "sketch = 0: wanted 1"),
        ("fedmerge:rule=paper:prox=-1", "prox = -1.0: wanted 0"),
        ("fedmerge:rule=paper:logit_step=-1", "logit_step = -1.0: wanted 0"),
        ("fedavg-ft:finetune=-1", "finetune = -1: wanted 0"),
        ("fedprox:mu=-1", "mu = -1.0: wanted 0"),
        ("ditto:lam=nan", "lam = nan: wanted 0"),
        ("fedprox:mu=1e300", "mu = 1e+300: wanted 0 or more, at most 1000000"),
        ("ifca:d=0", "d = 0"),
        ("ifca:warm=-1", "warm = -1"),
    ],
)
def test_a_text_that_names_nothing_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_method(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("fedmerge", {"d": 2.5}, "fedmerge: d = 2.5: wanted a whole number"),
        ("fedmerge", {"d": True}, "fedmerge: d = True: wanted a whole number"),
        ("fedmerge", {"d": "3"}, 'fedmerge: d = "3": wanted a whole number'),
        ("fedmerge", {"peers": None}, "fedmerge: peers = None: wanted a whole number"),
        # 0 would not be False.
        ("fedmerge", {"leave_one_out": 0}, "leave_one_out = 0: wanted true or false"),
        ("fedprox", {"mu": "big"}, 'fedprox: mu = "big": wanted a number'),
        ("apfl", {"alpha": "half"}, 'apfl: alpha = "half": wanted a number'),
        ("fedbabu", {"part": 1}, "fedbabu: part = 1: wanted a text"),
    ],
)
def test_an_option_of_another_type_is_told_in_one_line(
    kind: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=f"{told}$"):
        METHODS[kind][0](**options)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_is_held_against_its_type(name: str) -> None:
    kind = METHODS[name][0]
    for option in dataclasses.fields(kind):
        with pytest.raises(ConfigError, match=rf"{option.name} = \[\]: wanted "):
            kind(**{option.name: []})


def test_a_type_that_only_type_checkers_know_is_not_looked_at() -> None:
    @dataclass(frozen=True)
    class Mine(FedProx):
        other: Unknown = 3  # type: ignore[name-defined]  # noqa: F821

    assert Mine(other="x").other == "x"
    with pytest.raises(ConfigError, match="mu = -1: wanted 0 or more"):
        Mine(mu=-1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("fedavg", '"fedavg"'),
        (FedMerge, "the class FedMerge"),
        (torch.nn.Linear(2, 2), "a Linear"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_method_is_told_in_one_line(given: Any, told: str) -> None:
    wanted = rf'^algorithm is {told}: wanted a method, e.g. FedMerge\(\) or make_method\("fed'
    with pytest.raises(ConfigError, match=wanted):
        Soup(given, net())
    with pytest.raises(ConfigError, match=wanted):
        Simulation(given, make_clients(), net())


def test_the_number_of_models_fits_the_number_of_clients() -> None:
    assert FedMerge().resolve(40).d == 12
    assert FedMerge().resolve(7).d == 7
    assert FedMergePaper().resolve(40).d == 5
    assert FedMergePaper().resolve(3).d == 3
    assert IFCA().resolve(40).d == 4
    assert IFCA().resolve(2).d == 2
    for method in (FedMerge(d=9), FedMergePaper(d=9), IFCA(d=9)):
        assert method.resolve(9).d == 9
        with pytest.raises(ConfigError, match="d = 9 models for 8 clients: wanted d of at most 8"):
            method.resolve(8)


OPTIONS: dict[str, dict[str, object]] = {
    "fedmerge": {
        "d": 2,
        "init_noise": 0.5,
        "cap": 0.001,
        "horizon": 1,
        "leave_one_out": True,
        "sketch": 2,
        "peers": 0,
        "pull": 2.0,
        "settle": 1.0,
        "extrapolate": 1.0,
        "average": False,
        "finetune": 2,
    },
    "fedmerge:rule=paper": {"d": 2, "logit_step": 0.2, "prox": 0.5},
    "fedavg": {},
    "fedavg-ft": {"finetune": 2},
    "fedprox": {"mu": 1.0},
    "local": {},
    "ifca": {"d": 2, "warm": 1},
    "ifca-warm": {"d": 2, "warm": 1},
    "ditto": {"lam": 1.0},
    "apfl": {"alpha": 0.5, "adaptive": True},
    "fedper": {},
    "fedrep": {"head_epochs": 1, "body_epochs": 1},
    "fedbabu": {"finetune": 1, "part": "head"},
    "fedala": {"layers": 2, "share": 0.3, "eta": 0.1, "threshold": 1.0, "passes": 1},
    "apple": {
        "clients": 4,
        "downloads": 2,
        "weight_lr": 0.01,
        "core_scale": 1.0,
        "mu": 10.0,
        "fade": 1,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_every_method_changes_the_result(name: str) -> None:
    method = make_method(name)
    assert {f.name for f in dataclasses.fields(method)} == OPTIONS[name].keys()
    for option, value in OPTIONS[name].items():
        # With all clients in every round there is nothing to average.
        share = 0.5 if option == "average" else 1.0
        base, other = (
            run(made, rounds=14, participation=share)
            for made in (method, dataclasses.replace(method, **{option: value}))
        )
        assert plain(other.history) != plain(base.history), option


def test_every_method_is_in_the_registry_under_its_own_name() -> None:
    others = {method.split(":")[0] for method, _ in test_rivals_server.OPTIONS}
    others |= {"fedmerge-ft"}  # its options are FedMerge's
    assert set(METHODS) | {"fedmerge:rule=paper"} == set(OPTIONS) | others
    for name, (kind, options) in METHODS.items():
        assert make_method(name) == kind(**options)
    assert {make_method(name).name for name in METHODS} <= set(METHODS)


def test_nothing_is_left_out_where_each_client_may_have_a_model_of_its_own() -> None:
    setup = simulate("fedmerge", make_clients(6), training=TRAINING).soup.setup
    for text, n, d, left_out in (
        ("fedmerge", 12, 12, False),
        ("fedmerge", 13, 12, True),
        ("fedmerge:d=4", 5, 4, True),
        ("fedmerge:leave_one_out=true", 4, 4, True),
        ("fedmerge:leave_one_out=false", 40, 12, False),
    ):
        method = make_method(text).resolve(n)
        assert isinstance(method, FedMerge)
        assert (method.d, method.leave_one_out) == (d, left_out)
        assert ("own" in method.rows(setup, 1)) == left_out
    # A server that does not know how many there will be.
    assert "own" in FedMerge().rows(setup, 1)


def test_more_models_than_clients_are_refused_by_a_simulation() -> None:
    with pytest.raises(ConfigError, match="d = 7 models for 6 clients"):
        simulate("fedmerge:d=7", make_clients(6), training=TRAINING)


FINE_TUNED = ["WarmIFCA", "FeSEM", "CFL", "PPFL", "FedAvg"]
AVERAGED = ["FedAvg", "FedAvgFT", "WarmIFCA", "CFL", "PPFL"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("x = = 1", r"cannot be imported \(SyntaxError: .*\)$"),
        ("raise RuntimeError('two\\nlines')", r"cannot be imported \(RuntimeError: two lines\)$"),
        ("class Mines: pass", 'own_methods has no class Mine; did you mean "Mines"'),
        ("Mine = 3", "wanted a dataclass that extends fedmerge.Algorithm"),
        (
            "from dataclasses import dataclass\nfrom fedmerge import Algorithm\n"
            "@dataclass(frozen=True)\nclass Mine(Algorithm): pass",
            'its class has no name: wanted name = "..." in Mine',
        ),
        (
            "from dataclasses import dataclass\nfrom fedmerge import FedAvg\n"
            "@dataclass(frozen=True)\nclass Mine(FedAvg):\n    beta: float\n    name = 'mine'",
            r'beta has no default; write "own_methods.Mine:beta=\.\.\.", or give it one',
        ),
        (
            "from dataclasses import dataclass\nfrom fedmerge import FedAvg\n"
            "@dataclass(frozen=True)\nclass Mine(FedAvg):\n    name = 'mine'\n"
            "    def __post_init__(self): raise KeyError('lost')",
            "own_methods.Mine: KeyError: 'lost'$",
        ),
    ],
)
def test_what_is_wrong_with_a_method_of_ones_own_is_told_in_a_line(
    body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_methods.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)
    with pytest.raises(ConfigError, match=told) as caught:
        make_method("own_methods.Mine")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"nowhere.*is its folder on PYTHONPATH"):
        make_method("nowhere.Mine")


@pytest.mark.parametrize(
    "name", [*(f"fine_tuned.{n}" for n in FINE_TUNED), *(f"averaged.{n}" for n in AVERAGED)]
)
def test_the_examples_give_others_what_fedmerge_does_after_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    method = make_method(name)
    name = name.partition(".")[2]
    kind = getattr(algorithms, {"WarmIFCA": "IFCA"}.get(name, name))
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    some: dict[str, Any] = {"rounds": 8, "participation": 0.5}
    ours, theirs = run(method, **some), run(kind(**options), **some)
    for key, value in theirs.soup.shared.items():
        assert torch.equal(ours.soup.shared[key], value)  # the same training
    ids = [client.id for client in ours.clients]
    assert not torch.equal(ours.personal(ids), theirs.personal(ids))
