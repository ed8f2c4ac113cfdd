"""The loop over rounds: what it logs, whom it draws, what it saves, and what it refuses.

That methods keep to their contract within it is tested in `test_conformance`.
"""

from __future__ import annotations

import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core_fixture import (
    N_CLASSES,
    N_FEATURES,
    TRAINING,
    equal,
    make_client,
    make_clients,
    net,
    plain,
    run,
    simulate,
    soup_tensors,
)
from fedmerge.algorithms import Ditto
from fedmerge.data import Client, Federation, Split
from fedmerge.errors import ConfigError, DataError, ModelError, StateError
from fedmerge.local import Examples, Training
from fedmerge.sim import RoundLog, Simulation, Summary
from fedmerge.sim.log import Measured
from fedmerge.soup import Soup

HEARD = (signal.SIGINT, signal.SIGTERM)


def measure(simulation: Simulation, rows: torch.Tensor, split: str) -> Measured:
    """Loss and accuracy of rows in the order of the simulation's clients, computed directly."""
    losses, right = [], []
    layout = simulation.soup.setup.layout
    module = net()()
    for row, client in zip(rows, simulation.clients, strict=True):
        layout.load(module, row)
        part = getattr(client, split)
        with torch.no_grad():
            output = module(part.x)
        losses.append(nn.functional.cross_entropy(output, part.y).item())
        right.append((output.argmax(1) == part.y).double().mean().item())
    return Measured(np.array(losses), np.array(right), np.full(len(right), np.nan))


# -- logs -----------------------------------------------------------------------------------------


def test_a_log_survives_json() -> None:
    for simulation in (
        run("fedmerge", evaluate_every=2),
        run("local", dropout=0.3),
        run("fedavg", regression(), regression_net),
    ):
        for log in simulation.history:
            assert RoundLog.from_json(json.loads(json.dumps(log.to_json(), allow_nan=False))) == log


