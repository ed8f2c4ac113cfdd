"""A real federation on the loopback interface, with TLS and keys, and parts of it killed with -9.

SuperLink, SuperNodes and ServerApp are processes of Flower's own. The tests of this file share one
federation and one state folder, and each goes on where the one before has left it. Each can also be
run by itself, or in a worker of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from fedmerge import Client, Simulation, Split, Training, make_method
from fedmerge.deploy.create import create_app
from fedmerge.deploy.local import LocalFederation
from fedmerge.flower import ServerConfig
from fedmerge.flower.folder import locked
from fedmerge.flower.identity import key_id
from fedmerge.flower.progress import load
from fedmerge.soup import Soup

pytestmark = pytest.mark.federation

SITES = 3
DEADLINE = 40.0
PAUSE = 10.0
"""Seconds between two restarts of a SuperNode, which take seconds of computing each."""
DATA = """
import time
import numpy as np
import torch
from fedmerge import Split


def data(node_config):
    time.sleep(node_config.get("slow", 0.0))
    with np.load(node_config["data"]) as file:
        x, y = torch.tensor(file["x"]), torch.tensor(file["y"])
    return [Split(x[a:b], y[a:b]) for a, b in ((0, 60), (60, 80), (80, 100))]
"""


class Site:
    """The federation, its app and its state folder."""

    def __init__(self, root: Path) -> None:
        self.app, self.state = root / "app", root / "app" / "state"
        create_app(self.app, clients=SITES)
        (self.app / "app" / "data.py").write_text(DATA)
        nodes = {}
        for i in range(SITES):
            draw = np.random.default_rng(i)
            x = draw.normal(size=(100, 13)).astype("float32")
            np.savez(root / f"d{i}.npz", x=x, y=(x[:, i % 2] > 0).astype("int64"))
            nodes[f"site-{i}"] = {"data": str(root / f"d{i}.npz"), "slow": 1.0}
        environment = {"OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        self.federation = LocalFederation(root / "federation", nodes, environment=environment)

    def run(self, more: int, **options: Any) -> int:
        """Begin a run to `more` rounds beyond those committed."""
        self.goal = self.version() + more
        given = {"rounds": self.goal, "deadline": DEADLINE, "evaluate_every": 0, **options}
        return self.federation.run(self.app, {f"fedmerge.{k}": v for k, v in given.items()})

    def again(self) -> int:
        """The one command after a crash: the same run once more."""
        return self.run(self.goal - self.version())

    def status(self) -> dict[str, Any]:
        """What the server shows."""
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
            return found
        return {"round": 0, "clients": []}

    def version(self) -> int:
        """Rounds committed."""
        return int(self.status()["round"])

    def until(self, what: str, good: Any, seconds: float = 150) -> None:
        """Wait until `good(status)`; `what` it is, for the one who reads the failure."""
        end = time.monotonic() + seconds
        while not good(self.status()):
            logs = self.federation.tail("superlink")
            assert time.monotonic() < end, f"no {what} in {seconds} s: {self.status()} {logs}"
            time.sleep(0.1)

    def until_said(self, run: int, what: str, seconds: float = 60) -> None:
        """Wait until the ServerApp of a run has written `what` in its log."""
        end = time.monotonic() + seconds
        while what not in (log := self.federation.said(run)):
            assert time.monotonic() < end, f"nobody has said {what!r} in {seconds} s: {log}"

    def until_under_way(self) -> int:
        """Wait until a round has begun after the last commit; its number."""
        number = self.version() + 1

        def begun(status: dict[str, Any]) -> bool:
            running = status.get("running", {})
            return bool(running.get("round") == number and running["cohort"])

        self.until(f"round {number}", begun)
        return number

    def soup(self) -> Soup:
        """The soup that is on disk, read as a new server would."""
        settings = ServerConfig(state=str(self.state), clients=SITES)
        soup = settings.soup(app_model())
        load(self.state, soup)
        return soup

    def client(self, i: int) -> str:
        """Id of a site: the hash of its public key, computed here by itself."""
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            PublicFormat,
            load_ssh_public_key,
        )

        text = (self.federation.credentials / f"site-{i}.key.pub").read_bytes()
        key = load_ssh_public_key(text)
        return key_id(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def revive(self, *names: str) -> None:
        """Restart SuperNodes as a supervisor would: until the SuperLink lets the same key in."""
        for name in names:
            self.federation.start_node(name)
        again, end = time.monotonic() + PAUSE, time.monotonic() + 150
        while time.monotonic() < end:
            ended = [n for n in names if not self.federation.alive(n)]
            if not ended and all(self.federation.connected(n) for n in names):
                return
            if ended and time.monotonic() > again:
                again = time.monotonic() + PAUSE
                for name in ended:
                    self.federation.kill(name)
                    self.federation.start_node(name)
            time.sleep(0.5)
        raise AssertionError(f"{names}: {[self.federation.tail(n) for n in names]}")


def app_model() -> Any:
    """The model of the app that `deploy init` writes."""
    nn = torch.nn
    return lambda: nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("federation"))
    with made.federation:
        yield made


def check_whole(site: Site, before: dict[str, int]) -> None:
    """No committed round is lost, no update counted twice, and every row is its client's."""
    soup = site.soup()
    logs = [json.loads(line) for line in (site.state / "log.jsonl").read_text().splitlines()]
    assert soup.version == site.goal
    assert [log["round"] for log in logs] == list(range(1, site.goal + 1))[: len(logs)]
    assert set(soup.clients) == {site.client(i) for i in range(SITES)}
    counts = soup.rows(soup.clients)["count"].tolist()
    replies = {c["id"]: c["replies"] for c in site.status()["clients"]}
    assert dict(zip(soup.clients, counts, strict=True)) == replies
    for client, count in zip(soup.clients, counts, strict=True):
        assert before.get(client, 0) <= count <= site.goal


