"""Kinds of clients: told from their updates, and where their rows go; by hand in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from core_fixture import made_delta, make_updates, net, normal
from fedmerge import ConfigError, FedMerge, Soup
from fedmerge.kinds import (
    FEWEST,
    LASTING,
    SETTLING,
    TOGETHER,
    directions,
    grouped,
    homes,
    in_common,
    lasting,
    likenesses,
    parting,
    plainness,
    settled,
)
from fedmerge.peers import Peers, remembered
from rule_by_hand import RuleByHand

F64 = torch.float64


def pasts(kinds: list[int], noise: float = 0.1, seed: int = 0) -> Tensor:
    """(n, 2, 8): updates so far of clients of these kinds; of kind -1, like no other."""
    own = normal(seed, len(kinds), 2, 8)
    shared = normal(seed + 1, 8, 2, 8)
    plain = torch.tensor(kinds)[:, None, None] >= 0
    return torch.where(plain, shared[kinds] + noise * own, own)


def table(kinds: list[int], logits: Tensor, seed: int = 0) -> Peers:
    past = pasts(kinds, seed=seed)
    made = {"place": torch.arange(len(kinds)), "past": past, "sketch": past, "logits": logits}
    made["home"] = homes(made, SETTLING, 0.0)[2]
    return made


def rows(kinds: list[int], d: int, seed: int = 3) -> Tensor:
    return normal(seed, len(kinds), 2, d, dtype=F64)


def test_two_clients_are_alike_as_far_as_they_resemble_the_same_others() -> None:
    past = pasts([0, 0, 1, 1, 2, 2, -1], noise=0.5)
    flat = past.flatten(1).double().numpy()
    apart = flat - flat.mean(0)
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    cosine = apart @ apart.T
    found = likenesses(past)
    for i in range(7):
        assert found[i, i] == 0
        for k in range(i):
            others = [o for o in range(7) if o not in (i, k)]
            wanted = np.corrcoef(cosine[i, others], cosine[k, others])[0, 1]
            assert float(found[i, k]) == pytest.approx(wanted)
    torch.testing.assert_close(found, found.T)


def cube(noise: float, seed: int) -> Tensor:
    """(24, 2, 6): of three clients of each of 8 kinds that are on or off in three factors."""
    factors = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
    shared = factors.repeat_interleave(4, 1).repeat(3, 1).float().view(24, 2, 6)
    return shared + noise * normal(seed, 24, 2, 6)


def plain(alike: Tensor) -> float:
    return plainness(alike, grouped(alike))


def test_plain_is_who_resembles_its_own_kind_and_no_other() -> None:
    same = torch.block_diag(*[torch.ones(3, 3)] * 2, torch.ones(1, 1)).double()
    kinds = torch.tensor([0, 0, 0, 1, 1, 1])
    two = same[:6, :6].clone().fill_diagonal_(0)
    own, other = two, 1 - two - torch.eye(6, dtype=F64)
    assert plainness(0.9 * own - 0.9 * other, kinds) == 1  # what is below 0 counts as 0
    span = 0.8 - 2 / 3
    assert plainness(0.9 * own + 0.2 * other, kinds) == pytest.approx((0.7 - 2 / 3) / span)
    assert plainness(0.8 * own + 0.2 * other, kinds) == 0
    # One alone of its kind, of seven, is 0 on the average; its likeness to others is its own.
    seven = torch.zeros(7, 7, dtype=F64)
    seven[:6, :6] = 0.9 * own
    alone = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    assert plainness(seven, alone) == pytest.approx((0.9 * 6 / 7 - 2 / 3) / span)
    # The one that is resembled most after its own kind is what counts, not all others.
    seven[:6, 6] = seven[6, :6] = 0.05
    assert plainness(seven, alone) == pytest.approx((0.85 * 6 / 7 - 2 / 3) / span)
    assert plainness(own, torch.zeros(6, dtype=torch.int64)) == 0  # a single kind
    # Three factors, on or off, of which kinds share some: hardly plain even without any noise.
    assert 0 < plain(likenesses(cube(0.0, 5))) < 0.5
    assert plain(likenesses(cube(0.3, 5))) == 0
    assert plain(likenesses(pasts([0, 1, 2, 3] * 4, noise=0.3))) > 0.5
    assert plain(likenesses(pasts([-1] * 16))) == 0


def test_clients_are_grouped_whatever_their_order() -> None:
    kinds = [0, 1, 2, 0, 1, 2, 0, 1, 2, 2]
    found = grouped(likenesses(pasts(kinds, noise=0.4))).tolist()
    assert len(set(found)) == 3
    assert len(set(zip(kinds, found, strict=True))) == 3


def test_each_kind_has_homes_of_its_own_where_its_rows_weigh_most() -> None:
    kinds = [0, 1, 0, 1, 0, 1, -1]
    logits = torch.zeros(7, 2, 3, dtype=F64)
    logits[::2, 0, 2] = 3.0  # both kinds like model 2 most in the first block, kind 0 by more
    logits[1::2, 0, 2] = 2.0
    logits[1::2, 0, 1] = 1.0
    logits[::2, 1, 1] = 1.0
    logits[1::2, 1, 0] = 1.0
    past = pasts(kinds, seed=9)
    far, _, found = homes({"past": past, "sketch": past, "logits": logits}, SETTLING, 0.0)
    assert far == plain(likenesses(past)) > 0
    assert found.tolist() == [[2, 1], [1, 0]] * 3 + [[-1, -1]]


@pytest.mark.parametrize(
    ("kinds", "d"),
    [
        ([0, 1, 2, 0, 1, 2], 2),  # more kinds than models
        ([0, 0, 0, 0, 0, 0], 3),  # one kind: what differs from the mean is noise
        ([0, 0, 1, 1], 3),  # too few to tell
        ([-1] * 12, 3),
    ],
)
def test_nobody_has_a_home_where_kinds_are_not_told(kinds: list[int], d: int) -> None:
    assert len(kinds) >= FEWEST or len(kinds) == 4
    # With this seed four clients would pass for two kinds.
    past = pasts(kinds, seed=9)
    far, _, found = homes({"past": past, "sketch": past, "logits": rows(kinds, d)}, SETTLING, 0.0)
    assert far == 0
    assert bool((found == -1).all())


def test_in_common_is_the_mean_cosine_of_like_clients_last_updates() -> None:
    alike = likenesses(cube(0.3, 5))
    last = cube(1.0, 6)
    flat = last.flatten(1).double().numpy()
    flat = flat - flat.mean(0)
    total = weight = 0.0
    for i in range(24):
        for k in range(24):
            w = max(0.0, float(alike[i, k])) ** 2
            cosine = flat[i] @ flat[k] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[k])
            total, weight = total + w * cosine, weight + w
    assert in_common(alike, last) == pytest.approx(total / weight)
    assert in_common(torch.zeros(24, 24, dtype=F64), last) == 0


def test_lasting_is_1_at_the_peak_and_0_from_where_it_has_faded() -> None:
    assert lasting(0.4, 0.4) == 1
    assert lasting(0.35, 0.4) == pytest.approx(0.5)
    assert (lasting(0.3, 0.4), lasting(-0.1, 0.4), lasting(0.0, 0.0)) == (0, 0, 0)


def test_graded_kinds_settle_late_and_while_like_updates_go_on_pointing_the_same_way() -> None:
    past, fresh = cube(0.3, 5), cube(0.3, 6)
    logits = normal(3, 24, 2, 9, dtype=F64)
    peers = {"past": past, "sketch": fresh, "logits": logits}
    assert plain(likenesses(past)) == 0
    far, peak, found = homes(peers, LASTING - 1, 0.0)
    assert (far, bool((found == -1).all())) == (0, True)
    assert peak == in_common(likenesses(past), fresh) > 0.5
    far, again, found = homes(peers, LASTING, 1.1 * peak)
    assert (far, again) == (pytest.approx((1 / 1.1 - 0.75) / 0.25), 1.1 * peak)
    # Three clients of each of 8 kinds, a home of its own for each.
    assert len(set(map(tuple, found.tolist()))) == 8
    assert bool((found.view(3, 8, 2) == found[:8]).all())
    # What is left of it now is noise, each client's own.
    faded = {**peers, "sketch": normal(8, 24, 2, 6)}
    far, _, found = homes(faded, LASTING, peak)
    assert (far, bool((found == -1).all())) == (0, True)


def test_what_has_faded_does_not_come_back() -> None:
    """Beside a single wild update, which moves the mean, all others' point the same way."""
    past, late = cube(0.3, 5), 0.01 * normal(8, 24, 2, 6)
    peers = {"past": past, "sketch": late, "logits": normal(3, 24, 2, 9, dtype=F64)}
    _, peak, _ = homes(peers, LASTING, 0.5)
    assert peak == math.inf
    late[7] = 5.0
    assert in_common(likenesses(past), late) > 0.8
    far, peak, found = homes(peers, LASTING + 9, peak)
    assert (far, peak, bool((found == -1).all())) == (0, math.inf, True)
    # Not before it is to have faded: then there is nothing that it could tell.
    assert homes({**peers, "sketch": normal(8, 24, 2, 6)}, LASTING - 1, 0.5)[1] == 0.5