@pytest.mark.parametrize(
    ("m", "high_is_bad", "worst"),
    [(1, False, 1.0), (10, False, 1.0), (11, False, 1.5), (21, False, 2.0), (21, True, 20.0)],
)
def test_the_worst_decile_by_hand(m: int, high_is_bad: bool, worst: float) -> None:
    """The worst tenth of 1, 2, ..., m, rounded up: of 11 clients it is two, of 21 three."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, m + 1))
    summary = Summary.of(values, high_is_bad=high_is_bad)
    assert summary == Summary((m + 1) / 2, pytest.approx(np.std(values)), worst)


def test_clients_not_measured_are_left_out_and_diverged_ones_are_not() -> None:
    known = np.array([1.0, np.nan, 3.0])
    assert Summary.of(known, high_is_bad=True) == Summary(2.0, 1.0, 3.0)
    assert Summary.of(np.array([np.nan]), high_is_bad=True) is None
    assert Summary.of(np.array([1.0, np.inf]), high_is_bad=True) is None


def test_metrics_are_those_of_the_models_they_name() -> None:
    """merged: what a client would get now; local: its own after training; tuned: one epoch more."""
    simulation = run("fedavg", rounds=2)
    last = simulation.history[-1]
    ids = [client.id for client in simulation.clients]
    rows = simulation.soup.used(ids)[:, 0]
    for split in ("train", "validation", "test"):
        found = measure(simulation, rows, split)
        summary = last.metrics["merged"][split]
        loss, accuracy = summary["loss"], summary["accuracy"]
        assert loss is not None
        assert accuracy is not None
        assert loss.mean == pytest.approx(found.loss.mean(), rel=1e-5)
        assert loss.std == pytest.approx(found.loss.std(), rel=1e-4)
        assert loss.worst_decile == pytest.approx(found.loss.max(), rel=1e-5)
        assert accuracy.mean == pytest.approx(found.accuracy.mean(), rel=1e-6)
        assert accuracy.worst_decile == pytest.approx(found.accuracy.min(), rel=1e-6)
    splits = [(client.train.x, client.train.y) for client in simulation.clients]
    keys = [(3, name, "tuned") for name in ids]
    tuned, _ = simulation._side.engine.fit(rows, Examples.of(splits), keys, seed=0, epochs=1)
    made = last.metrics["tuned"]["test"]["loss"]
    assert made is not None
    assert made.mean == pytest.approx(measure(simulation, tuned, "test").loss.mean(), rel=1e-5)


def test_the_gap_is_what_merging_costs_the_participants() -> None:
    simulation = simulate("fedavg", rounds=3, participation=0.5)
    ids = [client.id for client in simulation.clients]
    for log in simulation.rounds():
        received = simulation.soup.used(ids)[:, 0]  # after the round: of the next one
        here = simulation.draws.cohort(log.round)
        assert 0 < len(here) < len(ids)
        for split, gap in (("train", log.gap_train), ("test", log.gap_test)):
            merged = measure(simulation, received, split).loss[here].mean()
            local = log.metrics["local"][split]["loss"]
            assert local is not None
            assert gap == pytest.approx(merged - local.mean, rel=1e-4, abs=1e-6)
    # A client that keeps its own model has no gap, but for the rounding of another grouping.
    for log in run("local", participation=0.5).history:
        assert log.gap_train == pytest.approx(0, abs=1e-6)
        assert log.gap_test == pytest.approx(0, abs=1e-6)


def test_the_statistics_of_the_rows() -> None:
    simulation = simulate("fedmerge:d=3:cap=0.5", participation=0.5, rounds=4)
    before = simulation.soup.weights()
    assert before is not None
    for log in simulation.rounds():
        weights = simulation.soup.weights()
        assert weights is not None
        assert log.rows is not None
        here = np.array(simulation.draws.cohort(log.round))
        w, old = weights.numpy(), before.numpy()
        entropy = [-sum(p * math.log(p) for p in row) for row in w.reshape(-1, 3)]
        assert log.rows["entropy"] == pytest.approx(np.mean(entropy), rel=1e-9)
        assert log.rows["largest"] == pytest.approx(w.max(-1).mean(), rel=1e-9)
        moved = 0.5 * np.abs(w[here] - old[here]).sum(-1).mean()
        assert log.rows["movement"] == pytest.approx(moved, rel=1e-9)
        assert moved > 0
        before = weights
    assert all(log.rows is None for log in run("fedavg").history)


def test_rounds_are_evaluated_as_often_as_asked_and_the_last_one_always() -> None:
    simulation = run("fedmerge", rounds=5, evaluate_every=2)
    assert [bool(log.metrics) for log in simulation.history] == [False, True, False, True, True]
    assert [log.gap_test is None for log in simulation.history] == [True, False, True, False, False]
    every = run("fedmerge", rounds=5)
    # Evaluating changes nothing.
    assert equal(soup_tensors(simulation.soup), soup_tensors(every.soup))
    assert simulation.history[-1].metrics == every.history[-1].metrics


def test_seconds_are_counted_by_phase() -> None:
    for log in run("fedmerge").history:
        assert log.seconds.keys() == {"send", "local", "fold", "commit", "evaluate"}
        assert min(log.seconds.values()) > 0


# -- cohorts --------------------------------------------------------------------------------------


def test_cohorts_are_drawn_anew_and_dropouts_counted() -> None:
    simulation = simulate("fedavg", make_clients(20), participation=0.5, dropout=0.3, rounds=40)
    seen: list[tuple[int, ...]] = []
    dropped = 0
    for log in simulation.rounds():
        cohort = simulation.draws.cohort(log.round)
        assert log.cohort == len(cohort) == len(set(cohort)) == 10
        assert log.dropped == sum(simulation.draws.drops(log.round, i) for i in cohort)
        seen.append(tuple(cohort))
        dropped += log.dropped
    assert len(set(seen)) > 35
    assert set(np.concatenate(seen)) == set(range(20))
    assert dropped / 400 == pytest.approx(0.3, abs=0.08)


def test_who_drops_out_sends_nothing() -> None:
    """A round in which all but one drop out is that one's own round."""
    simulation = simulate("fedavg", dropout=0.6, rounds=6)
    rounds = simulation.rounds()
    found = False
    for number in range(1, 7):
        before = simulation.soup.shared["models"]
        here = [i for i in range(6) if not simulation.draws.drops(number, i)]
        trainer = simulation._side.trainer(here, number)
        end, _ = trainer.fit(before.expand(len(here), -1)) if here else (before, None)
        n = trainer.n_examples.double()
        next(rounds)
        wanted = (n / n.sum()).float() @ end if here else before[0]
        torch.testing.assert_close(
            simulation.soup.shared["models"][0], wanted, rtol=1e-4, atol=1e-6
        )
        found |= len(here) < 6
    assert found


