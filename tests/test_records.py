"""What a run records beside its last round, and the tables that are collected from runs.

The loop itself is tested in `test_simulation`, trackers in `test_trackers`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pyarrow import parquet
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from core_fixture import N_FEATURES, TRAINING, make_client, make_clients, net, plain, run, simulate
from fedmerge.algorithms import FedAvg, Local, Setup, Tensors
from fedmerge.algorithms.trainer import Trainer
from fedmerge.compare import folder as files
from fedmerge.compare.cells import Cell
from fedmerge.compare.results import collect, result_rows
from fedmerge.config import RunConfig
from fedmerge.data import Client, Split
from fedmerge.errors import ConfigError, StateError
from fedmerge.local import Mixture
from fedmerge.params import Layout
from fedmerge.sim import Simulation
from fedmerge.sim.evaluation import Evaluation, better
from fedmerge.sim.log import SPLITS, Measured
from fedmerge.sim.mixing import WeightHistory, without


def binary_clients(m: int = 6) -> list[Client]:
    """Clients with two classes, the last one with a single class in its test split."""

    def two(split: Split) -> Split:
        return Split(split.x, (split.y > 0).long())

    made = [
        replace(c, train=two(c.train), validation=two(c.validation), test=two(c.test))
        for c in make_clients(m)
    ]
    last = made[-1]
    made[-1] = replace(last, test=Split(last.test.x, torch.ones_like(last.test.y)))
    return made


# -- the best round --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedmerge:d=3", "ditto"])
def test_the_best_round_is_that_of_the_lowest_validation_loss(method: str) -> None:
    """Its figures are those of a run that ended there."""
    options: dict[str, Any] = {"training": replace(TRAINING, lr=0.8), "dropout": 0.2}
    whole = run(method, rounds=12, **options)
    losses = [log.metrics["merged"]["validation"]["loss"] for log in whole.history]
    means = [summary.mean if summary else math.inf for summary in losses]
    found = whole.result()["best"]
    assert found["round"] == 1 + int(np.argmin(means))
    assert 1 < found["round"] < 12, "choose another lr: an end of the run proves nothing"
    shorter = run(method, rounds=found["round"], **options).result()
    for key in ("round", "models", "gap_train", "gap_test"):
        assert found[key] == shorter[key]
    for one, other in zip(found["clients"], shorter["clients"], strict=True):
        assert one == {key: other[key] for key in ("id", "accuracy", "auc", "loss")}
    assert found["models"] != whole.result()["models"]


def test_rounds_without_evaluation_are_not_the_best() -> None:
    options: dict[str, Any] = {"training": replace(TRAINING, lr=0.5), "rounds": 10}
    every = run("ditto", **options)
    third = run("ditto", evaluate_every=3, **options)
    loss = {
        log.round: log.metrics["merged"]["validation"]["loss"].mean  # type: ignore[union-attr]
        for log in every.history
    }
    assert third.result()["best"]["round"] == min((3, 6, 9, 10), key=loss.__getitem__)


def evaluation(number: int, loss: float) -> Evaluation:
    made = Evaluation(number, 2)
    figures = {split: Measured(*np.full((3, 1), loss)) for split in SPLITS}
    for place in (0, 1):
        made.put("merged", [place], figures)
    return made


def test_of_level_rounds_the_earliest_is_the_best() -> None:
    one, same, lower, diverged = (evaluation(i, v) for i, v in enumerate((2.0, 2.0, 1.0, math.inf)))
    assert better(same, one) is one
    assert better(lower, one) is lower
    assert better(diverged, one) is one
    assert better(one, diverged) is one
    assert better(one, None) is one


def test_test_data_have_no_say_in_the_best_round() -> None:
    clients = make_clients(4)
    other = [replace(c, test=Split(c.test.x, (c.test.y + 1) % 3)) for c in clients]
    options: dict[str, Any] = {"training": replace(TRAINING, lr=0.5), "rounds": 8}
    one, two = (run("ditto", c, **options).result()["best"] for c in (clients, other))
    assert one["round"] == two["round"]
    assert one["models"] != two["models"]


@pytest.mark.parametrize("method", ["fedmerge:d=3", "ditto"])
def test_a_run_that_goes_on_records_the_same_to_the_bit(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"training": replace(TRAINING, lr=0.8), "rounds": 12, "dropout": 0.2}
    whole = run(method, **options)
    best = whole.result()["best"]["round"]
    for done in (best - 1, best, best + 1):
        folder = tmp_path / str(done)
        rounds = simulate(method, checkpoint=folder, **options).rounds()
        for _ in range(done):
            next(rounds)
        rounds.close()
        resumed = run(method, checkpoint=folder, **options)
        assert resumed.result() == whole.result()
        assert plain(resumed.history) == plain(whole.history)
        one, two = resumed.weight_history(), whole.weight_history()
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)
        # Also once it is finished.
        assert simulate(method, checkpoint=folder, **options).result() == whole.result()


# -- areas under the curve -------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_areas_under_the_curve_for_two_classes(execution: str) -> None:
    def two_classes() -> nn.Module:
        return nn.Sequential(nn.Linear(N_FEATURES, 3), nn.Tanh(), nn.Linear(3, 2))

    simulation = run("fedmerge:d=2", binary_clients(), two_classes, execution=execution)
    result = simulation.result()
    ids = [client.id for client in simulation.clients]
    rows = simulation.personal(ids)
    assert isinstance(rows, Tensor)
    areas = []
    for row, client, entry in zip(rows, simulation.clients, result["clients"], strict=True):
        module = two_classes()
        simulation.soup.setup.layout.load(module, row)
        if client is simulation.clients[-1]:
            assert entry["auc"] == dict.fromkeys(("local", "merged", "tuned"))
            continue
        with torch.no_grad():
            share = module(client.test.x).softmax(1)[:, 1]
        areas.append(roc_auc_score(client.test.y, share))
        assert entry["auc"]["merged"] == pytest.approx(areas[-1])
    assert len(areas) == 5
    assert result["models"]["merged"]["auc"] == pytest.approx(np.mean(areas))
    assert result["best"]["models"]["merged"]["auc"] is not None
    assert run("fedavg").result()["models"]["merged"]["auc"] is None


# -- weights ---------------------------------------------------------------------------------------


def test_the_history_of_the_weights() -> None:
    clients = make_clients()[::-1]
    simulation = simulate("fedmerge:d=3", clients, rounds=5, evaluate_every=2, participation=0.5)
    seen = {}
    for log in simulation.rounds():
        weights = simulation.soup.weights([c.id for c in clients])
        assert weights is not None
        seen[log.round] = weights.clone()
    found = simulation.weight_history()
    assert found["rounds"].tolist() == [2, 4, 5]
    assert found["weights"].shape == (3, 6, 2, 3)
    assert found["weights"].dtype == np.float32
    for number, weights in zip(found["rounds"], found["weights"], strict=True):
        np.testing.assert_allclose(weights, seen[int(number)].numpy(), rtol=1e-6)
    assert not np.allclose(seen[2], seen[5])
    np.testing.assert_allclose(simulation.result()["weights"], seen[5].numpy())
    assert run("fedavg").weight_history() == {}


def test_a_history_that_grows_too_large_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.sim.mixing.MOST_NUMBERS", 40)
    history = WeightHistory()
    for number in range(1, 30):
        history.add(number, torch.full((2, 1, 2), float(number)))
        assert len(history.rounds) <= 10
        assert history.rounds[-1] == number
    assert [float(w[0, 0, 0]) for w in history.weights] == history.rounds
    assert history.rounds == sorted(history.rounds)


# -- importance ------------------------------------------------------------------------------------


def mixed_by_hand(models: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """One row (P,) from weights (b, d) of a client, block by block of a network without buffers."""
    row = torch.zeros(layout.size, dtype=torch.float64)
    for block, (start, stop) in enumerate(layout.spans):
        own = weights[min(block, len(weights) - 1)]
        for share, model in zip(own, models, strict=True):
            row[start:stop] += share * model[start:stop].double()
    return row.float()


@pytest.mark.parametrize("method", ["fedmerge:d=3", "fedmerge:rule=paper:d=3"])
@pytest.mark.parametrize(
    ("execution", "participation"), [("stacked", 1.0), ("sequential", 1.0), ("stacked", 0.5)]
)
def test_the_importance_of_a_model_is_what_its_loss_costs(
    method: str, execution: str, participation: float
) -> None:
    training = replace(TRAINING, lr=0.5)
    simulation = run(
        method, rounds=10, training=training, execution=execution, participation=participation
    )
    found = simulation.result()["importance"]
    layout, shared = simulation.soup.setup.layout, simulation.soup.shared
    apart = participation < 1 and "paper" not in method
    models = shared["means" if apart else "models"]  # those that clients use
    weights = simulation.soup.weights([c.id for c in simulation.clients])
    assert weights is not None
    module = net()()

    def loss(row: Tensor, client: Client) -> float:
        layout.load(module, row)
        with torch.no_grad():
            output = module(client.validation.x)
        return nn.functional.cross_entropy(output, client.validation.y).item()

    wanted = np.zeros((6, 3))
    for i, client in enumerate(simulation.clients):
        whole = loss(mixed_by_hand(models, weights[i], layout), client)
        for j in range(3):
            others = [k for k in range(3) if k != j]
            rest = weights[i][:, others] / weights[i][:, others].sum(1, keepdim=True)
            wanted[i, j] = loss(mixed_by_hand(models[others], rest, layout), client) - whole
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(wanted).max() > 0.01


def test_models_that_share_a_weight_take_it_over() -> None:
    weights = torch.tensor([[[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    assert without(weights, 0).tolist() == [
        [pytest.approx([0, 0.6, 0.4]), pytest.approx([0, 1.0, 0])]
    ]
    # The second has all of the second block: the others share it equally.
    assert without(weights, 1).tolist() == [
        [pytest.approx([5 / 7, 0, 2 / 7]), pytest.approx([0.5, 0, 0.5])]
    ]


def test_importance_is_for_mixes_of_several_models() -> None:
    for method in ("fedavg", "local", "ifca:d=2", "fedmerge:d=1"):
        assert run(method, rounds=1).result()["importance"] is None


# -- what a result says of clients and costs -------------------------------------------------------


def test_label_counts_are_of_all_of_a_clients_examples() -> None:
    simulation = run("fedavg", rounds=1)
    for entry, client in zip(simulation.result()["clients"], simulation.clients, strict=True):
        labels = [int(y) for _, split in client.splits() for y in split.y]
        assert entry["label_counts"] == [labels.count(c) for c in range(3)]
    values = run("fedavg", make_clients(4, targets=2), lambda: nn.Linear(N_FEATURES, 2), rounds=1)
    assert {str(entry["label_counts"]) for entry in values.result()["clients"]} == {"None"}


@dataclass(frozen=True)
class Partly(FedAvg):
    """FedAvg that sends only `parts` of a row; beside its update two rows, and a number."""

    name: ClassVar[str] = "partly"
    parts: tuple[tuple[int, int], ...] = ((0, 5), (7, 10))

    def travels(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        return self.parts

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        made = super().local(setup, message, memory, trainer)
        more = {"models": made.delta[:, None].repeat(1, 2, 1), "choice": made.steps}
        return replace(made, extra=more)


def test_bytes_are_of_what_travels_only() -> None:
    result = run(Partly()).result()
    assert result["bytes_down"] == 8 * 4
    assert result["bytes_up"] == 3 * 8 * 4 + 8
    half = run(Partly(), participation=0.5, dropout=0.3)
    assert sum(log.bytes_down for log in half.history) == 4 * 3 * 8 * 4
    assert half.result()["bytes_up"] == 3 * 8 * 4 + 8


@pytest.mark.parametrize("parts", [((0, 5), (4, 6)), ((5, 0),), ((0, 10**6),), ((-1, 5),)])
def test_parts_that_are_not_of_a_row_are_refused(parts: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError, match=r"partly: travels gives .* wanted .* in order") as caught:
        simulate(Partly(parts))
    assert "\n" not in str(caught.value)


def test_the_result_has_the_declared_cost() -> None:
    simulation = run("ifca:d=3", rounds=1)
    declared = simulation.algorithm.cost(simulation.soup.setup, 6, simulation.training.epochs)
    assert simulation.result()["cost"] == vars(declared)


# -- models that are mixtures, and none ------------------------------------------------------------


@dataclass(frozen=True)
class Doubled(FedAvg):
    """FedAvg whose clients use, and end with, a mixture of one model with itself."""

    name: ClassVar[str] = "doubled"

    @staticmethod
    def _twice(rows: Tensor) -> Mixture:
        return Mixture(rows[:, None].repeat(1, 2, 1), torch.full((len(rows), 2), 0.5))

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        made = super().local(setup, message, memory, trainer)
        assert isinstance(made.own, Tensor)
        return replace(made, own=self._twice(made.own))

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Mixture:
        return self._twice(message[:, 0])


def test_the_gap_of_mixtures() -> None:
    """A mixture of a model with itself is that model."""
    for one, two in zip(run(Doubled()).history, run("fedavg").history, strict=True):
        for gap in ("gap_train", "gap_test"):
            assert getattr(one, gap) == pytest.approx(getattr(two, gap), rel=1e-4, abs=1e-6)
        for model in ("merged", "local"):
            found, wanted = (log.metrics[model]["test"]["accuracy"] for log in (one, two))
            assert found == wanted


@dataclass(frozen=True)
class Ownless(FedAvg):
    """FedAvg whose clients keep no model at the end of training."""

    name: ClassVar[str] = "ownless"

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        return replace(super().local(setup, message, memory, trainer), own=None)


def test_there_is_no_gap_without_own_models() -> None:
    simulation = run(Ownless())
    result = simulation.result()
    assert result["models"].keys() == {"merged", "tuned"}
    assert result["models"] == {
        name: scores for name, scores in run("fedavg").result()["models"].items() if name != "local"
    }
    for reached in (result, result["best"]):
        assert (reached["gap_train"], reached["gap_test"]) == (None, None)
    assert all(log.gap_test is None for log in simulation.history)


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_with_more_rounds_is_refused(tmp_path: Path) -> None:
    run("fedmerge", rounds=4, checkpoint=tmp_path)
    with pytest.raises(StateError, match="holds 4 rounds, but rounds = 3: wanted 4 or more"):
        simulate("fedmerge", rounds=3, checkpoint=tmp_path)
    assert len(simulate("fedmerge", rounds=4, checkpoint=tmp_path).history) == 4


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("part", ["x", "y"])
def test_a_checkpoint_of_other_data_is_refused(split: str, part: str, tmp_path: Path) -> None:
    clients = make_clients()
    run("fedavg", clients, rounds=2, checkpoint=tmp_path)
    own: Split = getattr(clients[2], split)
    changed = Split(own.x + 0.1, own.y) if part == "x" else Split(own.x, (own.y + 1) % 3)
    clients[2] = replace(clients[2], **{split: changed})
    with pytest.raises(StateError, match="is of another run: its data is"):
        simulate("fedavg", clients, checkpoint=tmp_path)


# -- tables ----------------------------------------------------------------------------------------

TINY = {"clients": 6, "rounds": 3, "epochs": 1, "hidden": 4, "setting": "domain", "lr": 1.0}
ROWS = (
    "data setting method seed at model round accuracy accuracy_std accuracy_error "
    "accuracy_worst_decile auc loss "
    "better_than_local better_than_fedavg gap_train gap_test rounds seconds bytes_up bytes_down "
    "chosen cost_down cost_up cost_client cost_server cost_server_per_client cost_passes"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs and one that has only begun; not to be changed."""
    made = tmp_path_factory.mktemp("out")
    facts = {"preset": None, "trials": 0, "tuning_seeds": []}
    files.claim_comparison(made, facts)
    for method, seed in (
        ("local", 0),
        ("fedmerge:d=2", 0),
        ("fedavg", 0),
        ("fedmerge:d=2", 1),
        ("local", 1),
    ):
        chosen = "lr=0.5" if method == "fedavg" else None
        config = RunConfig(method=method, seed=seed, chosen=chosen, **TINY)  # type: ignore[arg-type]
        config.run(made / "runs" / f"{method.replace(':', '-')}--s{seed}")
    begun = made / "runs" / "begun"
    begun.mkdir()
    (begun / "config.json").write_text("{}")
    collect(made)
    return made


