"""What clients remember: kept over restarts, and right when a round is asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import RecordDict

from fedmerge import StateError, Training
from fedmerge.flower import ServerConfig, client_app
from fedmerge.flower.memory import Memory, read_memory, write_memory
from fedmerge.flower.server import Server
from flower_fixture import LocalGrid, Node, make_clients, network

TRAINING = Training(lr=0.2, epochs=2, batch_size=8)
CASES: dict[str, dict[str, Any]] = {
    "a model of its own": {"method": "ditto"},
    "what top-k left": {"method": "fedmerge:d=2", "compression": "topk", "keep": 0.1},
}


def grid_of(folder: Path | None, first: int = 100) -> LocalGrid:
    """Three SuperNodes that have just been started."""
    nodes = {}
    for i, client in enumerate(make_clients(3)):
        config = {"client-id": client.id}
        if folder is not None:
            config["client-state"] = str(folder)
        app = client_app(network, lambda config, c=client: c, TRAINING)
        nodes[first + i] = Node(app, config)
    return LocalGrid(nodes)


def serve(folder: Path, grid: LocalGrid, rounds: int, **options: Any) -> Server:
    given = {"state": str(folder), "clients": 3, "poll": 0.001, "deadline": 20.0, **options}
    server = Server(grid, ServerConfig(rounds=rounds, ordered=True, **given), network)
    server.run()
    return server


def outcome(server: Server) -> tuple[torch.Tensor, list[Any]]:
    return server.soup.shared["models"], [log.metrics for log in server.progress.history]


@pytest.mark.parametrize("case", CASES)
def test_a_restart_of_every_supernode_changes_no_bit(tmp_path: Path, case: str) -> None:
    options = CASES[case]
    models, metrics = outcome(serve(tmp_path / "whole", grid_of(None), 4, **options))
    serve(tmp_path / "cut", grid_of(tmp_path / "kept"), 2, **options)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    for path in (tmp_path / "kept", *(tmp_path / "kept").iterdir()):
        assert path.stat().st_mode & 0o077 == 0
    again = outcome(serve(tmp_path / "cut", grid_of(tmp_path / "kept", 500), 4, **options))
    assert torch.equal(again[0], models)
    assert again[1] == metrics
    # Without a folder the same restart forgets, and is seen to.
    serve(tmp_path / "lost", grid_of(None), 2, **options)
    forgot = outcome(serve(tmp_path / "lost", grid_of(None, 500), 4, **options))
    assert not torch.equal(forgot[0], models) or forgot[1] != metrics


class StopError(Exception):
    """The server's process ends."""


@pytest.mark.parametrize("case", CASES)
def test_a_round_that_is_asked_again_starts_from_what_was_before_it(
    tmp_path: Path, case: str
) -> None:
    options = CASES[case]
    whole = outcome(serve(tmp_path / "whole", grid_of(None), 4, **options))
    grid = grid_of(tmp_path / "kept")
    push = grid.push_messages

    def stop(messages: Any) -> list[str]:
        # Two of three have trained in round 3, which is not committed.
        if sum(m.metadata.message_type == "train" for m in grid.pushed) == 8:
            raise StopError
        return push(messages)

    grid.push_messages = stop  # type: ignore[method-assign]
    with pytest.raises(StopError):
        serve(tmp_path / "cut", grid, 4, **options)
    again = outcome(serve(tmp_path / "cut", grid_of(tmp_path / "kept", 500), 4, **options))
    assert torch.equal(again[0], whole[0])
    assert again[1] == whole[1]


def test_another_federation_starts_with_nothing(tmp_path: Path) -> None:
    fresh = outcome(serve(tmp_path / "a", grid_of(tmp_path / "kept"), 3, method="ditto"))
    again = outcome(serve(tmp_path / "b", grid_of(tmp_path / "kept"), 3, method="ditto"))
    assert torch.equal(again[0], fresh[0])
    assert again[1] == fresh[1]


@pytest.mark.parametrize("on_disk", [True, False])
def test_memory_by_round_and_federation(tmp_path: Path, on_disk: bool) -> None:
    config = {"client-state": str(tmp_path / "kept")} if on_disk else {}
    kept = RecordDict()
    now, before = {"memory/w": torch.ones(3)}, {"memory/w": torch.zeros(3)}
    write_memory(kept, config, "a/b", Memory("one", 5, now, before))
    found = read_memory(kept, config, "a/b", "one")
    assert found.at(6)["memory/w"].tolist() == found.at(9)["memory/w"].tolist() == [1, 1, 1]
    assert found.at(5)["memory/w"].tolist() == [0, 0, 0]
    assert found.at(4) == {}
    assert read_memory(kept, config, "a/b", "two").at(6) == {}
    if on_disk:
        assert read_memory(kept, config, "a_b", "one").at(6) == {}  # another client's


def test_a_damaged_memory_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    config = {"client-state": str(tmp_path)}
    write_memory(RecordDict(), config, "a", Memory("one", 1, {"left": torch.ones(2)}))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StateError, match=f"{path.name} cannot be read .* remove the file"):
        read_memory(RecordDict(), config, "a", "one")
    grid = grid_of(tmp_path)
    server = serve(tmp_path / "state", grid, 2, method="ditto")
    assert server.soup.version == 2
    names = sorted(p.name for p in tmp_path.glob("c1*"))
    (tmp_path / names[0]).write_bytes(b"x")
    server = serve(tmp_path / "state", grid_of(tmp_path), 3, method="ditto")
    assert "remove the file" in server.progress.members["c1"].error
    assert server.soup.version == 3
    # Another method has nothing to do with it.
    server = serve(tmp_path / "plain", grid_of(tmp_path), 2, method="fedmerge")
    assert server.progress.members["c1"].error == ""
    assert server.progress.members["c1"].replies == 2
