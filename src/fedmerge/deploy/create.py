"""`fedmerge deploy init`: the files of a complete Flower app, to be edited and run.

It writes files and nothing else; see `credentials` for keys and `check` for what may be wrong.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from ..errors import ConfigError, StateError
from ..flower.config import ServerConfig
from ..store import write_atomic

PORT = 8000
PLAIN = {"gitignore": ".gitignore"}


def create_app(folder: Path, *, clients: int = 4, publisher: str = "your-name") -> list[Path]:
    """Write an app for `clients` sites into `folder`; return the files.

    Raises:
        ConfigError: a name that no package can have, or no clients.
        StateError: `folder` is not empty, or cannot be written.
    """
    folder = folder.resolve()
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    if not name or not name[0].isalpha():
        raise ConfigError(f'"{folder.name}" is no name for an app: begin it with a letter')
    if clients < 1:
        raise ConfigError(f"clients = {clients}: wanted 1 or more")
    if folder.exists() and any(folder.iterdir()):
        raise StateError(f"{folder} is not empty: choose a new folder")
    package = name.replace("-", "_")
    sites = "\n".join(_site(i) for i in range(clients))
    values = {
        "name": name,
        "package": package,
        "publisher": publisher,
        "clients": str(clients),
        "last": str(clients - 1),
        "port": str(PORT),
        "state": str(folder / "state"),
        "folder": str(folder),
        "sites": sites,
        "settings": "\n".join(_settings(folder / "state", clients)),
    }
    written = []
    template = resources.files(__package__) / "template"
    # Those of the app are as they are; the others have {names} to be filled in.
    for source in (template / "app").iterdir():
        if source.name.endswith(".py.in"):
            written.append(folder / package / source.name.removesuffix(".in"))
            write_atomic(written[-1], source.read_bytes())
    for source in template.iterdir():
        if source.is_file():
            plain = source.name.removesuffix(".in")
            written.append(folder / PLAIN.get(plain, plain))
            text = source.read_text(encoding="utf-8").format_map(values)
            write_atomic(written[-1], text.encode())
    return sorted(written)


def _settings(state: Path, clients: int) -> Iterator[str]:
    """Every setting, since Flower lets a run override only what is written down."""
    own = {"state": str(state), "rounds": 10, "clients": clients, "identity": "key"}
    for field in dataclasses.fields(ServerConfig):
        yield f"{field.name} = {json.dumps(own.get(field.name, field.default))}"


def _site(i: int) -> str:
    return f"""  site-{i}:
    <<: *site
    environment: {{FLWR_TELEMETRY_ENABLED: "0"}}
    command: >-
      fedmerge deploy node --superlink server:{PORT} --root-certificates credentials/ca.crt
      --auth-supernode-private-key credentials/site-{i}.key
      --node-config 'data="/data/site.npz" client-state="/memory"'
    volumes:
      - ./memory/site-{i}:/memory
      - ./credentials/ca.crt:/app/credentials/ca.crt:ro
      - ./credentials/site-{i}.key:/app/credentials/site-{i}.key:ro
      - ./data/site-{i}:/data:ro"""