def results(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in out.glob("runs/*/result.json")]
    return {(one["method"], one["seed"]): one for one in found}


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_rows_of_runs(out: Path) -> None:
    found, stored = rows_of(out), results(out)
    assert len(stored) == 5
    assert all(" ".join(row) == ROWS for row in found)
    keys = [(r["method"], r["seed"], r["at"], r["model"]) for r in found]
    assert len(set(keys)) == len(keys) == 5 * 2 * 3
    for row in found:
        result = stored[row["method"], row["seed"]]
        reached = result if row["at"] == "last" else result["best"]
        assert row["round"] == reached["round"]
        for key, value in reached["models"][row["model"]].items():
            assert row[key] == value
        for key in ("gap_train", "gap_test"):
            assert row[key] == reached[key]
        for key in ("data", "setting", "rounds", "seconds", "bytes_up", "bytes_down"):
            assert row[key] == result[key]
        assert {k[5:]: v for k, v in row.items() if k.startswith("cost_")} == result["cost"]
        assert row["chosen"] == ({"lr": 0.5} if row["method"] == "fedavg" else {})
    assert {row["round"] for row in found if row["at"] == "last"} == {3}
    assert any(row["round"] != 3 for row in found), "choose another lr: best is always the last"


def test_the_share_of_clients_that_are_better_off(out: Path) -> None:
    stored = results(out)
    for row in rows_of(out):
        for name in ("local", "fedavg"):
            if (name, row["seed"]) not in stored:
                assert row[f"better_than_{name}"] is None
                continue
            pick = (lambda r: r) if row["at"] == "last" else (lambda r: r["best"])
            own = pick(stored[row["method"], row["seed"]])["clients"]
            other = pick(stored[name, row["seed"]])["clients"]
            pairs = [
                (a["accuracy"][row["model"]], b["accuracy"]["merged"])
                for a, b in zip(own, other, strict=True)
            ]
            assert row[f"better_than_{name}"] == sum(a > b for a, b in pairs) / 6
    shares = {row["better_than_local"] for row in rows_of(out)}
    assert len(shares) > 2


