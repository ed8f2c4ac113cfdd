"""`fedmerge deploy check`: what would go wrong, found before anything starts.

It reads, tries and reports; it changes nothing, but makes the state folder, to see that it can.
"""

from __future__ import annotations

import datetime
import importlib
import stat
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FedmergeError, StateError
from ..flower.config import ServerConfig
from ..flower.folder import locked
from ..flower.require import require_flower
from ..store import has_state
from .local import answers

SOON = datetime.timedelta(days=14)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is good, and a line that says what to do if not."""

    good: bool
    text: str


def check_app(folder: Path, *, port: int, credentials: str = "credentials") -> list[Finding]:
    """Look at an app's folder, its settings, its state and its credentials.

    Args:
        port: on which the SuperLink is to listen here.
        credentials: folder with ca.crt, server.crt, server.key and the sites' keys, in `folder`.
    """
    folder = folder.resolve()
    found: list[Finding] = []
    project: dict[str, Any] = {}

    def attempt(good: str, check: Callable[[], object]) -> object:
        try:
            value = check()
        except FedmergeError as error:
            found.append(Finding(False, str(error)))
            return None
        found.append(Finding(True, good))
        return value

    attempt("flwr has a version that fedmerge works with", require_flower)
    attempt("pyproject.toml describes a Flower app", lambda: project.update(_project(folder)))
    if project:
        settings = attempt("every setting is known and in its limits", lambda: _settings(project))
        if isinstance(settings, ServerConfig):
            model = attempt("the server's app can be imported", lambda: _model(folder, project))
            state = settings.folder if settings.folder.is_absolute() else folder / settings.state
            attempt(f"the state folder {state} can be used", lambda: _state(state, settings, model))
            if not settings.folder.is_absolute():
                found.append(
                    Finding(
                        False,
                        f'fedmerge.state = "{settings.state}": a relative folder depends on where '
                        "the SuperLink is started; write an absolute one",
                    )
                )
            if settings.identity == "key":
                found += _credentials(folder / credentials, settings.clients)
    found += _bundle(folder, credentials)
    attempt(f"port {port} is free", lambda: _port(port))
    return found


def _project(folder: Path) -> dict[str, Any]:
    path = folder / "pyproject.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): `fedmerge deploy init` writes one"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    app = found.get("tool", {}).get("flwr", {}).get("app", {})
    components = app.get("components", {})
    for key in ("serverapp", "clientapp"):
        if ":" not in str(components.get(key, "")):
            raise ConfigError(
                f"{path}: [tool.flwr.app.components] has no {key}: wanted "
                f'{key} = "package.module:app"'
            )
    return dict(app)


def _settings(app: dict[str, Any]) -> ServerConfig:
    return ServerConfig().with_options(dict(_flat(app.get("config", {}))))


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _model(folder: Path, app: dict[str, Any]) -> Any:
    module, _, name = app["components"]["serverapp"].partition(":")
    sys.path.insert(0, str(folder))
    try:
        made = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's own code may do anything
        raise ConfigError(
            f"{module}:{name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(str(folder))
    model = getattr(made, "fedmerge_model", None)
    if model is None:
        raise ConfigError(f"{module}:{name} was not made by fedmerge.flower.server_app")
    return model


def _state(state: Path, settings: ServerConfig, model: Any) -> None:
    with locked(state):
        if model is not None and has_state(state):
            from ..flower.progress import load

            load(state, settings.soup(model))


def _credentials(folder: Path, clients: int) -> list[Finding]:
    found = []
    try:
        text = _certificates(folder)
        found.append(Finding(True, text))
    except FedmergeError as error:
        found.append(Finding(False, str(error)))
    keys = sorted(folder.glob("*.key.pub"))
    if len(keys) < clients:
        found.append(
            Finding(
                False,
                f"{folder} has the public keys of {len(keys)} sites, fedmerge.clients is "
                f"{clients}: add NAME.key.pub of each site, or lower it",
            )
        )
    seen: dict[bytes, str] = {}
    for path in keys:
        body = b" ".join(path.read_bytes().split()[:2])
        if body in seen:
            found.append(
                Finding(
                    False,
                    f"{path.name} and {seen[body]} are the same key, so the same client: let one "
                    "of the sites make another (ssh-keygen -t ecdsa -b 384)",
                )
            )
        seen[body] = path.name
    for path in sorted(folder.glob("*.key")):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            found.append(Finding(False, f"{path} can be read by others: chmod 600 {path}"))
    return found


def _certificates(folder: Path) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    again = "make them anew (make_credentials.py), or ask the one who signs them"
    try:
        ca, server = (
            x509.load_pem_x509_certificate((folder / name).read_bytes())
            for name in ("ca.crt", "server.crt")
        )
        key = load_pem_private_key((folder / "server.key").read_bytes(), None)
    except OSError as error:
        raise StateError(f"{error.filename} cannot be read ({error.strerror}): {again}") from error
    except (ValueError, TypeError) as error:
        raise StateError(f"{folder}: a certificate or key is damaged ({error}): {again}") from error
    now = datetime.datetime.now(datetime.UTC)
    for name, certificate in (("ca.crt", ca), ("server.crt", server)):
        if now > certificate.not_valid_after_utc:
            day = certificate.not_valid_after_utc.date()
            raise ConfigError(f"{folder / name} has expired on {day}: {again}")
        if now < certificate.not_valid_before_utc:
            day = certificate.not_valid_before_utc.date()
            raise ConfigError(f"{folder / name} is valid from {day} on only: correct the clock")
    try:
        server.verify_directly_issued_by(ca)
    except Exception as error:
        raise ConfigError(f"{folder}: server.crt was not signed by ca.crt: {again}") from error

    def shown(public: Any) -> bytes:
        made: bytes = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return made

    if shown(key.public_key()) != shown(server.public_key()):
        raise ConfigError(f"{folder}: server.key does not belong to server.crt: {again}")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = ", ".join(str(one.value) for one in names)
    left = server.not_valid_after_utc - now
    text = f"the server's certificate is good for {left.days} days, under the names {hosts}"
    return text + ("; renew it soon" if left < SOON else "")


def _bundle(folder: Path, credentials: str) -> list[Finding]:
    """Flower sends the app's folder to every site, but for what .gitignore names."""
    if not list((folder / credentials).glob("*.key")):
        return []
    path = folder / ".gitignore"
    lines = path.read_text().splitlines() if path.exists() else []
    if any(line.strip().strip("/") == credentials.strip("/") for line in lines):
        return [Finding(True, "private keys stay out of the app that is sent to the sites")]
    return [
        Finding(
            False,
            f"{folder / credentials} would be sent to every site with the app: add the line "
            f"/{credentials}/ to {path}",
        )
    ]


def _port(port: int) -> None:
    if answers(port):
        raise ConfigError(
            f"port {port} is in use: end the program that listens there, or start the SuperLink "
            "with another --port (if it is the SuperLink that is running already, all is well)"
        )
