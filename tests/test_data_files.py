"""Clients in files: folders of .npz and tables, and the settings that use them.

All files are written to a temporary folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedmerge.data import describe, from_tensors, load_csv, load_npz_folder, make_federation
from fedmerge.errors import ConfigError, DataError


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def table(path: Path, n: int = 24, clients: int = 3, sep: str = ",") -> str:
    """Write a table whose features are the row's number and its double."""
    rows = [sep.join(map(str, (f"site {i % clients}", i, 2 * i, i // 3 % 2))) for i in range(n)]
    return write(path, sep.join(("client", "f", "g", "y")), *rows)


def npz_folder(path: Path, clients: int = 3, n: int = 8) -> str:
    path.mkdir()
    for i in range(clients):
        x = np.arange(n * 4.0).reshape(n, 1, 2, 2) + 100 * i
        np.savez(path / f"user{i}.npz", x=x, y=np.arange(n) % 2)
    return str(path)


def test_csv_and_tsv(tmp_path: Path) -> None:
    clients = load_csv(table(tmp_path / "a.csv"))
    assert list(clients) == ["site 0", "site 1", "site 2"]
    x, y = clients["site 1"]
    assert x.tolist() == [[float(i), 2.0 * i] for i in range(1, 24, 3)]
    assert y.tolist() == [i // 3 % 2 for i in range(1, 24, 3)]
    assert y.dtype == np.int64
    tabs = load_csv(table(tmp_path / "a.tsv", sep="\t"))
    assert all(np.array_equal(tabs[name][0], x) for name, (x, _) in clients.items())


def test_csv_column_names_quotes_bom_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufefflabel, a,who\nno,2,z\nyes,3,z\n\nyes,1,"x, y"\n', encoding="utf-8")
    clients = load_csv(path, client="who", target="label")
    assert list(clients) == ["x, y", "z"]
    assert clients["x, y"][1].tolist() == [1]
    assert clients["z"][1].tolist() == [0, 1]
    assert clients["z"][0].tolist() == [[2.0], [3.0]]


@pytest.mark.parametrize(
    ("cells", "expected", "kind"),
    [
        (("2", "0", "1"), [2, 0, 1], "i"),
        (("2.5", "0", "1"), [2.5, 0.0, 1.0], "f"),
        (("wing", "arm", "arm"), [1, 0, 0], "i"),
        (("1.0", "0.0", "-1.0"), [1.0, 0.0, -1.0], "f"),
        (("1.0", "-2", "0.5"), [1.0, -2.0, 0.5], "f"),
        (("9" * 20, "0", "1"), [1e20, 0.0, 1.0], "f"),
    ],
)
def test_csv_targets(
    tmp_path: Path, cells: tuple[str, ...], expected: list[float], kind: str
) -> None:
    rows = [f"a,{i},{cell}" for i, cell in enumerate(cells)]
    _, y = load_csv(write(tmp_path / "a.csv", "client,f,y", *rows))["a"]
    assert y.tolist() == expected
    assert y.dtype.kind == kind


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], '"a.csv": empty, wanted a header and at least one row'),
        (["client,f,y"], "empty, wanted a header and at least one row"),
        (["clients,f,y", "a,1,0"], r'"client"; did you mean "clients"\? \(or name yours as'),
        (["client,f,g", "a,1,0"], 'no column "y"; choose from client, f, g'),
        (["client,y", "a,0"], 'no feature columns besides "client" and "y"'),
        (["client,f,f,y", "a,1,1,0"], 'two columns "f", wanted one'),
        (["client,f,y", "a,1,0", "a,1"], "row 3: 2 cells, wanted 3 as in the header"),
        (["client,f,y", "a,1,0", "", "a,?,0"], 'row 4, column "f": "\\?", wanted a finite number'),
        (["client,f,y", "a,nan,0"], 'row 2, column "f": "nan", wanted a finite number'),
        (["client,f,y", "a,,0"], 'column "f": "", wanted .* "table:a.csv:standardise=true"$'),
        (["client,f,y", "a,up,0"], '"up", wanted .* drop the row, or .* "table:a.csv:drop=f"$'),
        (["client,f,y", "a,1,0", ",1,0"], 'column "client": empty, wanted a client; fill it in'),
        (["client,f,y", "a,1,0", "a,1,"], 'row 3, column "y": empty, wanted a target; fill it in'),
        (["client,f,y", "a,1,0.5", "a,1,o"], '"y": "o", wanted a finite .* or drop the row$'),
        (["client,f,y", "a,1,0", "a,1,1.0"], 'row 3, column "y": "1.0" among whole numbers; write'),
        (["client,f,y", "a,1,0", "a,1,-1"], 'row 3, column "y": label -1, wanted 0 or more'),
        (["client;f;y", "a;1;0"], "one column, 'client;f;y'; divide cells by ',' instead of ';'"),
        (["client,f,y", "a,1,0", f"a,{'1' * 140_000},0"], "row 3: not readable as cells .* limit"),
        (["client,f,y", "a,1,0.5", "a,1,inf"], 'row 3, column "y": "inf"'),
    ],
)
def test_unusable_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.csv"), *lines)
    with pytest.raises(DataError, match=message) as error:
        load_csv("a.csv")
    assert "\n" not in str(error.value)


def test_a_column_that_is_to_be_left_out_is_named_beside_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "client,id,f,where,y", "a,x,1,up,0")
    with pytest.raises(DataError, match=r'column "where": "up", wanted .*a\.csv:drop=id\+where"$'):
        load_csv(path, drop=("id",))
    assert load_csv(path, drop=("id", "where"))["a"][0].tolist() == [[1.0]]


