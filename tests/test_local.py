"""Local training and evaluation: stacked, one by one, and against loops written with PyTorch.

What methods do with it is tested in `test_algorithms`; whole simulations in `test_simulation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core_fixture import N_CLASSES, N_FEATURES, net, norm_net, normal
from fedmerge.engine import Engine
from fedmerge.errors import ConfigError, ModelError
from fedmerge.local import Examples, Proximal, Schedule, Training, batches, plan
from fedmerge.models import mlp
from fedmerge.network import EVALUATION_BATCH
from fedmerge.params import Layout, build
from fedmerge.rng import numpy_generator, numpy_generators

SIZES = (7, 16, 3, 11)  # with batches of 4: full ones, short ones, fewer examples than a batch
KEYS = [(2, name, "train") for name in "abcd"]
BASE = Training(lr=0.1, epochs=2, batch_size=4, loss="cross-entropy")
VARIANTS = {
    "plain": BASE,
    "momentum": replace(BASE, momentum=0.9),
    "decay": replace(BASE, weight_decay=0.05),
    "clip": replace(BASE, clip=0.3),
    "loose clip": replace(BASE, clip=3.0),
    "mse": replace(BASE, loss="mse"),
    "all": replace(BASE, momentum=0.5, weight_decay=0.05, clip=0.5),
    "wide": replace(BASE, batch_size=100),
}
Model = Callable[[], nn.Module]


def examples(loss: str = "cross-entropy", dtype: torch.dtype = torch.float64) -> Examples:
    pairs = []
    for i, n in enumerate(SIZES):
        x = normal(i, n, N_FEATURES, dtype=dtype)
        y = normal(50 + i, n, N_CLASSES, dtype=dtype)
        pairs.append((x, y if loss == "mse" else y.argmax(1)))
    return Examples.of(pairs)


def setting(model: Model, training: Training, execution: str) -> tuple[Engine, Layout, Tensor]:
    """An engine, its layout and four different start rows."""
    module = build(model, 1)
    layout = Layout.of(module)
    rows = torch.stack([layout.row(build(model, 1, j)) for j in range(4)])
    return Engine(module, layout, training, execution), layout, rows


def figures(engine: Engine, rows: Tensor, data: Examples) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of each client's row on its examples."""
    loss, accuracy, _ = engine.measure(rows, [data])[0]
    return loss, accuracy


