"""The checkpoint of a simulation: all that a run has behind it, written whole and read back.

It knows what belongs to a run, and refuses the checkpoint of another; when to save, and how files
are replaced, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..algorithms import Tensors
from ..errors import StateError
from ..soup import Soup
from ..store import load_state, of_another_run, save_state
from .evaluation import Evaluation, better
from .log import RoundLog
from .mixing import WeightHistory


@dataclass
class Progress:
    """What a run has behind it, beside its server; grows in place.

    Attributes:
        memory: what the clients keep, by place. history: a log for each round.
        latest, best: the last evaluation, and the one with the lowest validation loss.
        weights: after each evaluated round, for methods that have them.
    """

    memory: Tensors
    history: list[RoundLog] = field(default_factory=list)
    latest: Evaluation | None = None
    best: Evaluation | None = None
    weights: WeightHistory = field(default_factory=WeightHistory)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take in the evaluation of a round."""
        self.latest, self.best = evaluation, better(evaluation, self.best)


def save(folder: Path, identity: Mapping[str, Any], soup: Soup, progress: Progress) -> None:
    """Write the checkpoint, atomically.

    Args:
        identity: JSON values of all that the run depends on, beside the server's own.

    Raises:
        StateError: the folder cannot be written.
    """
    tensors, facts = soup.state()
    tensors |= {f"memory.{name}": table for name, table in progress.memory.items()}
    evaluated = {}
    for name, evaluation in (("latest", progress.latest), ("best", progress.best)):
        if evaluation is not None:
            tensors |= evaluation.tensors(name)
            evaluated[name] = evaluation.round
    if progress.weights.rounds:
        tensors["weights"] = torch.stack(progress.weights.weights)
    facts |= {
        "run": dict(identity),
        "history": [log.to_json() for log in progress.history],
        "evaluated": evaluated,
        "weights": progress.weights.rounds,
    }
    save_state(folder, tensors, facts)
    soup.storage.saved()


def load(
    folder: Path, identity: Mapping[str, Any], soup: Soup, progress: Progress, rounds: int
) -> Progress:
    """Read what `save` wrote: `soup` becomes the one saved, and its progress is returned.

    Args:
        progress: of a run that has not begun. rounds: that the run is to have in all.

    Raises:
        StateError: damaged, of another run, or further than `rounds`: what a run of fewer rounds
            would have kept is not in it.
    """
    tensors, facts = load_state(folder)
    stored = facts.get("run", {})  # first: another number of clients may change the method, too
    for name, own in identity.items():
        if stored.get(name) != own:
            raise of_another_run(str(folder), name, stored.get(name), own)
    soup.restore(tensors, facts, str(folder))
    done = len(facts["history"])
    if done > rounds:
        raise StateError(
            f"{folder} holds {done} rounds, but rounds = {rounds}: wanted {done} or more, or "
            "another folder"
        )
    m = len(identity["clients"])
    evaluations = {
        name: Evaluation.of_tensors(name, tensors, number, m)
        for name, number in facts["evaluated"].items()
    }
    return Progress(
        {name: tensors[f"memory.{name}"] for name in progress.memory},
        [RoundLog.from_json(values) for values in facts["history"]],
        evaluations.get("latest"),
        evaluations.get("best"),
        WeightHistory(list(facts["weights"]), list(tensors.get("weights", torch.empty(0)))),
    )
