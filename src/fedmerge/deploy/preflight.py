"""What would stop a site's SuperNode, before it starts: port, files, the server's certificate.

Flower says most of it as well, within a traceback or by a number. Nothing is changed here, and a
server that does not answer yet is no fault: the SuperNode waits for it.
"""

from __future__ import annotations

import argparse
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from .local import answers

PORT = 9094
"""Of a SuperNode for its own processes, unless it is told another."""
SECONDS = 5.0
EXPIRED, NOT_YET, OTHER_NAME, OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's numbers for what is wrong with a certificate."""


def check_node(arguments: Sequence[str]) -> None:
    """Look at the arguments of a `flower-supernode` that is to start here.

    Raises:
        ConfigError: a port in use, a file that cannot be read, or a server that cannot be trusted.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--superlink", default="")
    parser.add_argument("--root-certificates", type=Path)
    parser.add_argument("--auth-supernode-private-key", type=Path)
    parser.add_argument("--insecure", action="store_true")
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return  # Flower's own parser says what is wrong with it
    if 0 < given.port < 2**16 and answers(given.port):
        raise ConfigError(
            f"port {given.port} is in use, by another SuperNode perhaps: give each on this machine "
            "a --port of its own"
        )
    for path in (given.root_certificates, given.auth_supernode_private_key):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}): wanted the file that was made for this "
                "site, or that the federation's operator gave"
            ) from error
    if given.auth_supernode_private_key is not None:
        _check_key(given.auth_supernode_private_key)
    host, _, port = given.superlink.rpartition(":")
    if not port.isdecimal():
        return
    if given.insecure:
        _check_plain(host.strip("[]"), int(port))
    elif given.root_certificates is not None:
        _check_server(host.strip("[]"), int(port), given.root_certificates)


def _check_key(path: Path) -> None:
    """Read it as Flower will."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        found = isinstance(load_ssh_private_key(path.read_bytes(), None), EllipticCurvePrivateKey)
    except Exception:  # the library has many for what is no key
        found = False
    if not found:
        raise ConfigError(
            f"{path} holds no private key of a site: wanted its own SITE.key (from "
            "make_credentials.py, or ssh-keygen -t ecdsa -b 384), without a password"
        )


def _check_plain(host: str, port: int) -> None:
    """A SuperNode without TLS would knock at a server with TLS for ever, and say nothing."""
    any_server = ssl.create_default_context()
    any_server.check_hostname = False
    any_server.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), SECONDS) as call:
            any_server.wrap_socket(call, server_hostname=host).close()
    except (OSError, UnicodeError, OverflowError, ValueError):
        return  # no TLS, as wanted, or no answer
    raise ConfigError(
        f"{host}:{port} speaks TLS: give --root-certificates with its ca.crt in place of --insecure"
    )


def _check_server(host: str, port: int, root: Path) -> None:
    try:
        trusted = ssl.create_default_context(cafile=str(root))
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{root} holds no certificate ({error}): get it anew") from error
    # As strict as Flower's own connection will be, whatever this version of Python is by itself.
    trusted.verify_flags &= ~ssl.VERIFY_X509_STRICT
    trusted.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        with socket.create_connection((host, port), SECONDS) as call:
            trusted.wrap_socket(call, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        other = ("is for other names", "use one of them, or let it be made for this one")
        what, then = {
            EXPIRED: ("has expired", "the server needs a new one"),
            NOT_YET: ("is not valid yet", "compare the clocks of server and site"),
            OTHER_NAME: other,
            OTHER_ADDRESS: other,
        }.get(error.verify_code, (f"was not signed by {root}", "get ca.crt from its operator"))
        raise ConfigError(f"the certificate of the server {host}:{port} {what}: {then}") from error
    except ssl.SSLError as error:
        raise ConfigError(
            f"{host}:{port} does not speak TLS ({error.reason}): is it the SuperLink's port, and "
            "was it started with --ssl-certfile?"
        ) from error
    except (OSError, UnicodeError, OverflowError):
        return  # no answer, or no address: Flower's own words will do
