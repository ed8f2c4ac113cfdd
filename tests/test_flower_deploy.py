"""`fedmerge deploy init | check` and `fedmerge status`: files, faults, the operator's words."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from cryptography import x509
from flwr.app import Context, Message, RecordDict

from fedmerge import ConfigError, MissingExtraError, StateError, Training
from fedmerge.deploy.check import check_app
from fedmerge.deploy.create import create_app
from fedmerge.deploy.credentials import make_credentials
from fedmerge.deploy.local import free_port
from fedmerge.deploy.status import read_status, status_lines, tell_server
from fedmerge.flower import ServerConfig, client_app, server_app, wire
from fedmerge.flower.folder import locked, read_operator
from fedmerge.flower.require import require_flower
from fedmerge.flower.server import Server
from flower_fixture import LocalGrid, Node, make_clients, network


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A fresh app of two sites, with credentials."""
    folder = tmp_path / "heart-federation"
    create_app(folder, clients=2)
    make_credentials(folder / "credentials", ["localhost"], ["site-0", "site-1"])
    for name in [name for name in sys.modules if name.startswith("heart_federation")]:
        del sys.modules[name]  # of the test before, at another place
    return folder


def wrong(folder: Path, port: int | None = None) -> list[str]:
    findings = check_app(folder, port=port or free_port())
    return [finding.text for finding in findings if not finding.good]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_new_app_is_complete_and_passes_every_check(app: Path) -> None:
    assert wrong(app) == []
    written = {str(p.relative_to(app)) for p in app.rglob("*") if p.is_file()}
    assert {
        "pyproject.toml",
        "README.md",
        "compose.yaml",
        "Dockerfile",
        ".gitignore",
        "make_credentials.py",
        "heart_federation/__init__.py",
        "heart_federation/server.py",
        "heart_federation/client.py",
        "heart_federation/model.py",
        "heart_federation/data.py",
    } <= written
    project = tomllib.loads((app / "pyproject.toml").read_text())
    config = project["tool"]["flwr"]["app"]["config"]["fedmerge"]
    made = ServerConfig().with_options({f"fedmerge.{k}": v for k, v in config.items()})
    assert set(config) == set(vars(made))  # Flower overrides only what is written down
    assert (made.clients, made.identity, made.folder) == (2, "key", app / "state")
    for path in app.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text()
            assert "{{" not in text
            assert "{clients}" not in text


def test_the_script_makes_credentials_that_pass(app: Path) -> None:
    shutil.rmtree(app / "credentials")
    subprocess.run([sys.executable, "make_credentials.py", "2"], cwd=app, check=True)
    assert wrong(app) == []
    kept = (app / "credentials" / "site-0.key").read_bytes()
    subprocess.run([sys.executable, "make_credentials.py", "3"], cwd=app, check=True)
    assert (app / "credentials" / "site-0.key").read_bytes() == kept
    assert (app / "credentials" / "site-2.key").stat().st_mode & 0o077 == 0


def script(app: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "make_credentials.py", "2"]
    return subprocess.run(command, cwd=app, check=False, capture_output=True, text=True)


def contents(app: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (app / "credentials").iterdir()}


def changed(app: Path, before: dict[str, bytes]) -> set[str]:
    return {name for name, data in contents(app).items() if before.get(name) != data}


def test_the_script_makes_anew_what_is_not_good_any_more(app: Path) -> None:
    script(app)  # for its own hosts
    before = contents(app)
    assert script(app).stdout == ""
    assert changed(app, before) == set()
    expire(app)
    before = contents(app)
    made = script(app)
    assert wrong(app) == []
    assert changed(app, before) == {"ca.crt", "ca.key", "server.crt", "server.key"}
    assert "give every site the new ca.crt" in made.stdout
    assert (app / "credentials" / "ca.key").stat().st_mode & 0o077 == 0