def counts(site: Site) -> dict[str, int]:
    """How often each client's update was used, by the soup's own account."""
    if not site.version():
        return dict.fromkeys((site.client(i) for i in range(SITES)), 0)
    soup = site.soup()
    return dict(zip(soup.clients, soup.rows(soup.clients)["count"].tolist(), strict=True))


def test_with_tls_and_keys_it_does_what_the_simulation_does(site: Site) -> None:
    run = site.run(5, evaluate_every=1)
    assert site.federation.wait(run, 400) == "finished:completed"
    clients = []
    for i in range(SITES):
        with np.load(site.federation.nodes[f"site-{i}"]["data"]) as file:
            x, y = torch.tensor(file["x"]), torch.tensor(file["y"])
        splits = [Split(x[a:b], y[a:b]) for a, b in ((0, 60), (60, 80), (80, 100))]
        clients.append(Client(site.client(i), *splits))
    simulation = Simulation(
        make_method("fedmerge"),
        clients,
        app_model(),
        training=Training(lr=0.1, epochs=2, batch_size=16),
        rounds=5,
    )
    wanted = list(simulation.rounds())
    soup = site.soup()
    assert soup.version == 5
    torch.testing.assert_close(
        soup.shared["models"], simulation.soup.shared["models"], rtol=1e-5, atol=1e-6
    )
    ids = [c.id for c in clients]
    for name, rows in simulation.soup.rows(ids).items():
        # Of numbers kept in 16 bits, one may be rounded the other way.
        off = 1 if rows.dtype == torch.int16 else 1e-5
        torch.testing.assert_close(soup.rows(ids)[name], rows, rtol=1e-4, atol=off)
    logs = [json.loads(line) for line in (site.state / "log.jsonl").read_text().splitlines()]
    for mine, theirs in zip(logs, wanted, strict=True):
        found = mine["metrics"]["merged"]["test"]["accuracy"]["mean"]
        assert found == pytest.approx(theirs.metrics["merged"]["test"]["accuracy"].mean, abs=1e-6)
    check_whole(site, {})
    labels = {c["label"] for c in site.status()["clients"]}
    assert labels == {f"site-{i}" for i in range(SITES)}
    assert len(list((site.state / "models").glob("*.safetensors"))) == SITES


def test_a_supernode_killed_in_a_round_is_missed_and_comes_back(site: Site) -> None:
    before = counts(site)
    run = site.run(2, deadline=20.0)
    number = site.until_under_way()
    site.federation.kill("site-0")
    site.until("round without it", lambda s: s["round"] >= number)
    assert site.federation.wait(run, 300) == "finished:completed"
    check_whole(site, before)
    after = counts(site)
    assert after[site.client(1)] == before[site.client(1)] + 2
    assert after[site.client(0)] <= before[site.client(0)] + 1
    site.revive("site-0")
    run = site.run(1)
    assert site.federation.wait(run, 300) == "finished:completed"
    check_whole(site, after)
    assert counts(site)[site.client(0)] == after[site.client(0)] + 1


def test_a_serverapp_killed_between_push_and_commit_resumes(site: Site) -> None:
    before = counts(site)
    site.run(2)
    number = site.until_under_way()
    kill_serverapp(site)
    assert site.version() == number - 1
    run = site.again()  # at once: Flower needs a minute to see that the old run is dead
    assert site.federation.wait(run, 300) == "finished:completed"
    check_whole(site, before)
    assert counts(site) == {client: n + 2 for client, n in before.items()}


def test_a_superlink_killed_in_a_round_resumes(site: Site) -> None:
    before = counts(site)
    site.run(2)
    number = site.until_under_way()
    site.federation.kill("superlink")
    assert site.version() == number - 1
    site.federation.start_superlink()
    # The ServerApp of before ends when it likes, and until then has the state folder: here it is
    # made to last until the new one has met it. No round without a site that finds the new
    # SuperLink late: it would be away, not lost.
    with locked(site.state, wait=60.0):
        run = site.run(site.goal - site.version(), least=SITES)
        site.until_said(run, "waiting up to")
    assert site.federation.wait(run, 300) == "finished:completed"
    check_whole(site, before)
    assert counts(site) == {client: n + 2 for client, n in before.items()}


def test_all_supernodes_killed_the_run_waits_for_them(site: Site) -> None:
    before = counts(site)
    # No round without one: two of them are enough otherwise, and the SuperLink may let the third
    # in again when both rounds are over.
    run = site.run(2, least=SITES)
    site.until_under_way()
    names = [f"site-{i}" for i in range(SITES)]
    for name in names:
        site.federation.kill(name)
    site.revive(*names)
    assert site.federation.wait(run, 400) == "finished:completed"
    check_whole(site, before)
    assert counts(site) == {client: n + 2 for client, n in before.items()}


def kill_serverapp(site: Site) -> None:
    """Kill the ServerApp's process, which Flower has started by itself."""
    found = site.federation.descendants("flwr-serverapp")
    assert found, "no ServerApp is running"
    for pid in found:
        os.kill(pid, signal.SIGKILL)
