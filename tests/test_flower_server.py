"""The server on Flower, with nodes that are late, dishonest, doubled, or gone; in this process."""

from __future__ import annotations

import json
import logging
import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

import httpx
from flwr.app import Error, Message, RecordDict
from torch import nn

from core_fixture import ALL_METHODS
from fedmerge import ConfigError, ModelError, StateError, Training, make_method
from fedmerge.data.clients import Client, Split
from fedmerge.flower import ServerConfig, client_app, post, wire
from fedmerge.flower.client import check_model
from fedmerge.flower.folder import locked, write_operator
from fedmerge.flower.identity import key_id
from fedmerge.flower.server import ATTEMPTS, Server
from fedmerge.soup import Soup
from flower_fixture import LocalGrid, Node, make_clients, network

TRAINING = Training(lr=0.2, epochs=2, batch_size=8)
METHOD = "fedmerge:d=3"


def grid_of(clients: list[Any], model: Any = network, first: int = 100) -> LocalGrid:
    nodes = {}
    for i, client in enumerate(clients):
        app = client_app(model, lambda config, c=client: c, TRAINING)
        nodes[first + i] = Node(app, {"client-id": client.id})
    return LocalGrid(nodes)


def settings(folder: Path, **options: Any) -> ServerConfig:
    given: dict[str, Any] = {"state": str(folder), "method": METHOD, "rounds": 3, "clients": 4}
    return ServerConfig(**{**given, "poll": 0.001, "deadline": 20.0, "ordered": True, **options})


def serve(folder: Path, grid: LocalGrid, model: Any = network, **options: Any) -> Server:
    server = Server(grid, settings(folder, **options), model)
    server.run()
    return server


def changed(message: Any, reply: Any, **parts: Any) -> Any:
    """The reply with other parts than the honest client has sent."""
    found = wire.read_reply(reply.content)
    made = Message(wire.write_reply(replace(found, **parts)), reply_to=message)
    made.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return made