def test_the_script_names_other_hosts_with_the_same_authority(app: Path) -> None:
    script(app)
    before = contents(app)
    replace(app / "make_credentials.py", '"server"]', '"fed.hospital.example", "10.1.2.3"]')
    made = script(app)
    assert wrong(app) == []
    assert changed(app, before) == {"server.crt", "server.key"}
    assert "restart the SuperLink" in made.stdout
    assert "ca.crt" not in made.stdout
    certificate = x509.load_pem_x509_certificate(contents(app)["server.crt"])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.hospital.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == [
        "127.0.0.1",
        "10.1.2.3",
    ]


@pytest.mark.parametrize("fault", ["ca.crt", "server.key", "ca.crt ca.key"])
def test_the_script_mends_what_does_not_fit(app: Path, fault: str) -> None:
    make_credentials(app / "other", ["localhost", "127.0.0.1", "server"], [])
    script(app)
    for name in fault.split():
        shutil.copy(app / "other" / name, app / "credentials" / name)
    assert wrong(app)
    script(app)
    assert wrong(app) == []


def test_certificates_of_an_authority_that_is_elsewhere_are_kept(app: Path) -> None:
    (app / "credentials" / "ca.key").unlink()
    before = contents(app)
    assert script(app).returncode == 0
    assert changed(app, before) == set()


def test_the_script_says_in_a_line_what_it_cannot_write(app: Path) -> None:
    shutil.rmtree(app / "credentials")
    (app / "credentials").write_text("a file")
    made = script(app)
    assert made.returncode == 1
    assert re.fullmatch(r"credentials/ca.crt cannot be written: .+\n", made.stderr)


def expire(app: Path) -> None:
    for name in ("ca.crt", "ca.key", "server.crt", "server.key"):
        (app / "credentials" / name).unlink()
    make_credentials(app / "credentials", ["localhost"], [], days=-2)


def foreign_ca(app: Path) -> None:
    make_credentials(app / "other", ["localhost"], [])
    shutil.copy(app / "other" / "ca.crt", app / "credentials" / "ca.crt")


def foreign_key(app: Path) -> None:
    make_credentials(app / "other", ["localhost"], [])
    shutil.copy(app / "other" / "server.key", app / "credentials" / "server.key")


def same_key(app: Path) -> None:
    for name in ("site-1.key", "site-1.key.pub"):
        source = app / "credentials" / name.replace("1", "0")
        shutil.copy(source, app / "credentials" / name)