def test_missing_or_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'gone.csv": no such file'):
        load_csv(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r'ends in ".xlsx", wanted .csv, .tsv or .arff'):
        load_csv(tmp_path / "a.xlsx")
    (tmp_path / "b.csv").write_bytes(b"client,f,y\na,1,\xff\xfe\n")
    with pytest.raises(DataError, match=r'b.csv": not readable as UTF-8 text'):
        load_csv(tmp_path / "b.csv")


def test_npz_folder(tmp_path: Path) -> None:
    folder = npz_folder(tmp_path / "users")
    clients = load_npz_folder(folder)
    assert list(clients) == ["user0", "user1", "user2"]
    assert clients["user2"][0].min() == 200.0
    np.savez(
        tmp_path / "users" / "more.npz",
        x=np.arange(12.0).reshape(3, 1, 2, 2),
        y=[0, 1, 0],
        client=["p", "q", "p"],
    )
    clients = load_npz_folder(folder)
    assert list(clients) == ["p", "q", "user0", "user1", "user2"]
    assert clients["p"][0][:, 0, 0, 0].tolist() == [0.0, 8.0]
    assert clients["p"][1].tolist() == [0, 0]


def test_unusable_npz_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'users": not found, wanted a folder of .npz files'):
        load_npz_folder(tmp_path / "users")
    folder = tmp_path / "users"
    folder.mkdir()
    with pytest.raises(DataError, match=r'users": no .npz files, wanted one for each client'):
        load_npz_folder(folder)
    file = folder / "a.npz"
    np.savez(file, X=np.ones((4, 2)), y=np.ones(4))
    with pytest.raises(DataError, match=r'a.npz": no array "x"; choose from X, y'):
        load_npz_folder(folder)
    np.savez(file, x=np.ones((4, 2)), y=np.ones(4), client=["p"])
    with pytest.raises(DataError, match=r"shapes \(4, 2\), \(4,\) and \(1,\), wanted one client"):
        load_npz_folder(folder)
    np.savez(file, x=np.ones((4, 2)), y=np.array([{}, [], 1, 2], dtype=object))
    with pytest.raises(DataError, match=r'a.npz": not readable as .npz arrays of numbers'):
        load_npz_folder(folder)
    np.savez(file, x=np.ones((4, 2)), y=np.ones(4), client=["b"] * 4)
    np.savez(folder / "b.npz", x=np.ones((4, 2)), y=np.ones(4))
    with pytest.raises(DataError, match=r'client "b": in "a.npz" and in "b.npz"'):
        load_npz_folder(folder)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_broken_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r'a.npz": not readable as .npz arrays'):
        load_npz_folder(tmp_path)