class Liar:
    """Sends something else than it should, in a way that is chosen by name."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.first: Any = None

    def __call__(self, message: Any, reply: Any) -> Any:
        if message.metadata.message_type != "train":
            return reply
        found = wire.read_reply(reply.content)
        delta = found.coded["delta"]
        first, again = self.first or found, self.first is not None
        self.first = first
        assert found.ticket is not None
        parts: dict[str, dict[str, Any]] = {
            "nan": {"coded": {"delta": delta * float("nan")}},
            "huge": {"coded": {"delta": delta * 1e6}},
            "shape": {"coded": {"delta": delta[:-1]}},
            "dtype": {"coded": {"delta": delta.double()}},
            "places": {"coded": {"values": delta[:2], "places": torch.tensor([5, 10**6]).int()}},
            "replayed": {"ticket": first.ticket, "coded": first.coded},
            "repeated": {"coded": first.coded},
            "foreign": {"ticket": replace(found.ticket, client="c0")},
            "no examples": {"n_examples": 0},
            "boasting": {"extra": {"help": torch.tensor(7.0, dtype=torch.float64)}},
            "silent": {"error": "no answer"} if again else {},
        }
        return changed(message, reply, **parts[self.how])


@pytest.mark.parametrize(
    ("how", "reason", "refused"),
    [
        ("nan", "non-finite", 3),
        ("huge", "norm", 3),
        ("shape", "shape", 3),
        ("dtype", "shape", 3),
        ("places", "shape", 3),
        ("replayed", "stale", 2),
        ("repeated", "duplicate", 2),
        ("foreign", "foreign", 3),
        ("no examples", "empty", 3),
        ("boasting", "shape", 3),
    ],
)
def test_a_liar_is_refused_and_the_others_learn_as_without_it(
    tmp_path: Path, how: str, reason: str, refused: int
) -> None:
    clients = make_clients(5)
    grid = grid_of(clients)
    grid.nodes[104].change = Liar(how)
    server = serve(tmp_path / "with", grid, clients=5)
    assert server.soup.refused == {reason: refused}
    assert server.soup.refused_by == {"c4": {reason: refused}}
    logged = [log.refused for log in server.progress.history]
    assert sum(sum(one.values()) for one in logged) == refused
    if refused == 3:
        without = serve(tmp_path / "without", grid_of(clients[:4]))
    else:  # its first update was honest: as with a client that falls silent after it
        grid = grid_of(clients)
        grid.nodes[104].change = Liar("silent")
        without = serve(tmp_path / "without", grid, clients=5)
    assert torch.equal(server.soup.shared["models"], without.soup.shared["models"])
    ids = ["c0", "c1", "c2", "c3"]
    mine, theirs = server.soup.weights(ids), without.soup.weights(ids)
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine, theirs)
    for client in ids:
        figures = server.progress.members[client].figures["merged"]["test"]
        alone = without.progress.members[client].figures["merged"]["test"]
        assert figures == pytest.approx(alone, abs=0, nan_ok=True)  # no area with three classes


def test_a_client_with_many_refusals_is_set_aside_until_it_is_let_back(tmp_path: Path) -> None:
    grid = grid_of(make_clients(4))
    grid.nodes[103].change = Liar("nan")
    serve(tmp_path, grid, rounds=4, patience=2)
    asked = [m for m in grid.pushed if m.metadata.dst_node_id == 103]
    assert sum(m.metadata.message_type == "train" for m in asked) == 2
    grid.nodes[103].change = None
    server = serve(tmp_path, grid, rounds=5, patience=2)
    assert server.progress.members["c3"].replies == 0  # over a restart, too
    write_operator(tmp_path, {}, ["c3"])
    server = serve(tmp_path, grid, rounds=6, patience=2)
    assert server.progress.members["c3"].replies == 1


def test_late_replies_are_refused_and_counted(tmp_path: Path) -> None:
    grid = grid_of(make_clients(4))

    def hold(node: int) -> bool:
        # c3's reply to round 1 comes when round 2 is under way.
        orders = [m for m in grid.pushed if m.metadata.message_type == "train"]
        return node == 103 and 0 < len(orders) < 5

    grid.hold = hold
    server = serve(tmp_path, grid, quorum=0.75, rounds=3)
    assert server.soup.refused == {"stale": 1}
    assert server.progress.history[0].dropped == 1
    assert server.progress.history[1].refused == {"stale": 1}
    count = dict(
        zip(server.soup.clients, server.soup.rows(server.soup.clients)["count"], strict=True)
    )
    assert int(count["c3"]) <= 2


def test_no_more_orders_are_out_than_allowed(tmp_path: Path) -> None:
    grid = grid_of(make_clients(4))
    serve(tmp_path, grid, in_flight=2, rounds=2)
    assert grid.most_open == 4  # when asked who they are, before any model is sent
    grid.most_open = 0
    serve(tmp_path, grid, in_flight=2, rounds=4)
    resumed = [m for m in grid.pushed if m.metadata.message_type == "query"]
    assert len(resumed) == 8
    grid = grid_of(make_clients(4))
    for i, node in grid.nodes.items():
        node.key = bytes([i])
    serve(tmp_path / "keys", grid, in_flight=2, rounds=2, identity="key")
    assert grid.most_open == 2


class StopError(Exception):
    """The server's process ends."""


@pytest.mark.parametrize("after", [5, 9, 11])
def test_a_server_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path, after: int) -> None:
    clients = make_clients(4)
    whole = serve(tmp_path / "whole", grid_of(clients), rounds=4)
    grid = grid_of(clients)
    push = grid.push_messages

    def stop(messages: Any) -> list[str]:
        if sum(m.metadata.message_type == "train" for m in grid.pushed) == after:
            raise StopError
        return push(messages)

    grid.push_messages = stop  # type: ignore[method-assign]
    with pytest.raises(StopError):
        serve(tmp_path / "cut", grid, rounds=4)
    resumed = serve(tmp_path / "cut", grid_of(clients, first=500), rounds=4)  # other node ids
    assert torch.equal(resumed.soup.shared["models"], whole.soup.shared["models"])
    for name, rows in whole.soup.rows(whole.soup.clients).items():
        assert torch.equal(resumed.soup.rows(whole.soup.clients)[name], rows)
    mine, theirs = resumed.progress.history, whole.progress.history
    assert [log.metrics for log in mine] == [log.metrics for log in theirs]


def test_two_nodes_that_claim_one_id_are_not_both_let_in(tmp_path: Path) -> None:
    clients = make_clients(4)
    grid = grid_of(clients)
    twin = Node(client_app(network, lambda config: clients[0], TRAINING), {"client-id": "c0"})
    grid.nodes[900] = twin
    server = serve(tmp_path, grid)
    assert set(server.soup.clients) == {"c0", "c1", "c2", "c3"}
    asked = {m.metadata.dst_node_id for m in grid.pushed if m.metadata.message_type == "train"}
    assert asked == {100, 101, 102, 103}
    assert "which node 100 is already" in server.roster.nodes_refused[0]


