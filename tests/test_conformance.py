"""One suite over every method: what a method must hold to, whatever its update rule.

A new method is tested here by being in the registry; its own step belongs in `test_algorithms`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core_fixture import (
    ALL_METHODS,
    TRAINING,
    equal,
    make_client,
    make_clients,
    norm_net,
    plain,
    run,
    simulate,
    soup_tensors,
)
from fedmerge.errors import ConfigError
from fedmerge.local import Mixture
from fedmerge.sim import RoundLog, Simulation

every_method = pytest.mark.parametrize("method", ALL_METHODS)
# Warm-started clustering takes place within the few rounds of a test, and the little fine-tuning
# leaves something to learn in them.
SHORT = {
    "fedmerge-ft": "fedmerge-ft:finetune=1",
    "ifca-warm": "ifca-warm:warm=2",
    "cfl": "cfl:warm=0:eps1=1:eps2=0",
    "fesem": "fesem:warm=1",
}
PERSONAL = {"local", "ditto", "fedavg-ft", "fedamp"}
"""Methods whose personal model is fitted at the client, so that it must fit its training data."""

SENT = {"local": 0, "ifca": 4, "fedfomo": 5, "fedem": 3, "ppfl": 4, "moe": 4, "apple": 6}
RETURNED = {"local": 0, "fedem": 3, "moe": 4}
"""Models that travel to a client and back in a round; 1 where it is not said."""
EXTRA = {
    "ifca": 8, "ifca-warm": 8, "fedfomo": 5 * 8, "ppfl": 4 * 4, "fedmerge": 8, "fedmerge-ft": 8,
}  # fmt: skip
"""Bytes of what else a client sends: its cluster, its gains from the others, its membership, by
how much its training has helped it."""

PERSONAL_HEAD = {"fedper", "fedrep", "fedbabu"}
"""Methods whose last layer stays with the client."""


def short(method: str) -> str:
    return SHORT.get(method, method)


def losses(log: RoundLog, model: str = "merged", split: str = "train") -> float:
    summary = log.metrics[model][split]["loss"]
    assert summary is not None
    return summary.mean


def states(simulation: Simulation) -> dict[str, torch.Tensor]:
    """The server's numbers and the clients' memory, clients in the order of their ids."""
    order = sorted(range(len(simulation.clients)), key=lambda i: simulation.clients[i].id)
    memory = {f"memory.{n}": t[order] for n, t in simulation._memory.items()}
    return soup_tensors(simulation.soup) | memory


def finish(simulation: Simulation) -> Simulation:
    for _ in simulation.rounds():
        pass
    return simulation


@every_method
def test_it_learns_and_stays_finite(method: str) -> None:
    simulation = run(short(method), rounds=12)
    for log in simulation.history:
        assert log.metrics.keys() == {"merged", "tuned", "local"}
        for model in log.metrics:
            for split in ("train", "validation", "test"):
                assert 0 < losses(log, model, split) < 10
    first, last = simulation.history[0], simulation.history[-1]
    for model in ("merged", "tuned", "local"):
        assert losses(last, model) < losses(first, model), model
    # What a client has after training fits its data better than what everyone starts from. FedBABU
    # fits it after that, as `merged`: its clients start, and end, with an untrained head.
    own, start = ("merged", "local") if method == "fedbabu" else ("local", "merged")
    assert losses(last, own) < 0.85 * losses(first, start)
    if method in PERSONAL:
        assert losses(last) < 0.5 * losses(run("fedavg", rounds=12).history[-1])


@every_method
def test_a_client_alone_learns(method: str) -> None:
    history = run(short(method), [make_client("a", 30, kind=0)], rounds=6).history
    own = "tuned" if method == "fedbabu" else "merged"  # its body is trained under a random head
    assert losses(history[-1], own) < losses(history[0], own)


SLOW = pytest.mark.xfail(
    strict=True,
    reason="APPLE's sum of all cores moves by those of the round only: with a quarter of the "
    "clients in a round it takes four times the rounds, or four times the core's rate",
)


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=SLOW) if m == "apple" else m for m in ALL_METHODS]
    + ["apple:core_scale=14"],
)
def test_it_learns_from_few_clients_in_a_round(method: str) -> None:
    """Whoever has taken part is served clearly better than after the first round."""
    simulation = simulate(short(method), make_clients(12), participation=0.25, rounds=12)
    merged = []
    for _ in simulation.rounds():
        last = simulation._progress.latest
        assert last is not None
        merged.append(last.found["merged"]["train"].loss)
    seen = sorted({i for number in range(1, 13) for i in simulation.draws.cohort(number)})
    assert len(seen) > 8
    assert merged[-1][seen].mean() < 0.85 * merged[0][seen].mean()


@every_method
def test_stacked_is_sequential(method: str) -> None:
    stacked = run(short(method), execution="stacked")
    single = run(short(method), execution="sequential")
    a, b = states(stacked), states(single)
    assert a.keys() == b.keys()
    for name in a:
        # Whole numbers of a small unit may be rounded the other way.
        off = 1 if a[name].dtype == torch.int16 else 1e-5
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=off)
    for x, y in zip(stacked.history, single.history, strict=True):
        for model in x.metrics:
            assert losses(x, model) == pytest.approx(losses(y, model), rel=1e-4)


@every_method
def test_permuting_the_clients_permutes_the_results(method: str) -> None:
    # More than one group, and of one size, so that nothing but the ids can order them.
    clients = [make_client(f"c{i:02d}", 6, kind=i % 2) for i in range(40)]
    order = [i * 7 % 40 for i in range(40)]
    options = {"participation": 0.9, "dropout": 0.1, "rounds": 3}
    first = run(short(method), clients, **options)
    second = run(short(method), [clients[i] for i in order], **options)
    assert equal(states(first), states(second))
    of_first, of_second = first.result(), second.result()
    by_id = {client["id"]: client for client in of_first["clients"]}
    assert [client["id"] for client in of_second["clients"]] == [clients[i].id for i in order]
    for client in of_second["clients"]:
        assert client == by_id[client["id"]]
    if of_first["weights"] is not None:
        assert of_second["weights"] == [of_first["weights"][i] for i in order]


@every_method
def test_absent_clients_are_left_untouched(method: str) -> None:
    simulation = simulate(short(method), make_clients(8), participation=0.3, dropout=0.3, rounds=6)
    ids = [client.id for client in simulation.clients]
    touched = 0
    rounds = simulation.rounds()
    for number in range(1, 7):
        before = {n: t.clone() for n, t in simulation._memory.items()}
        rows = simulation.soup.rows(ids)
        next(rounds)
        cohort = set(simulation.draws.cohort(number))
        here = {i for i in cohort if not simulation.draws.drops(number, i)}
        away = [i for i in range(8) if i not in here]
        after = simulation.soup.rows(ids)
        for old, new in ((before, simulation._memory), (rows, after)):
            for name in old:
                assert torch.equal(old[name][away], new[name][away]), name
                touched += not torch.equal(old[name], new[name])
    # Two clients are too few for CFL to part them.
    if (before or rows) and method != "cfl":
        assert touched > 3  # those who were there did move


@every_method
def test_a_run_that_was_stopped_goes_on_the_same_to_the_bit(method: str, tmp_path: Path) -> None:
    options = {"rounds": 6, "participation": 0.7, "dropout": 0.1, "evaluate_every": 2}
    whole = run(short(method), **options)
    stopped = simulate(short(method), checkpoint=tmp_path, **options)
    for log in stopped.rounds():
        if log.round == 3:
            break
    del stopped
    resumed = simulate(short(method), checkpoint=tmp_path, **options)
    assert len(resumed.history) == 3
    finish(resumed)
    assert plain(resumed.history) == plain(whole.history)
    assert equal(states(resumed), states(whole))
    assert resumed.result() == whole.result()
    # A finished run is not run again.
    again = simulate(short(method), checkpoint=tmp_path, **options)
    assert list(again.rounds()) == []
    assert again.result() == whole.result()


@every_method
def test_the_seed_decides_everything(method: str) -> None:
    options = {"participation": 0.8, "dropout": 0.1}
    torch.manual_seed(1)
    first = run(short(method), seed=5, **options)
    torch.manual_seed(2)
    same = run(short(method), seed=5, **options)
    other = run(short(method), seed=6, **options)
    assert plain(first.history) == plain(same.history)
    assert equal(states(first), states(same))
    assert plain(first.history) != plain(other.history)
    assert first.result()["models"] != other.result()["models"]


@every_method
def test_no_round_is_lost_on_a_cohort_of_one(method: str) -> None:
    simulation = run(short(method), participation=0.01, rounds=5)
    assert [log.cohort for log in simulation.history] == [1] * 5
    for value in states(simulation).values():
        assert bool(value.isfinite().all())


@every_method
def test_it_takes_statistics_and_counters(method: str) -> None:
    simulation = run(
        short(method), make_clients(4), norm_net, training=replace(TRAINING, batch_size=100)
    )
    for log in simulation.history:
        assert losses(log) < 20
    layout = simulation.soup.setup.layout
    model = simulation.personal([client.id for client in simulation.clients])
    rows = model.rows.flatten(0, 1) if isinstance(model, Mixture) else model
    assert bool((layout.views(rows)["1.running_var"] > 0).all())
    assert bool(rows.isfinite().all())
    counters = rows[:, layout.counters]
    assert torch.allclose(counters, counters.round(), rtol=1e-6)  # of a merge: to rounding
    assert bool((counters > 0).all())


@every_method
def test_what_travels_is_counted(method: str) -> None:
    simulation = run(short(method), rounds=2, dropout=0.3)
    row = simulation.soup.setup.layout.n_bytes
    if method in PERSONAL_HEAD:
        row = row * 24 // 39  # the numbers below the last layer, of all of them
    for log in simulation.history:
        replied = log.cohort - log.dropped
        assert log.bytes_down == SENT.get(method, 1) * row * log.cohort
        assert log.bytes_up == (RETURNED.get(method, 1) * row + EXTRA.get(method, 0)) * replied


def test_a_round_of_fedmerge_costs_the_bytes_of_fedavg() -> None:
    averaged = run("fedavg", participation=0.7, dropout=0.2)
    # But for a number: by how much training has helped the client.
    for method, number in (
        ("fedmerge:d=5", 8),
        ("fedmerge:peers=0", 0),
        ("fedmerge:rule=paper", 0),
    ):
        merged = run(method, participation=0.7, dropout=0.2)
        for a, b in zip(merged.history, averaged.history, strict=True):
            replied = b.cohort - b.dropped
            assert (a.bytes_up, a.bytes_down) == (b.bytes_up + number * replied, b.bytes_down)


@every_method
def test_its_functions_change_none_of_what_they_are_given(method: str) -> None:
    """State goes in and comes out: what was there before a round is there after it."""
    simulation = simulate(short(method))
    rounds = simulation.rounds()
    next(rounds)
    shared = simulation.soup.shared
    kept = {name: value.clone() for name, value in shared.items()}
    next(rounds)
    next(rounds)
    assert equal(shared, kept)


@every_method
@pytest.mark.parametrize("option", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"clip": 0.01}])
def test_no_setting_of_local_training_is_ignored(method: str, option: dict[str, float]) -> None:
    """It changes the result, or is refused by methods whose local steps are their own."""
    training = replace(TRAINING, **option)
    if method in {"apfl", "apple", "fedem", "moe", "ppfl"}:
        with pytest.raises(ConfigError, match="do not go with this method"):
            run(short(method), rounds=3, training=training)
        return
    base, other = (run(short(method), rounds=3, **kw) for kw in ({}, {"training": training}))
    assert plain(other.history) != plain(base.history)