def test_a_row_goes_a_share_of_the_way_to_the_home_of_its_kind() -> None:
    kinds = [0, 1, 0, 1, 0, 1]
    peers = table(kinds, rows(kinds, 3))
    start = torch.log_softmax(rows([0, 0], 3, seed=9), -1)
    stepped = torch.log_softmax(start + 0.1, -1)
    newcomers = pasts([1, 0])
    moved = settled(stepped, start, newcomers, torch.tensor([7, 8]), peers, 0.3)
    for i, like in ((0, 1), (1, 0)):
        for block in range(2):
            wanted = 0.7 * torch.softmax(start[i, block], -1)
            wanted[peers["home"][like, block]] += 0.3
            torch.testing.assert_close(moved[i, block].exp(), wanted)


def test_a_client_of_no_known_kind_keeps_its_own_step() -> None:
    kinds = [0, 0, 0, 0, 1, 1, 1, 1, -1]
    peers = table(kinds, rows(kinds, 3), seed=9)
    assert peers["home"][:, 0].ge(0).tolist() == [True] * 8 + [False]
    start, stepped = rows([0], 3, seed=9), rows([0], 3, seed=10)
    mean = peers["past"].double().flatten(1).mean(0)
    towards = directions(peers["past"][:8], mean)
    away = torch.linalg.lstsq(towards, -torch.ones(8, 1, dtype=F64)).solution[:, 0]
    assert bool((towards @ away < 0).all())
    past = (mean + away).view(1, 2, 8)
    assert torch.equal(settled(stepped, start, past, torch.tensor([9]), peers, 0.3), stepped)