def test_keys_name_clients_and_rows_follow_them(tmp_path: Path) -> None:
    clients = make_clients(4)
    grid = grid_of(clients)
    for i, node in enumerate(grid.nodes.values()):
        node.key, node.name = b"key %d" % i, f"hospital {i}"
    first = serve(tmp_path, grid, identity="key", rounds=2)
    assert set(first.soup.clients) == {key_id(b"key %d" % i) for i in range(4)}
    assert first.progress.members[key_id(b"key 2")].label == "hospital 2"
    assert not [m for m in grid.pushed if m.metadata.message_type == "query"]
    # The same keys at other nodes, in another order.
    moved = LocalGrid({700 - i: node for i, node in enumerate(grid.nodes.values())})
    again = serve(tmp_path, moved, identity="key", rounds=4)
    assert again.soup.clients == first.soup.clients
    assert again.soup.rows(again.soup.clients)["count"].tolist() == [4, 4, 4, 4]


def test_one_block_for_the_whole_model(tmp_path: Path) -> None:
    server = serve(tmp_path, grid_of(make_clients(4)), blocks="whole")
    weights = server.soup.weights()
    assert weights is not None
    assert weights.shape == (4, 1, 3)
    assert (weights - 1 / 3).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "share"), [("bfloat16", 0.5), ("topk", 0.3)])
def test_compressed_updates_are_smaller_and_still_learn(
    tmp_path: Path, kind: str, share: float
) -> None:
    clients = make_clients(4)
    plain = serve(tmp_path / "plain", grid_of(clients), rounds=24)
    small = serve(tmp_path / kind, grid_of(clients), rounds=24, compression=kind, keep=0.1)
    said = 8 * 4  # what four clients say of their training
    sizes = [server.progress.history[-1].bytes_up - said for server in (plain, small)]
    assert sizes[1] <= share * sizes[0]
    assert small.progress.history[-1].bytes_down == plain.progress.history[-1].bytes_down

    def loss(server: Server) -> float:
        summary = server.progress.history[-1].metrics["merged"]["train"]["loss"]
        assert summary is not None
        return summary.mean

    first = plain.progress.history[0].metrics["merged"]["train"]["loss"]
    assert first is not None
    gained = first.mean - loss(plain)
    assert first.mean - loss(small) > (0.98 if kind == "bfloat16" else 0.9) * gained