def test_a_round_without_any_reply_is_logged() -> None:
    simulation = run("fedmerge", make_clients(2), dropout=0.97, rounds=3)
    assert [log.dropped for log in simulation.history] == [2, 2, 2]
    for log in simulation.history:
        assert log.gap_train is None
        assert "local" not in log.metrics
        assert log.bytes_up == 0 < log.bytes_down
        assert log.rows is not None
        assert log.rows["movement"] == 0
    assert simulation.result()["bytes_up"] == 0


# -- results --------------------------------------------------------------------------------------


def test_the_result_is_of_the_last_evaluated_round() -> None:
    simulation = run("fedmerge:d=3", rounds=3, dropout=0.2)
    result, last = simulation.result(), simulation.history[-1]
    json.dumps(result, allow_nan=False)
    assert result["rounds"] == 3
    for model in ("merged", "tuned", "local"):
        found = last.metrics[model]["test"]
        assert found["accuracy"] is not None
        assert found["loss"] is not None
        assert result["models"][model] == {
            "accuracy": found["accuracy"].mean,
            "accuracy_std": found["accuracy"].std,
            "accuracy_worst_decile": found["accuracy"].worst_decile,
            "auc": None,
            "loss": found["loss"].mean,
        }
    row = simulation.soup.setup.layout.n_bytes
    # Per client and round, with eight bytes for what its training has done.
    assert (result["bytes_up"], result["bytes_down"]) == (row + 8, row)
    assert (result["gap_train"], result["gap_test"]) == (last.gap_train, last.gap_test)
    assert result["blocks"] == ["0", "2"]
    assert np.array(result["weights"]).shape == (6, 2, 3)
    for entry, client in zip(result["clients"], simulation.clients, strict=True):
        assert (entry["id"], entry["kind"]) == (client.id, client.kind)
        sizes = [entry[f"n_{split}"] for split in ("train", "validation", "test")]
        assert sizes == [len(client.train), 6, 6]
    accuracies = [entry["accuracy"]["merged"] for entry in result["clients"]]
    assert np.mean(accuracies) == pytest.approx(result["models"]["merged"]["accuracy"])
    whole = run("fedmerge:d=3", blocks="whole").result()
    assert whole["blocks"] == ["model"]
    assert np.array(whole["weights"]).shape == (6, 1, 3)
    assert run("fedmerge:rule=paper").result()["blocks"] == ["all layers"]
    assert run("fedavg").result()["weights"] is None


def test_personal_gives_the_models_of_the_clients_asked_for() -> None:
    simulation = run("ditto")
    rows = simulation.personal(["c03", "c00"])
    assert torch.equal(rows, simulation._memory["model"][[3, 0]])
    with pytest.raises(ConfigError, match='no client "c99" in this simulation'):
        simulation.personal(["c99"])


@pytest.mark.parametrize("method", ["fedavg", "fedmerge", "local", "ditto", "ifca"])
@pytest.mark.parametrize("lr", [1e8, 1e20, 1e37])
def test_a_run_that_diverges_ends_with_logs_and_a_checkpoint(
    method: str, lr: float, tmp_path: Path
) -> None:
    options = {"training": replace(TRAINING, lr=lr), "checkpoint": tmp_path, "rounds": 3}
    simulation = run(method, **options)
    assert len(simulate(method, **options).history) == 3
    json.dumps(simulation.result(), allow_nan=False)
    for log in simulation.history:
        json.dumps(log.to_json(), allow_nan=False)
        assert log.refused.keys() <= {"non-finite"}


# -- kinds of data and models ---------------------------------------------------------------------


def regression() -> list[Client]:
    return make_clients(5, targets=2)


def regression_net() -> nn.Module:
    return nn.Sequential(nn.Linear(N_FEATURES, 2))


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize("method", ["fedmerge", "fedavg", "ifca"])
def test_a_regression_task_is_learned(method: str, execution: str) -> None:
    training = Training(lr=0.05, epochs=2, batch_size=4)
    simulation = run(
        method, regression(), regression_net, training=training, rounds=10, execution=execution
    )
    assert simulation.training.loss == "mse"
    first, last = (simulation.history[i].metrics["merged"]["test"] for i in (0, -1))
    assert first["loss"] is not None
    assert last["loss"] is not None
    assert last["loss"].mean < 0.8 * first["loss"].mean
    assert last["accuracy"] is None
    assert simulation.result()["models"]["merged"]["accuracy"] is None


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, N_CLASSES),
    )


