"""When a client has a model of its own, by numbers made by hand; the whole rule: `test_merging`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core_fixture import (
    equal,
    made_delta,
    make_clients,
    make_updates,
    net,
    run,
    simulate,
    soup_tensors,
)
from fedmerge import FedMerge, Soup
from fedmerge.config import load_config
from fedmerge.own import NEW, help_of, own_models, recent, share_of, towards_own
from fedmerge.peers import Peers, no_peers
from fedmerge.privacy import Privacy
from fedmerge.safety import Safety

F64 = torch.float64


def peers(weights: list[list[float]], places: list[int] | None = None) -> Peers:
    """Clients with rows of one block."""
    n, d = len(weights), len(weights[0])
    logits = torch.tensor(weights, dtype=F64).log()[:, None]
    place = torch.arange(n) if places is None else torch.tensor(places)
    return no_peers(1, d, 3) | {"place": place, "logits": logits}


def test_help_is_the_log_of_by_how_much_a_score_has_fallen() -> None:
    before = torch.tensor([3.0, 1.0, 2.0, 9.0, math.inf, 0.3, math.nan, math.inf])
    after = torch.tensor([1.0, 3.0, 2.0, 0.0, 1.0, math.inf, math.nan, math.inf])
    found = help_of(before, after, 1.0)
    # A client whose model was lost before does not know, nor one without a score.
    wanted = [math.log(2), -math.log(2), 0, 1, 1, -1, 0, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert found.dtype == F64


@pytest.mark.parametrize("targets", [0, 2])
def test_clients_say_what_their_training_did_to_their_validation_data(targets: int) -> None:
    clients = make_clients(3, targets=targets)
    simulation = simulate("fedmerge", clients, net() if not targets else two_outputs, rounds=1)
    start = simulation.soup.used(simulation.soup.clients)[:, 0]
    for _ in simulation.rounds():
        pass
    helped = simulation.soup.rows(simulation.soup.clients)["helped"]
    trainer = simulation._side.trainer([0, 1, 2], 1)
    end, _ = trainer.fit(start)
    for i, client in enumerate(clients):
        x, y = client.validation.x, client.validation.y
        scores = []
        for row in (start[i], end[i]):
            module = two_outputs() if targets else net()()
            torch.nn.utils.vector_to_parameters(row, module.parameters())
            output = module(x).detach()
            wrong = float((output.argmax(1) != y).sum()) + 1 if not targets else 0.0
            scores.append(wrong or float((output - y).square().mean()) + 1e-3)
        said = min(1.0, max(-1.0, math.log(scores[0] / scores[1])))
        assert float(helped[i]) == pytest.approx(said, abs=1e-5)
    assert float(helped.abs().max()) > 0.01


def test_the_mean_runs_from_the_first_value() -> None:
    before, said = torch.tensor([0.0, 0.5], dtype=F64), torch.tensor([0.4, -0.5], dtype=F64)
    assert recent(before, said, torch.tensor([True, False])).tolist() == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize(
    ("helped", "overall", "taken_part", "missed", "share"),
    [
        (0.05, 0.05, 40, 1, 0.0),
        (0.1, 0.1, 40, 1, 0.1),
        (0.3, -0.1, 40, 1, 0.1),  # half of it is what it is to all
        (0.1, 0.1, 40, 2, 1 - 0.9**2),
        (0.9, 0.3, 40, 1, 0.5),
        (-0.9, 0.3, 40, 1, 0.0),
        (0.3, 0.3, 10, 1, 0.5),
        (0.3, 0.3, 5, 1, 0.2),  # a fifth is asked where a twentieth would do later
        (0.3, 0.3, 4, 1, 0.0),
    ],
)
def test_how_far_a_row_goes(
    helped: float, overall: float, taken_part: int, missed: int, share: float
) -> None:
    one = torch.tensor([helped], dtype=F64), torch.tensor(overall, dtype=F64)
    found = share_of(*one, torch.tensor([taken_part]), torch.tensor([missed]), 0.5)
    assert float(found) == pytest.approx(share, abs=1e-12)


def test_each_has_another_model_and_the_sum_of_their_weights_is_largest() -> None:
    rows = [[0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.2, 0.5, 0.3]]
    # .3 + .7 + .3 is more than .6 + .2 + .5 only as long as nobody else is there.
    assert own_models(peers(rows)).tolist() == [[0], [2], [1]]
    assert own_models(peers(rows[:2])).tolist() == [[1], [0]]
    four = [*rows, [0.4, 0.3, 0.3]]
    assert own_models(peers(four)).tolist() == [[-1]] * 4


def test_rows_go_to_their_own_models_and_those_not_seen_before_stay() -> None:
    known = peers([[0.6, 0.4], [0.8, 0.2]], places=[7, 3])
    logits = torch.full((3, 1, 2), 0.5, dtype=F64).log()
    share = torch.tensor([0.2, 0.5, 0.5], dtype=F64)
    moved = towards_own(logits, share, torch.tensor([3, 7, 5]), known).softmax(-1)
    np.testing.assert_allclose(moved[:, 0], [[0.6, 0.4], [0.25, 0.75], [0.5, 0.5]], rtol=1e-12)
    still = towards_own(logits, torch.zeros(3, dtype=F64), torch.tensor([3, 7, 5]), known)
    assert torch.equal(still, logits)
    nobody = no_peers(1, 2, 3)
    assert torch.equal(towards_own(logits, share, torch.tensor([3, 7, 5]), nobody), logits)


def two_outputs() -> torch.nn.Module:
    return torch.nn.Linear(5, 2)


def few(said: float | None, rounds: int, method: FedMerge | None = None) -> Soup:
    """Rounds of three clients of as many models, who all say the same of their training."""
    soup = Soup((method or FedMerge()).resolve(3), net(dtype=F64), seed=3)
    clients = ["a", "b", "c"]
    extra = {} if said is None else {"help": torch.full((3,), said, dtype=F64)}
    for t in range(rounds):
        sent = soup.send(clients)
        assert soup.fold(make_updates(sent, 0.01 * made_delta(soup, 3, t), extra=extra)) == []
        soup.commit()
    return soup


def largest(soup: Soup) -> float:
    weights = soup.weights()
    assert weights is not None
    return float(weights.amax(-1).min())


def test_rows_stay_while_models_are_new_and_where_training_does_not_help() -> None:
    method = FedMerge(extrapolate=1)
    assert largest(few(1.0, NEW, method)) < 0.5
    assert largest(few(1.0, NEW + 6, method)) > 0.95
    assert largest(few(1.0, NEW + 6)) > 0.95
    unsaid = few(None, NEW + 6, method)
    assert largest(unsaid) < 0.5
    for said in (0.0, 0.05, -1.0):
        weights = few(said, NEW + 6, method).weights()
        assert torch.equal(weights, unsaid.weights())  # type: ignore[arg-type]
    assert largest(few(1.0, NEW + 6, FedMerge(settle=0))) < 0.5


@pytest.mark.parametrize("method", [FedMerge(), FedMerge(d=2), FedMerge(settle=0)])
def test_models_go_further_where_training_helps_and_only_there(method: FedMerge) -> None:
    def models(said: float | None, rounds: int = 1, extrapolate: float = 3.0) -> Tensor:
        return few(said, rounds, replace(method, extrapolate=extrapolate)).shared["models"]

    plain = models(None, extrapolate=1)
    start = models(None, 0)
    for said in (None, 0.0, -1.0):
        assert torch.equal(models(said), plain)
    further = (models(0.05) - start) / (plain - start)
    np.testing.assert_allclose(further, torch.full_like(further, 1.2), rtol=1e-5)
    # Made-up updates are near to orthogonal, so three may go 1.5 times their mean.
    most = (models(1.0) - start) / (plain - start)
    assert 1.3 < float(most.min()) < float(most.max()) < 1.7
    assert torch.equal(models(1.0, extrapolate=1), plain)


def test_how_much_training_has_helped_of_late_decides() -> None:
    soup = few(0.2, 1)
    assert float(soup.shared["helped"]) == pytest.approx(0.2)
    sent = soup.send(["a", "b"])
    said = torch.tensor([-0.1, 0.3], dtype=F64)
    soup.fold(make_updates(sent, made_delta(soup, 2, 5), extra={"help": said}))
    soup.commit()
    assert float(soup.shared["helped"]) == pytest.approx(0.7 * 0.2 + 0.3 * 0.1)


def test_one_model_goes_no_further_than_fedavg() -> None:
    asked = few(1.0, 3, FedMerge(d=1, leave_one_out=False))
    plain = few(1.0, 3, FedMerge(d=1, leave_one_out=False, extrapolate=1))
    assert float(asked.shared["helped"]) == 1.0
    assert torch.equal(asked.shared["models"], plain.shared["models"])


def test_nobody_is_asked_where_it_would_change_nothing() -> None:
    still = "extrapolate=1"
    for method in (f"d=3:{still}", f"settle=0:{still}", "peers=0", "d=1"):
        simulation = run(f"fedmerge:{method}", make_clients(4), rounds=2)
        assert not any("help" in name for name in soup_tensors(simulation.soup))
    for method in ("d=3", "settle=0"):
        simulation = run(f"fedmerge:{method}", make_clients(4), rounds=2)
        assert abs(float(simulation.soup.shared["helped"])) > 0.01
        assert "helped" not in simulation.soup.rows(simulation.soup.clients)
    asked = run("fedmerge", make_clients(4), rounds=2)
    helped = asked.soup.rows(asked.soup.clients)["helped"]
    assert helped.abs().max() > 0.01
    assert float(asked.soup.shared["helped"]) == pytest.approx(float(helped.mean()))


@pytest.mark.parametrize(
    "said",
    [
        torch.tensor([0.1]),
        torch.tensor([[0.1]], dtype=F64),
        torch.tensor([1.01], dtype=F64),
        torch.tensor([math.nan], dtype=F64),
    ],
)
def test_what_cannot_be_is_refused(said: Tensor) -> None:
    soup = few(0.2, 1)
    sent = soup.send(["a"])
    refusals = soup.fold(make_updates(sent, made_delta(soup, 1, 9), extra={"help": said}))
    assert [r.reason for r in refusals] == ["shape"]


def test_it_does_not_matter_in_what_order_clients_say_it() -> None:
    def one(order: list[int]) -> dict[str, Tensor]:
        soup = Soup(FedMerge().resolve(3), net(dtype=F64), seed=3, ordered=True)
        for t in range(NEW + 3):
            sent = soup.send(["a", "b", "c"])
            said = torch.tensor([0.3, 0.1, 0.7], dtype=F64) + 0.01 * t
            updates = make_updates(sent, made_delta(soup, 3, t), extra={"help": said})
            for i in order:
                soup.fold(updates.take([i]))
            soup.commit()
        return soup_tensors(soup)

    assert equal(one([0, 1, 2]), one([2, 0, 1]))


def test_with_privacy_nothing_is_said_of_the_validation_data() -> None:
    safety = Safety(privacy=Privacy(clip=1.0, noise=1.0))
    soup = Soup(FedMerge().resolve(3), net(dtype=F64), seed=3, safety=safety)
    assert not any("help" in name for name in soup_tensors(soup))


def test_few_clients_whom_training_helps_are_better_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight clients, of eight kinds that share three factors, of whom one is in each round."""

    def accuracy() -> float:
        found = []
        for seed in (500, 501, 502):
            settings: dict[str, Any] = {"setting": "concept-mix", "clients": 8, "seed": seed}
            sizes = {"rounds": 60, "participation": 0.1, "evaluate_every": 60}
            config = load_config(
                None, {"data": "digits", "method": "fedmerge", **settings, **sizes}
            )
            logs = list(config.simulation(config.federation()).rounds())
            found.append(logs[-1].to_json()["metrics"]["merged"]["test"]["accuracy"]["mean"])
        return float(np.mean(found))

    reached = accuracy()
    monkeypatch.setattr("fedmerge.algorithms.fedmerge.NEW", 1000)
    assert reached > accuracy() + 0.02
