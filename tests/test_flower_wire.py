"""What travels: it arrives as it was sent, in few pieces, and nonsense is refused in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmerge import ModelError
from fedmerge.algorithms import Ticket
from fedmerge.codec import Codec
from fedmerge.flower import wire

SIZES = (1, 300, wire.SMALL // 4, wire.SMALL // 4 + 1)
"""Numbers in a row; the last does not fit in the record of values."""


def order_of(size: int) -> wire.Order:
    ticket = Ticket("hosp-0", 4, "abc")
    codec = Codec("topk", 0.25)
    row = torch.randn(size, generator=torch.Generator().manual_seed(size))
    return wire.Order(
        ticket,
        5,
        7,
        "fedmerge:d=2",
        "print",
        row,
        "whole",
        True,
        False,
        True,
        codec,
        "fed",
        {"helped": torch.tensor(-0.25, dtype=torch.float64)},
    )


def reply_of(size: int) -> wire.Reply:
    return wire.Reply(
        Ticket("hosp-0", 4, "abc"),
        {"values": torch.randn(size), "places": torch.arange(size, dtype=torch.int32)},
        {"counts": torch.tensor([3, 4])},
        n_examples=20,
        steps=6,
        lr=0.1,
        figures={"merged": {"test": {"loss": 0.5, "auc": 0.75}}},
        sizes={"train": 20, "test": 9},
    )


def pieces(records: Any) -> list[str]:
    """What Flower sends one by one."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    made = Message(records, 2, "train")
    return [type(piece).__name__ for piece in get_all_nested_objects(made).values()]


@pytest.mark.parametrize("size", SIZES)
def test_an_order_arrives_as_it_was_sent(size: int) -> None:
    sent = order_of(size)
    found = wire.read_order(wire.write_order(sent))
    assert torch.equal(found.message, sent.message)
    assert found.told == sent.told
    found.message.add_(1.0)  # a client may write to it
    assert replace(found, message=sent.message) == sent


@pytest.mark.parametrize("size", SIZES)
def test_a_reply_arrives_as_it_was_sent(size: int) -> None:
    sent = reply_of(size)
    found = wire.read_reply(wire.write_reply(sent))
    for mine, theirs in ((found.coded, sent.coded), (found.extra, sent.extra)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(mine[name], value)
            assert mine[name].dtype == value.dtype
    assert replace(found, coded=sent.coded, extra=sent.extra) == sent


def test_a_reply_without_an_update_arrives() -> None:
    sent = wire.Reply(None, {"delta": torch.zeros(0)}, error="no data")
    found = wire.read_reply(wire.write_reply(sent))
    assert found.coded["delta"].shape == (0,)
    assert (found.ticket, found.error) == (None, "no data")


def test_a_small_model_is_as_many_pieces_as_no_model_and_a_large_one_is_cut() -> None:
    empty = pieces(RecordDict({"c": ConfigRecord({})}))
    assert pieces(wire.write_order(order_of(300))) == empty
    assert pieces(wire.write_reply(reply_of(300))) == empty
    large = pieces(wire.write_order(order_of(2 * wire.SMALL)))  # 8 MB
    assert large.count("ArrayChunk") >= 2


@pytest.mark.parametrize(
    "values",
    [
        {"tensors.update": b"\xff" * 20},
        {"tensors.update": "text"},
        {"n-examples": 1.5},
        {"n-examples": True},
        {"size.train": -1},
        {"protocol": wire.PROTOCOL - 1},
        {"figure.merged": 0.5},
    ],
)
def test_a_reply_of_nonsense_is_refused(values: dict[str, Any]) -> None:
    records = wire.write_reply(reply_of(3))
    records["reply"].update(values)
    with pytest.raises(ModelError, match="a reply"):
        wire.read_reply(records)