def test_a_disk_that_is_full_stops_the_server_and_keeps_the_last_commit(tmp_path: Path) -> None:
    clients = make_clients(4)
    whole = serve(tmp_path / "whole", grid_of(clients), rounds=4)
    serve(tmp_path / "full", grid_of(clients), rounds=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write files beyond this size, in the middle of them.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(StateError, match="cannot be written"):
            serve(tmp_path / "full", grid_of(clients), rounds=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed = serve(tmp_path / "full", grid_of(clients), rounds=4)
    assert torch.equal(resumed.soup.shared["models"], whole.soup.shared["models"])


def test_a_client_with_another_model_is_told_so(tmp_path: Path) -> None:
    clients = make_clients(4)
    grid = grid_of(clients)
    other = client_app(lambda: nn.Linear(6, 3), lambda config: clients[3], TRAINING)
    grid.nodes[103].app = other
    server = serve(tmp_path, grid)
    assert (
        "give server_app and every client_app the same model" in server.progress.members["c3"].error
    )
    assert server.progress.members["c3"].failures >= 3
    assert [log.dropped for log in server.progress.history] == [1, 1, 1]


def test_a_round_is_tried_again_with_the_same_updates(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "fedmerge:d=2", "clients": 2, "least": 2, "rounds": 2}
    whole = serve(tmp_path / "whole", grid_of(make_clients(2)), **options)
    grid, failed = grid_of(make_clients(2)), []

    def fail_once(message: Any, reply: Any) -> Any:
        if failed or message.metadata.message_type != "train":
            return reply
        failed.append(message)
        return changed(message, reply, error="no answer")

    grid.nodes[101].change = fail_once
    server = serve(tmp_path / "again", grid, **options)
    assert server.soup.refused == {}  # c0 has sent in the second attempt what it sent in the first
    assert torch.equal(server.soup.shared["models"], whole.soup.shared["models"])


def test_a_late_reply_to_a_first_attempt_stands_for_nobody_else(tmp_path: Path) -> None:
    grid, began, asked = grid_of(make_clients(3)), 0.0, 0

    def hold(node: int) -> bool:
        nonlocal asked, began
        trained = sum(m.metadata.message_type == "train" for m in grid.pushed)
        began = began or bool(trained) * time.monotonic()
        if node == 100:  # too late for the first attempt, and there before the second has begun
            return bool(trained) and time.monotonic() < began + 1.0
        asked += node == 102 and trained > 3
        return node == 102 and trained > 3 and asked < 30

    grid.hold = hold
    server = serve(tmp_path, grid, clients=3, least=3, rounds=1, deadline=0.5)
    assert sum(m.metadata.message_type == "train" for m in grid.pushed) == 5
    assert [(log.cohort, log.dropped) for log in server.progress.history] == [(3, 0)]
    counts = server.soup.rows(["c0", "c1", "c2"])["count"]
    assert counts.tolist() == [1, 1, 1]


def test_late_replies_of_all_are_a_round(tmp_path: Path) -> None:
    grid, began = grid_of(make_clients(3)), 0.0

    def hold(node: int) -> bool:
        nonlocal began
        trained = any(m.metadata.message_type == "train" for m in grid.pushed)
        began = began or trained * time.monotonic()
        return trained and time.monotonic() < began + 1.0

    grid.hold = hold
    server = serve(tmp_path, grid, clients=3, rounds=1, deadline=0.5)
    assert sum(m.metadata.message_type == "train" for m in grid.pushed) == 3
    assert [(log.cohort, log.dropped) for log in server.progress.history] == [(3, 0)]
    assert server.soup.rows(["c0", "c1", "c2"])["count"].tolist() == [1, 1, 1]


def one_class(client: Client) -> Client:
    splits = [Split(part.x, torch.zeros_like(part.y)) for _, part in client.splits()]
    return Client(client.id, *splits)


def with_a_gap(client: Client) -> Client:
    made = one_class(client)
    made.validation.x[0, 0] = torch.nan
    return made


def with_label(label: int) -> Callable[[Client], Client]:
    def change(client: Client) -> Client:
        client.train.y[0] = label
        return client

    return change


def wider(client: Client) -> Client:
    splits = [Split(part.x.repeat(1, 2), part.y) for _, part in client.splits()]
    return Client(client.id, *splits)


def not_there(client: Client) -> Client:
    raise FileNotFoundError(2, "No such file or directory", "site.npz")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (with_a_gap, 'DataError: client "c0", validation split: 1 NaN or infinite values'),
        (with_label(3), "DataError: label 3, but the model has outputs for labels 0 to 2"),
        (with_label(-1), 'DataError: client "c0", training split: label -1, wanted 0 to 2'),
        (
            lambda client: with_label(-1)(one_class(client)),
            'DataError: client "c0", training split: label -1, wanted 0 to 1',
        ),
        (wider, "ModelError: the model does not take this client's inputs of shape (12,): "),
        (not_there, "DataError: the client's data cannot be read: [Errno 2] No such file"),
    ],
)
def test_a_client_says_in_a_line_what_is_wrong_with_its_data(
    tmp_path: Path, fault: Callable[[Client], Client], line: str
) -> None:
    clients = make_clients(3)
    grid = grid_of(clients)
    grid.nodes[100].app = client_app(network, lambda config: fault(clients[0]), TRAINING)
    server = serve(tmp_path, grid, clients=3, least=2, rounds=2)
    assert server.progress.members["c0"].error.startswith(line)
    assert "\n" not in server.progress.members["c0"].error
    assert server.soup.rows(["c1", "c2"])["count"].tolist() == [2, 2]
    assert server.progress.history[-1].metrics["merged"]["validation"]["loss"] is not None


def test_looking_at_a_model_leaves_it_as_it_was() -> None:
    module = nn.Sequential(nn.Dropout(0.5), network())
    for training in (True, False):
        module.train(training)
        check_model(module, make_clients(1)[0])
        assert module.training == module[0].training == training


def test_whatever_a_model_raises_is_a_line() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError

    with pytest.raises(ModelError, match=r"inputs of shape \(6,\): RuntimeError$"):
        check_model(Odd(), make_clients(1)[0])


def test_the_shape_of_an_update_is_told(tmp_path: Path) -> None:
    grid = grid_of(make_clients(3))

    def short(message: Any, reply: Any) -> Any:
        if message.metadata.message_type != "train":
            return reply
        return changed(message, reply, coded={"delta": torch.zeros(5)})

    grid.nodes[100].change = short
    server = serve(tmp_path, grid, clients=3, least=2, rounds=1)
    assert server.progress.members["c0"].error.startswith("in round 1 it sent ")
    assert "5" in server.progress.members["c0"].error


def test_a_client_of_one_class_takes_part(tmp_path: Path) -> None:
    clients = make_clients(3)
    server = serve(tmp_path, grid_of([one_class(clients[0]), *clients[1:]]), clients=3, rounds=2)
    assert server.soup.rows(["c0"])["count"].tolist() == [2]
    assert server.progress.members["c0"].error == ""


