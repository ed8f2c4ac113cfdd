"""What a client remembers from one round to the next: a model of its own, or what it left unsent.

It is in a file where the node's config names a folder (`client-state`); otherwise Flower keeps it
for as long as the SuperNode runs. It never leaves the client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, StateError
from ..store import write_atomic
from . import wire

FOLDER = "client-state"
"""Key of the node's config."""
FORMAT = 1
_TENSORS, _FACTS = "fedmerge-memory", "fedmerge-facts"

Values = dict[str, Tensor]


@dataclass
class Memory:
    """Memory of one client in one federation.

    Attributes:
        federation: which; another one starts with nothing. round: the last that it trained in.
        now: what it remembers since. before: what it did before that round, for when the server was
            restarted before the commit and asks for the round again.
    """

    federation: str
    round: int = 0
    now: Values = field(default_factory=dict)
    before: Values = field(default_factory=dict)

    def at(self, number: int) -> Values:
        """What there was to remember when round `number` began."""
        if number > self.round:
            return self.now
        # Further back than one round: the server began anew, or from an old copy of its state.
        return self.before if number == self.round else {}


def read_memory(kept: Any, node_config: Mapping[str, Any], client: str, federation: str) -> Memory:
    """The client's memory of this federation; empty if it has none.

    Args:
        kept: what Flower keeps for the client (`Context.state`).

    Raises:
        ConfigError, StateError: no folder, or a file that cannot be read.
    """
    path = _path(node_config, client)
    found: Mapping[str, Tensor] = {}
    facts: dict[str, Any] = {}
    if path is None:
        if _FACTS in kept:
            found, facts = wire.tensors(kept[_TENSORS]), dict(kept[_FACTS])
    elif path.exists():
        found, facts = _read(path)
    if facts.get("federation") != federation:
        return Memory(federation)
    made = Memory(federation, int(facts["round"]))
    for name, value in found.items():
        time, _, rest = name.partition("/")
        (made.now if time == "now" else made.before)[rest] = value
    return made


def write_memory(kept: Any, node_config: Mapping[str, Any], client: str, memory: Memory) -> None:
    """Keep it, atomically.

    Raises:
        ConfigError, StateError: no folder, or it cannot be written.
    """
    times = {"now": memory.now, "before": memory.before}
    values = {f"{time}/{name}": v for time, vs in times.items() for name, v in vs.items()}
    facts = {"format": FORMAT, "federation": memory.federation, "round": memory.round}
    path = _path(node_config, client)
    if path is None:
        from flwr.app import ConfigRecord

        kept[_TENSORS], kept[_FACTS] = wire.arrays(values), ConfigRecord(facts)
        return
    from safetensors.torch import save

    with contextlib.suppress(OSError):  # what is wrong is said below, by name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole = {name: value.contiguous().clone() for name, value in values.items()}
    data = save(whole, {"fedmerge": json.dumps({**facts, "client": client})})
    write_atomic(path, data, 0o600)  # it tells about the client's data


def _read(path: Path) -> tuple[Values, dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["fedmerge"])
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["format"] == FORMAT:
            return values, facts
        problem = f"it has format {facts['format']}, this version writes {FORMAT}"
    except Exception as error:  # safetensors has errors of its own
        problem = f"{type(error).__name__}: {error}"
    raise StateError(
        f"this client's memory {path} cannot be read ({problem}): use the version that wrote it, "
        "or remove the file, and the client starts without a memory"
    )


def _path(node_config: Mapping[str, Any], client: str) -> Path | None:
    folder = node_config.get(FOLDER)
    if folder is None:
        return None
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{FOLDER} = {folder!r} in the node's config: wanted a folder")
    # Names of clients are anybody's choice: two that look alike as files must not be one.
    name = re.sub(r"[^\w.-]+", "_", client)[:80]
    tail = hashlib.sha256(client.encode()).hexdigest()[:8]
    return Path(folder).expanduser() / f"{name}-{tail}.safetensors"
