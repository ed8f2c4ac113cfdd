"""What stops a SuperNode before it starts: its port, its files, and the server's certificate."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedmerge import ConfigError
from fedmerge.deploy.credentials import make_credentials
from fedmerge.deploy.local import free_port
from fedmerge.deploy.preflight import check_node


@contextmanager
def server(folder: Path | None) -> Iterator[int]:
    """A server with the certificate in `folder`, or one that speaks no TLS; its port."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()

        def answer() -> None:
            try:
                call, _ = door.accept()
                with call:
                    if folder is None:
                        call.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        return
                    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    own.load_cert_chain(folder / "server.crt", folder / "server.key")
                    own.wrap_socket(call, server_side=True).close()
            except OSError:
                return  # the caller did not trust it

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield door.getsockname()[1]
    thread.join(10)


def start(port: int, ca: Path, *more: str) -> None:
    found = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", str(ca)]
    check_node([*found, "--port", str(free_port()), *more])


def credentials(folder: Path, host: str = "127.0.0.1", days: float = 365) -> Path:
    make_credentials(folder, [host], ["site"], days=days)
    return folder


def test_a_server_that_can_be_trusted_or_is_not_there_yet_is_no_fault(tmp_path: Path) -> None:
    good = credentials(tmp_path)
    with server(good) as port:
        start(port, good / "ca.crt", "--auth-supernode-private-key", str(good / "site.key"))
    start(free_port(), good / "ca.crt")


@pytest.mark.parametrize(
    ("host", "days", "own", "text"),
    [
        ("127.0.0.1", -2, True, "has expired: the server needs a new one"),
        ("hospital.example", 365, True, "is for other names"),
        ("10.0.0.1", 365, True, "is for other names"),
        ("127.0.0.1", 365, False, "was not signed by .*ca.crt: get ca.crt"),
    ],
)
def test_a_certificate_that_is_not_good_is_named(
    tmp_path: Path, host: str, days: float, own: bool, text: str
) -> None:
    theirs = credentials(tmp_path / "server", host, days)
    ca = theirs if own else credentials(tmp_path / "other")
    with server(theirs) as port, pytest.raises(ConfigError, match=text):
        start(port, ca / "ca.crt")


def test_a_site_without_tls_is_told_that_the_server_has_it(tmp_path: Path) -> None:
    given = ["--insecure", "--port", str(free_port()), "--superlink"]
    with server(credentials(tmp_path)) as port, pytest.raises(ConfigError, match="speaks TLS: giv"):
        check_node([*given, f"127.0.0.1:{port}"])
    with server(None) as port:
        check_node([*given, f"127.0.0.1:{port}"])
    check_node([*given, f"127.0.0.1:{free_port()}"])


@pytest.mark.parametrize("name", ["site.key.pub", "ca.crt", "server.key"])
def test_what_is_no_key_of_a_site_is_named(tmp_path: Path, name: str) -> None:
    path = credentials(tmp_path) / name
    with pytest.raises(ConfigError, match="holds no private key of a site: wanted its own SITE"):
        start(free_port(), tmp_path / "ca.crt", "--auth-supernode-private-key", str(path))


def test_ports_and_files(tmp_path: Path) -> None:
    good = credentials(tmp_path)
    with server(None) as port, pytest.raises(ConfigError, match="does not speak TLS"):
        start(port, good / "ca.crt")
    with pytest.raises(ConfigError, match=r"no\.key cannot be read \(No such file"):
        start(1, good / "ca.crt", "--auth-supernode-private-key", str(good / "no.key"))
    with pytest.raises(ConfigError, match="holds no certificate"):
        start(1, good / "site.key.pub")
    with server(good) as port, pytest.raises(ConfigError, match=f"port {port} is in use"):
        check_node(["--superlink", "127.0.0.1:1", "--port", str(port)])
    check_node(["--port", "many"])  # Flower's parser says it
    check_node(["--port", "99999"])
    more = ["--port", str(free_port()), "--root-certificates", str(good / "ca.crt")]
    for server_address in ("no..name:9092", "127.0.0.1:99999", "host:²"):
        check_node(["--superlink", server_address, *more])
