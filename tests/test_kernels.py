"""The compiled loops against the torch code, and the choice between them.

What both compute is tested in `test_merging`; the golden numbers, on both, in `test_parity`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core_fixture import equal, made_delta, make_updates, net, norm_net, normal, play, soup_tensors
from fedmerge import kernels
from fedmerge.algorithms import FedAvg, FedMerge, FedMergePaper
from fedmerge.errors import ConfigError, ModelError
from fedmerge.merging import (
    block_scores,
    finite_rows,
    merge,
    merge_weighted,
)
from fedmerge.sketches import Sketch
from fedmerge.soup import Soup
from fedmerge.sums import ModelSum

pytest.importorskip("numba")

F32, F64 = torch.float32, torch.float64
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([F32, F64])
clients, models_of = st.integers(1, 9), st.integers(1, 12)
lengths = st.lists(st.sampled_from([1, 2, 7, 300, 8191, 8192, 8193, 9000]), min_size=1, max_size=4)
"""Of blocks: below, at and above the columns that the loops take at a time."""
ROUNDING = {F32: 2e-6, F64: 1e-13}
"""Most that the two may differ by, relative to the sum of magnitudes."""


@contextmanager
def using(name: str) -> Iterator[None]:
    """Compute with "torch" or "numba", or as "auto" chooses."""
    before = os.environ.get(kernels.VARIABLE)
    os.environ[kernels.VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[kernels.VARIABLE]
        if before is not None:
            os.environ[kernels.VARIABLE] = before


def layout(lengths: list[int]) -> tuple[tuple[tuple[int, int, int], ...], int]:
    """Segments of these lengths in two blocks, by turns, and the end of the last."""
    made, start = [], 0
    for i, length in enumerate(lengths):
        made.append((start, start + length, i % 2))
        start += length
    return tuple(made), start


def close(a: Tensor, b: Tensor, scale: Tensor | float, dtype: torch.dtype) -> None:
    """Equal to rounding; where one is not finite, the other is the same."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    rough = b.isfinite()
    torch.testing.assert_close(
        torch.where(rough, 0, a), torch.where(rough, 0, b), equal_nan=True, rtol=0, atol=0
    )
    error = torch.where(rough, a - b, 0).abs().double()
    assert bool((error <= ROUNDING[dtype] * scale + 1e-300).all()), float(error.max())


def spoiled(values: Tensor, seed: int, spoil: float | None) -> Tensor:
    """`values` with one number replaced, unless `spoil` is None."""
    if spoil is not None:
        values.view(-1)[seed % values.numel()] = spoil
    return values


spoils = st.sampled_from([None, None, float("nan"), float("inf"), float("-inf")])


@settings(max_examples=60)
@given(seeds, dtypes, clients, models_of, lengths, spoils)
@example(3, F32, 1, 1, [1], None)
@example(3, F32, 5, 6, [2049], float("nan"))
def test_merging_is_the_same(
    seed: int, dtype: torch.dtype, k: int, d: int, lengths: list[int], spoil: float | None
) -> None:
    segments, n = layout(lengths)
    models = spoiled(normal(seed, d, n, dtype=dtype), seed, spoil)
    weights = normal(seed + 1, k, 2, d, dtype=F64).softmax(-1)
    with using("torch"):
        wanted = merge_weighted(models, weights, segments)
    out = torch.full((k, n), 9.0, dtype=dtype)
    with using("numba"):
        made = merge_weighted(models, weights, segments, out=out)
        assert torch.equal(
            merge_weighted(models, weights, segments).nan_to_num(7), made.nan_to_num(7)
        )
    assert made.data_ptr() == out.data_ptr()
    close(made, wanted, 10.0, dtype)


