"""How far models go along the updates of a round; the whole rule: `test_merging`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core_fixture import made_delta, make_updates, net
from fedmerge import FedMerge, Simulation, Soup, Training, make_federation, make_model
from fedmerge.merging import merging_weights
from fedmerge.pace import (
    AHEAD,
    agreement,
    ahead,
    averaged,
    bounded,
    mean_steps,
    model_pace,
    wanted,
)

F64 = torch.float64

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 7)


def f64(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def near(a: Tensor, b: Tensor, tol: float = 1e-12) -> bool:
    return bool(((a - b).abs() <= tol * (1 + b.abs())).all())


def test_a_model_goes_as_far_as_the_rounds_clients_use_it() -> None:
    cohort = torch.tensor([[[0.8, 0.1, 0.1]]], dtype=F64)
    others = torch.tensor([[[0.2, 0.7, 0.1]], [[0.2, 0.7, 0.1]], [[0.4, 0.5, 0.1]]], dtype=F64)
    # All four use the models by .4, .5 and .1; the one of this round by twice, a fifth and all.
    assert near(model_pace(cohort, others), torch.tensor([[1.0, 0.2, 1.0]], dtype=F64))


@given(seeds, sizes, st.integers(0, 6), sizes)
def test_no_model_goes_further_because_clients_are_away(seed: int, k: int, n: int, d: int) -> None:
    cohort = merging_weights(3 * f64(seed, k, 2, d))
    others = merging_weights(3 * f64(seed + 1, n, 2, d))
    pace = model_pace(cohort, others)
    assert bool((pace >= 0).all() and (pace <= 1).all())
    # Some model is used as much as by all.
    assert near(pace.amax(-1), torch.ones(2, dtype=F64))
    same = model_pace(cohort, cohort.repeat(n, 1, 1))  # the others use them alike
    assert near(same, torch.ones(2, d, dtype=F64))
    if not n:
        assert torch.equal(pace, torch.ones(2, d, dtype=F64))


def far_of(share: Tensor, updates: Tensor, wanted: Tensor) -> Tensor:
    return bounded(share, updates, mean_steps(share, updates), wanted, 3.0)


def test_a_model_goes_the_further_the_less_its_clients_agree() -> None:
    # Two blocks of one number, four clients; of the models only the last is not for all of them.
    share = torch.ones(4, 2, 3, dtype=F64)
    share[1:, :, 2] = 0
    share[:, :, 1] = torch.tensor([[2.0], [2.0], [0.0], [0.0]])
    updates = torch.tensor([[[1.0], [2.0]], [[1.0], [-2.0]], [[1.0], [2.0]], [[-3.0], [-2.0]]])

    def far(wanted: float) -> Tensor:
        return far_of(share, updates, torch.full((3,), wanted, dtype=F64))

    # Mean squared lengths of 7, 5 and 5, and means of lengths whose squares are 0, 1 and 5.
    assert far(9.0).tolist() == [3.0, 2.5, 1.0]
    assert far(1.5).tolist() == [1.5, 1.5, 1.0]
    assert far(-2.0).tolist() == [1.0, 1.0, 1.0]


@given(seeds, sizes, sizes, st.floats(-1, 5))
def test_how_far_a_model_goes_is_within_its_bounds(
    seed: int, k: int, d: int, wanted: float
) -> None:
    share = f64(seed, k, 2, d).abs()
    updates = f64(seed + 1, k, 2, 5)
    wish = torch.full((d,), wanted, dtype=F64)
    found = far_of(share, updates, wish)
    assert bool((found >= 1).all() and (found <= min(3.0, max(1.0, wanted))).all())
    assert near(far_of(share, 1e-3 * updates, wish), found)  # whatever their length
    once = torch.ones(d, dtype=F64)
    assert torch.equal(far_of(share, updates[:1].expand(k, -1, -1), wish), once)
    # Nor does a model that nobody uses fail.
    assert bool(far_of(torch.zeros_like(share), updates, wish).isfinite().all())


@given(seeds, sizes, sizes)
def test_a_models_step_is_the_mean_of_its_clients_updates(seed: int, k: int, d: int) -> None:
    share, updates = f64(seed, k, 2, d).abs(), f64(seed + 1, k, 2, 5)
    found = mean_steps(share, updates)
    for b in range(2):
        for j in range(d):
            by_hand = np.average(updates[:, b], axis=0, weights=share[:, b, j])
            np.testing.assert_allclose(found[b, j], by_hand, rtol=1e-9, atol=1e-12)


def test_a_model_gets_ahead_while_its_rounds_agree_and_falls_back_when_they_do_not() -> None:
    on = torch.tensor([3.0, 0.0], dtype=F64)
    heading = torch.stack([on, on, -on, torch.tensor([4.0, 3.0], dtype=F64), 0 * on])
    heading = heading[None].repeat(2, 1, 1)  # (b, d, s)
    step = on.expand(2, 5, 2)
    none = torch.zeros(5, dtype=F64)
    found = agreement(step, heading)
    assert near(found, torch.tensor([1, 1, -1, 0.8, 0], dtype=F64))
    assert near(ahead(none, found), torch.tensor([0.1, 0.1, 0, 0, 0], dtype=F64))
    before = torch.tensor([0.5, 0.95, 1.0, 0.3, 0.95], dtype=F64)
    assert near(ahead(before, found), torch.tensor([0.6, AHEAD, 0, 0.2, 0.05], dtype=F64))
    # All blocks count as one: here the second, which is longer, goes back.
    both = torch.stack([on, -2 * on])[:, None]
    found = agreement(both, both * torch.tensor([[[1.0]], [[-1.0]]]))
    assert near(found, none[:1] - 0.6)
    assert near(ahead(none[:1] + 0.5, found), none[:1])


def test_models_that_turn_back_go_no_further_for_what_training_does() -> None:
    agrees = torch.tensor([1.0, 0.0, -0.25, -0.5, -1.0], dtype=F64)
    none, much = torch.zeros(5, dtype=F64), torch.tensor(0.3, dtype=F64)
    assert near(wanted(much, none, agrees), torch.tensor([2.2, 2.2, 1.6, 1, 1], dtype=F64))
    # The other sign, and where training does harm.
    assert near(wanted(much, none + 0.7, agrees)[2:], torch.tensor([1.7, 1.7, 1.7], dtype=F64))
    assert near(wanted(-much, none, agrees), none + 1)


def test_models_get_ahead_in_rounds_that_agree() -> None:
    """By a tenth a round from the second on, as clients say nothing of their training."""

    def after(rounds: int, extrapolate: float = 3.0) -> dict[str, Tensor]:
        soup = Soup(FedMerge(d=2, extrapolate=extrapolate), net(dtype=F64), seed=3)
        for _ in range(rounds):
            sent = soup.send(["a", "b", "c"])
            soup.fold(make_updates(sent, 0.01 * made_delta(soup, 3, 1)))
            soup.commit()
        return soup.shared

    start, one, four = after(0), after(1), after(4)
    assert one["ahead"].tolist() == [0, 0]
    np.testing.assert_allclose(four["ahead"], [0.3, 0.3], rtol=1e-3)
    # The heading is the step from the first round on.
    np.testing.assert_allclose(four["heading"], one["heading"], rtol=0.05, atol=1e-3)
    gone = (four["models"] - start["models"]).norm(dim=1)
    plain = (after(4, 1.0)["models"] - start["models"]).norm(dim=1)
    np.testing.assert_allclose(gone / plain, [1.15, 1.15], rtol=0.01)  # 1, 1.1, 1.2 and 1.3


def test_what_is_used_follows_a_model_by_the_root_of_its_clients_in_the_round() -> None:
    # Two blocks of two numbers and a buffer. One client is there, three are not: they use the
    # first block's models by .8 to .8 and .2 to 2.2, the second's by 1 to 0 and 0 to 3.
    cohort = torch.tensor([[[0.8, 0.2], [1.0, 0.0]]], dtype=F64)
    others = torch.tensor([[[0.4, 0.6], [0.0, 1.0]], [[0.2, 0.8], [0.0, 1.0]]], dtype=F64)
    others = torch.cat([others, others[1:]])
    means, models = torch.zeros(2, 5), torch.ones(2, 5)
    made = averaged(means, models, cohort, others, ((0, 2), (2, 4)))
    wanted = torch.tensor([[0.5**0.5] * 2 + [1, 1, 1], [(1 / 12) ** 0.5] * 2 + [0, 0, 1]])
    assert near(made, wanted, 1e-6)
    assert torch.equal(means, torch.zeros(2, 5))
    assert averaged(means, models, cohort, others[:0], ((0, 2), (2, 4))).shape == (0, 5)


def test_what_is_used_is_the_model_in_a_round_of_all_its_clients() -> None:
    def after(cohorts: list[tuple[str, ...]], **options: Any) -> Soup:
        soup = Soup(FedMerge(**{"d": 2, **options}), net(), seed=3)
        for t, cohort in enumerate(cohorts):
            sent = soup.send(cohort)
            soup.fold(make_updates(sent, made_delta(soup, len(cohort), t)))
            soup.commit()
        return soup

    def differs(soup: Soup) -> bool:
        return not torch.equal(soup.used(("a", "b")), soup.send(("a", "b")).message)

    every, one = ("a", "b", "c"), ("a",)
    assert not differs(after([every, every]))
    apart = after([every, one])
    assert differs(apart)
    plain = after([every, one], average=False)
    assert not differs(plain)
    # Training knows nothing of it.
    assert torch.equal(plain.shared["models"], apart.shared["models"])
    assert not differs(after([every, one, every]))
    assert not differs(after([every, one], peers=0))
    assert not differs(after([every, one], d=1))  # which is FedAvg


def test_models_do_not_swing_at_a_high_rate() -> None:
    """Where they did, steps took turns from round 20 on and the loss rose from .2 to .7."""
    federation = make_federation("digits", "concept-mix", 32, seed=1)
    model = make_model("mlp", federation.input_shape, federation.n_outputs, 32)
    training = Training(lr=1.0, epochs=5, batch_size=16)
    simulation = Simulation(
        FedMerge(), federation, model, training=training, rounds=60, seed=1, evaluate_every=20
    )
    losses = [
        log.metrics["merged"]["train"]["loss"].mean for log in simulation.rounds() if log.metrics
    ]
    assert losses[2] < losses[1] < losses[0] < 0.3