def test_a_client_is_no_witness_of_its_own_kind() -> None:
    # Of kind 0 are client 0 and one it hardly resembles; it resembles both of kind 1 more.
    towards = torch.tensor([[1.0, 0, 0], [0.2, 0.98, 0], [0.4, 0, 0.92], [0.4, 0, 0.92]])
    past = torch.cat([towards, -towards])[:, None]  # about a mean of 0
    home = torch.tensor([0, 0, 1, 1, -1, -1, -1, -1])[:, None]
    peers = {"place": torch.arange(8), "past": past, "home": home}
    start = torch.zeros(1, 1, 2, dtype=F64)
    moved = settled(start, start, past[:1], torch.tensor([0]), peers, 0.5)
    torch.testing.assert_close(moved[0, 0].exp(), torch.tensor([0.25, 0.75], dtype=F64))


def test_the_first_updates_are_remembered_in_full_and_later_ones_less() -> None:
    sketch, before = normal(1, 3, 2, 4), torch.tensor([0, 9, 19])
    past = remembered(torch.ones(3, 2, 4), sketch, before)
    torch.testing.assert_close(past, 1 + sketch * torch.tensor([1, 1, 0.25])[:, None, None])


def test_kinds_are_parting_where_their_mean_updates_point_no_way_in_common() -> None:
    kinds = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    ways = torch.eye(8)[[0, 1, 2, 0, 1, 2, 3]] * torch.tensor([1, 1, 1, 3, 2, 5, 9])[:, None]
    ways[6] = 9.0  # one alone is not asked
    noise = torch.tensor([1, 1, 1, -1, -1, -1, 0])[:, None] * normal(1, 8)
    updates = (ways + noise).view(7, 2, 4)
    assert parting(updates, kinds) == pytest.approx(1)
    updates[:, 1, 3] = 9.0  # beside which the rest is little
    assert parting(updates, kinds) == 0
    # Three means of length 1 with a cosine of c: c / TOGETHER of the way to 0.
    third = 0.6 * TOGETHER
    axes = torch.linalg.cholesky(torch.full((3, 3), third, dtype=F64).fill_diagonal_(1))
    updates = torch.cat([axes, axes]).view(6, 1, 3)
    assert parting(updates, kinds[:6]) == pytest.approx(1 - 0.6)
    axes = torch.linalg.cholesky(torch.full((3, 3), -0.3, dtype=F64).fill_diagonal_(1))
    assert parting(torch.cat([axes, axes]), kinds[:6]) == 1