def fitted(
    model: Model, training: Training, execution: str, mu: float = 0.0, **options: Any
) -> Tensor:
    engine, layout, rows = setting(model, training, execution)
    pull = Proximal(rows.flip(0).clone(), mu) if mu else None
    end, steps = engine.fit(
        rows,
        examples(training.loss, layout.dtype),
        KEYS,
        **{"seed": 3, "epochs": training.epochs, "proximal": pull, **options},
    )
    assert steps.tolist() == [training.epochs * -(-n // training.batch_size) for n in SIZES]
    return end


# -- two ways, one result -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stacked_is_sequential(variant: str, mu: float, dtype: torch.dtype) -> None:
    training = VARIANTS[variant]
    stacked = fitted(net(dtype=dtype), training, "stacked", mu)
    single = fitted(net(dtype=dtype), training, "sequential", mu)
    tol = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(stacked, single, rtol=tol, atol=tol)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_a_step_in_two_stacks_is_a_step_in_one(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, training = net(dtype=torch.float64), VARIANTS[variant]
    one = fitted(model, training, "stacked")
    monkeypatch.setattr("fedmerge.engine.SPLIT", 1.0)
    cuts: list[int] = []
    parts = Schedule.parts

    def seen(schedule: Schedule, step: int, worth: float) -> list[tuple[int, int, int]]:
        cuts.append(len(parts(schedule, step, worth)))
        return parts(schedule, step, worth)

    monkeypatch.setattr(Schedule, "parts", seen)
    torch.testing.assert_close(fitted(model, training, "stacked"), one, rtol=1e-12, atol=1e-12)
    assert set(cuts) == {1, 2}


ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU(), nn.Identity()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_every_activation_stacks(activation: nn.Module) -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Sequential(nn.Linear(N_FEATURES, 6), activation),
            nn.Linear(6, 6, bias=False),
            activation,
            nn.Linear(6, N_CLASSES),
        ).double()

    stacked = fitted(model, BASE, "stacked")
    torch.testing.assert_close(stacked, fitted(model, BASE, "sequential"), rtol=1e-12, atol=1e-12)


def test_images_are_flattened_in_the_stack_too() -> None:
    pairs = [(normal(i, n, 1, 3, 4), torch.arange(n) % 3) for i, n in enumerate(SIZES)]
    ends = []
    for execution in ("stacked", "sequential"):
        engine, _, rows = setting(lambda: mlp((1, 3, 4), 3, 5), BASE, execution)
        ends.append(engine.fit(rows, Examples.of(pairs), KEYS, seed=3, epochs=2)[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequential_is_a_loop_written_with_torch(variant: str) -> None:
    training, mu = VARIANTS[variant], 0.7
    ours = fitted(net(dtype=torch.float64), training, "sequential", mu)
    _, layout, rows = setting(net(dtype=torch.float64), training, "sequential")
    data = examples(training.loss)
    for i in range(4):
        module = net(dtype=torch.float64)()
        layout.load(module, rows[i])
        anchor = rows.flip(0)[i]
        optimiser = torch.optim.SGD(
            module.parameters(),
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
        for order in batches(SIZES[i], training.epochs, numpy_generator(3, *KEYS[i])):
            for first in range(0, SIZES[i], training.batch_size):
                at = data.start[i] + order[first : first + training.batch_size]
                output, y = module(data.x[at]), data.y[at]
                loss = (
                    functional.mse_loss(output, y)
                    if training.loss == "mse"
                    else functional.cross_entropy(output, y)
                )
                flat = torch.cat([p.reshape(-1) for p in module.parameters()])
                optimiser.zero_grad()
                (loss + mu / 2 * (flat - anchor).square().sum()).backward()
                if training.clip:
                    nn.utils.clip_grad_norm_(module.parameters(), training.clip)
                optimiser.step()
        torch.testing.assert_close(ours[i], layout.row(module), rtol=1e-11, atol=1e-12)


def test_training_reaches_every_batch_norm_statistic() -> None:
    engine, layout, rows = setting(norm_net, BASE, "auto")
    assert engine.net is None
    data = examples(dtype=torch.float32)
    end, steps = engine.fit(rows[:1], data.take(np.array([1])), KEYS[1:2], seed=3, epochs=2)
    assert int(end[0, layout.counters]) == int(steps[0]) == 8
    module = build(norm_net, 1)
    layout.load(module, rows[0])
    module.train()
    parameters = list(module.parameters())
    for order in batches(16, 2, numpy_generator(3, *KEYS[1])):
        for at in torch.split(torch.from_numpy(data.start[1] + order), 4):
            loss = functional.cross_entropy(module(data.x[at]), data.y[at])
            with torch.no_grad():
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p -= 0.1 * g
    torch.testing.assert_close(end[0], layout.row(module), rtol=1e-5, atol=1e-6)


# -- what training depends on ---------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_start_rows_and_data_are_not_changed(execution: str) -> None:
    engine, _, rows = setting(net(dtype=torch.float64), VARIANTS["all"], execution)
    data = examples()
    anchor = rows.flip(0).clone()
    kept = rows.clone(), data.x.clone(), anchor.clone()
    end, _ = engine.fit(rows, data, KEYS, seed=3, epochs=2, proximal=Proximal(anchor, 0.5))
    figures(engine, rows, data)
    for a, b in zip((rows, data.x, anchor), kept, strict=True):
        assert torch.equal(a, b)
    assert not (end == rows).any()
    # The engine holds no memory of the rows: training again gives the same.
    again, _ = engine.fit(rows, data, KEYS, seed=3, epochs=2, proximal=Proximal(anchor, 0.5))
    assert torch.equal(again, end)


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_batches_depend_on_seed_and_names_only(execution: str) -> None:
    model = net(dtype=torch.float64)
    base = fitted(model, BASE, execution)
    assert not torch.equal(fitted(model, BASE, execution, seed=4), base)
    engine, _, rows = setting(model, BASE, execution)
    data = examples()
    changed, _ = engine.fit(rows, data, [(3, *k[1:]) for k in KEYS], seed=3, epochs=2)
    assert not (changed == base).all(1).any()
    # Alone, or in another order among others: the same result for each.
    order = np.array([2, 0, 3, 1])
    mixed, _ = engine.fit(rows[order], data.take(order), [KEYS[i] for i in order], seed=3, epochs=2)
    torch.testing.assert_close(mixed, base[order], rtol=1e-12, atol=1e-13)
    alone, _ = engine.fit(rows[1:2], data.take(np.array([1])), KEYS[1:2], seed=3, epochs=2)
    torch.testing.assert_close(alone, base[1:2], rtol=1e-12, atol=1e-13)
    state = torch.get_rng_state()
    engine.fit(rows, data, KEYS, seed=3, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_takes_every_example_once_in_a_new_order() -> None:
    orders = batches(20, 3, numpy_generator(0, "x"))
    assert orders.shape == (3, 20)
    for order in orders:
        assert sorted(order) == list(range(20))
    assert not (orders[0] == orders[1]).all()


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.2},
        {"batch_size": 2},
        {"momentum": 0.5},
        {"weight_decay": 0.01},
        {"clip": 0.1},
        {"loss": "mse"},
    ],
    ids=str,
)
def test_every_training_option_changes_the_result(changes: dict[str, Any], execution: str) -> None:
    engine, _, rows = setting(net(dtype=torch.float64), BASE, execution)
    module = build(net(dtype=torch.float64), 1)
    other = Engine(module, engine.layout, replace(BASE, **changes), execution)
    one_hot = examples()
    targets = functional.one_hot(one_hot.y, 3).double()
    data = Examples(one_hot.x, targets, one_hot.start, one_hot.count)
    ends = [
        e.fit(rows, data if e.training.loss == "mse" else one_hot, KEYS, seed=3, epochs=2)[0]
        for e in (engine, other)
    ]
    assert not (ends[0] == ends[1]).all(1).any()


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_epochs_change_the_result(execution: str) -> None:
    model = net(dtype=torch.float64)
    one, two = (fitted(model, replace(BASE, epochs=e), execution) for e in (1, 2))
    assert not (one == two).all(1).any()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": 0.0}, "lr = 0.0: wanted a positive number"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": float("inf")}, "lr = inf"),
        ({"epochs": 0}, "epochs = 0: wanted 1 or more"),
        ({"batch_size": 0}, "batch_size = 0: wanted 1 or more"),
        ({"momentum": 1.0}, "momentum = 1.0: wanted 0 or more and less than 1"),
        ({"momentum": -0.1}, "momentum = -0.1"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0: wanted 0 or more"),
        ({"weight_decay": float("inf")}, "weight_decay = inf"),
        ({"clip": 0.0}, "clip = 0.0: wanted a positive number or nothing"),
        ({"loss": "hinge"}, 'loss = hinge: wanted "auto", "cross-entropy" or "mse"'),
    ],
)
def test_bad_training_options_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Training(**values)