def fake(method: str, loss: Sequence[float | None], ids: str = "abc") -> dict[str, Any]:
    """A result of regression with these test losses."""
    clients = [
        {"id": name, "accuracy": {"merged": None}, "auc": {}, "loss": {"merged": value}}
        for name, value in zip(ids, loss, strict=True)
    ]
    scores = dict.fromkeys(("accuracy", "accuracy_std", "accuracy_worst_decile", "auc", "loss"))
    cost = dict.fromkeys(("down", "up", "client", "server", "server_per_client", "passes"), 1.0)
    reached = {"round": 1, "models": {"merged": scores}, "gap_train": None, "gap_test": None}
    run = {"rounds": 1, "seconds": 1.0, "bytes_up": 0, "bytes_down": 0, "cost": cost}
    named = {"data": "d", "setting": "s", "method": method, "seed": 0}
    return {**named, **run, **reached, "clients": clients, "best": {**reached, "clients": clients}}


def test_regression_is_compared_by_loss_and_clients_by_name() -> None:
    # Lower is better; one that diverged (no loss) is worse than any, and not better than another.
    own = fake("fedmerge", [1.0, 2.0, None], "abc")
    rows = list(result_rows([own, fake("local", [None, 3.0, 1.0], "cab")]))
    assert [row["better_than_local"] for row in rows[:2]] == [1 / 3, 1 / 3]
    rows = list(result_rows([own, fake("local", [1.5, 1.5], "ax")]))
    assert rows[0]["better_than_local"] == 1.0
    assert rows[0]["better_than_fedavg"] is None


