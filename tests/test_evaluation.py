"""Evaluation on a sample of the clients: who is drawn, what is measured, and its standard error.

What an evaluation of all clients measures is tested in `test_simulation`.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_fixture import equal, make_clients, plain, run, simulate, soup_tensors
from fedmerge.errors import ConfigError
from fedmerge.sim import RoundLog, Simulation, Summary
from fedmerge.sim.cohort import Draws
from fedmerge.sim.evaluation import Evaluation

M = 12


def sampled(share: float = 0.34, method: str = "fedmerge", **options: Any) -> Simulation:
    return run(method, make_clients(M), evaluate_on=share, **options)


def latest(simulation: Simulation) -> Evaluation:
    found = simulation._progress.latest
    assert found is not None
    return found


def test_the_error_is_what_drawing_without_replacement_gives() -> None:
    """Its square, averaged over all samples, is the variance of their means: exactly."""
    values = np.array([0.1, 0.9, 0.4, 0.75, 0.2, 0.6])
    for n in (2, 3, 5):
        means, squares = [], []
        for chosen in combinations(range(6), n):
            known = np.full(6, np.nan)
            known[list(chosen)] = values[list(chosen)]
            summary = Summary.of(known, high_is_bad=False, sampled=True)
            assert summary is not None
            assert summary.error is not None
            means.append(summary.mean)
            squares.append(summary.error**2)
        assert np.mean(squares) == pytest.approx(np.var(means), rel=1e-12)
        assert np.mean(means) == pytest.approx(values.mean(), rel=1e-12)


def test_there_is_no_error_of_all_clients_nor_of_one() -> None:
    for values in (np.array([0.1, 0.4]), np.array([0.1, np.nan])):
        summary = Summary.of(values, high_is_bad=False, sampled=True)
        assert summary is not None
        assert summary.error is None
        assert "error" not in summary.to_json()


def test_only_the_sample_is_measured_and_as_ever() -> None:
    some, all_of_them = sampled(), run("fedmerge", make_clients(M))
    # Evaluating fewer changes nothing of the training.
    assert equal(soup_tensors(some.soup), soup_tensors(all_of_them.soup))
    chosen = some.draws.evaluated(4)
    assert len(chosen) == 4
    others = [i for i in range(M) if i not in chosen]
    for model in ("merged", "tuned"):
        for split in ("train", "validation", "test"):
            here = latest(some).found[model][split].loss
            there = latest(all_of_them).found[model][split].loss
            assert here[chosen] == pytest.approx(there[chosen], rel=1e-5)
            assert np.isnan(here[others]).all()
            summary = some.history[-1].metrics[model][split]["loss"]
            assert summary is not None
            assert summary.mean == pytest.approx(there[chosen].mean(), rel=1e-5)
            wanted = there[chosen].std(ddof=1) * np.sqrt((1 - 4 / M) / 4)
            assert summary.error == pytest.approx(wanted, rel=1e-4)
    own = latest(some).found["local"]["test"].loss
    assert not np.isnan(own).any()
    gap = (latest(all_of_them).found["merged"]["test"].loss - own)[chosen].mean()
    assert some.history[-1].gap_test == pytest.approx(gap, rel=1e-4)


def test_all_clients_give_what_they_gave() -> None:
    whole = run("fedmerge", make_clients(M))
    assert plain(sampled(1.0).history) == plain(whole.history)
    text = json.dumps([log.to_json() for log in whole.history])
    assert "error" not in text
    assert "error" not in json.dumps(whole.result())


def test_the_sample_is_drawn_anew_and_by_names_alone() -> None:
    ids = tuple(f"c{i}" for i in range(40))
    draws = Draws(ids, 3, evaluate_on=0.2)
    seen = {tuple(draws.evaluated(number)) for number in range(1, 30)}
    assert len(seen) == 29
    assert {len(one) for one in seen} == {8}
    # Over many rounds every client has its turn, as often as any other.
    counts = np.bincount([i for n in range(2000) for i in draws.evaluated(n)], minlength=40)
    assert abs(counts / 2000 - 0.2).max() < 0.04
    turned = Draws(ids[::-1], 3, evaluate_on=0.2)
    assert sorted(39 - i for i in turned.evaluated(5)) == sorted(draws.evaluated(5))
    assert Draws(ids, 4, evaluate_on=0.2).evaluated(5) != draws.evaluated(5)
    # Nobody is evaluated for having trained.
    both = Draws(ids, 3, participation=0.2, evaluate_on=0.2)
    assert both.cohort(5) != both.evaluated(5)
    assert len(Draws(ids, 0, evaluate_on=1e-6).evaluated(1)) == 2


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_outside_its_limits_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"evaluate_on = {share}: wanted more than 0, at most 1"):
        simulate("fedavg", evaluate_on=share)


def test_errors_survive_logs_checkpoints_and_workers(tmp_path: Path) -> None:
    straight = sampled(participation=0.5)
    log = straight.history[-1]
    assert RoundLog.from_json(json.loads(json.dumps(log.to_json()))) == log
    sampled(participation=0.5, rounds=2, checkpoint=tmp_path)
    resumed = sampled(participation=0.5, checkpoint=tmp_path)
    assert plain(resumed.history) == plain(straight.history)
    assert resumed.result() == straight.result()
    found = straight.result()["models"]["merged"]
    accuracy = log.metrics["merged"]["test"]["accuracy"]
    assert accuracy is not None
    assert found["accuracy_error"] == accuracy.error
    figures = [client["accuracy"]["merged"] for client in straight.result()["clients"]]
    assert sum(figure is not None for figure in figures) == 4
