"""Which updates are too large to be believed, and which clients are sent too many bad ones.

It looks at lengths and counts only; whether an update fits the model is `Soup`'s own business.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

KNOWN = 5
"""Updates whose lengths must be known before their median is the measure."""
WINDOW = 256
"""Lengths that the running median is taken over."""
INNOCENT = frozenset({"stale", "unknown", "set aside"})
"""Reasons that speak of slowness, or of somebody else, and are not held against a client."""


@dataclass
class Guard:
    """Bounds what one client can do to the others; part of the server's state.

    An update longer than `factor` times the running median of those taken is refused. Before five
    are known, the length of a fresh model stands in for the median: local training does not move a
    model by many times its own length.

    Attributes:
        factor: longest update, in medians; infinity for no bound.
        patience: refusals after which a client is set aside until the operator lets it back; 0 for
            never. Late updates are not counted.
        lengths: Euclidean lengths of the parameters' part of the latest updates taken.
        offences: refusals of each client since it was last let back.
        aside: clients set aside.
    """

    factor: float = 10.0
    patience: int = 5
    lengths: list[float] = field(default_factory=list)
    offences: dict[str, int] = field(default_factory=dict)
    aside: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ConfigError(f"norm_factor = {self.factor}: wanted more than 1, or inf for none")
        if self.patience < 0:
            raise ConfigError(f"patience = {self.patience}: wanted 0 or more")

    def bound(self, model_length: float) -> float:
        """Longest update that is taken from a client that was sent a model of this length."""
        known = len(self.lengths) >= KNOWN
        usual = statistics.median(self.lengths) if known else model_length
        # Models or medians of length 0 would refuse everything, for ever.
        return self.factor * usual if usual > 0 else math.inf

    def take(self, length: float) -> None:
        """Remember an update that was taken."""
        self.lengths = [*self.lengths, length][-WINDOW:]

    def refuse(self, client: str, reason: str) -> None:
        """Remember a refusal; set the client aside when its patience is used up."""
        if reason in INNOCENT:
            return
        self.offences[client] = self.offences.get(client, 0) + 1
        if self.patience and self.offences[client] >= self.patience:
            self.aside.add(client)

    def readmit(self, clients: Iterable[str]) -> None:
        """Let clients back, with a clean record."""
        for client in clients:
            self.aside.discard(client)
            self.offences.pop(client, None)

    def to_json(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {
            "lengths": self.lengths,
            "offences": self.offences,
            "aside": sorted(self.aside),
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Take back what `to_json` made; nothing, from a state that has none."""
        self.lengths = [float(v) for v in values.get("lengths", [])]
        self.offences = {str(c): int(n) for c, n in values.get("offences", {}).items()}
        self.aside = set(values.get("aside", []))