def test_the_table_of_clients(out: Path) -> None:
    table = parquet.read_table(out / "clients.parquet")
    assert str(table.schema.field("label_counts").type) == "list<element: int64>"
    found = table.to_pylist()
    stored = results(out)
    assert len(found) == 5 * 2 * 6
    for row in found:
        result = stored[row["method"], row["seed"]]
        i = [one["id"] for one in result["clients"]].index(row["client"])
        facts = result["clients"][i]
        for key in ("kind", "n_train", "n_validation", "n_test", "label_counts"):
            assert row[key] == facts[key]
        assert sum(row["label_counts"]) == row["n_train"] + row["n_validation"] + row["n_test"]
        figures = facts if row["at"] == "last" else result["best"]["clients"][i]
        for figure in ("accuracy", "auc", "loss"):
            for model in ("merged", "tuned", "local"):
                assert row[f"{figure}_{model}"] == figures[figure][model]
        if row["at"] == "best" or result["weights"] is None:
            assert (row["weights"], row["importance"]) == (None, None)
        else:
            assert row["weights"] == np.array(result["weights"][i]).flatten().tolist()
            assert len(row["weights"]) == 2 * 2
            assert row["importance"] == result["importance"][i]
    assert any(row["importance"] for row in found)
    # Means of this table are those of the other.
    for one in rows_of(out):
        name = (one["method"], one["seed"], one["at"])
        some = [r for r in found if (r["method"], r["seed"], r["at"]) == name]
        mean = np.mean([r[f"accuracy_{one['model']}"] for r in some])
        assert mean == pytest.approx(one["accuracy"])