def test_before_kinds_settle_they_go_home_as_far_as_they_are_parting_so_far_and_lately() -> None:
    past = pasts([0, 1, 2, 3] * 4, noise=0.3)
    kinds = grouped(likenesses(past))
    together = past + 20.0  # all one way
    logits = rows([0] * 16, 4)
    assert 0 < parting(past, kinds) <= 1
    assert parting(together, kinds) == 0

    def far(past: Tensor, sketch: Tensor, rounds: int) -> float:
        peers = {"past": past, "sketch": sketch, "logits": logits}
        made, _, found = homes(peers, rounds, 0.0)
        assert bool((found >= 0).all()) == (made > 0)
        return made

    whole = far(past, past, SETTLING)
    assert whole == far(together, together, SETTLING) > 0.5
    assert far(past, past, 1) == far(past, past, SETTLING - 1) == whole * parting(past, kinds)
    # What the two say differs: the less of both counts.
    less = past + 0.4
    assert 0 < parting(less, kinds) < parting(past, kinds)
    assert far(past, less, 1) == far(less, past, 1) == whole * parting(less, kinds)
    assert far(past, together, SETTLING - 1) == far(together, past, SETTLING - 1) == 0


def play(
    method: FedMerge,
    rounds: int = 14,
    noise: float = 0.1,
    graded: float = 0.0,
    fades: bool = False,
    together: float = 0.0,
) -> tuple[Soup, RuleByHand]:
    """Rounds of nine clients of three kinds, of which some are away at times.

    Two of the kinds share as much as `graded` says, all three as much as `together`. What clients
    have in common fades from round 6 on, or else shows more plainly from round 10 on.
    """
    soup = Soup(method, net(dtype=F64), seed=3)
    hand = RuleByHand(
        soup.shared["models"].numpy().copy(), soup.setup.layout.spans, settle=method.settle
    )
    shared = made_delta(soup, 3, 1)
    shared[1] += graded * (shared[0] - shared[1])
    shared += together * made_delta(soup, 1, 2)
    for t in range(rounds):
        cohort = [f"c{i}" for i in range(9) if (i + t) % 7]
        sent = soup.send(cohort)
        kinds = [int(c[1:]) % 3 for c in cohort]
        common = 0.8 ** max(0, t - 6) if fades else 1.0
        own = noise * (1.0 if fades or t < 10 else 0.5)
        delta = common * shared[kinds] + own * made_delta(soup, len(cohort), 100 + t)
        updates = make_updates(sent, delta)
        assert soup.fold(updates) == []
        soup.commit()
        hand.step(
            {c: delta[i].numpy() for i, c in enumerate(cohort)},
            {c: int(updates.n_examples[i]) for i, c in enumerate(cohort)},
            dict.fromkeys(cohort, 0.5),
        )
    return soup, hand


@pytest.mark.parametrize(("noise", "fades"), [(2.1, False), (1.6, True)])
def test_rows_of_kinds_settle_as_by_hand(noise: float, fades: bool) -> None:
    soup, hand = play(FedMerge(d=4), noise=noise, graded=0.3, fades=fades)
    assert len(hand.kinds) == 3
    # Once what they have in common has faded, they settle as far as they are plain.
    assert 0.2 < hand.plain < 0.9
    assert (hand.far > hand.plain) == (not fades)
    assert float(soup.shared["settled"]) == pytest.approx(hand.far, rel=1e-4)
    assert float(soup.shared["peak"]) == pytest.approx(hand.peak, rel=1e-4)
    weights = soup.weights(list(hand.weights))
    assert weights is not None
    np.testing.assert_allclose(weights, np.stack(list(hand.weights.values())), rtol=1e-4)
    np.testing.assert_allclose(soup.shared["models"], hand.models, rtol=1e-4, atol=1e-5)
    without = play(FedMerge(d=4, settle=0))[0].weights(list(hand.weights))
    assert float((weights - without).abs().max()) > 0.1


def test_rows_go_home_at_once_where_kinds_are_parting_and_else_after_the_first_rounds() -> None:
    for together, rounds in ((0.0, SETTLING), (1.0, SETTLING), (1.0, SETTLING + 1)):
        (one, _), (other, hand) = (
            play(FedMerge(d=4, settle=s), rounds, together=together) for s in (0.0, 0.9)
        )
        waits = together and rounds == SETTLING
        assert torch.equal(one.shared["models"], other.shared["models"]) == bool(waits)
        assert float(other.shared["settled"]) == pytest.approx(hand.far, rel=1e-4)
        assert hand.far > 0.5
        np.testing.assert_allclose(other.shared["models"], hand.models, rtol=1e-3, atol=1e-5)


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"settle = 2: wanted 0 to 1"):
        FedMerge(settle=2.0)
