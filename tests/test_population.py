"""Clients' data in their files: the same numbers as in memory, less of it, and one clear line for a
file that is not what it was.

What the data sets are made of is tested in `test_data_files`.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core_fixture import TRAINING, equal, plain, soup_tensors
from fedmerge.algorithms import FedMerge
from fedmerge.data import Federation, from_tensors, make_federation
from fedmerge.data.clients import Client, Split
from fedmerge.data.stored import Stored, StoredSplit
from fedmerge.errors import DataError
from fedmerge.sim import Simulation
from fedmerge.sim.population import Population

M, N, F = 5, 12, 4


def arrays(dtype: str = "float32") -> tuple[Any, Any]:
    draws = np.random.default_rng(3)
    x = (10 * draws.normal(size=(M * N, F))).astype(dtype)
    return x, np.arange(M * N) % 3


def mapped(folder: Path, x: Any) -> Any:
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def federation(x: Any, y: Any) -> Federation:
    return from_tensors([(x[i * N : (i + 1) * N], y[i * N : (i + 1) * N]) for i in range(M)])


def simulate(fed: Federation, **options: Any) -> Simulation:
    return Simulation(
        FedMerge(d=2),
        fed,
        lambda: nn.Sequential(nn.Linear(F, 4), nn.ReLU(), nn.Linear(4, 3)),
        **{"training": TRAINING, "rounds": 3, "participation": 0.8, **options},
    )


def done(simulation: Simulation) -> Simulation:
    list(simulation.rounds())
    return simulation


# -- rows of a file -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int16", ">f4"])
def test_rows_are_read_from_where_they_are(dtype: str, tmp_path: Path) -> None:
    x, _ = arrays(dtype)
    whole = mapped(tmp_path, x)
    # A range of a range, whose place in the file is beyond the header and beyond its own parent.
    stored = Stored.of(whole[7:40][3:])
    assert (stored.shape, len(stored)) == ((30, F), 30)
    at = torch.tensor([4, 0, 29, 4])
    wanted = torch.from_numpy(x.astype(np.float32)[[14, 10, 39, 14]])
    assert torch.equal(stored[at].read(), wanted)
    again: Stored = pickle.loads(pickle.dumps(stored[at]))
    assert torch.equal(again[torch.tensor([2, 1])].read(), wanted[[2, 1]])


def test_numbers_that_no_file_holds_stay_in_memory(tmp_path: Path) -> None:
    """Copies of a mapped array are of its type; what copy-on-write has changed is not in it."""
    x, y = arrays()
    whole = mapped(tmp_path, x)
    changed = np.load(tmp_path / "x.npy", mmap_mode="c")
    changed += 1
    for given, wanted in ((whole.copy(), x), (whole.astype("float32"), x), (changed, x + 1)):
        assert isinstance(given, np.memmap)
        split = federation(given, y).clients[1].train
        assert not isinstance(split, StoredSplit)
        plain = federation(wanted, y).clients[1].train
        assert torch.equal(split.x, plain.x)


def test_columns_of_a_file_are_refused(tmp_path: Path) -> None:
    whole = mapped(tmp_path, arrays()[0])
    with pytest.raises(DataError, match=r"rows are not side by side in the file; give the array"):
        Stored.of(whole[:, 1:])


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["auto", "sequential"])
def test_a_run_from_files_is_the_run_from_memory(execution: str, tmp_path: Path) -> None:
    x, y = arrays()
    fed = federation(mapped(tmp_path, x), y)
    assert all(isinstance(s, StoredSplit) for c in fed.clients for _, s in c.splits())
    lazy, eager = (done(simulate(f, execution=execution)) for f in (fed, federation(x, y)))
    assert lazy._population.splits["train"].x.numel() == 0
    assert equal(soup_tensors(lazy.soup), soup_tensors(eager.soup))
    assert plain(lazy.history) == plain(eager.history)
    # What tells data apart is not read anew from files.
    assert lazy.result() == {**eager.result(), "examples": None}
    assert eager.result()["examples"] is not None


def test_a_summary_tells_who_has_which_examples() -> None:
    x, y = torch.arange(48.0).view(12, 4), torch.arange(12) % 2

    def people(*bounds: int) -> dict[str, Any] | None:
        ends = [0, *bounds, 12]
        parts = [Split(x[a:b], y[a:b]) for a, b in pairwise(ends)]
        return Population.of([Client("a", *parts[:3]), Client("b", *parts[3:])]).summary()

    first = people(2, 4, 6, 8, 10)
    assert first == people(2, 4, 6, 8, 10)
    assert first != people(2, 4, 5, 8, 10)  # the same pool, another client's


def test_a_checkpoint_goes_from_files_to_memory_and_back(tmp_path: Path) -> None:
    x, y = arrays()
    lazy, eager = federation(mapped(tmp_path, x), y), federation(x, y)
    here = tmp_path / "here"
    for fed, rounds in ((lazy, 1), (eager, 2), (lazy, 3)):
        last = done(simulate(fed, checkpoint=here, rounds=rounds))
    assert len(last.history) == 3
    digests = {Population.of(fed.clients).digest for fed in (lazy, eager)}
    changed = x.copy()
    changed[0, 0] += 1
    digests.add(Population.of(federation(changed, y).clients).digest)
    assert len(digests) == 2


def test_some_clients_are_taken_without_reading(tmp_path: Path) -> None:
    x, y = arrays()
    lazy = Population.of(federation(mapped(tmp_path, x), y).clients)
    eager = Population.of(federation(x, y).clients)
    (tmp_path / "x.npy").rename(tmp_path / "away.npy")
    part = lazy.take([3, 1])
    (tmp_path / "away.npy").rename(tmp_path / "x.npy")
    assert part.ids == ("c03", "c01")
    for found, wanted in zip(
        part.examples([1, 0], "test", "train"), eager.examples([1, 3], "test", "train"), strict=True
    ):
        for i in range(2):
            here, there = (slice(e.start[i], e.start[i] + e.count[i]) for e in (found, wanted))
            assert torch.equal(found.x[here], wanted.x[there])
            assert torch.equal(found.y[here], wanted.y[there])


def test_a_folder_of_arrays_is_a_data_set(tmp_path: Path) -> None:
    x, y = arrays()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "client.npy", np.repeat([f"site {i}" for i in range(M)], N))
    fed = make_federation(str(tmp_path), "natural", seed=0)
    assert [c.id for c in fed.clients] == [f"site {i}" for i in range(M)]
    for i, client in enumerate(fed.clients):
        for _, split in client.splits():
            assert isinstance(split, StoredSplit)
            assert split.source is not None
            assert set(split.source.tolist()) <= set(range(i * N, (i + 1) * N))
            assert torch.equal(split.x, torch.from_numpy(x)[split.source])
            assert torch.equal(split.y, torch.from_numpy(y)[split.source])
    made = make_federation(str(tmp_path), "dirichlet", 3, seed=0)
    assert isinstance(made.clients[0].train, StoredSplit)


MEMORY = """
import sys
import numpy as np
from torch import nn
from fedmerge import FedAvg, Simulation, Training
from fedmerge.data import from_tensors

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