@pytest.mark.parametrize("method", ["fedmerge", "fedmerge:rule=paper", "fedavg", "ifca"])
def test_a_network_with_batch_norm_keeps_its_variances_positive(method: str) -> None:
    clients = [make_client(f"c{i}", 8, kind=i % 2, shape=(1, 4, 4)) for i in range(4)]
    simulation = run(method, clients, cnn, rounds=6, participation=0.8)
    layout = simulation.soup.setup.layout
    rows = simulation.personal([client.id for client in clients])
    views = layout.views(torch.cat([rows, simulation.soup.shared["models"]]))
    assert bool((views["1.running_var"] > 0).all())
    assert all(bool(part.isfinite().all()) for part in views.values())
    assert float((views["1.running_mean"].abs()).max()) > 0
    assert rows[:, layout.counters].unique().tolist() == [6 * 2 * 2]
    first, last = (simulation.history[i].metrics["merged"]["train"]["loss"] for i in (0, -1))
    assert first is not None
    assert last is not None
    assert last.mean < first.mean


def test_a_module_can_be_given_instead_of_a_function() -> None:
    module = net()()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    simulation = simulate("fedmerge:rule=paper:d=3", model=module)
    models = simulation.soup.shared["models"]
    assert torch.equal(models[0], simulation.soup.setup.layout.row(module))
    assert not (models[0] == models[1]).any()
    for _ in simulation.rounds():
        pass
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_clients_are_given_as_a_list_or_as_a_federation() -> None:
    clients = make_clients()
    federation = Federation("f", tuple(clients), "classification", N_CLASSES, (N_FEATURES,))
    assert plain(run("fedmerge", clients).history) == plain(run("fedmerge", federation).history)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounds": 0}, "rounds = 0: wanted 1 or more"),
        ({"participation": 0.0}, "participation = 0.0: wanted more than 0, at most 1"),
        ({"participation": 1.5}, "participation = 1.5"),
        ({"participation": math.nan}, "participation = nan"),
        ({"dropout": 1.0}, "dropout = 1.0: wanted 0 or more and less than 1"),
        ({"dropout": -0.1}, "dropout = -0.1"),
        ({"evaluate_every": 0}, "evaluate_every = 0: wanted 1 or more"),
        ({"execution": "fast"}, 'execution = "fast"'),
        ({"method": "fedmerge:d=7"}, "d = 7 models for 6 clients"),
        ({"clients": []}, "clients is empty: wanted 1 client or more"),
        ({"training": Training(loss="mse")}, 'loss = "mse": the data have class numbers'),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        simulate(**{"method": "fedavg", **options})
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_the_data_is_told_in_one_line() -> None:
    # Too few inputs, too few outputs, another dtype, and targets of another shape.
    for clients, model in (
        (None, lambda: nn.Sequential(nn.Linear(4, 3))),
        (None, lambda: nn.Sequential(nn.Linear(5, 1))),
        (None, net(dtype=torch.float64)),
        (regression(), lambda: nn.Sequential(nn.Linear(5, 3))),
    ):
        for execution in ("auto", "sequential"):
            with pytest.raises(ModelError, match="the model cannot be trained on inputs") as caught:
                simulate("fedavg", clients, model, execution=execution)
            assert "\n" not in str(caught.value)


def test_bad_clients_are_refused() -> None:
    clients = make_clients(3)
    with pytest.raises(DataError, match='client id "c00": given to two clients'):
        simulate("fedavg", [*clients, clients[0]])
    x = clients[1].train.x.clone()
    x[0, 0] = math.nan
    bad = replace(clients[1], train=Split(x, clients[1].train.y))
    with pytest.raises(DataError, match="1 NaN or infinite values"):
        simulate("fedavg", [clients[0], bad])


@pytest.mark.parametrize(
    "options",
    [
        {"participation": 0.5},
        {"dropout": 0.4},
        {"seed": 1},
        {"blocks": "whole"},
        {"training": replace(TRAINING, lr=0.1)},
        {"training": replace(TRAINING, epochs=1)},
    ],
    ids=str,
)
def test_every_setting_changes_the_result(options: dict[str, Any]) -> None:
    base, other = run("fedmerge"), run("fedmerge", **options)
    assert base.result()["models"] != other.result()["models"]


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_is_written_as_often_as_asked(tmp_path: Path) -> None:
    index = tmp_path / "state.json"
    never = simulate("fedavg", checkpoint=tmp_path, checkpoint_seconds=1e9)
    rounds = never.rounds()
    next(rounds)
    next(rounds)
    assert not index.exists()
    rounds.close()  # but always in the end
    assert index.exists()
    always = simulate("fedavg", checkpoint=tmp_path, checkpoint_seconds=0)
    assert len(always.history) == 2
    before = index.read_bytes()
    next(always.rounds())
    assert index.read_bytes() != before


