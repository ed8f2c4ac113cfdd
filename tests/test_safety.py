"""Compression, the guard, robust model steps and differential privacy, each against numbers made by
hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmerge import ConfigError, FedAvg, FedMerge, Layout, ModelError, Soup, Updates
from fedmerge.algorithms import IFCA
from fedmerge.codec import Codec, cut, decode, n_bytes, spread
from fedmerge.guard import Guard
from fedmerge.privacy import Privacy, PrivateSum, noisy_rows
from fedmerge.robust import trimmed_mean
from fedmerge.safety import Safety

PARAMETERS = 200


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- compression -----------------------------------------------------------------------------------


def test_top_k_sends_the_largest_and_keeps_the_rest() -> None:
    delta = torch.tensor([0.1, -3.0, 0.2, 2.0, -0.3, 7.0])
    coded, left = Codec("topk", keep=0.4).encode(delta, 5, None)
    assert coded["places"].tolist() == [1, 3]
    assert coded["values"].tolist() == [-3.0, 2.0]
    assert coded["buffers"].tolist() == [7.0]
    torch.testing.assert_close(left, torch.tensor([0.1, 0.0, 0.2, 0.0, -0.3]))
    sent = decode(coded, 6, 5, torch.float32)
    assert sent.tolist() == [0.0, -3.0, 0.0, 2.0, 0.0, 7.0]
    assert n_bytes(coded) == 2 * 4 + 2 * 4 + 4


@pytest.mark.parametrize("kind", ["bfloat16", "topk"])
def test_what_is_left_out_comes_later(kind: str) -> None:
    """Sent updates and the rest add up to the updates themselves, round after round."""
    codec = Codec(kind, keep=0.05)
    total, sent, left = torch.zeros(PARAMETERS), torch.zeros(PARAMETERS), None
    for step in range(8):
        delta = draw(PARAMETERS, seed=step)
        total += delta
        coded, left = codec.encode(delta, PARAMETERS, left)
        sent += decode(coded, PARAMETERS, PARAMETERS, torch.float32)
        torch.testing.assert_close(sent + left, total, rtol=1e-4, atol=1e-5)
    assert left.abs().max() > 0


def test_bfloat16_halves_the_bytes_and_rounds_to_eight_bits() -> None:
    delta = draw(PARAMETERS)
    coded, _ = Codec("bfloat16").encode(delta, PARAMETERS, None)
    assert n_bytes(coded) == 2 * PARAMETERS
    error = (decode(coded, PARAMETERS, PARAMETERS, torch.float32) - delta).abs() / delta.abs()
    assert 2**-12 < error.max() <= 2**-8


@pytest.mark.parametrize(
    "coded",
    [
        {"delta": torch.zeros(4)},
        {"delta": torch.zeros(5, dtype=torch.float64)},
        {"half": torch.zeros(4, dtype=torch.int16)},
        {"half": torch.zeros(5, dtype=torch.int32)},
        {"values": torch.ones(2), "places": torch.tensor([0, 5]).int()},
        {"values": torch.ones(2), "places": torch.tensor([-1, 2]).int()},
        {"values": torch.ones(2), "places": torch.tensor([2, 2]).int()},
        {"values": torch.ones(2), "places": torch.tensor([2]).int()},
        {"values": torch.ones(2), "places": torch.tensor([1, 2])},
        {"values": torch.ones(0), "places": torch.zeros(0).int()},
        {"half": torch.zeros(5, dtype=torch.int16), "buffers": torch.ones(1)},
        {"other": torch.ones(5)},
        {},
    ],
)
def test_what_no_codec_has_made_is_refused(coded: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError):
        decode(coded, 5, 5, torch.float32)


def test_parts_of_a_row_are_cut_and_put_back() -> None:
    rows = draw(2, 3, 10)
    parts = ((1, 4), (6, 10))
    sent = cut(rows, parts)
    assert torch.equal(sent, rows[..., [1, 2, 3, 6, 7, 8, 9]])
    back = spread(sent, parts, 10)
    assert torch.equal(back[..., 1:4], rows[..., 1:4])
    assert not back[..., [0, 4, 5]].any()
    with pytest.raises(ModelError):
        spread(sent[..., 1:], parts, 10)


@pytest.mark.parametrize("options", [{"kind": "zip"}, {"keep": 0.0}, {"keep": 1.5}])
def test_a_codec_that_is_none_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Codec(**options)  # type: ignore[arg-type]


# -- the guard -------------------------------------------------------------------------------------


def test_the_bound_is_the_model_at_first_and_the_median_later() -> None:
    guard = Guard(factor=4.0)
    assert guard.bound(3.0) == 12.0
    for length in (1.0, 9.0, 2.0, 8.0):
        guard.take(length)
    assert guard.bound(3.0) == 12.0
    guard.take(2.5)
    assert guard.bound(3.0) == 10.0
    assert Guard().bound(0.0) == math.inf


def test_patience_is_lost_by_offences_only_and_won_back() -> None:
    guard = Guard(patience=2)
    for reason in ("stale", "norm", "stale", "unknown"):
        guard.refuse("a", reason)
    assert not guard.aside
    guard.refuse("a", "shape")
    assert guard.aside == {"a"}
    copy = Guard(patience=2)
    copy.restore(guard.to_json())
    assert (copy.aside, copy.offences) == ({"a"}, {"a": 2})
    copy.readmit(["a"])
    copy.refuse("a", "norm")
    assert not copy.aside
    forgiving = Guard(patience=0)
    for _ in range(9):
        forgiving.refuse("a", "norm")
    assert not forgiving.aside


# -- a soup with safety ----------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


SIZE = Layout.of(network()).size


def soup_with(algorithm: FedAvg | FedMerge, safety: Safety) -> Soup:
    return Soup(algorithm, network, seed=1, safety=safety)


def fold(soup: Soup, delta: Tensor, n: list[int] | None = None) -> list[str]:
    k = len(delta)
    sent = soup.send([f"c{i}" for i in range(k)])
    return [
        refusal.reason
        for refusal in soup.fold(
            Updates(
                sent.tickets,
                delta,
                torch.tensor(n or [10] * k),
                torch.full((k,), 5),
                torch.full((k,), 0.1, dtype=torch.float64),
            )
        )
    ]


def test_a_soup_refuses_what_the_guard_refuses() -> None:
    soup = soup_with(FedAvg(), Safety(Guard(factor=3.0, patience=1)))
    length = torch.linalg.vector_norm(soup.setup.initial(0)).item()
    delta = draw(3, SIZE)
    delta *= length / torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    delta[1] *= 3.01
    delta[2] *= 2.99
    assert fold(soup, delta) == ["norm"]
    assert soup.refused_by == {"c1": {"norm": 1}}
    assert set(soup.commit()) == {"c0", "c2"}
    assert fold(soup, delta[:2] * 0.1) == ["set aside"]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=9), st.data())
def test_equal_weights_give_the_plain_median_and_mean(
    values: list[float], data: st.DataObject
) -> None:
    delta = torch.tensor(values, dtype=torch.float64)[:, None]
    weight = torch.full((len(values), 1), data.draw(st.floats(0.1, 5.0)), dtype=torch.float64)
    assert trimmed_mean(delta, weight, 0.5).item() == pytest.approx(np.median(values), abs=1e-9)
    assert trimmed_mean(delta, weight, 0.0).item() == pytest.approx(np.mean(values), abs=1e-9)


def test_a_weight_of_two_counts_as_two_clients() -> None:
    delta = torch.tensor([[1.0, 5.0], [2.0, 4.0], [30.0, -9.0]])
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    twice = torch.tensor([[1.0, 5.0], [2.0, 4.0], [2.0, 4.0], [30.0, -9.0]])
    for trim in (0.0, 0.25, 0.5):
        found = trimmed_mean(delta, weight, trim)
        wanted = trimmed_mean(twice, torch.ones(4, 1, dtype=torch.float64), trim)
        torch.testing.assert_close(found[:1], wanted)
        assert not found[1].any()  # a model that nobody uses
    # One quarter off at either end of 1, 2, 2, 30 and of -9, 4, 4, 5.
    assert trimmed_mean(delta, weight, 0.25)[0].tolist() == [2.0, 4.0]


def test_a_robust_soup_follows_the_median_and_a_plain_one_does_not() -> None:
    delta = 0.01 * draw(5, SIZE)
    delta[4] = 3.0
    plain, robust = soup_with(FedAvg(), Safety()), soup_with(FedAvg(), Safety(trim=0.5))
    for soup in (plain, robust):
        assert fold(soup, delta) == []
        soup.commit()
    start = plain.setup.initial(0)
    torch.testing.assert_close(
        start - robust.shared["models"][0], delta.median(0).values, rtol=1e-4, atol=1e-6
    )
    assert (start - plain.shared["models"][0]).mean() > 0.5


def test_a_robust_soup_weighs_each_model_by_the_rows() -> None:
    soup = soup_with(FedMerge(d=2), Safety(trim=0.5))
    before = soup.shared["models"].clone()
    delta = 0.01 * draw(5, SIZE)
    n = [10, 20, 30, 40, 5]
    fold(soup, delta, n)
    share = soup._round.gathered("share")
    soup.commit()
    for start, stop, block in soup.setup.layout.segments:
        wanted = trimmed_mean(delta[:, start:stop], share[:, block], 0.5)
        moved = before[:, start:stop] - soup.shared["models"][:, start:stop]
        torch.testing.assert_close(moved, wanted.float(), rtol=1e-3, atol=1e-6)


# -- privacy ---------------------------------------------------------------------------------------


def test_epsilon_is_the_librarys_own() -> None:
    dp = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    rounds, delta = 30, 1e-5
    found = Privacy(1.0, noise=2.0, delta=delta).epsilon(rounds)
    accountant = rdp.RdpAccountant()
    # Two releases with multiplier z are one with z / sqrt(2).
    accountant.compose(dp.GaussianDpEvent(2.0 / math.sqrt(2.0)), rounds)
    assert found == pytest.approx(accountant.get_epsilon(delta), rel=1e-9)
    with_rows = Privacy(1.0, noise=2.0, row_noise=2.0, delta=delta).epsilon(rounds)
    accountant = rdp.RdpAccountant()
    accountant.compose(dp.GaussianDpEvent(2.0 / math.sqrt(3.0)), rounds)
    assert with_rows == pytest.approx(accountant.get_epsilon(delta), rel=1e-9)
    assert Privacy(1.0, noise=2.0).epsilon(0) == 0.0


def test_updates_are_clipped_and_sizes_do_not_count() -> None:
    delta = draw(3, SIZE)
    delta *= torch.tensor([0.5, 4.0, 40.0])[:, None] / torch.linalg.vector_norm(
        delta, dim=1, keepdim=True
    )
    clipped = Privacy(2.0, noise=1.0).clipped(delta)
    lengths = torch.linalg.vector_norm(clipped, dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.5, 2.0, 2.0]))
    tiny = Safety(privacy=Privacy(2.0, noise=1e-9, seed=0))
    soup = soup_with(FedAvg(), tiny)
    fold(soup, delta, n=[1, 100, 10_000])
    soup.commit()
    moved = soup.setup.initial(0) - soup.shared["models"][0]
    torch.testing.assert_close(moved, clipped.mean(0), rtol=1e-3, atol=1e-6)


def test_the_models_noise_has_the_stated_scale() -> None:
    """Nobody moves: what is seen is noise of scale noise * clip / (weight with its own noise)."""
    privacy = Privacy(clip=0.7, noise=0.05, seed=3)
    found = []
    for seed in range(60):
        soup = Soup(
            FedAvg(),
            network,
            seed=1,
            safety=Safety(privacy=Privacy(privacy.clip, privacy.noise, seed=seed)),
        )
        fold(soup, torch.zeros(20, SIZE))
        soup.commit()
        found.append(soup.setup.initial(0) - soup.shared["models"][0])
    noise = torch.stack(found)
    wanted = privacy.clip * privacy.noise / 20
    assert noise.std().item() == pytest.approx(wanted, rel=0.03)
    assert abs(noise.mean().item()) < 4 * wanted / math.sqrt(noise.numel())


def test_one_client_changes_the_sum_by_the_clipping_length_at_most() -> None:
    """The sensitivity that the noise is made for, with one-hot and with mixed rows."""
    for logits in (torch.zeros(3), torch.tensor([9.0, 0.0, -9.0])):
        soup = soup_with(FedMerge(d=3), Safety(privacy=Privacy(0.5, noise=1.0, seed=0)))
        soup.join(["c0"])
        soup._roster.tables["logits"][:] = logits.double()
        fold(soup, 100 * draw(1, SIZE))
        total = soup._round.sum
        assert total is not None
        assert torch.linalg.vector_norm(total.total) <= 0.5 * (1 + 1e-6)
        bound = math.sqrt(len(soup.setup.layout.blocks))
        assert torch.linalg.vector_norm(total.mass) <= bound * (1 + 1e-9)


def test_the_two_sums_have_noise_of_their_own_scales() -> None:
    """What is released: sums of updates, scaled by clip; of weights, by the root of the blocks."""
    sums = []
    for seed in range(400):
        made = PrivateSum.of(3, 4, ((0, 50, 0),), 50)
        made.mass += 1000.0  # far from where a model without weight is left alone
        made.privacy = Privacy(clip=0.7, noise=1.5, seed=seed)
        made.add_noise()
        sums.append(torch.cat([made.total.flatten(), made.mass.flatten() - 1000]))
    noise = torch.stack(sums)
    models, weights = noise[:, :150], noise[:, 150:]
    assert models.std().item() == pytest.approx(1.5 * 0.7, rel=0.02)
    assert weights.std().item() == pytest.approx(1.5 * 2.0, rel=0.03)
    assert abs(float((models[:, 0] * weights[:, 0]).mean())) < 4 * (1.05 * 3.0) / 20  # 400 draws


def test_with_privacy_no_client_decides_whether_anothers_update_counts() -> None:
    """Six long updates raise the running median: the last is taken in either case, clipped."""
    for others in (0.01, 100.0):
        safety = Safety(guard=Guard(2.0, 5), privacy=Privacy(0.5, noise=1.0, seed=0))
        soup = soup_with(FedAvg(), safety)
        fold(soup, others * draw(6, SIZE))
        before = soup._round.sum.total.clone()  # type: ignore[union-attr]
        soup.join(["last"])
        ticket = soup.send(["last"]).tickets[0]
        one = torch.ones(1)
        refused = soup.fold(Updates((ticket,), draw(1, SIZE), one, one, one.double(), {}))
        assert not refused
        added = soup._round.sum.total - before  # type: ignore[union-attr]
        assert torch.linalg.vector_norm(added).item() == pytest.approx(0.5, rel=1e-5)


def test_noise_on_rows_has_the_stated_scale() -> None:
    privacy = Privacy(1.0, noise=1.0, row_noise=0.3, seed=0)
    logits = torch.zeros(4000, 2, 3, dtype=torch.float64)
    reach = torch.full((4000,), 0.1, dtype=torch.float64)
    noisy = noisy_rows(logits, reach, privacy, 0)
    # Normalising takes away a constant of each block: differences show the noise itself.
    spread = (noisy[..., 0] - noisy[..., 1]).std().item() / math.sqrt(2)
    assert spread == pytest.approx(0.3 * 0.1 * math.sqrt(6), rel=0.03)
    torch.testing.assert_close(noisy.exp().sum(-1), torch.ones(4000, 2, dtype=torch.float64))


def test_rows_are_noisy_only_if_asked_for() -> None:
    rows = {}
    for row_noise in (0.0, 0.5):
        privacy = Privacy(1.0, noise=1e-6, row_noise=row_noise, seed=0)
        soup = soup_with(FedMerge(d=3), Safety(privacy=privacy))
        fold(soup, 0.1 * draw(4, SIZE))
        soup.commit()
        rows[row_noise] = soup.rows(["c0"])["logits"]
    assert (rows[0.0] - rows[0.5]).abs().max() > 0.01


def test_private_rounds_stay_finite_when_nobody_uses_a_model() -> None:
    soup = soup_with(FedMerge(d=4), Safety(privacy=Privacy(1.0, noise=3.0, seed=0)))
    for _ in range(5):
        fold(soup, 0.1 * draw(2, SIZE))
        soup.commit()
        soup.commit()  # a round without updates
    assert all(t.isfinite().all() for t in (*soup.shared.values(), *soup.rows(["c0"]).values()))
    assert soup.version == 10


def test_what_cannot_be_protected_is_refused() -> None:
    def with_buffers() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    private = Safety(privacy=Privacy(1.0, noise=1.0))
    with pytest.raises(ConfigError, match="GroupNorm"):
        Soup(FedAvg(), with_buffers, safety=private)
    with pytest.raises(ConfigError, match="fedmerge and fedavg only"):
        Soup(IFCA(d=2), network, safety=private)
    with pytest.raises(ConfigError, match="together"):
        Soup(FedAvg(), network, safety=Safety(trim=0.5, privacy=Privacy(1.0, noise=1.0)))
    for options in ({"clip": 0.0}, {"noise": 0.0}, {"row_noise": -1.0}, {"delta": 0.0}):
        with pytest.raises(ConfigError):
            Privacy(**{"clip": 1.0, "noise": 1.0, **options})  # type: ignore[arg-type]
