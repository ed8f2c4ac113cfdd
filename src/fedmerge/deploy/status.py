"""`fedmerge status`: what a deployed server has done, who is there, and what the operator can say.

It reads the server's state folder; the server need not be running.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StateError
from ..flower.folder import STATUS, is_held, read_json, write_operator


def read_status(folder: Path) -> dict[str, Any]:
    """What the server last said of itself.

    Raises:
        StateError: there is nothing of a server in `folder`.
    """
    found = read_json(folder / STATUS)
    if not found:
        raise StateError(
            f"{folder} has no {STATUS}: wanted the state folder of a server (fedmerge.state), "
            "which writes it when its run begins"
        )
    missing = {"written", "round", "rounds", "method", "refused", "clients"} - found.keys()
    if missing:
        raise StateError(
            f"{folder / STATUS} is damaged (no {', '.join(sorted(missing))}); remove it: the "
            "server writes it anew"
        )
    return {**found, "served": is_held(folder)}


def status_lines(status: Mapping[str, Any], now: float | None = None) -> Iterator[str]:
    """The status in lines of text, a line for each client."""
    age = (time.time() if now is None else now) - status["written"]
    running = status.get("running")
    line = f"round {status['round']} of {status['rounds']} committed, {status.get('state', '')}"
    if running and running["cohort"]:
        line += f": {running['taken']} of {running['cohort']} updates of round {running['round']}"
    yield f"{status['method']}: {line} ({age:.0f} s ago)"
    if status.get("error"):
        yield f"why it failed: {status['error']}"
    elif status.get("state") != "finished" and status.get("served") is False:
        yield "no server is running now: it was stopped or killed; `flwr run` goes on from there"
    if status.get("epsilon") is not None:
        yield f"differential privacy: epsilon {status['epsilon']:.3g}"
    if status["refused"]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(status["refused"].items()))
        yield f"updates refused: {reasons}"
    for reason in status.get("nodes_refused", []):
        yield f"not let in: {reason}"
    yield ""
    table: list[tuple[str, ...]] = [
        ("client", "id", "there", "last", "updates", "failed", "refused", "acc.", "row")
    ]
    table += [_row(client) for client in status["clients"]]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
    for client in status["clients"]:
        name = client["label"] or client["id"]
        if client["error"]:
            yield f"{name}: {client['error']}"
        if client["set_aside"]:
            yield f"{name}: set aside; --readmit {client['id']} lets it back"


def _row(client: Mapping[str, Any]) -> tuple[str, ...]:
    there = "aside" if client["set_aside"] else "yes" if client["connected"] else "no"
    figures = client["figures"].get("merged", {}).get("test", {})
    accuracy = figures.get("accuracy")
    weights = client["weights"]
    return (
        client["label"] or "-",
        client["id"],
        there,
        str(client["seen"] or "-"),
        str(client["replies"]),
        str(client["failures"]),
        str(sum(client["refused"].values())),
        "-" if accuracy is None or accuracy != accuracy else f"{accuracy:.3f}",
        " ".join(f"{w:.2f}" for w in weights) if weights else "-",
    )


def tell_server(folder: Path, labels: Sequence[str], readmit: Sequence[str]) -> list[str]:
    """Give clients labels ("ID=NAME") and let clients back; return what was said, in lines.

    Raises:
        ConfigError: a client that the server does not know, or no ID=NAME.
    """
    clients = read_status(folder)["clients"]
    known = {c["id"]: c["label"] for c in clients}
    aside = {c["id"] for c in clients if c["set_aside"]}
    by_label = {label: client for client, label in known.items() if label}

    def client_of(text: str) -> str:
        found = text if text in known else by_label.get(text)
        if found is None:
            names = ", ".join(f"{c} ({label})" if label else c for c, label in known.items())
            raise ConfigError(f'there is no client "{text}"; the server knows {names}')
        return found

    named: dict[str, str] = {}
    for pair in labels:
        client, equals, name = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f'--label "{pair}": wanted ID=NAME')
        named[client_of(client)] = name
    back = [client_of(text) for text in readmit]
    write_operator(folder, named, back)
    said = [f"{client} is called {name}" for client, name in named.items()]
    said += [f"{client} is let back" for client in back if client in aside]
    said = [f"{line}, from the server's next round on" for line in said]
    # The status may be older than what has just happened to it, so the word is kept all the same.
    return said + [f"{client} was not set aside" for client in back if client not in aside]