class BehindGrid(LocalGrid):
    """The node 100 hands over each reply when it is given the next message, as Flower's may."""

    kept: dict[str, Message]

    def push_messages(self, messages: list[Message]) -> list[str]:
        (message,) = messages
        before = dict(self.replies)
        (name,) = super().push_messages(messages)
        if message.metadata.dst_node_id == 100:
            self.replies = {**before, **getattr(self, "kept", {})}
            self.kept = {name: reply_to(message, self.nodes[100])}
        return [name]


def reply_to(message: Message, node: Node) -> Message:
    made = node.app(message, node.context)
    made.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
    return made


@pytest.mark.parametrize(("rounds", "told"), [(1, 0), (5, 1)])
def test_a_node_that_is_one_message_behind_misses_no_round(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rounds: int,
    told: int,
) -> None:
    monkeypatch.setattr(post, "REMIND", 0.05)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    grid = BehindGrid(grid_of(make_clients(3)).nodes)
    server = serve(tmp_path, grid, clients=3, rounds=rounds)
    assert [(log.cohort, log.dropped) for log in server.progress.history] == [(3, 0)] * rounds
    assert server.soup.rows(["c0", "c1", "c2"])["count"].tolist() == [rounds] * 3
    assert server.soup.refused == {}
    lines = [record.getMessage() for record in caplog.records if "reminder" in record.getMessage()]
    assert len(lines) == told
    assert all('client "c0" (node 100) has answered 3 orders in a row' in one for one in lines)


def test_a_node_that_stops_in_the_middle_of_its_reply_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's Grid waits for what has been announced, for minutes."""
    monkeypatch.setattr(post, "HOLD", 0.05)
    monkeypatch.setattr(post, "TOLERANCE", 0.0)
    grid, real, goes_on, asked = (
        grid_of(make_clients(3)),
        LocalGrid.pull_messages,
        threading.Event(),
        [],
    )

    def pull(ids: list[str]) -> list[Message]:
        for name in ids:
            message = grid.pushed[int(name[1:])].metadata
            if message.dst_node_id == 100 and message.message_type == "train":
                asked.append(name)
                goes_on.wait(60)
        return real(grid, ids)

    monkeypatch.setattr(grid, "pull_messages", pull)
    began = time.monotonic()
    options: dict[str, Any] = {"clients": 3, "least": 2, "quorum": 1.0}
    server = serve(tmp_path, grid, rounds=2, deadline=2.0, **options)
    assert time.monotonic() - began < 20
    assert [(log.cohort, log.dropped) for log in server.progress.history] == [(3, 1), (2, 0)]
    assert server.soup.rows(["c0", "c1", "c2"])["count"].tolist() == [0, 2, 2]
    assert len(asked) == len(set(asked))  # Flower is not asked again while it waits
    goes_on.set()  # what it sends in the end is late
    assert server.soup.refused == {}


def test_what_comes_after_its_order_has_expired_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "HOLD", 0.01)
    monkeypatch.setattr(post, "TOLERANCE", 0.0)
    grid, goes_on = grid_of(make_clients(1)), threading.Event()
    monkeypatch.setattr(grid, "pull_messages", lambda ids: goes_on.wait(60) and [])
    office = post.Post(grid, 9, ttl=0.1)
    assert office.send(RecordDict(), "query", "c0", 100, 1, None)
    assert list(office.replies()) == []
    time.sleep(0.2)
    ((_, _, failure),) = office.replies()
    assert failure == post.Failure("no reply before the order expired")
    assert office._pulls == {}
    goes_on.set()


def test_what_took_long_to_arrive_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "HOLD", 0.01)
    grid, goes_on = grid_of(make_clients(1)), threading.Event()
    real = LocalGrid.pull_messages

    def pull(ids: list[str]) -> list[Message]:
        goes_on.wait(60)
        if len(grid.pushed) == 2:
            raise ValueError("of Flower's own")
        return real(grid, ids)

    grid.nodes[100].app = lambda message, context: Message(RecordDict(), reply_to=message)  # type: ignore[assignment]
    monkeypatch.setattr(grid, "pull_messages", pull)
    office = post.Post(grid, 9, ttl=1000)

    def found() -> list[Any]:
        for _ in range(500):
            replies = list(office.replies())
            if replies:
                return replies
            time.sleep(0.01)
        return []

    assert office.send(RecordDict(), "train", "c0", 100, 1, "about")
    assert list(office.replies()) == []
    assert office.busy() == {"c0"}
    goes_on.set()
    ((letter, content, failure),) = found()
    assert (letter.about, failure) == ("about", None)
    assert content is not None
    goes_on.clear()
    assert office.send(RecordDict(), "train", "c0", 100, 2, "again")
    assert list(office.replies()) == []
    goes_on.set()
    with pytest.raises(ValueError, match="of Flower's own"):
        found()


