"""Where clients' work is done, and why: by time where the bits are the same, by the module else.

That results do not depend on it is tested in `test_processes` and `test_conformance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from core_fixture import TRAINING, equal, make_clients, plain, simulate, soup_tensors
from fedmerge.engine import Engine
from fedmerge.network import LARGEST_STACKED
from fedmerge.params import Layout
from fedmerge.sim import RoundLog, Simulation
from fedmerge.sim.choice import WORTH, Auto
from fedmerge.sim.execute import InProcess
from fedmerge.sim.processes import Processes


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def automatic(workers: int = 2, m: int = 40, **options: Any) -> tuple[Simulation, Auto]:
    made = simulate("fedmerge", make_clients(m), workers=workers, **options)
    assert isinstance(made._executor, Auto)
    return made, made._executor


def told(number: int, seconds: float, *, evaluated: bool = True) -> RoundLog:
    """A log that says how long local training and evaluation took together."""
    return RoundLog(
        round=number,
        cohort=1,
        dropped=0,
        refused={},
        metrics={"merged": {}} if evaluated else {},
        gap_train=None,
        gap_test=None,
        rows=None,
        bytes_up=0,
        bytes_down=0,
        seconds={"send": 99.0, "local": 0.75 * seconds, "evaluate": 0.25 * seconds},
    )


@pytest.mark.parametrize(("there", "chosen"), [(0.6, Processes), (1.1, InProcess)])
def test_the_faster_of_two_timed_rounds_is_chosen(there: float, chosen: type) -> None:
    _, auto = automatic()
    assert isinstance(auto._now, InProcess)
    auto.after(told(1, 0.1), 99)  # warms up: not counted
    auto.after(told(2, 1.0), 98)
    assert isinstance(auto._now, Processes)
    auto.after(told(3, 9.0), 97)  # starts the workers: not counted
    auto.after(told(4, there), 96)
    assert isinstance(auto._now, chosen)
    assert f"a round took 1 s here and {there} s in 2 workers" in auto.why
    assert ("in 2 worker processes" in auto.why) == (chosen is Processes)
    auto.after(told(5, 100.0), 95)  # it stays so
    assert isinstance(auto._now, chosen)


@pytest.mark.parametrize(("left", "tried"), [(9, False), (11, True)])
def test_workers_are_tried_only_if_there_is_enough_to_do(left: int, tried: bool) -> None:
    _, auto = automatic()
    auto.after(told(1, WORTH / 10), left + 1)
    auto.after(told(2, WORTH / 10), left)
    assert isinstance(auto._now, Processes) == tried
    assert ("the rest takes about 18 s" in auto.why) == (not tried)


def test_like_is_held_against_like() -> None:
    _, auto = automatic()
    auto.after(told(1, 9.0, evaluated=False), 99)
    auto.after(told(2, 5.0, evaluated=True), 98)
    assert isinstance(auto._now, Processes)
    auto.after(told(3, 9.0, evaluated=True), 97)  # starts them
    auto.after(told(4, 1.0, evaluated=False), 96)  # less to do than in round 2
    assert not auto._decided
    auto.after(told(5, 2.0, evaluated=True), 95)
    assert "5 s here and 2 s in" in auto.why


def test_where_there_is_nothing_to_choose() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, auto = automatic()
    finally:
        torch.set_num_threads(before)
    assert auto.why == "in this process, as it has 2 threads"
    auto.after(told(1, 9.0), 99)
    auto.after(told(2, 9.0), 98)
    assert isinstance(auto._now, InProcess)
    assert "the clients make one stack" in automatic(m=6)[1].why
    assert "one worker" in automatic(workers=1)[1].why
    assert isinstance(simulate("fedavg", make_clients(40))._executor, InProcess)


def test_moving_to_workers_and_back_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.sim.choice.WORTH", 0.0)
    made, auto = automatic(rounds=6, m=34)
    where = []
    for _ in made.rounds():
        where.append(isinstance(auto._now, Processes))
    assert where[:3] == [False, True, True]  # as it stands after each round
    assert not auto._apart._desks  # nobody is left behind
    straight = simulate("fedmerge", make_clients(34), rounds=6)
    list(straight.rounds())
    assert equal(soup_tensors(made.soup), soup_tensors(straight.soup))
    assert plain(made.history) == plain(straight.history)
    assert "in stacks" in made.chosen
    assert "workers" in made.chosen


def local() -> nn.Module:
    class Local(nn.Linear):
        """No other process can import it."""

    return Local(5, 3)


def test_a_run_goes_on_here_where_workers_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.sim.choice.WORTH", 0.0)
    made, auto = automatic(rounds=4, m=34, model=local)
    list(made.rounds())
    assert len(made.history) == 4
    assert isinstance(auto._now, InProcess)
    assert "in this process, as workers cannot be had" in made.chosen
    assert "model (Local) cannot be sent" in made.chosen


def big() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 1100), nn.ReLU(), nn.Linear(1100, 950), nn.Linear(950, 3))


@pytest.mark.parametrize(
    ("make", "execution", "stacked", "reason"),
    [
        (lambda: nn.Linear(5, 3), "auto", True, ""),
        (lambda: nn.Linear(5, 3), "sequential", False, ""),
        (big, "auto", False, "1,055,403 numbers a model, stacks are no faster"),
        (big, "stacked", True, ""),
        (lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten()), "auto", False, "(Conv1d) cannot"),
    ],
)
def test_the_module_says_whether_it_is_stacked(
    make: Callable[[], nn.Module], execution: str, stacked: bool, reason: str
) -> None:
    module = make()
    engine = Engine(module, Layout.of(module), TRAINING, execution)
    assert (engine.net is not None) == stacked
    assert reason in engine.reason
    assert bool(engine.reason) == bool(reason)


def test_the_limit_is_a_number_of_parameters() -> None:
    def engine(hidden: int) -> Engine:
        with torch.device("meta"):
            module = nn.Linear(1, hidden, bias=False)
        module = module.to_empty(device="cpu")
        return Engine(module, Layout.of(module), TRAINING)

    assert engine(LARGEST_STACKED).net is not None
    assert engine(LARGEST_STACKED + 1).net is None


@pytest.mark.parametrize(
    ("workers", "words"), [(1, "in one worker process."), (2, "in 2 worker processes.")]
)
def test_one_worker_is_not_called_several(workers: int, words: str) -> None:
    clients = make_clients(40)
    assert simulate("fedavg", clients, execution="processes", workers=workers).chosen.endswith(
        words
    )
