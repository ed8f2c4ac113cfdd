"""The guard, the split rule and federations from the user's own tensors.

Partitions and files have test files of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.data import Client, Federation, Split, check_federation, describe, from_tensors
from fedmerge.data.draws import generator
from fedmerge.errors import ConfigError, DataError


def examples(n: int = 12, features: int = 3, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(n * features, dtype=torch.float32).reshape(n, features)
    return x, torch.arange(n) % classes


def federation() -> Federation:
    return from_tensors({"a": examples(), "b": examples(8)}, name="own")


def with_split(fed: Federation, **change: Any) -> Federation:
    """Return `fed` with the training split of client b changed."""
    client = fed.clients[1]
    changed = replace(client, train=replace(client.train, **change))
    return replace(fed, clients=(fed.clients[0], changed))


def test_contract_of_a_federation_from_tensors() -> None:
    fed = federation()
    assert (fed.name, fed.task, fed.n_outputs, fed.input_shape) == (
        "own",
        "classification",
        2,
        (3,),
    )
    assert [client.id for client in fed.clients] == ["a", "b"]
    first = fed.clients[0]
    assert (len(first.train), len(first.validation), len(first.test)) == (6, 3, 3)
    assert first.train.x.dtype == torch.float32
    assert first.train.y.dtype == torch.int64
    x = torch.cat([examples()[0], examples(8)[0]])
    for client in fed.clients:
        for _, split in client.splits():
            assert split.source is not None
            assert torch.equal(split.x, x[split.source])
    check_federation(fed)


def test_lists_arrays_and_regression() -> None:
    rows = [[float(i), 1.0] for i in range(8)]
    fed = from_tensors([(rows, [0.5] * 8), (np.array(rows), np.ones((8, 1)))], name="own")
    assert (fed.task, fed.n_outputs) == ("regression", 1)
    assert [client.id for client in fed.clients] == ["c00", "c01"]
    assert fed.clients[0].train.y.shape == (4, 1)
    assert fed.clients[0].train.y.dtype == torch.float32
    assert describe(fed)[0].label_counts.shape == (0,)


def test_the_users_tensors_are_neither_changed_nor_shared() -> None:
    x, y = examples()
    before = x.clone()
    fed = from_tensors([(x, y)], name="own")
    for _, split in fed.clients[0].splits():
        split.x.zero_()
    assert torch.equal(x, before)


def test_bfloat16_and_read_only_inputs() -> None:
    x, y = examples()
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    fed = from_tensors([(x.bfloat16(), y), (frozen, y.numpy())], name="own")
    assert fed.clients[0].train.x.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*no client trains on label")  # Of few examples, some miss one.
@settings(max_examples=60, deadline=None)
@given(n=st.integers(4, 90), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 50))
def test_split_rule(n: int, fraction: float, seed: int) -> None:
    client = from_tensors([examples(n)], name="own", train_fraction=fraction, seed=seed).clients[0]
    sizes = [len(split) for _, split in client.splits()]
    assert sizes[0] == min(max(round(fraction * n), 2), n - 2)
    assert sizes[2] - sizes[1] in (0, 1)
    assert sizes[1] >= 1
    found = torch.cat([split.source for _, split in client.splits() if split.source is not None])
    assert sorted(found.tolist()) == list(range(n))


def test_the_split_depends_on_seed_and_client_id_only() -> None:
    def sources(seed: int, **clients: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
        fed = from_tensors(clients, name="own", seed=seed)
        client = next(client for client in fed.clients if client.id == "a")
        assert client.train.source is not None
        return client.train.source.tolist()

    alone = sources(0, a=examples())
    assert alone == sources(0, a=examples(), b=examples())
    assert alone != sources(1, a=examples())
    fed = from_tensors([examples(), examples()], name="own")
    first, second = (client.train.source for client in fed.clients)
    assert first is not None
    assert second is not None
    assert (second - 12).tolist() != first.tolist()


def test_kinds_by_id_or_in_order() -> None:
    given_by_id = from_tensors({"a": examples(), "b": examples()}, name="own", kinds={"b": "x"})
    assert [client.kind for client in given_by_id.clients] == [None, "x"]
    in_order = from_tensors([examples(), examples()], name="own", kinds=["x", "y"])
    assert [client.kind for client in in_order.clients] == ["x", "y"]
    with pytest.raises(DataError, match="kinds: 1 given, wanted one for each of 2 clients"):
        from_tensors([examples(), examples()], name="own", kinds=["x"])
    with pytest.raises(DataError, match='kinds: no client "z"; clients are a'):
        from_tensors({"a": examples()}, name="own", kinds={"z": "x"})


def test_describe_counts_the_labels_of_all_splits() -> None:
    row = describe(from_tensors([examples(13, classes=3)], name="own", kinds=["k"]))[0]
    assert (row.id, row.kind, row.n_train, row.n_validation, row.n_test) == ("c00", "k", 6, 3, 4)
    assert row.label_counts.tolist() == [5, 4, 4]


X, Y = examples()


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "clients: 0 given, wanted at least 1"),
        ([examples(3)], 'client "c00": 3 examples, wanted at least 4'),
        ([(X, Y[:5])], 'client "c00": 12 inputs but 5 targets'),
        ([(X[:, 0], Y)], r'client "c00": inputs of shape \(12,\), wanted \(examples, features'),
        ([(X, Y[:, None])], r"class labels of shape \(12, 1\), wanted \(examples,\)"),
        ([(X, X[:, :, None])], r"float targets of shape \(12, 3, 1\)"),
        ([(X, ["a"] * 12)], 'client "c00": targets of type <U1, wanted numbers'),
        ([([[1.0], [1.0, 2.0]], [0, 1])], 'client "c00": inputs of unequal lengths'),
        ([(X, Y), (X[:, :2], Y)], r'client "c01" have shape \(2,\), those of client "c00" \(3,\)'),
        ([(X, Y), (X, Y.float())], 'of client "c01" are 1 floats an example, .* class labels'),
        ([(X, X), (X, X[:, :2])], 'of client "c01" are 2 floats an example, .* 3 floats'),
        ({"a": X}, 'client "a": a Tensor, wanted a pair \\(x, y\\) of inputs and targets'),
        ({"a": torch.zeros(2, 8, 3)}, 'client "a": a Tensor, wanted a pair'),
        ([(X, Y, Y)], 'client "c00": a tuple of 3, wanted a pair'),
        ([(X,)], 'client "c00": a tuple of 1, wanted a pair'),
        ({"a": {"x": X, "y": Y}}, 'client "a": a dict, wanted a pair'),
        (X, 'client "c00": a Tensor, wanted a pair'),
        ([(X, Y * 12)], "label 12: wanted less than the number of examples, 12"),
        ([(X, Y - 1)], "label -1, wanted 0 to 0"),
        ([(X, Y * 0 + 1)], 'federation "own": every example has label 1, wanted at least 2'),
        (
            [(X.double().numpy() * 1e300, Y)],
            'client "c00", training split: .* infinite values in its inp',
        ),
    ],
)
def test_unusable_tensors(clients: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        from_tensors(clients, name="own")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_train_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"train_fraction: {fraction}, wanted more than 0"):
        from_tensors([examples()], name="own", train_fraction=fraction)


def test_a_negative_seed_is_refused_and_purposes_differ() -> None:
    with pytest.raises(ConfigError, match="seed: -1, wanted 0 or more"):
        generator(-1)
    numbers = {
        generator(seed, *purpose).random()
        for seed, purpose in [(0, ("a",)), (0, ("b",)), (1, ("a",)), (0, ("a", "b"))]
    }
    assert len(numbers) == 4
    assert generator(0, "a").random() in numbers


def nan_at(tensor: torch.Tensor, *values: float) -> torch.Tensor:
    bad = tensor.clone()
    bad.view(-1)[: len(values)] = torch.tensor(values)
    return bad


def test_the_guard_names_client_split_and_count_of_bad_values() -> None:
    fed = federation()
    bad = nan_at(fed.clients[1].train.x, float("nan"), float("inf"))
    with pytest.raises(DataError, match=r'client "b", training split: 2 NaN or inf.* its inputs'):
        check_federation(with_split(fed, x=bad))
    y = torch.rand(8, 2)
    fed = from_tensors({"a": (X, torch.rand(12, 2)), "b": (X[:8], y)}, name="own")
    bad = nan_at(fed.clients[1].train.y, float("nan"))
    with pytest.raises(DataError, match=r'client "b", training split: 1 NaN or inf.* its targets'):
        check_federation(with_split(fed, y=bad))


def test_what_the_guard_found_good_it_does_not_look_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Split] = []
    loaded = Split.loaded

    def counted(split: Split) -> Split:
        looked.append(split)
        return loaded(split)

    fed = federation()
    bad = with_split(fed, x=nan_at(fed.clients[1].train.x, float("nan")))
    monkeypatch.setattr(Split, "loaded", counted)
    check_federation(fed)
    assert not looked  # `from_tensors` has
    check_federation(replace(fed))
    assert len(looked) == 6
    for _ in range(2):
        with pytest.raises(DataError, match="1 NaN"):
            check_federation(bad)


def test_the_guard_refuses_no_clients_and_double_ids() -> None:
    fed = federation()
    with pytest.raises(DataError, match='federation "own": 0 clients'):
        check_federation(replace(fed, clients=()))
    with pytest.raises(DataError, match='client id "a": given to two clients'):
        check_federation(replace(fed, clients=(fed.clients[0], fed.clients[0])))


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [
        ("train", 0, "0 training, 2 validation and 2 test"),
        ("train", 1, "1 training"),
        ("validation", 0, "4 training, 0 validation"),
        ("test", 0, "2 validation and 0 test examples, wanted at least 2, 1 and 1"),
    ],
)
def test_the_guard_refuses_small_splits(name: str, size: int, sizes: str) -> None:
    fed = federation()
    split: Split = getattr(fed.clients[1], name)
    change: Any = {name: Split(split.x[:size], split.y[:size])}
    client = replace(fed.clients[1], **change)
    with pytest.raises(DataError, match=f'client "b": .*{sizes}'):
        check_federation(replace(fed, clients=(fed.clients[0], client)))


def test_the_guard_refuses_shapes_types_and_labels() -> None:
    fed = federation()
    train = fed.clients[1].train
    with pytest.raises(DataError, match=r'client "b" have shape \(2,\), .* client "a" \(3,\)'):
        check_federation(with_split(fed, x=train.x[:, :2]))
    with pytest.raises(DataError, match=r"input_shape is \(4,\)"):
        check_federation(replace(fed, input_shape=(4,)))
    with pytest.raises(DataError, match=r'"b", training split: targets of shape \(4, 1\), wanted'):
        check_federation(with_split(fed, y=train.y[:, None]))
    with pytest.raises(DataError, match=r"source of shape \(2,\), wanted \(4,\)"):
        check_federation(with_split(fed, source=torch.arange(2)))
    with pytest.raises(DataError, match=r"inputs of type torch.float64, wanted torch.float32"):
        check_federation(with_split(fed, x=train.x.double()))
    with pytest.raises(DataError, match=r"targets of type torch.int32, wanted torch.int64"):
        check_federation(with_split(fed, y=train.y.int()))
    with pytest.raises(DataError, match='client "b", training split: label 2, wanted 0 to 1'):
        check_federation(with_split(fed, y=train.y + 1))
    with pytest.raises(DataError, match=r"targets of shape \(6,\), wanted \(6, 2\)"):
        check_federation(replace(fed, task="regression"))


def test_the_guard_refuses_one_class_overall() -> None:
    split = Split(X[:4], Y[:4] * 0)
    fed = Federation("own", (Client("a", split, split, split),), "classification", 2, (3,))
    with pytest.raises(DataError, match="every example has label 0, wanted at least 2 classes"):
        check_federation(fed)


def test_the_guard_finds_an_example_in_two_places() -> None:
    fed = federation()
    source = fed.clients[1].train.source
    assert source is not None
    stolen = fed.clients[0].test.source
    assert stolen is not None
    leak = source.clone()
    leak[0] = stolen[0]
    with pytest.raises(
        DataError, match=rf'example {stolen[0]}: in client "a" \(test\) and in client "b" \(train'
    ):
        check_federation(with_split(fed, source=leak))
    twice_in_one_place = source.clone()
    twice_in_one_place[0] = source[1]
    check_federation(with_split(fed, source=twice_in_one_place))