def test_when_nodes_are_reminded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders that take long, on a clock of the test's own; who answers what is said here, too."""
    clock, answered = 0.0, set[str]()
    grid = grid_of(make_clients(2))
    for node in grid.nodes.values():
        node.app = lambda message, context: Message(RecordDict(), reply_to=message)  # type: ignore[assignment]
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    office = post.Post(grid, 9, ttl=1000)

    def order(node: int) -> str:
        assert office.send(RecordDict(), "train", f"c{node}", node, 1, None)
        return f"m{len(grid.pushed) - 1}"

    def reminders(until: float) -> list[tuple[float, int]]:
        """When questions go to which node, looking twice a second."""
        nonlocal clock
        found: list[tuple[float, int]] = []
        while clock < until:
            clock += 0.5
            before = len(grid.pushed)
            list(office.replies())
            found += [(clock, m.metadata.dst_node_id) for m in grid.pushed[before:]]
        return found

    grid.pull_messages = lambda ids: [  # type: ignore[method-assign]
        grid.replies.pop(name) for name in ids if name in answered and name in grid.replies
    ]
    first = order(100)
    other = order(101)
    assert reminders(9) == []
    answered.add(other)  # that one takes 9.5 s
    assert reminders(16) == [(10, 100)]  # and not again while the reminder is open
    answered |= {first, "m2"}
    assert reminders(20) == []
    # At best it took 16.5 s: longer than that it is left alone; the other one as before.
    orders = {order(100), order(100), order(101)}
    assert reminders(60) == [(32, 101), (41, 100)]
    answered |= {f"m{i}" for i in range(len(grid.pushed)) if f"m{i}" not in orders}
    # A node of two orders is asked about one of them. After each reminder it takes twice as long.
    assert reminders(62) == [(61, 100), (61, 101)]
    answered |= {"m8", "m9"}
    assert [when for when, node in reminders(110) if node == 101] == [67.5]


def test_errors_are_no_sign_of_a_node_that_is_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, wait, error = 0.0, 10.0, True
    grid = grid_of(make_clients(1))

    def answer(message: Message, context: Any) -> Message:
        if error:
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        return Message(RecordDict(), reply_to=message)

    grid.nodes[100].app = answer  # type: ignore[assignment]
    grid.hold = lambda node: len(grid.pushed) % 2 == 1  # until it is reminded
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    office = post.Post(grid, 9, ttl=1000)
    for error, lines in ((True, 0), (False, 1)):
        for _ in range(post.TELL):
            assert office.send(RecordDict(), "train", "c0", 100, 1, None)
            wait *= 2  # longer than it has ever taken
            clock += wait
            assert list(office.replies()) == []
            ((_, _, failure),) = office.replies()
            assert (failure is not None) == error
        assert sum("reminder" in record.getMessage() for record in caplog.records) == lines


def test_a_node_that_is_at_work_is_reminded_once_for_each_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post, "REMIND", 0.05)
    grid, began = grid_of(make_clients(3)), 0.0

    def hold(node: int) -> bool:
        nonlocal began
        trained = any(m.metadata.message_type == "train" for m in grid.pushed)
        began = began or trained * time.monotonic()
        return node == 100 and trained and time.monotonic() < began + 1.0

    grid.hold = hold
    server = serve(tmp_path, grid, clients=3, rounds=3)
    assert [(log.cohort, log.dropped) for log in server.progress.history] == [(3, 0)] * 3
    kinds = [m.metadata.message_type for m in grid.pushed if m.metadata.dst_node_id == 100]
    # Who it is, the first order, one reminder for all of the second that it took, the next order.
    assert kinds[:4] == ["query", "train", "query", "train"]


def unreachable(message: Any, reply: Any) -> Any:
    """What Flower answers for a node that it has lost, once it has told who it is."""
    if message.metadata.message_type != "train":
        return reply
    made = Message(Error(5, "Node Unavailable"), reply_to=message)
    made.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return made