def test_npy_renamed_to_npz(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match=r'a.npz": not readable as .npz arrays'):
        load_npz_folder(tmp_path)


def test_natural_clients(tmp_path: Path) -> None:
    path = table(tmp_path / "sites.csv")
    fed = make_federation(path, "natural", seed=0)
    assert (fed.name, fed.task, fed.n_outputs, fed.input_shape) == (
        "sites/natural",
        "classification",
        2,
        (2,),
    )
    assert [client.id for client in fed.clients] == ["site 0", "site 1", "site 2"]
    assert [row.label_counts.tolist() for row in describe(fed)] == [[4, 4]] * 3
    assert [client.id for client in make_federation(path, "natural", 3, seed=0).clients] == [
        client.id for client in fed.clients
    ]
    other = make_federation(path, "natural", seed=1)
    assert not torch.equal(fed.clients[0].train.x, other.clients[0].train.x)
    longer = make_federation(path, "natural", seed=0, train_fraction=0.75)
    assert len(longer.clients[0].train) == 6
    folder = npz_folder(tmp_path / "users")
    assert make_federation(folder, "natural", seed=0).input_shape == (1, 2, 2)


def test_labels_may_leave_numbers_out(tmp_path: Path) -> None:
    rows = [f"a,{i},{i % 2 * 7}" for i in range(12)]
    fed = make_federation(write(tmp_path / "a.csv", "client,f,y", *rows), "natural", seed=0)
    assert describe(fed)[0].label_counts.tolist() == [6, 0, 0, 0, 0, 0, 0, 6]


def test_regression_table(tmp_path: Path) -> None:
    rows = [f"a,{i},{i / 2}" for i in range(8)]
    fed = from_tensors(load_csv(write(tmp_path / "a.csv", "client,f,y", *rows)), name="a")
    assert (fed.task, fed.n_outputs) == ("regression", 1)
    train = fed.clients[0].train
    assert torch.equal(train.y, train.x / 2)


def test_other_settings_pool_the_examples(tmp_path: Path) -> None:
    fed = make_federation(table(tmp_path / "sites.csv"), "dirichlet", 2, seed=0)
    assert fed.name == "sites/dirichlet"
    assert [client.id for client in fed.clients] == ["c00", "c01"]
    found = torch.cat([s.x[:, 0] for client in fed.clients for _, s in client.splits()])
    assert sorted(found.tolist()) == list(range(24))
    folder = npz_folder(tmp_path / "users", clients=4)
    rotated = make_federation(folder, "domain", 4, seed=0)
    assert {client.kind for client in rotated.clients} == {"rot0", "rot90", "rot180", "invert"}


def test_settings_and_files_that_do_not_go_together(tmp_path: Path) -> None:
    path = table(tmp_path / "sites.csv")
    with pytest.raises(DataError, match='"natural": data "digits" has no clients of its own'):
        make_federation("digits", "natural", seed=0)
    with pytest.raises(DataError, match=r'clients: 5, but "sites" has 3; .* or say 3'):
        make_federation(path, "natural", 5, seed=0)
    with pytest.raises(DataError, match=r'"domain": needs square images .* "sites" has .*cluster'):
        make_federation(path, "domain", 2, seed=0)
    with pytest.raises(DataError, match=r'gone.tsv": no such file'):
        make_federation(str(tmp_path / "gone.tsv"), "natural", seed=0)
    with pytest.raises(DataError, match='gone": neither a built-in data set nor the path'):
        make_federation(str(tmp_path / "gone"), "natural", seed=0)
    with pytest.raises(ConfigError, match="seed: -1"):
        make_federation(path, "natural", seed=-1)
    short = table(tmp_path / "short.csv", n=9)
    with pytest.raises(DataError, match='client "site 0": 3 examples, wanted at least 4'):
        make_federation(short, "natural", seed=0)
    assert len(make_federation(short, "latent", 2, seed=0).clients) == 2
