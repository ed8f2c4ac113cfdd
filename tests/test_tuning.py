"""Equal tuning: what is tried, by what it is judged, what is chosen, and that it stands.

Most runs here are pretended: a function writes what a run would have written. The last tests are
whole commands.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedmerge.algorithms import make_method
from fedmerge.cli import app
from fedmerge.compare.cells import Cell, chosen_text, chosen_values, make_cells
from fedmerge.compare.folder import append_log, write_config, write_result
from fedmerge.compare.grids import Point, grid_points
from fedmerge.compare.race import contenders, score
from fedmerge.compare.runner import Outcome
from fedmerge.compare.tuning import Group, Tuning, make_groups
from fedmerge.comparison import run_cell
from fedmerge.errors import ConfigError, StateError

SOURCE = Path(__file__).parents[1] / "src"
POINTS: tuple[Point, ...] = ({}, {"lr": 0.1}, {"lam": 2.0})


# -- what is tried ---------------------------------------------------------------------------------


def test_the_first_points_of_the_grid_behind_the_defaults() -> None:
    grid = list(make_method("fedavg").grid)
    assert len(grid) == 4
    assert grid_points("fedavg", 2, 8) == ({}, *grid[:2])
    assert grid_points("fedavg", 9, 8) == ({}, *grid)


def test_rates_are_tried_in_proportion_to_the_usual_one() -> None:
    assert grid_points("fedavg", 3, 8, {"lr": 0.3}) == ({}, {"lr": 1.0}, {"lr": 0.1}, {"lr": 0.5})
    assert grid_points("fedavg", 3, 8, {"lr": 0.01}) == (
        {},
        {"lr": 0.0333},
        {"lr": 0.00333},
        {"lr": 0.0167},
    )


def test_no_trial_is_spent_on_what_another_has_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ({"lr": 0.3}, {"finetune": 20}, {"finetune": 20, "lr": 0.3}, {"epochs": 2}, {"lr": 0.6})
    monkeypatch.setattr(type(make_method("fedavg-ft")), "grid", grid)
    tried = grid_points("fedavg-ft", 3, 8, {"lr": 0.1, "epochs": 2})
    assert tried == ({}, {"finetune": 20}, {"lr": 0.2})
    assert grid_points("fedavg-ft", 8, 8) == ({}, *grid)


@pytest.mark.parametrize(("n", "fits"), [(8, True), (9, False)])
def test_no_method_may_try_more_points_than_eight(
    monkeypatch: pytest.MonkeyPatch, n: int, fits: bool
) -> None:
    grid = tuple({"lr": 0.01 * (i + 1)} for i in range(n))
    monkeypatch.setattr(type(make_method("fedavg")), "grid", grid)
    if fits:
        assert grid_points("fedavg", 8, 8) == ({}, *grid)
    else:
        with pytest.raises(ConfigError, match='"fedavg": its grid has 9 points, wanted at most 8'):
            grid_points("fedavg", 2, 8)
    result = call(*TUNED, "--trials", "9", "--out", "nowhere")
    assert result.exit_code == 2
    assert "'--trials': 9 is not in the range 0<=x<=8" in result.stderr


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_every_method_gets_the_same_number_of_trials(trials: int) -> None:
    from fedmerge.algorithms import METHODS

    for method in METHODS:
        assert len(grid_points(method, trials, 32)) == 1 + trials, method


def test_points_that_the_user_or_the_clients_rule_out_are_left_out() -> None:
    own = [point for point in make_method("ditto").grid if "lam" in point]
    assert own
    tried = grid_points("ditto:lam=0.3", 8, 8)
    assert tried == ({}, *(p for p in make_method("ditto").grid if "lam" not in p))
    # IFCA may have no more models than there are clients.
    counts = [point["d"] for point in grid_points("ifca", 8, 32) if "d" in point]
    assert max(counts) > 3
    assert all(int(str(p["d"])) <= 3 for p in grid_points("ifca", 8, 3) if "d" in p)


def test_what_was_chosen_is_text_and_back() -> None:
    values = {"lam": 0.5, "d": 8, "warm": True, "kind": "a"}
    assert chosen_text(values) == "lam=0.5:d=8:warm=True:kind=a"
    assert chosen_values(chosen_text(values)) == values
    assert chosen_text({}) is None
    assert chosen_values(None) == {}
    for text in ("lr", "lr=", "=1", "lr=1:lr=2", "lr=1::d=2"):
        with pytest.raises(ConfigError, match="wanted key=value:key=value"):
            chosen_values(text)


def groups_of(
    points: tuple[Point, ...] = POINTS, seeds: tuple[int, ...] = (1000,), n: int = 1
) -> tuple[Group, ...]:
    def configure(data: str, setting: str, method: str, seed: int) -> dict[str, Any]:
        own = {"data": data, "setting": setting, "method": method, "seed": seed}
        return {**own, "chosen": None, "lr": 0.3, "rounds": 60, "evaluate_every": 5}

    methods = ["ditto", "fedavg"][:n]
    cells = make_cells(configure, [("digits", "domain")], methods, [0, 1])
    return make_groups(cells, lambda *_: points, seeds)


def test_trials_are_cells_of_a_folder_of_their_own(tmp_path: Path) -> None:
    (group,) = groups_of(seeds=(1000, 1001))
    assert group.name == "digits--domain--ditto"
    found = [
        (trial.name, trial.root, trial.config["seed"], trial.config["chosen"])
        for trials in group.trials
        for trial in trials
    ]
    assert found == [
        (f"digits--domain--ditto--{point}--s{seed}", "tuning", seed, chosen)
        for point, chosen in (("defaults", None), ("lr=0.1", "lr=0.1"), ("lam=2.0", "lam=2.0"))
        for seed in (1000, 1001)
    ]
    assert group.trials[0][0].folder(tmp_path) == tmp_path / "tuning" / found[0][0]
    # A trial is judged by its last round, and evaluated in no other.
    assert {t.config["evaluate_every"] for trials in group.trials for t in trials} == {60}
    assert {cell.config["evaluate_every"] for cell in group.cells} == {5}


def test_without_tuning_there_are_cells_only(tmp_path: Path) -> None:
    groups = groups_of(seeds=(), n=2)
    assert [cell.name for cell in Tuning(groups, tmp_path).ready()] == [
        f"digits--domain--{method}--s{seed}" for method in ("ditto", "fedavg") for seed in (0, 1)
    ]


# -- by what it is judged --------------------------------------------------------------------------


def logged(
    accuracy: float | None, loss: float | None, test: float = 0.5, worst: float | None = None
) -> dict[str, dict[str, Any]]:
    """One evaluated round: figures of the validation split, and the accuracy on the test split.

    The worst tenth of clients is as good as the rest, but for `worst` on validation data.
    """

    def split(accuracy: float | None, loss: float | None, worst: float | None) -> dict[str, Any]:
        return {
            key: None
            if value is None
            else {"mean": value, "std": 0.0, "worst_decile": value if worst is None else worst}
            for key, value in (("accuracy", accuracy), ("loss", loss))
        }

    validation, tested = split(accuracy, loss, worst), split(test, 0.1, None)
    return {"merged": {"validation": validation, "test": tested}}


def write_run(cell: Cell, out: Path, *rounds: Mapping[str, Any]) -> None:
    folder = cell.folder(out)
    write_config(folder, cell.config)
    for number, metrics in enumerate(rounds, start=1):
        append_log(folder, {"round": number, "metrics": metrics})
    write_result(folder, {"rounds": len(rounds)})


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([logged(0.5, 1.0), logged(0.7, 0.5), logged(0.9, 0.6), {}], 0.9),
        ([logged(0.8, 0.5), logged(0.4, 0.5)], 0.4),
        ([logged(0.75, 0.5, worst=0.25)], 0.5),  # half of it is of the worst tenth
        ([logged(None, 2.0), logged(None, 2.5, worst=9.0)], -2.5),  # regression
        ([logged(0.9, 0.5), logged(0.9, None)], None),  # diverged at the end
        ([logged(0.9, None), logged(0.6, 1.5)], 0.6),
    ],
)
def test_the_score_is_of_the_last_evaluated_round(
    tmp_path: Path, rounds: list[dict[str, Any]], expected: float | None
) -> None:
    (group,) = groups_of()
    write_run(group.cells[0], tmp_path, *rounds)
    assert score(group.cells[0].folder(tmp_path)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]\n",
        '{"metrics": {}}\n',
        '{"metrics": {"merged": {"validation": {}}}}\n',
        '{"me',
        None,
    ],
)
def test_a_log_that_is_damaged_is_no_model_that_diverged(tmp_path: Path, text: str | None) -> None:
    (group,) = groups_of()
    folder = group.cells[0].folder(tmp_path)
    write_run(group.cells[0], tmp_path, logged(0.5, 1.0))
    (folder / "log.jsonl").unlink()
    if text is not None:
        (folder / "log.jsonl").write_text(text)
    with pytest.raises(StateError, match=r"log\.jsonl: .*; remove .* to run that trial again"):
        score(folder)


def play(
    plan: Tuning, out: Path, rounds: Callable[[Cell], list[dict[str, Any]] | str], most: int = 99
) -> list[Cell]:
    """Do what is to be done, one after the other; a text in place of rounds is an error."""
    todo, done = list(plan.ready()), []
    while todo and len(done) < most:
        cell = todo.pop(0)
        made = rounds(cell)
        if not isinstance(made, str):
            write_run(cell, out, *made)
        done.append(cell)
        todo += plan.after(Outcome(cell, made if isinstance(made, str) else None))
    return done


def by_point(
    figures: Mapping[str | None, list[dict[str, Any]] | str],
) -> Callable[[Cell], list[dict[str, Any]] | str]:
    return lambda cell: figures[cell.config["chosen"]]


def chosen(plan: Tuning) -> list[str | None]:
    return [cell.config["chosen"] for cell in plan.cells()]


def test_validation_decides_whatever_the_test_split_says(tmp_path: Path) -> None:
    plan = Tuning(groups_of(), tmp_path)
    figures = {
        None: [logged(0.6, 1.0, test=0.99)],
        "lr=0.1": [logged(0.8, 1.0, test=0.01)],
        "lam=2.0": [logged(0.7, 1.0, test=0.98)],
    }
    done = play(plan, tmp_path, by_point(figures))
    assert chosen(plan) == ["lr=0.1", "lr=0.1"]
    # All trials first, then the cells with what was chosen; no seed is in both.
    assert [cell.config["seed"] for cell in done] == [1000, 1000, 1000, 0, 1]
    assert [cell.config["chosen"] for cell in done[3:]] == ["lr=0.1", "lr=0.1"]
    made = json.loads((tmp_path / "tuning" / "digits--domain--ditto.json").read_text())
    assert made == {
        "points": [{}, {"lr": 0.1}, {"lam": 2.0}],
        "scores": [0.6, 0.8, 0.7],
        "seeds": [1, 1, 1],
        "chosen": {"lr": 0.1},
        "failed": {},
    }


def test_of_equals_the_earlier_point_stays(tmp_path: Path) -> None:
    plan = Tuning(groups_of(), tmp_path)
    play(plan, tmp_path, lambda cell: [logged(0.7, 1.0)])
    assert chosen(plan) == [None, None]
    other = tmp_path / "other"
    plan = Tuning(groups_of(), other)
    play(plan, other, lambda cell: [logged(0.8 if cell.config["chosen"] else 0.7, 1.0)])
    assert chosen(plan) == ["lr=0.1", "lr=0.1"]


def test_the_mean_over_tuning_seeds_decides(tmp_path: Path) -> None:
    figures = {(None, 1000): 0.7, (None, 1001): 0.7, ("lr=0.1", 1000): 0.77, ("lr=0.1", 1001): 0.6}
    plan = Tuning(groups_of(({}, {"lr": 0.1}), (1000, 1001)), tmp_path)
    play(
        plan,
        tmp_path,
        lambda c: [logged(figures.get((c.config["chosen"], c.config["seed"]), 0.5), 1.0)],
    )
    assert chosen(plan) == [None, None]
    scores = plan.choices()["digits--domain--ditto"].scores
    assert scores == (0.7, pytest.approx(0.685))


def raced(
    tmp_path: Path, figures: Mapping[str | None, Callable[[int], float]], n: int = 12
) -> tuple[Tuning, list[tuple[str | None, int]], dict[str, Any]]:
    """Tune with `n` seeds, 0 the first; figures by point and seed. What was tried is returned."""
    plan = Tuning(groups_of(seeds=tuple(range(1000, 1000 + n))), tmp_path)

    def rounds(cell: Cell) -> list[dict[str, Any]]:
        if cell.root != "tuning":
            return [logged(0.5, 1.0)]
        return [logged(figures[cell.config["chosen"]](cell.config["seed"] - 1000), 1.0)]

    done = play(plan, tmp_path, rounds, most=999)
    tried = [(c.config["chosen"], c.config["seed"] - 1000) for c in done if c.root == "tuning"]
    made = json.loads((tmp_path / "tuning" / "digits--domain--ditto.json").read_text())
    return plan, tried, made


def test_a_race_ends_when_all_others_are_beaten(tmp_path: Path) -> None:
    # 3 x 12 trials and 2 cells at most, as long as nothing has run.
    before = Tuning(groups_of(seeds=tuple(range(1000, 1012))), tmp_path)
    assert (before.total, len(before.unfinished()), len(before.ready())) == (38, 38, 3)
    plan, tried, made = raced(
        tmp_path,
        {
            None: lambda seed: 0.6 + 0.01 * seed,
            "lr=0.1": lambda seed: 0.8 + 0.01 * seed,  # ahead by the same with every seed
            "lam=2.0": lambda seed: 0.75 + 0.1 * (seed in (1, 2)) - 0.01 * seed,
        },
    )
    # The first is far behind with one seed; the third is open until there are four.
    assert tried[:3] == [(p, 0) for p in (None, "lr=0.1", "lam=2.0")]
    assert tried[3:] == [(p, s) for s in range(1, 4) for p in ("lr=0.1", "lam=2.0")]
    assert (made["seeds"], made["chosen"]) == ([1, 4, 4], {"lr": 0.1})
    # 27 trials were not needed.
    assert plan.total == 11


def test_points_that_are_open_get_more_seeds_and_those_decide(tmp_path: Path) -> None:
    late = [0.0, 0.02, -0.02, 0.02, -0.02, 0.02, -0.12, 0.0, 0.0, 0.0, 0.0, 0.0]
    plan, tried, made = raced(
        tmp_path,
        {
            None: lambda seed: 0.7,
            "lr=0.1": lambda seed: 0.7 + late[seed],  # ahead after six seeds, not beyond chance
            "lam=2.0": lambda seed: 0.3,
        },
    )
    # The third is out after one seed, the second after seven, and all seeds of a point count.
    assert made["seeds"] == [7, 7, 1]
    assert made["scores"][1] == pytest.approx(0.7 - 0.1 / 7)
    assert chosen(plan) == [None, None]
    assert [seed for point, seed in tried if point == "lam=2.0"] == [0]
    again = Tuning(groups_of(seeds=tuple(range(1000, 1012))), tmp_path)
    assert (again.ready(), again.total, again.done) == ((), 17, 17)


def test_a_race_of_equals_takes_all_seeds_and_the_earlier_point(tmp_path: Path) -> None:
    plan, tried, made = raced(
        tmp_path,
        {
            None: lambda seed: 0.7 + 0.02 * (seed % 2),
            "lr=0.1": lambda seed: 0.72 - 0.02 * (seed % 2),
            "lam=2.0": lambda seed: 0.7 + 0.02 * (seed % 2),
        },
        n=6,
    )
    assert made["seeds"] == [6, 6, 6]
    assert len(tried) == 18
    assert chosen(plan) == [None, None]


def test_a_point_that_is_out_is_not_chosen_for_its_few_seeds(tmp_path: Path) -> None:
    _, _, made = raced(
        tmp_path,
        {
            # Good in the first four seeds, bad later; the third is behind in the first two.
            None: lambda seed: 0.9 if seed < 4 else 0.2,
            "lr=0.1": lambda seed: (0.91, 0.86, 0.92, 0.88)[seed] if seed < 4 else 0.3,
            "lam=2.0": lambda seed: 0.84 + 0.005 * seed,
        },
    )
    assert made["seeds"] == [5, 5, 2]
    assert made["scores"] == pytest.approx([0.76, 0.774, 0.8425])
    assert made["chosen"] == {"lr": 0.1}


def test_who_is_still_in_a_race() -> None:
    # t of the second against the first: mean .05, error .0289 / 2 = .0144, so 3.5 of .584.
    first, second = [0.9, 0.8, 0.7, 0.6], [0.85 - 0.03, 0.75 + 0.02, 0.65 - 0.02, 0.55 + 0.03]
    assert contenders({0: first, 1: second}) == (0,)
    noisy = [0.99, 0.65, 0.8, 0.4]  # mean .04 behind, error .0786: t = .509
    assert contenders({0: first, 1: noisy}) == (0, 1)
    assert contenders({0: noisy, 2: first, 5: [0.9, None, 0.9, 0.9]}) == (0, 2)
    assert contenders({0: [0.5] * 4, 1: [0.6] * 4, 2: [0.6] * 4}) == (1, 2)
    # Of two or three seeds that agree only a wide margin counts: .727 and .617 times the error of
    # differences that have a standard deviation of .04. Of one seed it is twice that.
    assert contenders({0: [0.53], 1: [0.6]}) == (0, 1)
    assert contenders({0: [0.51], 1: [0.6]}) == (1,)
    assert contenders({0: [0.58, 0.58], 1: [0.6, 0.6]}) == (0, 1)
    assert contenders({0: [0.578, 0.578], 1: [0.6, 0.6]}) == (1,)
    assert contenders({0: [0.587] * 3, 1: [0.6] * 3}) == (0, 1)
    assert contenders({0: [0.585] * 3, 1: [0.6] * 3}) == (1,)
    assert contenders({0: [0.5, 0.62, 0.62], 1: [0.6] * 3}) == (0, 1)  # theirs, if it is wider
    # Minus a loss that is not of the size of an accuracy: in proportion.
    assert contenders({0: [-105.0], 1: [-100.0]}) == (0, 1)
    assert contenders({0: [-109.0], 1: [-100.0]}) == (1,)
    assert contenders({0: [-104.0] * 3, 1: [-100.0] * 3}) == (1,)
    assert contenders({0: [-101.0] * 3, 1: [-100.0] * 3}) == (0, 1)
    assert contenders({0: [None, 0.5], 1: [None]}) == ()


@pytest.mark.parametrize("most", range(0, 20, 3))
def test_a_race_that_was_stopped_goes_on_where_it_was(tmp_path: Path, most: int) -> None:
    def rounds(cell: Cell) -> list[dict[str, Any]]:
        seed = cell.config["seed"]
        accuracy = {None: 0.7, "lr=0.1": 0.7 + 0.02 * (-1) ** seed, "lam=2.0": 0.1}
        return [logged(accuracy[cell.config["chosen"]], 1.0)]

    def plan() -> Tuning:
        return Tuning(groups_of(seeds=tuple(range(1000, 1008))), tmp_path)

    first = play(plan(), tmp_path, rounds, most)
    again = plan()
    assert again.done == most
    assert again.total - again.done == len(again.unfinished())
    rest = play(again, tmp_path, rounds)
    assert len({cell.name for cell in (*first, *rest)}) == len(first) + len(rest) == 19
    assert again.total == 19


def test_a_failure_late_in_a_race_ends_it_with_the_defaults(tmp_path: Path) -> None:
    def rounds(cell: Cell) -> list[dict[str, Any]] | str:
        if cell.config["chosen"] == "lr=0.1" and cell.config["seed"] == 1005:
            return "no memory"
        return [logged(0.7 + 0.01 * (cell.config["chosen"] == "lam=2.0"), 1.0)]

    plan = Tuning(groups_of(({}, {"lr": 0.1}), tuple(range(1000, 1012))), tmp_path)
    done = play(plan, tmp_path, rounds, most=999)
    assert sorted({cell.config["seed"] for cell in done if cell.root == "tuning"})[-1] == 1005
    assert chosen(plan) == [None, None]
    failed = plan.failures()["digits--domain--ditto"].failed
    assert failed == {"digits--domain--ditto--lr=0.1--s1005": "no memory"}
    # 12 trials and 2 cells were begun; no later seed is waited for.
    assert (len(done), plan.total) == (14, 14)
    again = Tuning(groups_of(({}, {"lr": 0.1}), tuple(range(1000, 1012))), tmp_path)
    assert (again.ready(), again.total, again.done) == ((), 13, 13)


def test_a_point_that_diverged_loses(tmp_path: Path) -> None:
    figures = {
        None: [logged(0.9, 1.0), logged(0.9, None)],
        "lr=0.1": [logged(0.2, 1.0)],
        "lam=2.0": [logged(0.9, None)],
    }
    plan = Tuning(groups_of(), tmp_path)
    play(plan, tmp_path, by_point(figures))
    assert chosen(plan) == ["lr=0.1", "lr=0.1"]
    assert not plan.failures()
    everything = tmp_path / "all"
    plan = Tuning(groups_of(), everything)
    play(plan, everything, lambda cell: [logged(0.9, None)])
    assert chosen(plan) == [None, None]


def test_a_trial_that_fails_leaves_the_defaults_and_is_told(tmp_path: Path) -> None:
    figures = {None: [logged(0.5, 1.0)], "lr=0.1": [logged(0.9, 1.0)], "lam=2.0": "no memory"}
    plan = Tuning(groups_of(), tmp_path)
    done = play(plan, tmp_path, by_point(figures))
    assert chosen(plan) == [None, None]
    assert len(done) == 5
    failed = {"digits--domain--ditto--lam=2.0--s1000": "no memory"}
    assert plan.failures()["digits--domain--ditto"].failed == failed
    # What was run with the defaults stays, and stays told.
    again = Tuning(groups_of(), tmp_path)
    assert again.ready() == ()
    assert again.failures()["digits--domain--ditto"].failed == failed


def test_before_a_cell_has_begun_failed_trials_are_run_again(tmp_path: Path) -> None:
    figures: dict[str | None, Any] = {None: "lost", "lr=0.1": [logged(0.9, 1.0)], "lam=2.0": "lost"}
    play(Tuning(groups_of(), tmp_path), tmp_path, by_point(figures), most=3)
    again = Tuning(groups_of(), tmp_path)
    assert [cell.config["chosen"] for cell in again.ready()] == [None, "lam=2.0"]
    play(again, tmp_path, lambda cell: [logged(0.5, 1.0)])
    assert chosen(again) == ["lr=0.1", "lr=0.1"]


def test_cells_that_only_began_do_not_keep_the_defaults(tmp_path: Path) -> None:
    """As on a disk that is full for a while: trials fail, and the cells after them, too."""

    def full(cell: Cell) -> str:
        write_config(cell.folder(tmp_path), cell.config)
        append_log(cell.folder(tmp_path), {"round": 1, "metrics": {}})
        return "No space left on device"

    plan = Tuning(groups_of(), tmp_path)
    play(plan, tmp_path, full)
    assert plan.failures()
    assert not plan.finished("digits--domain--ditto")
    again = Tuning(groups_of(), tmp_path)
    assert [cell.root for cell in again.ready()] == ["tuning"] * 3
    figures = {None: 0.5, "lr=0.1": 0.9, "lam=2.0": 0.5}
    play(again, tmp_path, lambda cell: [logged(figures[cell.config["chosen"]], 1.0)])
    assert (chosen(again), again.failures()) == (["lr=0.1", "lr=0.1"], {})
    assert again.finished("digits--domain--ditto")
    for cell in again.cells():
        folder = cell.folder(tmp_path)
        assert json.loads((folder / "config.json").read_text())["chosen"] == "lr=0.1"
        assert len((folder / "log.jsonl").read_text().splitlines()) == 1  # what had begun is gone


# -- that it stands --------------------------------------------------------------------------------


@pytest.mark.parametrize("most", range(6))
def test_started_again_nothing_is_run_twice_or_chosen_anew(tmp_path: Path, most: int) -> None:
    def rounds(cell: Cell) -> list[dict[str, Any]]:
        return [logged(0.9 if cell.config["chosen"] == "lam=2.0" else 0.5, 1.0)]

    plan = Tuning(groups_of(n=2), tmp_path)
    assert (plan.total, plan.done) == (10, 0)
    first = play(plan, tmp_path, rounds, most)
    again = Tuning(groups_of(n=2), tmp_path)
    assert (again.total, again.done) == (10, most)
    assert len(again.unfinished()) == 10 - most
    rest = play(again, tmp_path, rounds)
    assert len({cell.name for cell in (*first, *rest)}) == len(first) + len(rest) == 10
    assert chosen(again) == ["lam=2.0"] * 4
    assert Tuning(groups_of(n=2), tmp_path).ready() == ()


def test_a_choice_among_other_points_is_refused(tmp_path: Path) -> None:
    play(Tuning(groups_of(), tmp_path), tmp_path, lambda cell: [logged(0.5, 1.0)])
    with pytest.raises(StateError, match=r"is a choice among .*; choose another --out"):
        Tuning(groups_of(({}, {"lr": 0.2})), tmp_path)
    path = tmp_path / "tuning" / "digits--domain--ditto.json"
    made = json.loads(path.read_text())
    for damaged in ({"points": 3}, {**made, "seeds": ["a", None]}, {**made, "scores": "x"}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(StateError, match=r"is damaged .*; remove it to tune again"):
            Tuning(groups_of(), tmp_path)


# -- the command -----------------------------------------------------------------------------------

TUNED = ("compare", "--data", "gaussian", "--settings", "concept", "--methods", "fedavg,ditto")
TUNED += ("--seeds", "0-1", "--trials", "2", "--tuning-seeds", "1000")
TUNED += ("--clients", "4", "--epochs", "1", "--hidden", "4")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def rows_without_times(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_killed_comparison_ends_with_the_same_results(tmp_path: Path) -> None:
    arguments = (*TUNED, "--rounds", "20")
    process = subprocess.Popen(
        [sys.executable, "-m", "fedmerge", *arguments, "--workers", "1", "--out", tmp_path / "a"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    end = time.monotonic() + 90
    while len(list((tmp_path / "a").glob("tuning/*/result.json"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "a" / "results.jsonl").exists()
    resumed = call(*arguments, "--workers", "2", "--out", tmp_path / "a")
    assert (resumed.exit_code, resumed.stderr) == (0, "")
    assert "Tuning tried 2 points beside the defaults" in resumed.stdout
    straight = call(*arguments, "--workers", "1", "--out", tmp_path / "b")
    assert straight.exit_code == 0
    assert rows_without_times(tmp_path / "a") == rows_without_times(tmp_path / "b")

    # The runs are what was asked for, and only those: no reported seed in tuning, or the other way.
    for root, seeds, n in (("tuning", {1000}, 3), ("runs", {0, 1}, 2)):
        configs = [json.loads(p.read_text()) for p in (tmp_path / "a" / root).glob("*/config.json")]
        assert {config["seed"] for config in configs} == seeds
        for method in ("fedavg", "ditto"):
            assert sum(config["method"] == method for config in configs) == n
    # Each row has what was chosen for it, and was run with that.
    for row in rows_without_times(tmp_path / "a"):
        group = f"{row['data']}--{row['setting']}--{row['method']}"
        made = json.loads((tmp_path / "a" / "tuning" / f"{group}.json").read_text())
        assert row["chosen"] == made["chosen"]
        numbers = [-math.inf if value is None else value for value in made["scores"]]
        assert made["chosen"] == made["points"][numbers.index(max(numbers))]
        config = tmp_path / "a" / "runs" / f"{group}--s{row['seed']}" / "config.json"
        assert chosen_values(json.loads(config.read_text())["chosen"]) == row["chosen"]


def trial_killed(config: dict[str, Any], folder: Path) -> None:
    if config["method"] == "ditto" and config["chosen"] is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    run_cell(config, folder)


def test_failed_trials_are_told_and_all_cells_are_there(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmerge.comparison.run_cell", trial_killed)
        result = call(*TUNED, "--rounds", "2", "--workers", "1", "--out", tmp_path)
    assert result.exit_code == 1
    errors = result.stderr.splitlines()
    assert len(errors) == 3
    assert all(line.endswith("its process was killed by signal 9") for line in errors[:2])
    assert "gaussian--concept--ditto was not tuned, as 2 of its trials failed" in errors[2]
    rows = rows_without_times(tmp_path)
    assert {(row["method"], row["seed"]) for row in rows} == {
        (method, seed) for method in ("fedavg", "ditto") for seed in (0, 1)
    }
    assert all(row["chosen"] == {} for row in rows if row["method"] == "ditto")
    # It stays said: by the next command, in its exit code, and on the page.
    again = call(*TUNED, "--rounds", "2", "--workers", "1", "--out", tmp_path)
    assert (again.exit_code, again.stderr.splitlines()) == (1, errors[2:])
    assert "on 1 seed not reported" in again.stdout
    assert " of 1 groups (method, data and setting)" in again.stdout
    page = (tmp_path / "report.html").read_text()
    assert "run with the method&#39;s defaults: ditto in concept." in page
    # And what it says to do helps.
    assert f"remove {tmp_path}/tuning/gaussian--concept--ditto.json and" in errors[2]
    (tmp_path / "tuning" / "gaussian--concept--ditto.json").unlink()
    for folder in tmp_path.glob("runs/gaussian--concept--ditto--s*"):
        shutil.rmtree(folder)
    result = call(*TUNED, "--rounds", "2", "--workers", "1", "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Not tuned" not in (tmp_path / "report.html").read_text()


def test_more_trials_than_the_grid_has_are_all_of_it_and_said(tmp_path: Path) -> None:
    arguments = ("--settings", "concept", "--methods", "fedavg", "--seeds", "0", "--trials", "7")
    sizes = ("--clients", "4", "--rounds", "1", "--epochs", "1", "--hidden", "4", "--workers", "1")
    sizes += ("--lr", "0.03", "--tuning-seeds", "1000")
    result = call("compare", *arguments, *sizes, "--data", "gaussian", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "--trials 7 is more than some grids have; all was tried of: fedavg 4." in result.stdout
    assert len(list(tmp_path.glob("tuning/*/result.json"))) == 5
    tried = {
        json.loads(file.read_text())["chosen"] for file in tmp_path.glob("tuning/*/config.json")
    }
    assert tried == {None, "lr=0.1", "lr=0.05", "lr=0.01", "lr=0.003"}  # about its own of .03


def test_another_way_of_tuning_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    arguments = (
        "--settings",
        "concept",
        "--methods",
        "fedavg",
        "--seeds",
        "0",
        "--data",
        "gaussian",
    )
    sizes = ("--clients", "4", "--rounds", "1", "--epochs", "1", "--hidden", "4", "--workers", "1")
    assert call("compare", *arguments, *sizes, "--out", tmp_path).exit_code == 0
    result = call("compare", *arguments, *sizes, "--trials", "1", "--out", tmp_path)
    assert result.exit_code == 2
    assert "trials is 0 there and 1 here; choose another --out" in result.stderr
    assert result.stderr.count("\n") == 1
    (tmp_path / "comparison.json").write_text('{"format": 99}')
    result = call("compare", *arguments, *sizes, "--out", tmp_path)
    assert result.exit_code == 2
    assert "format 99" in result.stderr
    (tmp_path / "comparison.json").unlink()
    result = call("compare", *arguments, *sizes, "--out", tmp_path)
    assert result.exit_code == 2
    assert "older version" in result.stderr