def test_tables_are_made_again_to_the_byte(out: Path) -> None:
    """From the runs alone, in the order they had; and in another where one is asked for."""
    before = {name: (out / name).read_bytes() for name in ("results.jsonl", "clients.parquet")}
    asked = [Cell("local--s1", {}), Cell("fedavg--s0", {})]
    rows = collect(out, asked)
    order = list(dict.fromkeys((row["method"], row["seed"]) for row in rows))
    assert order[:2] == [("local", 1), ("fedavg", 0)]
    assert len(order) == 5
    again = collect(out)
    assert list(dict.fromkeys((row["method"], row["seed"]) for row in again)) == order
    (out / "results.jsonl").unlink()
    collect(out)
    assert {name: (out / name).read_bytes() for name in before} == before


def test_tables_of_a_single_run(tmp_path: Path) -> None:
    RunConfig(**TINY).run(tmp_path)  # type: ignore[arg-type]
    assert len(collect(tmp_path)) == 6
    assert len(collect(tmp_path)) == 6  # its own tables do not make it a comparison
    assert parquet.read_table(tmp_path / "clients.parquet").num_rows == 12
    history = np.load(tmp_path / "weights.npz")
    result = json.loads((tmp_path / "result.json").read_text())
    assert history["rounds"].tolist() == [1, 2, 3]
    assert history["weights"].dtype == np.float32
    np.testing.assert_allclose(history["weights"][-1], result["weights"], rtol=1e-6)