def test_the_loss_follows_the_data_and_must_fit_it() -> None:
    assert Training().for_data(classes=True).loss == "cross-entropy"
    assert Training().for_data(classes=False).loss == "mse"
    assert Training(loss="mse").for_data(classes=False).loss == "mse"
    with pytest.raises(ConfigError, match='the data have class numbers, wanted "cross-entropy"'):
        Training(loss="mse").for_data(classes=True)
    with pytest.raises(ConfigError, match='targets that are not classes, wanted "mse"'):
        Training(loss="cross-entropy").for_data(classes=False)


# -- modules that cannot be stacked ---------------------------------------------------------------


L = nn.Linear


class Doubled(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Moody(nn.Module):
    """Computes one thing in training and another in use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(N_FEATURES, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if self.training else 2 * y


class Branching(Moody):
    """Asks what the numbers are."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if y.sum() > 0 else -y


class Averaging(Moody):
    """A mean over a named axis, which may be that of the examples."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y - y.mean(self.axis, keepdim=True)


class Bare(nn.Module):
    """A parameter without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N_FEATURES, N_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Residual(nn.Module):
    """Norms, dropout, a skip connection and functions: all that can be stacked at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(N_FEATURES, 8)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU(), nn.Dropout(0.3))
        self.groups = nn.GroupNorm(2, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.lift(x))
        h = h + self.body(self.norm(h)) * 0.5
        return self.head(self.drop(functional.leaky_relu(self.groups(h), 0.1)))  # type: ignore[no-any-return]


class Words(nn.Module):
    """An embedding of whole numbers, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.head = nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.table(x))).mean(1))  # type: ignore[no-any-return]