@settings(max_examples=60)
@given(seeds, dtypes, clients, models_of, lengths, spoils)
def test_scores_are_the_same(
    seed: int, dtype: torch.dtype, k: int, d: int, lengths: list[int], spoil: float | None
) -> None:
    segments, n = layout(lengths)
    spans = tuple((start, stop) for start, stop, _ in segments)
    delta = spoiled(normal(seed, k, n, dtype=dtype), seed, spoil)
    models = normal(seed + 1, d, n, dtype=dtype)
    with using("torch"):
        wanted = block_scores(delta, models, spans)
    with using("numba"):
        made = block_scores(delta, models, spans)
    # Torch sums in float64, the loops up to a tile in the numbers' own dtype.
    with using("torch"):
        magnitude = block_scores(delta.abs(), models.abs(), spans).nan_to_num(0, 0, 0)
    close(made, wanted, magnitude, dtype)


@settings(max_examples=60)
@given(seeds, dtypes, clients, models_of, lengths, spoils, st.integers(0, 3))
@example(1, F32, 4, 5, [8192, 8193], None, 1)
def test_sums_and_steps_are_the_same(
    seed: int,
    dtype: torch.dtype,
    k: int,
    d: int,
    lengths: list[int],
    spoil: float | None,
    buffers: int,
) -> None:
    segments, n = layout(lengths)
    buffers = min(buffers, n - 1)
    delta = spoiled(normal(seed, k, n, dtype=dtype), seed, spoil)
    models, coef = normal(seed + 1, d, n, dtype=dtype), normal(seed + 2, k, 2, d, dtype=F64).abs()
    coef[:, :, seed % d] = 0  # a model nobody uses
    made: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name in ("torch", "numba"):
        total = ModelSum.of(d, 2, segments, n - buffers, counters=min(1, buffers))
        with using(name):
            total.add(coef[:1], delta[:1])
            if k > 1:
                total.add(coef[1:], delta[1:])
            whole = total.step(models)
            total.pace = normal(seed + 3, 2, d, dtype=F64).abs()
            made[name] = total.total, whole, total.step(models)
    close(made["numba"][0], made["torch"][0], 10.0 * k, F64)
    close(made["numba"][1], made["torch"][1], 100.0, dtype)
    close(made["numba"][2], made["torch"][2], 100.0, dtype)


@settings(max_examples=40)
@given(seeds, dtypes, clients, lengths, st.sampled_from([1, 3, 8, 256, 4096]), spoils)
def test_sketches_and_what_is_finite_are_the_same(
    seed: int, dtype: torch.dtype, k: int, lengths: list[int], size: int, spoil: float | None
) -> None:
    segments, n = layout(lengths)
    delta = spoiled(normal(seed, k, n, dtype=dtype), seed, spoil)
    sketch = Sketch.of(tuple((start, stop) for start, stop, _ in segments), size, seed)
    with using("torch"):
        wanted, fine = sketch(delta), finite_rows(delta)
    with using("numba"):
        made, found = sketch(delta), finite_rows(delta)
    close(made, wanted, 10.0 * max(1.0, (n / size) ** 0.5), dtype)
    assert found == fine == delta.isfinite().all(1).tolist()


def test_huge_finite_numbers_are_not_taken_for_infinity() -> None:
    for dtype in (F32, F64):
        delta = torch.full((3, 5000), torch.finfo(dtype).max, dtype=dtype)
        with using("numba"):
            assert finite_rows(delta) == [True] * 3
    with using("numba"):
        big = torch.full((1, 4), torch.finfo(F32).max / 2)
        assert bool(block_scores(big, big, ((0, 4),)).isfinite().all())