def test_a_table_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunConfig(**TINY).run(tmp_path)  # type: ignore[arg-type]
    collect(tmp_path)
    before = (tmp_path / "clients.parquet").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StateError, match="cannot be written: No space left on device"):
        collect(tmp_path)
    assert (tmp_path / "clients.parquet").read_bytes() == before


# -- folders of another version --------------------------------------------------------------------


def test_folders_of_another_version_are_refused_and_kept(tmp_path: Path) -> None:
    facts = {"preset": "quick", "trials": 4, "tuning_seeds": [10, 11]}
    fresh = tmp_path / "fresh"
    files.claim_comparison(fresh, facts)
    assert json.loads((fresh / "comparison.json").read_text()) == {"format": files.FORMAT, **facts}
    files.claim_comparison(fresh, {**facts, "preset": None})
    assert json.loads((fresh / "comparison.json").read_text())["preset"] is None
    with pytest.raises(StateError, match="trials is 4 there and 3 here; choose another --out"):
        files.claim_comparison(fresh, {**facts, "trials": 3})

    for name, content in (("runs/a/result.json", "{}"), ("results.jsonl", "{}\n")):
        old = tmp_path / name.split("/")[0]
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(content)
        for refuse in (lambda f: files.claim_comparison(f, facts), collect, files.check_comparison):
            with pytest.raises(StateError, match="older version of fedmerge") as caught:
                refuse(old)
            assert "\n" not in str(caught.value)
        assert [p for p in old.rglob("*") if p.is_file()] == [old / name]
        assert (old / name).read_text() == content

    other = tmp_path / "other"
    other.mkdir()
    (other / "comparison.json").write_text('{"format": 6}')
    with pytest.raises(StateError, match="in format 6, and this version of fedmerge writes 7"):
        collect(other)
    assert files.check_comparison(tmp_path / "nowhere") is None


def test_a_result_of_another_version_is_named(tmp_path: Path) -> None:
    RunConfig(**TINY).run(tmp_path)  # type: ignore[arg-type]
    path = tmp_path / "result.json"
    stored = json.loads(path.read_text())
    del stored["best"]
    path.write_text(json.dumps(stored))
    with pytest.raises(StateError, match=r"result.json has no best: another version"):
        collect(tmp_path)
    stored["best"] = {"clients": stored["clients"][1:]}
    path.write_text(json.dumps(stored))
    with pytest.raises(StateError, match=r"result.json is damaged \(its clients are not those"):
        collect(tmp_path)


def test_records_of_a_client_are_in_the_order_of_the_clients() -> None:
    clients = [*make_clients(3), make_client("a", 9)]
    assert isinstance(simulate("fedmerge:d=2", clients), Simulation)
    result = run("fedmerge:d=2", clients, participation=0.5).result()
    assert [one["id"] for one in result["clients"]] == ["c00", "c01", "c02", "a"]
    assert [one["id"] for one in result["best"]["clients"]] == ["c00", "c01", "c02", "a"]