def twice() -> nn.Module:
    shared = nn.Linear(N_FEATURES, N_FEATURES)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(N_FEATURES, N_CLASSES))


def half_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(N_FEATURES, 4), nn.ReLU(), nn.Linear(4, N_CLASSES))
    module[0].bias.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), r'layer "0" \(Conv2d\)'),
        (lambda: nn.Sequential(L(5, 4), nn.Sequential(nn.RReLU())), r'layer "1\.0" \(RReLU\)'),
        (Moody, "Moody, which computes something else when it is trained,"),
        (Branching, "Branching, whose forward cannot be traced"),
        (lambda: Averaging(0), r'"mean" \(mean\)'),
        (lambda: nn.Sequential(L(5, 3), nn.Flatten(0)), r'layer "1" \(Flatten\)'),
        (Bare, 'the parameter "weight", which is outside a known layer,'),
        (lambda: nn.Bilinear(5, 5, 3), "a module of class Bilinear"),
        (twice, r'layer "0" \(Linear\), used twice,'),
        (half_frozen, r'layer "0" \(Linear\) with a frozen or shared parameter'),
        (norm_net, r'layer "1" \(BatchNorm1d\), which has buffers,'),
    ],
)
def test_what_cannot_be_stacked_is_named(model: Model, named: str) -> None:
    module = build(model, 0)
    layout = Layout.of(module)
    with pytest.raises(ConfigError, match=f'execution = "stacked": {named}.* cannot be stacked'):
        Engine(module, layout, BASE, "stacked")
    assert Engine(module, layout, BASE, "auto").net is None


def channels() -> nn.Module:
    """A group norm over positions, and layers without parameters."""
    return nn.Sequential(
        nn.Linear(N_FEATURES, 6), nn.Unflatten(1, (3, 2)), nn.GroupNorm(3, 3), nn.Flatten(),
        nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, N_CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        Residual,
        Words,
        channels,
        lambda: Averaging(1),
        lambda: nn.Linear(N_FEATURES, N_CLASSES),
        lambda: nn.Sequential(L(5, 4), Doubled(), L(4, 3)),
        lambda: nn.Sequential(nn.LayerNorm(5), nn.Dropout(0.5), L(5, 4), nn.ReLU(True), L(4, 3)),
        lambda: nn.Sequential(L(5, 6), nn.LayerNorm(6, bias=False), nn.SELU(), L(6, 3)),
    ],
)
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_whatever_can_be_stacked_trains_as_it_would_alone(model: Any, variant: str) -> None:
    ends, scores = [], []
    for execution in ("stacked", "sequential"):
        module = build(model, 0).double()
        layout = Layout.of(module)
        rows = torch.stack([layout.row(build(model, j).double()) for j in range(len(KEYS))])
        data = examples(dtype=torch.float64)
        if model is Words:
            x = (data.x[:, :3].abs() * 3).long().clamp_max(5)
            data = Examples(x, data.y, data.start, data.count)
        engine = Engine(module, layout, VARIANTS[variant], execution)
        assert (engine.net is None) == (execution == "sequential")
        end, _ = engine.fit(rows, data, KEYS, seed=3, epochs=3)
        assert float((end - rows).abs().max()) > 1e-2
        ends.append(end)
        scores.append(figures(engine, end, data))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scores[0][0], scores[1][0], rtol=1e-9, atol=1e-11)
    assert torch.equal(scores[0][1], scores[1][1])