def test_clients_that_are_away_are_waited_for(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "fedmerge:d=2", "clients": 2, "least": 2, "rounds": 2}
    whole = serve(tmp_path / "whole", grid_of(make_clients(2)), **options)
    grid, lost = grid_of(make_clients(2)), []

    def away(message: Any, reply: Any) -> Any:
        lost.extend([message] * (message.metadata.message_type == "train"))
        return unreachable(message, reply) if len(lost) <= ATTEMPTS + 2 else reply

    grid.nodes[101].change = away
    server = serve(tmp_path / "away", grid, **options)
    assert server.progress.members["c1"].failures == ATTEMPTS + 2
    assert server.soup.refused == {}
    assert torch.equal(server.soup.shared["models"], whole.soup.shared["models"])


@pytest.mark.parametrize("name", ["get_nodes", "push_messages", "pull_messages"])
def test_a_superlink_that_fails_for_a_moment_ends_no_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "fedmerge:d=2", "clients": 2, "least": 2, "rounds": 2}
    whole = serve(tmp_path / "whole", grid_of(make_clients(2)), **options)
    grid, calls = grid_of(make_clients(2)), []
    real = getattr(grid, name)

    def failing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) % 3 == 0:  # as when its database is locked
            response = httpx.Response(500, request=httpx.Request("POST", "https://x"))
            response.raise_for_status()
        return real(*given)

    monkeypatch.setattr(grid, name, failing)
    server = serve(tmp_path / "failing", grid, **options)
    assert len(calls) >= 3
    assert torch.equal(server.soup.shared["models"], whole.soup.shared["models"])


def test_a_superlink_that_refuses_does_end_the_run(tmp_path: Path) -> None:
    grid = grid_of(make_clients(2))

    def refuse() -> Any:
        response = httpx.Response(401, request=httpx.Request("POST", "https://x"))
        response.raise_for_status()

    grid.get_nodes = refuse  # type: ignore[method-assign]
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        serve(tmp_path, grid, method="fedavg", clients=2)


def test_clients_that_stay_away_are_not_waited_for_longer_than_was_asked(tmp_path: Path) -> None:
    grid = grid_of(make_clients(2))
    for node in grid.nodes.values():
        node.change = unreachable
    with pytest.raises(ConfigError, match=r"0\.3 s at round 1 without .*c1: Node Unavailable"):
        serve(tmp_path, grid, method="fedavg", clients=2, wait=0.3)


def test_privacy_that_was_forgotten_is_named(tmp_path: Path) -> None:
    grid = grid_of(make_clients(2))
    options: dict[str, Any] = {"method": "fedmerge:d=2", "clients": 2}
    serve(tmp_path, grid, rounds=1, clip=1.0, noise=0.3, **options)
    with pytest.raises(StateError, match=r"is of rounds with clip = 1, and this run has none: set"):
        serve(tmp_path, grid, rounds=2, **options)


def test_rounds_with_other_noise_are_not_counted_as_if_they_had_this_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "fedavg", "clients": 2, "clip": 1.0}
    grid = grid_of(make_clients(2))
    serve(tmp_path / "low", grid, noise=0.3, rounds=1, **options)
    with pytest.raises(StateError, match=r"is of rounds with noise = 0\.3 and row_noise = 0"):
        serve(tmp_path / "low", grid, noise=10.0, rounds=2, **options)
    serve(tmp_path / "none", grid, method="fedavg", clients=2, rounds=1)
    with pytest.raises(StateError, match="is of rounds with no privacy"):
        serve(tmp_path / "none", grid, rounds=2, **options)
    serve(tmp_path / "low", grid, noise=0.3, rounds=2, **options)


def test_when_every_client_fails_the_server_stops_and_says_why(tmp_path: Path) -> None:
    grid = grid_of(make_clients(4), model=lambda: nn.Linear(6, 3))
    with pytest.raises(ConfigError, match=r"3 attempts at round 1 .* the same model"):
        serve(tmp_path, grid)


def test_no_clients_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0 of 4 clients within 0\.05 s: start the SuperNodes"):
        serve(tmp_path, LocalGrid({}), wait=0.05)


def test_a_state_of_another_model_or_a_newer_version_is_refused(tmp_path: Path) -> None:
    serve(tmp_path, grid_of(make_clients(4)), rounds=1)
    with pytest.raises(StateError, match="its model is"):
        serve(tmp_path, grid_of(make_clients(4)), model=lambda: nn.Linear(6, 3))
    with pytest.raises(StateError, match="its method is"):
        serve(tmp_path, grid_of(make_clients(4)), method="fedavg")
    index = tmp_path / "state.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    with pytest.raises(StateError, match="format 99"):
        serve(tmp_path, grid_of(make_clients(4)))