def setting(old: str, new: str) -> Callable[[Path], None]:
    return lambda app: replace(app / "pyproject.toml", old, new)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "expired": (expire, "has expired on"),
    "other CA": (foreign_ca, "was not signed by ca.crt"),
    "other key": (foreign_key, "does not belong to server.crt"),
    "no certificate": (lambda app: (app / "credentials" / "server.crt").unlink(), "cannot be read"),
    "damaged": (lambda app: (app / "credentials" / "ca.crt").write_text("x"), "is damaged"),
    "one key twice": (same_key, "the same key, so the same client"),
    "a key is missing": (
        lambda app: (app / "credentials" / "site-1.key.pub").unlink(),
        "public keys of 1 sites, fedmerge.clients is 2",
    ),
    "readable key": (lambda app: (app / "credentials" / "site-0.key").chmod(0o644), "chmod 600"),
    "typo": (setting("rounds = 10", "rounds = 10\nround = 3"), 'did you mean "rounds"'),
    "out of limits": (setting("quorum = 1.0", "quorum = 1.5"), "quorum = 1.5"),
    "no app": (lambda app: (app / "pyproject.toml").unlink(), "`fedmerge deploy init` writes one"),
    "no component": (setting("serverapp = ", "server = "), "has no serverapp"),
    "broken code": (
        lambda app: (app / "heart_federation" / "model.py").write_text("import nothing_like_it"),
        "No module named 'nothing_like_it'",
    ),
    "relative state": (
        lambda app: replace(app / "pyproject.toml", str(app / "state"), "state"),
        "write an absolute one",
    ),
    "keys in the bundle": (
        lambda app: replace(app / ".gitignore", "/credentials/", ""),
        "would be sent to every site",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(app: Path, fault: str) -> None:
    make, text = FAULTS[fault]
    make(app)
    found = wrong(app)
    assert len(found) == 1
    assert text in found[0]


def test_a_port_in_use_is_found(app: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert "is in use" in wrong(app, listener.getsockname()[1])[0]


def test_a_state_in_use_or_of_another_model_is_found(app: Path) -> None:
    with locked(app / "state"):
        assert "is using the state folder" in wrong(app)[0]
    Server(LocalGrid({}), ServerConfig(state=str(app / "state")), network)
    grid = grid_of_two()
    options = {"rounds": 1, "clients": 2, "poll": 0.001, "deadline": 20.0}
    Server(grid, ServerConfig(state=str(app / "state"), **options), network).run()
    assert "its model is" in wrong(app)[0]


def test_flower_of_another_version_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.42.0")
    with pytest.raises(ConfigError, match=r"flwr 1\.42\.0 is installed, .* works with 1\.41\.x"):
        require_flower()

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "fedmerge\[flower\]"'):
        require_flower()


def test_init_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="is not empty"):
        create_app(tmp_path)
    with pytest.raises(ConfigError, match="no name for an app"):
        create_app(tmp_path / "123")


# -- status ----------------------------------------------------------------------------------------


def grid_of_two() -> LocalGrid:
    training = Training(lr=0.2, epochs=1, batch_size=8)
    nodes = {}
    for i, client in enumerate(make_clients(2)):
        nodes[i] = Node(
            client_app(network, lambda config, c=client: c, training), {"client-id": client.id}
        )
    return LocalGrid(nodes)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state folder of a server that has run two rounds."""
    options: dict[str, Any] = {"rounds": 2, "clients": 2, "poll": 0.001, "deadline": 20.0}
    Server(grid_of_two(), ServerConfig(state=str(tmp_path), **options), network).run()
    return tmp_path


def test_status_shows_rounds_clients_and_rows(state: Path) -> None:
    status = read_status(state)
    lines = list(status_lines(status, now=status["written"] + 5))
    assert lines[0] == "fedmerge: round 2 of 2 committed, finished (5 s ago)"
    rows = {line.split()[1]: line for line in lines if line.startswith("-")}
    assert set(rows) == {"c0", "c1"}
    accuracy = status["clients"][0]["figures"]["merged"]["test"]["accuracy"]
    assert f"{accuracy:.3f}" in rows["c0"]
    assert sum(status["clients"][0]["weights"]) == pytest.approx(1.0)


def test_the_operators_words_reach_the_server(state: Path) -> None:
    tell_server(state, ["c0=Cleveland"], [])
    assert tell_server(state, ["c1=Hungary"], ["c0"]) == [
        "c1 is called Hungary, from the server's next round on",
        "c0 was not set aside",
    ]
    labels, readmitted = read_operator(state)
    assert labels == {"c0": "Cleveland", "c1": "Hungary"}
    assert set(readmitted) == {"c0"}
    options: dict[str, Any] = {"rounds": 3, "clients": 2, "poll": 0.001, "deadline": 20.0}
    Server(grid_of_two(), ServerConfig(state=str(state), **options), network).run()
    assert [c["label"] for c in read_status(state)["clients"]] == ["Cleveland", "Hungary"]
    assert {p.stem for p in (state / "models").iterdir()} >= {"Cleveland", "Hungary"}
    with pytest.raises(ConfigError, match=r'no client "c7"; the server knows c0 \(Cleveland\), c1'):
        tell_server(state, [], ["c7"])
    with pytest.raises(ConfigError, match="wanted ID=NAME"):
        tell_server(state, ["c0"], [])


def test_the_models_are_those_that_the_clients_would_receive(state: Path) -> None:
    from safetensors.torch import load_file

    soup = ServerConfig(state=str(state), clients=2).soup(network)
    from fedmerge.flower.progress import load

    load(state, soup)
    module = network()
    module.load_state_dict(load_file(state / "models" / "c1.safetensors"))
    row = soup.setup.layout.row(module)
    assert row.equal(soup.used(["c1"])[0, 0])


def test_the_commands(state: Path, tmp_path: Path) -> None:
    def fedmerge(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedmerge", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = fedmerge("status", str(state))
    assert shown.stdout.startswith("fedmerge: round 2 of 2 committed, finished")
    assert fedmerge("status", str(state / "models")).returncode == 2
    assert fedmerge("deploy", "init", str(tmp_path / "app"), "--clients", "1").returncode == 0
    checked = fedmerge("deploy", "check", str(tmp_path / "app"), "--port", str(free_port()))
    assert checked.returncode == 1
    assert "WRONG" in checked.stdout
    reported = fedmerge("report", str(state))
    assert reported.returncode == 0, reported.stderr
    page = (state / "report.html").read_text()
    assert len(page) > 10_000
    assert "comes from <code>result.json</code> and <code>log.jsonl</code> beside it" in page
    (state / "result.json").unlink()
    unevaluated = fedmerge("report", str(state))
    assert "the server has evaluated no round yet; wait" in " ".join(unevaluated.stderr.split())


def test_expired_is_said_with_its_day(app: Path) -> None:
    expire(app)
    day = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)).date()
    assert str(day) in wrong(app)[0]


def test_a_damaged_status_is_one_line(state: Path) -> None:
    (state / "status.json").write_text("[1]")
    with pytest.raises(StateError, match="holds no JSON object"):
        read_status(state)
    (state / "status.json").write_text('{"round": 1}')
    with pytest.raises(
        StateError, match=r"is damaged .no clients, method, refused, rounds, written"
    ):
        read_status(state)
    (state / "operator.json").write_text(json.dumps({"labels": {"c0": "A"}}))
    assert read_operator(state)[0] == {"c0": "A"}
    (state / "operator.json").write_text('{"labels": []}')
    with pytest.raises(StateError, match=r"operator\.json is damaged"):
        read_operator(state)


def test_status_says_that_a_server_was_killed(state: Path) -> None:
    status = json.loads((state / "status.json").read_text())
    (state / "status.json").write_text(json.dumps({**status, "state": "running"}))
    gone = "no server is running now: it was stopped or killed; `flwr run` goes on from there"
    with locked(state):
        assert gone not in list(status_lines(read_status(state)))
    assert list(status_lines(read_status(state)))[1] == gone


def test_status_says_why_a_run_has_failed(tmp_path: Path) -> None:
    app = server_app(ServerConfig(), network)
    config = {"fedmerge.state": str(tmp_path), "fedmerge.clients": 2, "fedmerge.wait": 0.2}
    empty = LocalGrid({})
    with pytest.raises(ConfigError, match="0 of 2 clients within"):
        app(empty, Context(1, 0, {}, RecordDict(), config))
    lines = list(status_lines(read_status(tmp_path)))
    assert lines[0].startswith("fedmerge: round 0 of ")
    assert ", failed (" in lines[0]
    assert lines[1].startswith("why it failed: 0 of 2 clients within 0.2 s: start the SuperNodes")


def test_status_says_who_was_set_aside_and_why(tmp_path: Path) -> None:
    grid = grid_of_two()

    def nonsense(message: Any, reply: Any) -> Any:
        if message.metadata.message_type != "train":
            return reply
        found = wire.read_reply(reply.content)
        delta = torch.full_like(found.coded["delta"], torch.nan)
        made = Message(
            wire.write_reply(dataclasses.replace(found, coded={"delta": delta})), reply_to=message
        )
        made.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
        return made

    grid.nodes[min(grid.nodes)].change = nonsense
    options: dict[str, Any] = {"rounds": 5, "clients": 2, "least": 1, "poll": 0.001}
    Server(grid, ServerConfig(state=str(tmp_path), deadline=20.0, **options), network).run()
    lines = list(status_lines(read_status(tmp_path)))
    assert "c0: update of round 5 refused: non-finite" in lines
    assert "c0: set aside; --readmit c0 lets it back" in lines
    assert tell_server(tmp_path, [], ["c0"]) == ["c0 is let back, from the server's next round on"]