def test_an_unknown_execution_is_refused() -> None:
    with pytest.raises(ConfigError, match='execution = "fast": wanted "auto", "stacked"'):
        setting(net(), BASE, "fast")


@pytest.mark.parametrize(
    "model", [twice, lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))]
)
def test_they_are_trained_one_by_one_and_reproducibly(model: Model) -> None:
    ends, losses = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)  # whatever the global state is
        engine, layout, rows = setting(model, BASE, "auto")
        data = examples(dtype=layout.dtype)
        end, _ = engine.fit(rows, data, KEYS, seed=3, epochs=9)
        ends.append(end)
        losses.append((figures(engine, rows, data)[0], figures(engine, end, data)[0]))
    assert torch.equal(ends[0], ends[1])
    before, after = losses[0]
    assert bool((after < before).all())
    other, _ = engine.fit(rows, data, KEYS, seed=4, epochs=9)
    assert not torch.equal(other, end)


def test_dropout_draws_differ_from_client_to_client_and_stop_in_evaluation() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    engine, _, rows = setting(model, BASE, "auto")
    # One and the same example for both: nothing but their dropout can differ.
    one = Examples.of([(normal(0, 1, N_FEATURES), torch.tensor([1]))]).take(np.array([0, 0]))
    rows = rows[:1].repeat(2, 1)
    end, _ = engine.fit(rows, one, KEYS[:2], seed=3, epochs=1)
    assert not torch.allclose(end[0], end[1], rtol=1e-3)
    same, _ = engine.fit(rows, one, [KEYS[0], KEYS[0]], seed=3, epochs=1)
    torch.testing.assert_close(same, end[:1].repeat(2, 1), rtol=1e-5, atol=1e-7)
    losses = figures(engine, rows, one)[0]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


# -- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_evaluation_is_computed_directly(loss: str, execution: str) -> None:
    training = replace(BASE, loss=loss)
    engine, layout, rows = setting(net(dtype=torch.float64), training, execution)
    data = examples(loss)
    losses, accuracies = figures(engine, rows, data)
    for i, n in enumerate(SIZES):
        module = net(dtype=torch.float64)()
        layout.load(module, rows[i])
        x = data.x[data.start[i] : data.start[i] + n]
        y = data.y[data.start[i] : data.start[i] + n]
        with torch.no_grad():
            output = module(x)
        if loss == "mse":
            wanted = (output - y).square().mean()
            assert bool(accuracies[i].isnan())
        else:
            wanted = -torch.log_softmax(output, 1)[torch.arange(n), y].mean()
            assert float(accuracies[i]) == pytest.approx(
                float((output.argmax(1) == y).double().mean()), abs=1e-12
            )
        assert float(losses[i]) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_many_examples_are_evaluated_in_parts_and_none_give_nan(execution: str) -> None:
    n = EVALUATION_BATCH + 37
    x = normal(0, n, N_FEATURES, dtype=torch.float64)
    y = torch.arange(n) % 3
    training = replace(BASE, weight_decay=0.1)
    engine, layout, rows = setting(net(dtype=torch.float64), training, execution)
    data = Examples.of([(x, y), (x[:0], y[:0]), (x[:5], y[:5])])
    loss, accuracy = figures(engine, rows[:3], data)
    module = net(dtype=torch.float64)()
    layout.load(module, rows[0])
    with torch.no_grad():
        wanted = functional.cross_entropy(module(x), y)
    assert float(loss[0]) == pytest.approx(float(wanted), rel=1e-12)
    assert loss.isnan().tolist() == accuracy.isnan().tolist() == [False, True, False]
    # And training leaves a client without examples as it is.
    end, steps = engine.fit(rows[:3], data, KEYS[:3], seed=0, epochs=1)
    assert torch.equal(end[1], rows[1])
    assert int(steps[1]) == 0


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_a_diverged_model_has_an_infinite_loss_and_no_right_answer(execution: str) -> None:
    engine, _, rows = setting(net(dtype=torch.float64), BASE, execution)
    rows[1, 0] = float("nan")
    loss, accuracy = figures(engine, rows, examples())
    assert loss.isinf().tolist() == [False, True, False, False]
    assert bool(loss[1] > 0)
    assert float(accuracy[1]) == 0.0  # not the share of the first class
    assert 0 in examples().y[examples().start[1] : examples().start[1] + examples().count[1]]


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_targets_of_another_shape_than_the_outputs_are_refused(execution: str) -> None:
    engine, _, rows = setting(net(), replace(BASE, loss="mse"), execution)
    data = Examples.of([(normal(0, 4, N_FEATURES), normal(1, 4, 1))])
    with pytest.raises(ModelError, match=r"outputs of shape \(3,\) for an example, wanted \(1,\)"):
        figures(engine, rows[:1], data)


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_rows_of_another_model_are_refused(execution: str) -> None:
    engine, _, rows = setting(net(), BASE, execution)
    data = examples(dtype=torch.float32)
    with pytest.raises(ModelError, match="a row has 38 numbers"):
        engine.fit(rows[:, 1:], data, KEYS, seed=0, epochs=1)
    with pytest.raises(ModelError, match="a row has 38 numbers"):
        figures(engine, rows[:, 1:], data)


