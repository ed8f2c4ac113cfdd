"""What a deployed server has behind it beside its soup, and how both are kept on disk.

A round's evaluation arrives with the replies of the next one: until then its log waits here. It
sends nothing and decides nothing about rounds.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.clients import ClientRow
from ..errors import StateError
from ..local import Training
from ..sim.evaluation import Evaluation, better
from ..sim.log import SPLITS, Measured, RoundLog
from ..sim.results import summarise_run
from ..soup import Soup
from ..store import load_state, save_state
from .config import ServerConfig
from .wire import Figures

MEASURES = ("loss", "accuracy", "auc")
EXTRA = "federation"
"""Version of what is kept beside the soup."""
FORMAT = 1


@dataclass
class Member:
    """What the server knows of a client, beside its row.

    Attributes:
        label: a name for people. node: where it was last seen. seen: round of its last update that
            was taken, 0 for none. replies, failures: counts. error: the last failure's line.
        sizes: examples in each split, as it says.
    """

    label: str = ""
    node: int = 0
    seen: int = 0
    replies: int = 0
    failures: int = 0
    error: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    figures: Figures = field(default_factory=dict)


@dataclass
class Progress:
    """All of it; grows in place.

    Attributes:
        history: finished logs. pending: the log of the last commit, which waits for its evaluation.
        found: figures of that round by client. wanted: whether that round is evaluated at all.
        latest, best: the last evaluation, and the one with the lowest validation loss.
        members: clients by id. readmitted: the operator's latest word that was heeded, in seconds
            since 1970.
        federation: drawn at the first start; names this one among all.
    """

    history: list[RoundLog] = field(default_factory=list)
    pending: RoundLog | None = None
    wanted: bool = False
    found: dict[str, Figures] = field(default_factory=dict)
    latest: Evaluation | None = None
    best: Evaluation | None = None
    members: dict[str, Member] = field(default_factory=dict)
    readmitted: float = 0.0
    federation: str = field(default_factory=lambda: secrets.token_hex(8))

    def put(self, client: str, figures: Figures, *models: str) -> None:
        """Take in figures of the pending round."""
        mine = self.found.setdefault(client, {})
        mine.update({model: figures[model] for model in models if model in figures})

    def finish(self, clients: Sequence[str], seconds: float = 0.0) -> RoundLog | None:
        """Close the pending round with what has been measured; return its log."""
        if self.pending is None:
            return None
        log = replace(self.pending, seconds={**self.pending.seconds, "evaluate": seconds})
        if self.wanted:
            evaluation = self.evaluation(clients)
            log = replace(
                log,
                metrics=evaluation.metrics(),
                gap_train=evaluation.gap("train"),
                gap_test=evaluation.gap("test"),
            )
            if "merged" in evaluation.found:
                self.latest, self.best = evaluation, better(evaluation, self.best)
            for client, figures in self.found.items():
                self.members[client].figures = figures
        self.history.append(log)
        self.pending, self.found = None, {}
        return log

    def evaluation(self, clients: Sequence[str]) -> Evaluation:
        """The figures so far of the pending round, clients in this order."""
        number = self.pending.round if self.pending else len(self.history)
        made = Evaluation(number, len(clients))
        place = {client: i for i, client in enumerate(clients)}
        for client, models in self.found.items():
            for model, splits in models.items():
                made.put(model, [place[client]], _measured(splits))
        return made


def _measured(splits: dict[str, dict[str, float]]) -> dict[str, Measured]:
    """Figures of one client as arrays of one; what is not there was not measured."""
    return {
        split: Measured(*(np.array([splits.get(split, {}).get(name, np.nan)]) for name in MEASURES))
        for split in SPLITS
    }


def save(folder: Path, settings: ServerConfig, soup: Soup, progress: Progress) -> None:
    """Write soup and progress as one state, atomically. Raises StateError if that fails."""
    tensors, facts = soup.state()
    evaluated = {}
    for name, evaluation in (("latest", progress.latest), ("best", progress.best)):
        if evaluation is not None:
            tensors |= evaluation.tensors(name)
            evaluated[name] = [evaluation.round, evaluation.m]
    facts[EXTRA] = {
        "format": FORMAT,
        "history": [log.to_json() for log in progress.history],
        "pending": progress.pending and progress.pending.to_json(),
        "wanted": progress.wanted,
        "found": progress.found,
        "evaluated": evaluated,
        "members": {client: asdict(member) for client, member in progress.members.items()},
        "readmitted": progress.readmitted,
        "federation": progress.federation,
        "settings": asdict(settings),
    }
    save_state(folder, tensors, facts)


def load(folder: Path, soup: Soup) -> Progress:
    """Make `soup` the one that `save` wrote, and return its progress.

    Raises:
        StateError: damaged, or of another method, model, seed, privacy or version.
    """
    tensors, facts = load_state(folder)
    kept = facts.get(EXTRA)
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise StateError(
            f"{folder} holds no state of this version of a deployed server; set fedmerge.state to "
            "another folder, or use the version that wrote it"
        )
    _check_privacy(kept["settings"], soup, folder)
    own = {n: t for n, t in tensors.items() if n.split(".")[0] not in ("latest", "best")}
    soup.restore(own, facts, str(folder))
    evaluations = {
        name: Evaluation.of_tensors(name, tensors, number, m)
        for name, (number, m) in kept["evaluated"].items()
    }
    return Progress(
        [RoundLog.from_json(values) for values in kept["history"]],
        kept["pending"] and RoundLog.from_json(kept["pending"]),
        kept["wanted"],
        kept["found"],
        evaluations.get("latest"),
        evaluations.get("best"),
        {client: Member(**values) for client, values in kept["members"].items()},
        kept["readmitted"],
        kept.get("federation", ""),
    )


def _check_privacy(then: Mapping[str, Any], soup: Soup, folder: Path) -> None:
    """Raise StateError if epsilon, which counts all rounds alike, would be wrong for those done."""
    now = soup.safety.privacy
    had = (then["noise"], then["row_noise"]) if then["clip"] else None
    if now is None and had is not None:
        raise StateError(
            f"{folder} is of rounds with clip = {then['clip']:g}, and this run has none: set "
            "fedmerge.clip and what goes with it again, or fedmerge.state to another folder"
        )
    if now is not None and had != (now.noise, now.row_noise):
        what = "no privacy" if had is None else f"noise = {had[0]:g} and row_noise = {had[1]:g}"
        raise StateError(
            f"{folder} is of rounds with {what}, and epsilon counts all rounds alike: use the same "
            "privacy, or set fedmerge.state to another folder"
        )


def result(settings: ServerConfig, soup: Soup, progress: Progress) -> dict[str, Any]:
    """What `result.json` of a run holds."""
    clients = soup.clients
    rows = [_row(client, progress.members.get(client, Member())) for client in clients]
    made = summarise_run(
        _padded(progress, len(clients)),
        rows,
        soup.weights(),
        soup.setup.layout.blocks,
        None,
        # How many epochs a client trains is its own affair.
        soup.algorithm.cost(soup.setup, len(clients), Training().epochs),
    )
    seconds = sum(sum(log.seconds.values()) for log in progress.history)
    named = {"setting": "natural", "data": "federation", "method": settings.method}
    return {**named, "seed": settings.seed, "seconds": seconds, **made}


def _row(client: str, member: Member) -> ClientRow:
    train, validation, test = (member.sizes.get(split, 0) for split in SPLITS)
    none = np.zeros(0, dtype=np.int64)  # how its labels are spread is the client's own secret
    return ClientRow(member.label or client, None, train, validation, test, none)


def _padded(progress: Progress, m: int) -> Any:
    """The progress as `summarise_run` takes it: evaluations of all m clients known by now."""

    def grown(evaluation: Evaluation | None) -> Evaluation | None:
        if evaluation is None or evaluation.m == m:
            return evaluation
        made = Evaluation(evaluation.round, m)
        for model, splits in evaluation.found.items():
            made.put(model, list(range(evaluation.m)), splits)
        return made

    from ..sim.checkpoint import Progress as SimProgress

    return SimProgress({}, progress.history, grown(progress.latest), grown(progress.best))


def client_weights(soup: Soup, client: str) -> list[float] | None:
    """Merging weights of a client, mean over blocks."""
    weights = soup.weights([client])
    return None if weights is None else [float(w) for w in torch.mean(weights[0], dim=0)]
