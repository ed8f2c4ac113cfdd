"""What methods with a step of their own build on: batches, parts of a row, mixtures, areas.

Plain training and evaluation are tested in `test_local`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from core_fixture import N_CLASSES, N_FEATURES, net, norm_net, normal
from fedmerge.algorithms import tune
from fedmerge.engine import Engine
from fedmerge.errors import ConfigError, ModelError
from fedmerge.local import Examples, Mixture, Training, batches
from fedmerge.ops import Batch, Dense
from fedmerge.params import Layout, build
from fedmerge.rng import numpy_generator
from test_local import BASE, KEYS, SIZES, examples, figures, setting

both = pytest.mark.parametrize("execution", ["stacked", "sequential"])


def with_row(module: nn.Module, layout: Layout, row: Tensor) -> nn.Module:
    layout.load(module, row)
    return module


@both
@pytest.mark.parametrize("part", ["head", "body", "nothing"])
def test_only_a_part_of_the_row_is_trained(execution: str, part: str) -> None:
    engine, layout, rows = setting(net(dtype=torch.float64), BASE, execution)
    head = layout.last_layer
    only = {"head": head, "body": (0, head[0]), "nothing": (0, 0)}[part]
    end, _ = engine.fit(rows, examples(), KEYS, seed=3, epochs=2, only=only)
    data = examples()
    for i, key in enumerate(KEYS):
        module = with_row(build(net(dtype=torch.float64), 1), layout, rows[i])
        names = {e.name for e in layout.entries if only[0] <= e.start and e.stop <= only[1]}
        learned = [p for n, p in module.named_parameters() if n in names]
        for epoch in batches(SIZES[i], 2, numpy_generator(3, *key)):
            for at in np.array_split(epoch, range(4, SIZES[i], 4)):
                where = torch.from_numpy(at + data.start[i])
                loss = functional.cross_entropy(module(data.x[where]), data.y[where])
                if learned:
                    for p, g in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                        p.data -= BASE.lr * g
        torch.testing.assert_close(end[i], layout.row(module))
    assert torch.equal(end[:, : only[0]], rows[:, : only[0]])
    assert torch.equal(end[:, only[1] :], rows[:, only[1] :])


@both
def test_fit_takes_steps_of_another_length(execution: str) -> None:
    training = Training(lr=0.1, batch_size=4, momentum=0.5, loss="cross-entropy")
    engine, layout, rows = setting(net(dtype=torch.float64), training, execution)
    slow = Engine(build(net(dtype=torch.float64), 1), layout, replace(training, lr=0.03), execution)
    wanted, _ = slow.fit(rows, examples(), KEYS, seed=3, epochs=2)
    found, _ = engine.fit(rows, examples(), KEYS, seed=3, epochs=2, lr_scale=0.3)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, engine.fit(rows, examples(), KEYS, seed=3, epochs=2)[0])


def test_a_part_that_cuts_a_parameter_or_lies_outside_is_refused() -> None:
    engine, layout, rows = setting(net(dtype=torch.float64), BASE, "sequential")
    with pytest.raises(ModelError, match="cuts a parameter"):
        engine.fit(rows, examples(), KEYS, seed=3, epochs=1, only=(1, layout.n_params))
    with pytest.raises(ModelError, match="wanted a part of the"):
        engine.fit(rows, examples(), KEYS, seed=3, epochs=1, only=(0, layout.n_params + 1))


@both
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_steps_give_the_batches_of_fit(execution: str, loss: str) -> None:
    training = Training(lr=0.1, batch_size=4, loss=loss)  # type: ignore[arg-type]
    engine, layout, rows = setting(net(dtype=torch.float64), training, execution)
    data = examples(loss)
    wanted, steps = engine.fit(rows, data, KEYS, seed=3, epochs=3)
    work, taken = rows.clone(), torch.zeros(4, dtype=torch.int64)
    for step in engine.steps(data, KEYS, seed=3, epochs=3):
        before = work.clone()
        work[:, : layout.n_params] -= 0.1 * step.gradient(work)
        assert torch.equal(work[~step.active], before[~step.active])
        taken += step.active
    torch.testing.assert_close(work, wanted)
    assert torch.equal(taken, steps)


@both
def test_a_step_knows_its_examples_and_weighs_them(execution: str) -> None:
    engine, layout, rows = setting(net(dtype=torch.float64), BASE, execution)
    data = examples()
    table = torch.zeros(4, max(SIZES), dtype=torch.float64)
    for i, n in enumerate(SIZES):
        table[i, :n] = normal(90 + i, n).abs()
    every = engine.losses(rows, data)
    assert every.shape == table.shape
    modules = [with_row(build(net(dtype=torch.float64), 1), layout, row) for row in rows]
    for step in engine.steps(data, KEYS, seed=3, epochs=1):
        weight, losses = step.take(table), step.losses(rows)
        gradient = step.gradient(rows, weight)
        for i in range(4):
            n = int(step.real[i].sum())
            assert torch.equal(step.real[i], torch.arange(step.real.shape[1]) < n)
            assert not losses[i, n:].any()
            assert not weight[i, n:].any()
            if not n:
                assert not gradient[i].any()
                continue
            x = step.inputs[i, :n]
            own = data.x[data.start[i] : data.start[i] + SIZES[i]]
            places = [int((own == one).all(1).nonzero()) for one in x]
            y = data.y[data.start[i] + torch.tensor(places)]
            each = functional.cross_entropy(modules[i](x), y, reduction="none")
            torch.testing.assert_close(losses[i, :n], each)
            torch.testing.assert_close(every[i, places], each)
            assert torch.equal(weight[i, :n], table[i, places])
            found = torch.autograd.grad(
                (each * table[i, places]).sum() / n, list(modules[i].parameters())
            )
            flat = torch.cat([g.reshape(-1) for g in found])
            places_of = layout.gradient_places(modules[i])
            ordered = torch.cat([gradient[i, a:b] for a, b in places_of])
            torch.testing.assert_close(ordered, flat)
    for i, n in enumerate(SIZES):
        assert not every[i, n:].any()


@pytest.mark.parametrize("only", [(1, 39), (5, 20), (0, 3), (37, 39)])
def test_a_stack_may_train_a_part_that_cuts_a_parameter(only: tuple[int, int]) -> None:
    engine, layout, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    assert layout.n_params == 39
    end, _ = engine.fit(rows, examples(), KEYS, seed=3, epochs=2, only=only)
    # Gradients that are put together first, since they are to be clipped.
    clipped = setting(net(dtype=torch.float64), replace(BASE, clip=1e9), "stacked")[0]
    wanted, _ = clipped.fit(rows, examples(), KEYS, seed=3, epochs=2, only=only)
    torch.testing.assert_close(end, wanted)
    outside = torch.ones(39, dtype=torch.bool)
    outside[slice(*only)] = False
    assert torch.equal(end[:, outside], rows[:, outside])
    assert not torch.equal(end, rows)


@both
def test_no_epochs_are_no_training(execution: str) -> None:
    engine, _layout, rows = setting(net(dtype=torch.float64), BASE, execution)
    end, steps = engine.fit(rows, examples(), KEYS, seed=3, epochs=0)
    assert torch.equal(end, rows)
    assert not steps.any()


def test_steps_one_by_one_keep_statistics_and_counters() -> None:
    _engine, layout, rows = setting(norm_net, BASE, "auto")
    data = examples(dtype=torch.float32)
    keep = [1, 3]  # batches of one example have no variance
    wide = Engine(
        build(norm_net, 1), layout, Training(lr=0.1, batch_size=100, loss="cross-entropy")
    )
    wanted, _ = wide.fit(rows[keep], data.take(np.array(keep)), KEYS[:2], seed=3, epochs=2)
    work = rows[keep].clone()
    for step in wide.steps(data.take(np.array(keep)), KEYS[:2], seed=3, epochs=2):
        work[:, : layout.n_params] -= 0.1 * step.gradient(work)
    torch.testing.assert_close(work, wanted)
    assert (work[:, layout.counters] == 2).all()


@both
def test_dropout_in_steps_draws_anew_and_the_same_every_time(execution: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(N_FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, N_CLASSES))

    engine, _layout, rows = setting(model, BASE, execution)
    data = examples(dtype=torch.float32)

    def gradients() -> list[Tensor]:
        return [
            step.gradient(rows)
            for step in engine.steps(data, KEYS, seed=3, epochs=1)
            for _ in range(2)
        ]

    first, again = gradients(), gradients()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1])


@both
@pytest.mark.parametrize("models", [0, 2])
@pytest.mark.parametrize("weighed", ["not", "by numbers", "by losses"])
def test_a_descent_is_the_step_down_the_gradient(execution: str, models: int, weighed: str) -> None:
    engine, layout, rows = setting(net(dtype=torch.float64), BASE, execution)
    data, rates = examples(), torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=torch.float64)
    if models:
        rows = torch.stack([rows, rows.roll(1, 0)], dim=1)
    for number, step in enumerate(engine.steps(data, KEYS, seed=3, epochs=1)):
        losses = step.losses(rows)
        weight = {
            "not": None,
            "by numbers": normal(number, *losses.shape, dtype=torch.float64),
            "by losses": losses.exp(),
        }[weighed]
        lr = 0.1 if number % 2 else rates
        wide = lr.view(4, *[1] * (rows.ndim - 1)) if isinstance(lr, Tensor) else lr
        wanted = rows.clone()
        wanted[..., : layout.n_params] -= wide * step.gradient(rows, weight)
        step.descend(rows, lr, torch.exp if weighed == "by losses" else weight)
        torch.testing.assert_close(rows, wanted)
        assert torch.equal(rows[~step.active], wanted[~step.active])
    assert number > 1


@both
def test_a_descent_weighs_by_losses_without_dropout(execution: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(N_FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, N_CLASSES))

    engine, layout, rows = setting(model, BASE, execution)
    data = examples(dtype=torch.float32)

    def weigh(losses: Tensor) -> Tensor:
        seen.append(losses)
        return losses.exp()

    seen: list[Tensor] = []
    # Two iterators draw the same masks: one for the gradient, one for the descent.
    pairs = zip(*(engine.steps(data, KEYS, seed=3, epochs=1) for _ in range(2)), strict=True)
    for one, other in pairs:
        losses = one.losses(rows)
        wanted = rows.clone()
        wanted[:, : layout.n_params] -= 0.1 * one.gradient(rows, losses.exp())
        other.descend(rows, 0.1, weigh)
        torch.testing.assert_close(seen.pop(), losses)
        torch.testing.assert_close(rows, wanted)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("r", [1, 2])
def test_steps_are_the_same_whatever_order_clients_are_in(r: int, weighed: bool) -> None:
    """In one of them those that still have a batch always come first."""
    engine, _layout, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    data, found, slopes = examples(), [], []
    for order in (np.arange(4), np.argsort(SIZES)[::-1].copy()):
        work = rows[order] if r == 1 else torch.stack([rows[order], 2 * rows[order]], dim=1)
        lr = torch.tensor([[0.1], [0.2], [0.05], [0.3]], dtype=torch.float64)[order]
        keys, seen = [KEYS[i] for i in order], []
        for step in engine.steps(data.take(order), keys, seed=3, epochs=2):
            weight = step.losses(work) + 1 if weighed else None
            seen.append(step.gradient(work, weight).sum(0))
            step.descend(work, lr, torch.sigmoid if weighed else None)
        found.append(work[order.argsort()])
        slopes.append(torch.stack(seen))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*slopes)


def test_the_rate_may_be_another_in_every_step() -> None:
    engine, _layout, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    data = examples().take(np.array([1, 1, 1, 1]))  # all have a batch in every step
    wanted, rates = rows.clone(), iter((0.1, 0.3, torch.full((4, 1), 0.2), 0.1))
    for step, lr in zip(engine.steps(data, KEYS, seed=3, epochs=1), rates, strict=True):
        wanted -= lr * step.gradient(wanted)
        step.descend(rows, lr)
        torch.testing.assert_close(rows, wanted)


def test_two_stacks_may_go_down_in_turn() -> None:
    """What is kept of one is not taken for the other."""
    engine, _layout, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    wanted, _ = engine.fit(rows, examples(), KEYS, seed=3, epochs=2)
    other, _ = engine.fit(2 * rows, examples(), KEYS, seed=3, epochs=2)
    one, two = rows.clone(), 2 * rows
    for step in engine.steps(examples(), KEYS, seed=3, epochs=2):
        step.descend(one, BASE.lr)
        step.descend(two, BASE.lr)
    torch.testing.assert_close(one, wanted)
    torch.testing.assert_close(two, other)


def test_a_stack_that_trains_a_part_computes_no_gradient_for_the_rest() -> None:
    engine, layout, _rows = setting(net(dtype=torch.float64), BASE, "stacked")
    assert engine.net is not None
    whole = engine.net.training(slice(0, layout.n_params))
    last = engine.net.training(slice(*layout.last_layer))
    assert whole == engine.net
    assert any(node.needed for node in whole.nodes)
    assert not any(node.needed for node in last.nodes)


class Shortcut(nn.Module):
    """Inputs are added before the last layer, or, with `late`, go past it through one of theirs."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(N_FEATURES, N_FEATURES)
        self.side = nn.Linear(N_FEATURES, N_CLASSES) if late else None
        self.head = nn.Linear(N_FEATURES, N_CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        out: Tensor = self.head(hidden) + self.side(x) if self.side else self.head(x + hidden)
        return out


@pytest.mark.parametrize(
    ("make", "once"),
    [(net(dtype=torch.float64), True), (Shortcut, True), (partial(Shortcut, late=True), False)],
)
def test_layers_before_those_that_are_trained_are_computed_once(
    make: Callable[[], nn.Module], once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the result is that of one client after another, which compute them in every step."""
    engine, layout, rows = setting(make, BASE, "stacked")
    one_by_one = setting(make, BASE, "sequential")[0]
    seen: list[bool] = []
    forward = Dense.forward

    def counted(self: Dense, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        seen.append(self.weight.start == 0)
        return forward(self, batch, *inputs)

    monkeypatch.setattr(Dense, "forward", counted)
    last = layout.last_layer
    end, _ = engine.fit(rows, examples(), KEYS, seed=3, epochs=4, only=last)
    steps = 4 * -(-max(SIZES) // BASE.batch_size)
    assert sum(seen) == (1 if once else steps)
    assert seen.count(False) == steps * (1 if once else 2)
    wanted, _ = one_by_one.fit(rows, examples(), KEYS, seed=3, epochs=4, only=last)
    torch.testing.assert_close(end, wanted)


def test_layers_without_parameters_are_no_reason_to_compute_anything_beforehand() -> None:
    made = nn.Sequential(nn.Flatten(), nn.Linear(N_FEATURES, 4), nn.ReLU(), nn.Linear(4, N_CLASSES))
    engine, layout, _rows = setting(lambda: made, BASE, "stacked")
    assert engine.net is not None
    assert len(engine.net.nodes) == 4
    for part, first in (((0, layout.n_params), 0), (layout.last_layer, 3), ((0, 0), 0)):
        settled, rest = engine.net.parted(slice(*part))
        assert (len(settled.nodes), len(rest.nodes)) == (first, 4 - first)


def alike(make: Callable[[], nn.Module], part: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """End rows of the stack, and of one client after another."""
    (engine, _, rows), (other, _, _) = (setting(make, BASE, e) for e in ("stacked", "sequential"))
    data = examples(dtype=rows.dtype)
    ends = [e.fit(rows, data, KEYS, seed=3, epochs=4, only=part)[0] for e in (engine, other)]
    assert not torch.equal(ends[0], rows)
    return ends[0], ends[1]


@pytest.mark.parametrize("counts", [(5, 0, 9, 0), (0, 7, 0, 7), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_clients_without_examples_stay_as_they_are(counts: tuple[int, ...]) -> None:
    """Whatever is computed once, or in views: also the last client of the pool, and nobody."""
    engine, layout, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    y = torch.zeros(9, dtype=torch.int64)
    data = Examples.of([(normal(i, n, N_FEATURES).double(), y[:n]) for i, n in enumerate(counts)])
    idle = torch.tensor(counts) == 0
    for only in (layout.last_layer, None):
        end, steps = engine.fit(rows, data, KEYS, seed=3, epochs=3, only=only)
        work = rows.clone()
        for step in engine.steps(data, KEYS, seed=3, epochs=3):
            step.descend(work, BASE.lr)
        for found in (end, work):
            assert torch.equal(found[idle], rows[idle])
            assert bool((found[~idle] != rows[~idle]).any(1).all())
            assert bool(found.isfinite().all())
        assert torch.equal(steps == 0, idle)


def test_layers_with_dropout_are_computed_in_every_step() -> None:
    def make() -> nn.Module:
        body = nn.Linear(N_FEATURES, 6), nn.Dropout(0.5), nn.Linear(6, N_CLASSES)
        return nn.Sequential(*body).double()

    torch.testing.assert_close(*alike(make, Layout.of(build(make, 1)).last_layer))


def test_some_axes_are_made_one() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(N_FEATURES, 8), nn.Unflatten(1, (2, 2, 2)), nn.Flatten(1, 2),
            nn.LayerNorm((4, 2)), nn.Flatten(-2), nn.Linear(8, N_CLASSES),
        ).double()  # fmt: skip

    with pytest.raises(ConfigError, match=r'layer "4" \(Flatten\)'):
        alike(make, None)  # counted from the end it might be the clients' own
    made = make()
    made[4] = nn.Flatten(1, -1)  # type: ignore[index]
    torch.testing.assert_close(*alike(lambda: made, None))


def test_a_model_that_has_diverged_spoils_no_others_settled_layers() -> None:
    engine, layout, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    last = layout.last_layer
    wanted, _ = engine.fit(rows, examples(), KEYS, seed=3, epochs=4, only=last)
    rows[0] = float("inf")
    end, _ = engine.fit(rows, examples(), KEYS, seed=3, epochs=4, only=last)
    assert torch.equal(end[1:], wanted[1:])


# -- mixtures -------------------------------------------------------------------------------------


def mixture(layout: Layout, gated: bool) -> Mixture:
    rows = torch.stack([layout.row(build(net(dtype=torch.float64), 1, j)) for j in range(8)])
    rows = rows.view(4, 2, -1)
    if gated:
        return Mixture(rows, gate=normal(7, 4, 2, N_FEATURES + 1, dtype=torch.float64))
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    return Mixture(rows, weights=weights)


def predictions(model: Mixture, layout: Layout, i: int, x: Tensor, loss: str) -> Tensor:
    """What client i's mixture predicts for x (n, F): probabilities, or outputs."""
    module = build(net(dtype=torch.float64), 1)
    parts = []
    for j in range(model.rows.shape[1]):
        output = with_row(module, layout, model.rows[i, j])(x).detach()
        parts.append(output if loss == "mse" else torch.softmax(output, -1))
    if model.weights is not None:
        share = model.weights[i].expand(len(x), -1)
    else:
        assert model.gate is not None
        share = torch.softmax(torch.cat([x, torch.ones(len(x), 1)], 1) @ model.gate[i].T, -1)
    return sum(share[:, j, None] * part for j, part in enumerate(parts))  # type: ignore[return-value]


@both
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_a_mixture_mixes_predictions(execution: str, gated: bool, loss: str) -> None:
    training = Training(lr=0.1, batch_size=4, loss=loss)  # type: ignore[arg-type]
    engine, layout, _ = setting(net(dtype=torch.float64), training, execution)
    model, data = mixture(layout, gated), examples(loss)
    losses, right, _ = engine.measure(model, [data])[0]
    for i, n in enumerate(SIZES):
        at = slice(data.start[i], data.start[i] + n)
        found = predictions(model, layout, i, data.x[at], loss)
        y = data.y[at]
        if loss == "mse":
            wanted = (found - y).square().mean()
            assert right[i].isnan()
        else:
            wanted = -found.gather(1, y[:, None]).log().mean()
            assert right[i] == pytest.approx(float((found.argmax(1) == y).double().mean()))
        assert losses[i] == pytest.approx(float(wanted), rel=1e-9)


def test_a_mixture_of_one_is_that_model() -> None:
    engine, _layout, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    alone = Mixture(rows[:, None], weights=torch.ones(4, 1))
    for a, b in zip(
        engine.measure(alone, [examples()])[0], engine.measure(rows, [examples()])[0], strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_mixture_has_weights_or_a_gate() -> None:
    rows = torch.zeros(1, 2, 3)
    for parts in ({}, {"weights": torch.ones(1, 2), "gate": torch.ones(1, 2, 4)}):
        with pytest.raises(ConfigError, match="weights or a gate"):
            Mixture(rows, **parts)


class OneEpoch:
    """A trainer whose clients are those of the examples."""

    def __init__(self, engine: Engine, data: Examples) -> None:
        self.engine, self.data, self.lr = engine, data, engine.training.lr

    def steps(self, *, epochs: int, purpose: str) -> object:
        keys = [(2, name, purpose) for name in "abcd"]
        return self.engine.steps(self.data, keys, seed=3, epochs=epochs)


@both
@pytest.mark.parametrize("gated", [False, True])
def test_tuning_a_mixture_descends_its_loss(execution: str, gated: bool) -> None:
    training = Training(lr=0.1, batch_size=100, loss="cross-entropy")
    engine, layout, _ = setting(net(dtype=torch.float64), training, execution)
    model, data = mixture(layout, gated), examples()
    tuned = tune(model, OneEpoch(engine, data))  # type: ignore[arg-type]
    assert isinstance(tuned, Mixture)
    # One step on all examples: the gradient of the mixture's mean loss, by autograd.
    for i, n in enumerate(SIZES):
        x, y = data.x[data.start[i] :][:n], data.y[data.start[i] :][:n]
        rows = model.rows[i].clone().requires_grad_()
        module = build(net(dtype=torch.float64), 1)
        views = [
            {e.name: rows[j, e.start : e.stop].view(e.shape) for e in layout.entries}
            for j in range(2)
        ]
        parts = [torch.softmax(torch.func.functional_call(module, v, (x,)), -1) for v in views]
        share = (
            model.weights[i].expand(n, -1)
            if model.weights is not None
            else torch.softmax(torch.cat([x, torch.ones(n, 1)], 1) @ model.gate[i].T, -1)  # type: ignore[index]
        )
        mixed = sum(share[:, j, None] * part for j, part in enumerate(parts))
        loss = -mixed.gather(1, y[:, None]).log().mean()  # type: ignore[union-attr]
        (gradient,) = torch.autograd.grad(loss, rows)
        torch.testing.assert_close(tuned.rows[i], (rows - 0.1 * gradient).detach())


# -- areas under the curve ------------------------------------------------------------------------


@both
def test_the_area_under_the_curve_is_that_of_scikit_learn(execution: str) -> None:
    def model() -> nn.Module:
        return nn.Linear(3, 2)

    module = build(model, 1)
    layout = Layout.of(module)
    pairs = []
    for i, n in enumerate((20, 9, 5)):
        x = normal(i, n, 3).round(decimals=0)  # ties
        pairs.append((x, torch.zeros(n, dtype=torch.int64) if i == 2 else (x[:, 0] > 0).long()))
    data = Examples.of(pairs)
    rows = torch.stack([layout.row(build(model, 1, j)) for j in range(3)])
    area = Engine(module, layout, BASE, execution).measure(rows, [data])[0][2]
    for i, (x, y) in enumerate(pairs[:2]):
        output = with_row(module, layout, rows[i])(x).detach()
        wanted = roc_auc_score(y, output[:, 1] - output[:, 0])
        assert area[i] == pytest.approx(wanted, abs=1e-9)
    assert area[2].isnan()
    rows[0, 0] = float("nan")
    spoilt = Engine(module, layout, BASE, execution).measure(rows, [data])[0][2]
    assert float(spoilt[0]) == 0.0  # not 1, which scores that are not numbers sort to
    assert spoilt[1] == area[1]


def test_there_is_no_area_with_more_classes() -> None:
    engine, _, rows = setting(net(dtype=torch.float64), BASE, "stacked")
    assert engine.measure(rows, [examples()])[0][2].isnan().all()
    assert figures(engine, rows, examples())[0].isfinite().all()