m, n = 256, 64
x = np.load(sys.argv[1], mmap_mode="r")
y = np.arange(m * n) % 2
before = status("VmRSS")
fed = from_tensors([(x[i * n : (i + 1) * n], y[i * n : (i + 1) * n]) for i in range(m)])
training = Training(epochs=1, batch_size=64)
made = Simulation(FedAvg(), fed, lambda: nn.Linear(4096, 2), training=training, rounds=1)
list(made.rounds())
print(x.nbytes / 2**20, status("VmHWM") - before, made.result()["models"]["merged"]["loss"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_data_larger_than_what_they_may_take(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    x = np.lib.format.open_memmap(path, "w+", "float32", (256 * 64, 4096))
    x[:, 0] = np.arange(len(x)) % 2
    x.flush()
    line = [sys.executable, "-c", MEMORY, str(path)]
    found = subprocess.run(line, capture_output=True, text=True, check=True)
    size, grown, loss = map(float, found.stdout.split())
    assert size == 256
    # A group of 32 clients is 32 MiB, of which an evaluation has some copies: 140 in all.
    assert grown < 180
    assert loss < 0.7


# -- files that are not what they were -------------------------------------------------------------


def test_a_file_that_was_cut_off_is_one_line(tmp_path: Path) -> None:
    x, y = arrays()
    simulation = simulate(federation(mapped(tmp_path, x), y))
    rounds = simulation.rounds()
    next(rounds)
    with (tmp_path / "x.npy").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(DataError, match=r'x.npy": 500 bytes, wanted \d+ or more: cut off'):
        next(rounds)
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match=r'x.npy": cannot be read \(No such file'):
        list(simulation.rounds())


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("x.npy", lambda p: p.write_bytes(p.read_bytes()[:-1]), "wanted a whole .npy file: cut"),
        ("y.npy", lambda p: p.unlink(), "no such file, wanted one; write it with numpy.save"),
        ("client.npy", lambda p: p.write_text("a, b"), "wanted a whole .npy file: cut"),
        ("y.npy", lambda p: np.save(p, np.arange(3)), "60 inputs but 3 targets"),
        ("client.npy", lambda p: np.save(p, np.arange(3)), r"clients of shape \(3,\)"),
    ],
)
def test_a_damaged_folder_is_one_line(name: str, damage: Any, text: str, tmp_path: Path) -> None:
    x, y = arrays()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "client.npy", np.arange(M * N) % M)
    damage(tmp_path / name)
    with pytest.raises(DataError, match=text) as caught:
        make_federation(str(tmp_path), "natural", seed=0)
    assert "\n" not in str(caught.value)
