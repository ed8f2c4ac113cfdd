"""The clients a server knows, in the order in which they joined, and what it keeps for each.

Tables with a row for each client, looked up by the client's id. What the numbers mean is the
method's business; see `fedmerge.algorithms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .algorithms import Tensors
from .errors import ConfigError


class Roster:
    """Rows of clients; grows in place, by doubling, so that joining costs the same at any size.

    Args:
        fresh: rows of k new clients, one tensor (k, ...) for each table.
    """

    def __init__(self, fresh: Callable[[int], Tensors]) -> None:
        self._fresh = fresh
        self._places: dict[str, int] = {}
        self._held = fresh(0)  # (room, ...): more than are used

    @classmethod
    def holding(
        cls, fresh: Callable[[int], Tensors], clients: Iterable[str], tables: Tensors
    ) -> Roster:
        """A roster of `clients` with these rows, which it keeps and writes to."""
        made = cls.__new__(cls)  # without fresh rows, which only the server may make
        made._fresh = fresh
        ids = list(clients)
        made._places = dict(zip(ids, range(len(ids)), strict=True))
        made._held = tables
        return made

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, client: object) -> bool:
        return client in self._places

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids in the order of joining."""
        return tuple(self._places)

    @property
    def tables(self) -> Tensors:
        """Views of all rows; they are of use until somebody joins."""
        n = len(self._places)
        return {name: table[:n] for name, table in self._held.items()}

    def join(self, clients: Iterable[str]) -> None:
        """Take in clients; known ones stay as they are. Raises ConfigError for a text."""
        need_list(clients)
        new = [c for c in dict.fromkeys(clients) if c not in self._places]
        if not new:
            return
        first = len(self._places)
        fresh = self._fresh(len(new))
        if "place" in fresh:
            fresh["place"] = torch.arange(first, first + len(new))
        for name, values in fresh.items():
            table = self._held.get(name, values[:0])
            if len(table) < first + len(new):
                self._held[name] = _grown(table, first, first + len(new))
            self._held[name][first : first + len(new)] = values
        self._places.update(zip(new, range(first, first + len(new)), strict=True))

    def at(self, clients: Sequence[str]) -> Tensor:
        """(k,) int64 places of clients. Raises ConfigError for a text, or one that never joined."""
        need_list(clients)
        places = [self._places.get(c, -1) for c in clients]
        if -1 in places:
            raise ConfigError(
                f'client "{clients[places.index(-1)]}" has not joined: call join first'
            )
        return torch.tensor(places, dtype=torch.int64)

    def rows(self, clients: Sequence[str], names: Iterable[str] | None = None) -> Tensors:
        """A copy of the rows of clients, in that order, from some of the tables or from all.

        Raises ConfigError as `at` does.
        """
        at = self.at(clients)
        chosen = self._held if names is None else names
        return {name: self._held[name].index_select(0, at) for name in chosen}

    def put(self, clients: Sequence[str], rows: Tensors) -> None:
        """Replace rows of clients in some of the tables."""
        at = self.at(clients)
        for name, values in rows.items():
            self._held[name][at] = values


def need_list(clients: Iterable[str]) -> None:
    """Raise ConfigError for a text in place of a list of names: its letters are no clients."""
    if isinstance(clients, str):
        raise ConfigError(
            f'clients = "{clients}": wanted a list of client names, e.g. ["{clients}"]'
        )


def _grown(table: Tensor, used: int, wanted: int) -> Tensor:
    """A table with room for `wanted` rows or more, of which the first `used` are filled."""
    # Memory that nobody has written to is not taken from the system.
    made = table.new_empty(max(wanted, 2 * len(table) if used else 0), *table.shape[1:])
    made[:used] = table[:used]
    return made