def stopped(function: Any, *signals: signal.Signals) -> Any:
    """`function`, and then signals, or for none of them an exception as of Ctrl-C."""

    def then_stop(*args: Any) -> None:
        function(*args)
        for number in signals:
            signal.raise_signal(number)
        if not signals:
            raise KeyboardInterrupt

    return then_stop


@pytest.mark.parametrize(
    ("owner", "phase", "signals", "kept"),
    [
        (Ditto, "local", [signal.SIGINT], 2),
        # Within a commit the state is of neither round, so it is ended first, and the evaluation;
        (Soup, "commit", [signal.SIGINT], 3),
        (Soup, "commit", [signal.SIGTERM], 3),
        (Simulation, "_evaluate", [signal.SIGINT], 3),
        # or if it cannot be, what was saved before it stays, here nothing.
        (Soup, "commit", [signal.SIGINT, signal.SIGINT], 0),
        (Soup, "commit", [], 0),
    ],
)
def test_an_interruption_in_the_middle_of_a_round_leaves_a_whole_state(
    tmp_path: Path, owner: type, phase: str, signals: list[signal.Signals], kept: int
) -> None:
    simulation = simulate("ditto", rounds=5, checkpoint=tmp_path, checkpoint_seconds=1e9)
    rounds = simulation.rounds()
    next(rounds)
    next(rounds)
    handlers = [signal.signal(number, signal.default_int_handler) for number in HEARD]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, phase, stopped(getattr(owner, phase), *signals))
            with pytest.raises(KeyboardInterrupt):
                next(rounds)
        now = [signal.getsignal(number) for number in HEARD]
        assert now == [signal.default_int_handler, signal.default_int_handler]
    finally:
        for number, handler in zip(HEARD, handlers, strict=True):
            signal.signal(number, handler)
    resumed = simulate("ditto", rounds=5, checkpoint=tmp_path)
    assert len(resumed.history) == kept
    for _ in resumed.rounds():
        pass
    whole = run("ditto", rounds=5)
    assert plain(resumed.history) == plain(whole.history)
    assert torch.equal(resumed._memory["model"], whole._memory["model"])


def test_rounds_outside_the_main_thread_hear_no_signals() -> None:
    simulation = simulate("fedavg", rounds=2)
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(list, simulation.rounds()).result()) == 2


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    run("fedmerge", rounds=2, checkpoint=tmp_path)
    longer = run("fedmerge", rounds=5, checkpoint=tmp_path)
    assert plain(longer.history) == plain(run("fedmerge", rounds=5).history)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("method", {"method": "fedavg"}),
        ("method", {"method": "fedmerge:cap=0.2"}),
        ("seed", {"seed": 1}),
        ("model", {"model": net(5)}),
        ("training", {"training": replace(TRAINING, lr=0.1)}),
        ("participation", {"participation": 0.5}),
        ("dropout", {"dropout": 0.5}),
        ("evaluate_every", {"evaluate_every": 3}),
        ("clients", {"clients": [*make_clients(6)[:5], make_client("other", 8)]}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    what: str, options: dict[str, Any], tmp_path: Path
) -> None:
    run("fedmerge", rounds=2, checkpoint=tmp_path)
    with pytest.raises(StateError, match=f"is of another run: its {what} is") as caught:
        simulate(**{"method": "fedmerge", **options}, checkpoint=tmp_path)
    assert "\n" not in str(caught.value)
    assert "use another folder" in str(caught.value)
    assert len(str(caught.value)) < 250 + len(str(tmp_path))


def test_of_a_method_only_the_options_that_differ_are_named(tmp_path: Path) -> None:
    run("fedmerge", rounds=2, checkpoint=tmp_path)
    with pytest.raises(StateError, match=r"its method is cap=0\.1, wanted cap=0\.2; use another"):
        simulate(method="fedmerge:cap=0.2", checkpoint=tmp_path)


def test_a_checkpoint_cut_in_half_is_refused(tmp_path: Path) -> None:
    run("fedmerge", rounds=2, checkpoint=tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(StateError, match="is damaged") as caught:
            simulate("fedmerge", checkpoint=tmp_path)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert len(simulate("fedmerge", checkpoint=tmp_path).history) == 2


def test_saving_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="no checkpoint folder: pass checkpoint=FOLDER"):
        simulate("fedavg").save()
