"""How a server's models are kept: rounding of smaller dtypes, and files that outlive a kill.

What is saved otherwise is in `test_store` and `test_soup`.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core_fixture import (
    equal,
    made_delta,
    make_updates,
    net,
    norm_net,
    normal,
    play,
    run,
    simulate,
    soup_tensors,
)
from fedmerge import kernels
from fedmerge.algorithms import FedAvg, FedMerge, FedMergePaper
from fedmerge.errors import ConfigError, StateError
from fedmerge.safety import Safety
from fedmerge.soup import Soup
from fedmerge.sums import by_chance

COHORTS = (("a", "b", "c"), ("b", "d"), ("a", "d", "e", "c"))
METHOD = FedMerge(d=3, sketch=8)


@pytest.fixture(params=["torch", "numba"], autouse=True)
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for the torch code and for the compiled loops."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv(kernels.VARIABLE, request.param)


# -- dtypes ---------------------------------------------------------------------------------------


def test_rounding_by_chance_keeps_the_mean_and_whole_numbers_of_the_dtype() -> None:
    n = 200_000
    low, high = 1.0, 1.0 + 2.0**-7  # neighbours in bfloat16
    value = low + 0.3 * (high - low)
    for salt in (1, 2):
        made = by_chance(torch.full((2, n), value, dtype=torch.float64), 0, salt).double()
        assert set(made.unique().tolist()) == {low, high}
        share = (made == high).double().mean(1)
        # Four standard deviations of a share of n draws.
        assert bool(((share - 0.3).abs() < 4 * (0.3 * 0.7 / n) ** 0.5).all())
        assert float((made[0] != made[1]).double().mean()) == pytest.approx(0.42, abs=0.01)
    exact = normal(0, 3, 50).to(torch.bfloat16)
    assert torch.equal(by_chance(exact.double(), 7, 9), exact)
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), -value]])
    rounded = by_chance(odd, 0, 0)[0]
    assert bool(rounded[0].isnan())
    assert rounded[1:3].tolist() == [float("inf"), -float("inf")]
    assert float(rounded[3]) in (-low, -high)


def distance(values: Tensor, bits: int) -> Tensor:
    """Between neighbours, at `values`, of a floating dtype with so many bits after the point."""
    return torch.exp2(values.abs().clamp_min(1e-30).log2().floor() - bits)


@pytest.mark.parametrize("method", [METHOD, FedAvg()])
@pytest.mark.parametrize(("kept", "bits"), [("float32", 23), ("bfloat16", 7)])
def test_a_round_in_a_smaller_dtype_is_off_by_less_than_one_distance(
    method: Any, kept: Any, bits: int
) -> None:
    model = net(dtype=torch.float64)
    small = Soup(method, model, storage=kept)
    assert small.shared["models"].dtype == getattr(torch, kept)
    exact = Soup(method, model)
    tensors, facts = exact.state()
    tensors["shared.models"] = small.shared["models"].double()
    exact.restore(tensors, facts, "here")
    sent = small.send(("a", "b"))
    # Mixed and sent in the module's dtype, with all its digits.
    assert torch.equal(sent.message, exact.send(("a", "b")).message)
    delta = made_delta(small, 2, 5)
    for soup in (small, exact):
        soup.fold(make_updates(sent, delta))
        soup.commit()
    models, wanted = small.shared["models"].double(), exact.shared["models"]
    assert bool(((models - wanted).abs() <= distance(wanted, bits)).all())
    assert bool((models != wanted).any())
    for name, rows in exact.rows(("a", "b")).items():
        torch.testing.assert_close(small.rows(("a", "b"))[name], rows, rtol=1e-12, atol=1e-12)


def test_steps_far_below_the_dtypes_distance_are_not_lost() -> None:
    soup = Soup(FedAvg(), lambda: torch.nn.Linear(300, 10, bias=False), storage="bfloat16")
    soup.shared["models"].fill_(1.0)
    for _ in range(100):
        sent = soup.send(("a",))
        soup.fold(make_updates(sent, torch.full((1, 3000), -1e-4)))
        soup.commit()
    # Rounded to nearest, a model would stay at 1: its neighbours are .0078 above and .0039 below.
    assert float(soup.shared["models"].double().mean()) == pytest.approx(1.01, abs=6e-4)


def test_a_smaller_dtype_is_part_of_a_state(tmp_path: Path) -> None:
    whole, half = (Soup(METHOD, net(), storage="bfloat16") for _ in range(2))
    play(whole, COHORTS)
    play(half, COHORTS[:1])
    half.save(tmp_path)
    again = Soup.open(tmp_path, METHOD, net(), storage="bfloat16")
    play(again, COHORTS[1:], seed=1)
    assert equal(soup_tensors(again), soup_tensors(whole))
    with pytest.raises(StateError, match="its storage is bfloat16, wanted model"):
        Soup.open(tmp_path, METHOD, net())


@pytest.mark.parametrize(
    ("text", "method", "model", "options"),
    [
        ('storage = "float8": wanted model, float32', METHOD, net(), {"storage": "float8"}),
        ("for fedmerge and fedavg only", FedMergePaper(d=2), net(), {"storage": "bfloat16"}),
        ("needs a model without buffers", METHOD, norm_net, {"storage": "bfloat16"}),
        ("do not go with robust", METHOD, net(), {"models_in": "x", "safety": Safety(trim=0.2)}),
    ],
)
def test_what_cannot_be_kept_is_told(
    text: str, method: Any, model: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=text):
        Soup(method, model, **options)


# -- files ----------------------------------------------------------------------------------------


def mapped(tmp_path: Path, **options: Any) -> Soup:
    return Soup.open(tmp_path / "state", METHOD, net(), models_in=tmp_path / "models", **options)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "models").iterdir())


def rows_and_models(soup: Soup) -> dict[str, Tensor]:
    return {**soup.rows(sorted(soup.clients)), "models": soup.shared["models"]}


@pytest.mark.parametrize("kept", ["model", "bfloat16"])
def test_models_in_files_are_the_same_to_the_bit(kept: Any, tmp_path: Path) -> None:
    plain = Soup(METHOD, net(), storage=kept)
    play(plain, COHORTS)
    soup = mapped(tmp_path, storage=kept)
    play(soup, COHORTS[:1])
    soup.save(tmp_path / "state")
    (kept_file,) = files(tmp_path)
    before = kept_file.read_bytes()
    assert len(before) == soup.shared["models"].nbytes
    play(soup, COHORTS[1:], seed=1)
    assert equal(rows_and_models(soup), rows_and_models(plain))
    assert kept_file.read_bytes() == before  # what a saved state needs is left alone
    assert len(files(tmp_path)) == 2
    again = mapped(tmp_path, storage=kept)
    assert again.version == 1
    play(again, COHORTS[1:], seed=1)
    assert equal(rows_and_models(again), rows_and_models(plain))
    again.save(tmp_path / "state")
    assert len(files(tmp_path)) == 1
    # The models are in that file only.
    assert sum(f.stat().st_size for f in (tmp_path / "state").glob("tensors-*")) < 40_000


def test_models_move_between_memory_and_files(tmp_path: Path) -> None:
    plain = Soup(METHOD, net())
    play(plain, COHORTS)
    plain.save(tmp_path / "state")
    soup = mapped(tmp_path)
    assert equal(rows_and_models(soup), rows_and_models(plain))
    # Beside models in files no means are kept.
    sent = plain.send(("a", "b")).message
    assert not torch.equal(plain.used(("a", "b")), sent)
    assert torch.equal(soup.used(("a", "b")), sent)
    soup.save(tmp_path / "state")
    with pytest.raises(StateError, match=r"has its models in a file, models-3-.*: pass models_in"):
        Soup.open(tmp_path / "state", METHOD, net())


@pytest.mark.parametrize("spoil", ["truncate", "remove"])
def test_a_file_that_is_not_whole_is_told_in_one_line(spoil: str, tmp_path: Path) -> None:
    soup = mapped(tmp_path)
    play(soup, COHORTS)
    soup.save(tmp_path / "state")
    (path,) = files(tmp_path)
    if spoil == "truncate":
        os.truncate(path, 100)
    else:
        path.unlink()
    with pytest.raises(StateError, match=r"100 bytes|cannot be read") as caught:
        mapped(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_full_disk_leaves_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soup = mapped(tmp_path)
    play(soup, COHORTS)
    soup.save(tmp_path / "state")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StateError, match=r"no room for .* No space left on device"):
        play(soup, [("a", "b")])
    monkeypatch.undo()
    assert len(files(tmp_path)) == 1
    assert mapped(tmp_path).version == len(COHORTS)


@pytest.mark.parametrize("kept", ["model", "bfloat16"])
def test_a_simulation_keeps_its_models_as_it_is_told(kept: Any, tmp_path: Path) -> None:
    whole, first, plain = (
        {"storage": kept, **options}
        for options in (
            {"models_in": tmp_path / "models"},
            {"models_in": tmp_path / "models", "checkpoint": tmp_path / "run"},
            {},
        )
    )
    wanted = run(METHOD, **plain)
    other = run(METHOD)
    same = equal(rows_and_models(wanted.soup), rows_and_models(other.soup))
    assert same is (kept == "model")
    assert equal(rows_and_models(run(METHOD, **whole).soup), rows_and_models(wanted.soup))
    started = simulate(METHOD, **first).rounds()
    next(started)
    next(started)
    started.close()  # saves
    assert equal(rows_and_models(run(METHOD, **first).soup), rows_and_models(wanted.soup))


KILLED = """
import sys
from pathlib import Path
from core_fixture import net, play
from fedmerge.algorithms import FedMerge
from fedmerge.soup import Soup
here = Path(sys.argv[1])
soup = Soup.open(here / "state", FedMerge(d=3, sketch=8), net(), models_in=here / "models")
for t in range(10_000):
    play(soup, [("a", "b")], seed=t)
    soup.save(here / "state")
    print(t, flush=True)
"""


@pytest.mark.parametrize("computed_by", ["torch"], indirect=True)
def test_a_kill_at_any_instant_leaves_a_whole_round(tmp_path: Path) -> None:
    for rounds in (1, 9):
        here = tmp_path / str(rounds)
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", KILLED, str(here)]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            for _ in range(rounds):
                running.stdout.readline()
            running.send_signal(signal.SIGKILL)
        soup = Soup.open(here / "state", METHOD, net(), models_in=here / "models")
        assert soup.version >= rounds
        plain = Soup(METHOD, net())
        for t in range(soup.version):
            play(plain, [("a", "b")], seed=t)
        assert equal(rows_and_models(soup), rows_and_models(plain))
        # What the kill has left over goes with the next save.
        play(soup, [("a",)])
        soup.save(here / "state")
        assert len(list((here / "models").iterdir())) == 1