def test_a_state_folder_is_held_by_one_server(tmp_path: Path) -> None:
    held = rf"another server \(process {os.getpid()}\) is using the state folder"
    with locked(tmp_path), pytest.raises(StateError, match=held), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_server_waits_for_the_one_before_it_to_leave_the_state_folder(tmp_path: Path) -> None:
    # As the ServerApp of a killed SuperLink, which ends some time after the next one has begun.
    said: list[str] = []
    with ExitStack() as before:
        before.enter_context(locked(tmp_path))
        leaving = threading.Timer(0.5, before.close)
        leaving.start()
        start = time.monotonic()
        with locked(tmp_path, wait=30.0, told=said.append):
            assert 0.3 < time.monotonic() - start < 10
        leaving.join()
    assert len(said) == 1
    assert "waiting up to 30 s" in said[0]


def test_every_setting_can_be_given_and_typos_are_named() -> None:
    made = ServerConfig().with_options(
        {"fedmerge.rounds": 7, "fedmerge.quorum": 1, "fedmerge.norm-factor": "inf", "lr": 3}
    )
    assert (made.rounds, made.quorum, made.norm_factor) == (7, 1.0, float("inf"))
    for options, text in (
        ({"fedmerge.round": 7}, 'unknown key "fedmerge.round"; did you mean "rounds"'),
        ({"fedmerge.rounds": "7"}, "wanted int"),
        ({"fedmerge.rounds": True}, "wanted int"),
        ({"fedmerge.identity": "keys"}, 'did you mean "key"'),
        ({"fedmerge.quorum": 0.0}, "quorum = 0.0"),
        ({"fedmerge.method": "fedmrge"}, 'did you mean "fedmerge"'),
        ({"fedmerge.trim": 0.7, "fedmerge.robust": "trimmed"}, "trim = 0.7"),
    ):
        with pytest.raises(ConfigError, match=text):
            ServerConfig().with_options(options)


def test_a_soup_can_be_read_without_flower(tmp_path: Path) -> None:
    server = serve(tmp_path, grid_of(make_clients(4)))
    kept = Soup.open(tmp_path, server.soup.algorithm, network)
    assert kept.version == 3
    assert torch.equal(kept.shared["models"], server.soup.shared["models"])


@pytest.mark.parametrize("method", ALL_METHODS)
def test_clients_make_the_method_that_the_server_has_filled_in(tmp_path: Path, method: str) -> None:
    server = Server(grid_of([]), settings(tmp_path, method=method, clients=4), network)
    assert make_method(server._method()).resolve(None) == server.soup.algorithm


def test_with_privacy_clients_do_not_say_what_their_training_did(tmp_path: Path) -> None:
    options = {"method": "fedmerge:peers=9", "clip": 1.0, "noise": 1.0}
    server = Server(grid_of([]), settings(tmp_path, **options), network)
    assert server._method() == "fedmerge:peers=0:d=4:leave_one_out=false"
    assert not any("help" in name for name in server.soup.shared)


def test_clients_that_fine_tune_hear_what_training_does_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def tune(start: Any, epochs: int, trainer: Any, sure: Any) -> Any:
        asked.append(sure)
        return start

    monkeypatch.setattr("fedmerge.algorithms.fedmerge.fine_tuned_while_it_helps", tune)
    grid = grid_of(make_clients(4))
    server = serve(tmp_path, grid, method="fedmerge-ft:finetune=1")
    orders = [
        wire.read_order(message.content)
        for message in grid.pushed
        if message.metadata.message_type in ("train", "evaluate")
    ]
    last = [order.told["helped"] for order in orders if not order.train]
    assert len(last) == 4
    assert all(torch.equal(told, server.soup.shared["helped"]) for told in last)
    assert server.soup.shared["helped"]
    first = [order.told["helped"] for order in orders if order.round == 1]
    assert first == [0.0] * 4
    assert [sure.tolist() for sure in asked[-4:]] == [[1 - 4 * float(last[0])]] * 4


def test_while_a_client_is_away_others_train_one_model_and_use_another(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    grid = grid_of(make_clients(4))
    grid.nodes[103].change = Liar("silent")  # after its first answer
    server = serve(tmp_path, grid)
    asked = {
        order.ticket.client: order.message
        for message in grid.pushed
        if message.metadata.message_type == "evaluate"
        for order in [wire.read_order(message.content)]
        if order.ticket is not None
    }
    clients = ("c0", "c1", "c2")
    assert set(clients) <= set(asked)
    used = server.soup.used(clients)
    assert torch.equal(torch.stack([asked[c] for c in clients]), used)
    assert not torch.equal(used, server.soup.send(clients).message)
    module = network()
    module.load_state_dict(load_file(tmp_path / "models" / "c1.safetensors"))
    assert server.soup.setup.layout.row(module).equal(used[1, 0])