def test_rows_in_any_layout_of_memory_are_read() -> None:
    models, wide = normal(0, 3, 50), normal(1, 4, 100)
    views = (wide[:, ::2], wide.T[:50].T, wide[:1, :50].expand(4, -1))
    for delta in views:
        with using("torch"):
            wanted = block_scores(delta, models, ((0, 50),))
        with using("numba"):
            close(block_scores(delta, models, ((0, 50),)), wanted, 500.0, F32)
    with using("numba"):
        assert torch.equal(
            merge(models[:, ::2], wide[:, :3]), merge(models[:, ::2].clone(), wide[:, :3])
        )


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kept", [torch.bfloat16, F32])
def test_models_in_another_dtype_are_widened(
    dtype: torch.dtype, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "COLUMNS", 100)  # in several parts
    models, delta = normal(0, 3, 350).to(kept), normal(1, 4, 350, dtype=dtype)
    weights = normal(2, 4, 2, 3, dtype=F64).softmax(-1)
    segments = ((0, 120, 0), (120, 350, 1))
    for name in ("torch", "numba"):
        with using(name):
            merged = merge_weighted(models, weights, segments, dtype=dtype)
            scores = block_scores(delta, models, ((0, 120), (120, 350)))
        exact = torch.stack(
            [
                torch.cat([weights[i, b] @ models[:, s:e].double() for s, e, b in segments])
                for i in range(4)
            ]
        )
        # Widened before they are mixed: the result has the digits of its own dtype.
        close(merged, exact.to(dtype), 20.0, dtype)
        wanted = delta[:, 120:].double() @ models[:, 120:].double().T
        close(scores[:, 1], wanted, 3000.0, dtype)


@pytest.mark.parametrize("method", [FedMerge(d=3, sketch=8), FedMergePaper(d=3), FedAvg()])
@pytest.mark.parametrize("model", [net(dtype=F64), norm_net])
def test_rounds_of_a_server_are_the_same(method: object, model: object) -> None:
    made = []
    for name in ("torch", "numba"):
        with using(name):
            soup = Soup(method, model, seed=3)  # type: ignore[arg-type]
            assert soup.kernels == name
            play(soup, [("a", "b", "c"), ("b", "d"), ("a", "c")])
            made.append(soup_tensors(soup))
    for key, wanted in made[0].items():
        # Rounding decides which of two whole numbers of units is kept, of these two only.
        off = 1.0 if key.endswith((".own", ".past")) else 1e-6
        torch.testing.assert_close(made[1][key], wanted, rtol=1e-5, atol=off)


def test_an_ordered_server_has_the_same_bits_in_any_order_and_chunks() -> None:
    states = []
    for cuts in ([0, 4], [0, 1, 3, 4]):
        with using("numba"):
            soup = Soup(FedMerge(d=3, sketch=8), net(), ordered=True)
            for t in range(2):
                sent = soup.send(("d", "b", "a", "c"))
                updates = make_updates(sent, made_delta(soup, 4, t))
                order = [2, 0, 3, 1] if len(cuts) > 2 else [0, 1, 2, 3]
                for start, stop in itertools.pairwise(cuts):
                    soup.fold(updates.take(order[start:stop]))
                soup.commit()
            states.append(soup_tensors(soup))
    assert equal(*states)


# -- the choice -----------------------------------------------------------------------------------


def test_large_models_take_the_loops_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.name(kernels.LEAST - 1) == "torch"
    assert kernels.name(kernels.LEAST) == "numba"
    assert kernels.loops(kernels.LEAST, torch.float16) is None
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    assert kernels.name(kernels.LEAST) == "torch"


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    with using("torch"):
        assert kernels.name(10**9) == "torch"
    with using("numba"):
        assert kernels.name(1) == "numba"
    with using("c"), pytest.raises(ConfigError, match='FEDMERGE_KERNELS = "c": wanted auto, torch'):
        kernels.name(1)
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    with using("numba"), pytest.raises(ConfigError, match=r'pip install "fedmerge\[fast\]"'):
        kernels.name(1)


def test_a_small_server_does_not_import_numba() -> None:
    code = (
        "import sys; from torch import nn; from fedmerge import FedMerge, Soup\n"
        "Soup(FedMerge(), nn.Linear(3, 2)).send(['a'])\n"
        "print('numba' in sys.modules, 'fedmerge.loops' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != kernels.VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_memory_for_the_result_must_fit() -> None:
    models, weights = normal(0, 2, 6), normal(1, 3, 2)
    with pytest.raises(ModelError, match=r"out is \(2, 6\) of torch.float32: wanted \(3, 6\)"):
        merge_weighted(models, weights, out=torch.empty(2, 6))
    with pytest.raises(ModelError, match=r"of torch\.float64: wanted"):
        merge_weighted(models, weights, out=torch.empty(3, 6, dtype=F64))