# -- plans ----------------------------------------------------------------------------------------


def test_generators_in_turn_are_generators_of_their_own() -> None:
    names = [("a", 1), ("b",), ("a", 1)]
    for name, generator in zip(names, numpy_generators(5, names), strict=True):
        own = numpy_generator(5, *name)
        # 32-bit draws leave half a word behind, which must not reach the next one.
        for _ in range(3):
            assert generator.integers(0, 100, dtype=np.uint32) == own.integers(
                0, 100, dtype=np.uint32
            )
        assert (generator.permutation(9) == own.permutation(9)).all()
        assert generator.normal() == own.normal()


def test_a_step_is_divided_where_that_saves_enough_padding() -> None:
    """One epoch of 12, 7, 6 and 1 examples in batches of 5: worked out by hand."""
    schedule = Schedule.of(np.array([12, 7, 6, 1]), 1, 5, torch.float32)
    assert schedule.real.tolist() == [[5, 5, 2], [5, 2, 0], [5, 1, 0], [1, 0, 0]]
    whole = [[(0, 4, 5)], [(0, 3, 5)], [(0, 1, 2)]]
    assert [schedule.parts(t, 100) for t in range(3)] == whole
    assert schedule.parts(0, 4) == [(0, 3, 5), (3, 4, 1)]
    assert schedule.parts(1, 4) == [(0, 1, 5), (1, 3, 2)]  # 15 places, or 5 + 4
    assert schedule.parts(0, 5) == whole[0]
    assert schedule.parts(2, 0.5) == whole[2]


def test_a_plan_is_the_batches_of_each_client_side_by_side() -> None:
    """Against one made client by client and step by step."""
    counts, size, epochs = [7, 0, 4, 1, 12], 4, 3
    data = Examples.of([(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64)) for n in counts])
    keys = [(2, f"c{i}") for i in range(5)]
    order = np.array([4, 0, 2, 3, 1])
    schedule = Schedule.of(data.count[order], epochs, size, torch.float64)
    index = plan(schedule, data.start[order], [keys[i] for i in order], 9, epochs)
    weight = schedule.share
    assert index.shape == weight.shape == (5, 9, 4)
    for place, i in enumerate(order):
        wanted = [
            part + data.start[i]
            for epoch in batches(counts[i], epochs, numpy_generator(9, *keys[i]))
            for part in np.split(epoch, range(size, counts[i], size))
            if len(part)
        ]
        for t in range(9):
            batch = wanted[t] if t < len(wanted) else np.zeros(0)
            b = len(batch)
            assert index[place, t, :b].tolist() == batch.tolist()
            assert (index[place, t, b:] == (data.start[i] if counts[i] else 0)).all()
            assert weight[place, t].tolist() == [1 / b for _ in range(b)] + [0.0] * (size - b)
