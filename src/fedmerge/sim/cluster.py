"""Clients' work on a Ray cluster, shard by shard: the same bits for any number of actors, also when
actors or machines are lost.

What travels: to an actor its clients' data, once; in a round the server's shared state, put into
the object store once for all actors, with the cohort's rows and what its clients keep; back the
folded updates of its shards, O(d P) for most methods, and what is kept for each client. What a
shard does is not decided here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..algorithms import Tensors
from ..errors import ConfigError, MissingExtraError, StateError
from ..soup import Soup
from .execute import ClientSide, Parcel
from .mail import Bundle
from .processes import ATTEMPTS, Failure
from .shards import Block, Harvest, Order, Round, Shards, Tree, blocks, deal

REACH_SECONDS = 20
"""Longest wait for a cluster to answer."""
START_SECONDS = 60
"""Longest wait for an actor to start."""
SPARE_SECONDS = 10
"""Longest wait for a free CPU in place of a lost one, before another CPU is shared."""
QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}


class Host:
    """What runs in an actor: the work of the shards that it has been given."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def take(self, parcel: Bundle, places: list[int]) -> str:
        """Take shards in place of those it had; return what is wrong with the parcel, if anything.

        Args:
            parcel: of a client side with the shards' clients. places: of these in the population.
        """
        try:
            self._shards = Shards(parcel.open().open(), places)
        except Exception as error:  # what is loaded there can raise what it likes
            return " ".join(f"{type(error).__name__}: {error}".split())
        return ""

    def do(self, shared: Bundle, todo: Bundle) -> Bundle:
        """A `Harvest`, or a `Failure`."""
        try:
            return Bundle.of(self._shards.do(shared.open(), todo.open()))
        except Exception as error:
            return Bundle.of(Failure.of(error))

    def process(self) -> int:
        """Id of the process."""
        return os.getpid()


@dataclass(eq=False)
class _Owner:
    """An actor and what it owns.

    Attributes:
        first, end: its shards. places: of their clients.
        jobs: what it has been asked to do, by the reference to the answer.
    """

    first: int
    end: int
    places: list[int]
    actor: Any = None
    jobs: dict[Any, Block] = field(default_factory=dict)


class Cluster:
    """Actors on a Ray cluster, started with the first round and ended by `close`; then anew.

    Args:
        side: what they do.
        cohort: usual number of clients in a round, for the number of shards.
        workers: number of actors, of one thread and one CPU each; None for all CPUs.
        address: of the cluster: "host:port", "auto" for the one on this machine, None for one that
            this process is connected to, or else a new one of its own.

    Attributes:
        received: bytes that actors have sent back so far.

    Raises:
        ConfigError: no worker at all; when they start: a cluster that cannot be reached or is too
            small, a method or module that cannot be sent; when they work: no memory.
        MissingExtraError: Ray is not installed.
        StateError: actors that are lost again and again.
    """

    def __init__(
        self, side: ClientSide, cohort: int, workers: int | None = None, address: str | None = None
    ) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers = {workers}: wanted 1 or more")
        self.side, self.workers, self.address = side, workers, address
        self.shards = deal(side.population, cohort, side.group)
        self.received = 0
        self._owners: list[_Owner] = []
        self._shared: tuple[int, Any] | None = None
        self._connected = False
        _ray()

    def train(
        self,
        soup: Soup,
        number: int,
        cohort: Sequence[int],
        replying: set[int],
        memory: Tensors,
        measured: bool,
    ) -> Harvest:
        """Send to the cohort, train those that reply and fold what they send.

        Args:
            soup: is asked for its state only. number: of the round, from 1.
            cohort, replying: places in the population. memory: what all clients keep.
            measured: of `ClientSide.train`.
        """
        return self._done(soup, number, set(cohort), replying, memory, measured)

    def evaluate(self, soup: Soup, number: int, memory: Tensors, places: Sequence[int]) -> Harvest:
        """Figures of what the clients at `places` would use, and of that after an epoch."""
        chosen = set(places)
        return self._done(soup, number, chosen, chosen, memory, None)

    def close(self) -> None:
        """End all actors, and the connection, with the cluster if it is of this process's own."""
        ray = _ray()
        with contextlib.suppress(Exception):  # whatever is left of a cluster that was lost
            for owner in self._owners:
                ray.kill(owner.actor)
        self._owners, self._shared = [], None
        if self._connected:
            self._connected = False
            ray.shutdown()

    # -- a round -----------------------------------------------------------------------------------

    def _done(
        self,
        soup: Soup,
        number: int,
        cohort: set[int],
        replying: set[int],
        memory: Tensors,
        measured: bool | None,
    ) -> Harvest:
        ray, whole, finished = _ray(), None, False
        try:
            owners = self._start()
            shared = self._put(soup)
            orders = list(self._orders(soup, cohort, replying, memory))

            def give(owner: _Owner, block: Block) -> None:
                todo = Round(number, soup.version, measured, orders[slice(*block)])
                owner.jobs[owner.actor.do.remote(shared, Bundle.of(todo))] = block

            for owner in owners:
                for block in blocks(owner.first, owner.end):
                    give(owner, block)
            tree, lost = Tree(len(self.shards)), dict.fromkeys(range(len(owners)), 0)
            while whole is None:
                busy = {answer: owner for owner in owners for answer in owner.jobs}
                (answer,), _ = ray.wait(list(busy))
                owner = busy[answer]
                try:
                    found = self._opened(ray.get(answer), number)
                except ray.exceptions.OutOfMemoryError as error:
                    raise ConfigError(self._no_memory(number)) from error
                except ray.exceptions.RayTaskError as error:
                    Failure.of(error).reraise(self._no_memory(number))
                except ray.exceptions.RayError as error:
                    place = owners.index(owner)
                    lost[place] += 1
                    if lost[place] == ATTEMPTS:
                        raise self._given_up(number, owner, error) from error
                    again, owner.jobs = list(owner.jobs.values()), {}
                    self._replace(owner)
                    for block in again:
                        give(owner, block)
                    continue
                lost[owners.index(owner)] = 0
                whole = tree.put(owner.jobs.pop(answer), found)
            finished = True
        finally:
            if not finished:  # what is still being done, on Ctrl-C, is wanted by nobody
                self.close()
        return whole

    def _orders(
        self, soup: Soup, cohort: set[int], replying: set[int], memory: Tensors
    ) -> Iterator[Order]:
        ids = self.side.population.ids
        for shard in self.shards:
            places = [place for place in shard if place in cohort]
            yield Order(
                places,
                [place in replying for place in places],
                soup.rows([ids[place] for place in places]),
                {name: table[places] for name, table in memory.items()},
            )

    def _put(self, soup: Soup) -> Any:
        """The soup's shared state in the object store, once for each of its versions."""
        if self._shared is None or self._shared[0] != soup.version:
            self._shared = (soup.version, _ray().put(Bundle.of(soup.shared)))
        return self._shared[1]

    def _opened(self, bundle: Bundle, number: int) -> Harvest:
        self.received += bundle.n_bytes
        found: Harvest | Failure = bundle.open()
        if isinstance(found, Failure):
            found.reraise(self._no_memory(number))
        return found

    def _no_memory(self, number: int) -> str:
        return (
            f"round {number}: a Ray actor is out of memory; use fewer workers than "
            f"{len(self._owners)}, or a smaller model or batch size"
        )

    def _given_up(self, number: int, owner: _Owner, error: Exception) -> StateError:
        first = self.side.population.ids[owner.places[0]]
        return StateError(
            f"round {number}, {len(owner.places)} clients from {first} on: their Ray actor was "
            f"lost {ATTEMPTS} times in a row ({_line(error)}); a checkpoint stays as it is: see to "
            'the cause, such as memory, and go on from there, or use execution "sequential"'
        )

    # -- actors ------------------------------------------------------------------------------------

    def _start(self) -> list[_Owner]:
        if self._owners:
            return self._owners
        ray = _ray()
        self._connect(ray, min(self.workers or os.cpu_count() or 1, len(self.shards)))
        cpus = int(ray.cluster_resources().get("CPU", 0))
        size = min(self.workers or max(cpus, 1), len(self.shards))
        if size > cpus:
            raise ConfigError(
                f"workers = {self.workers}: the Ray cluster has {cpus} CPUs, wanted {size}; use "
                "fewer workers, or more machines"
            )
        bounds = [len(self.shards) * i // size for i in range(size + 1)]
        for first, end in pairwise(bounds):
            places = [place for shard in self.shards[first:end] for place in shard]
            self._owners.append(_Owner(first, end, places))
        for ready in [self._hire(owner) for owner in self._owners]:
            try:
                started = self._taken(ready, START_SECONDS)
            except ray.exceptions.RayError as error:
                raise StateError(f"a Ray actor was not able to start: {_line(error)}") from error
            if not started:
                raise ConfigError(
                    f"Ray actors did not start within {START_SECONDS} s: the cluster has {cpus} "
                    f"CPUs, which may be in use; wanted {size} free ones"
                )
        return self._owners

    def _connect(self, ray: Any, size: int) -> None:
        if ray.is_initialized():
            here = ray.get_runtime_context().gcs_address
            if self.address not in (None, "auto", here):
                raise ConfigError(
                    f'address = "{self.address}": this process is connected to {here}: wanted that '
                    "address, or none"
                )
            return
        if self.address is not None:
            _reach(self.address)
        options = {"num_cpus": size} if self.address is None else {}
        self._connected = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about Ray's own affairs
            try:
                ray.init(address=self.address or "local", **options, **QUIET)
            except Exception as error:  # of many kinds
                where = f'the Ray cluster "{self.address}"' if self.address else "Ray"
                raise ConfigError(f"cannot start with {where}: {_line(error)}") from error

    def _hire(self, owner: _Owner, cpus: int = 1) -> Any:
        """Start an actor for `owner`; return the reference to what `Host.take` says."""
        ray = _ray()
        places = owner.places
        side = dataclasses.replace(self.side, population=self.side.population.take(places))
        parcel = Bundle.of(Parcel.of(side, "ray", ray.cloudpickle.dumps))
        owner.actor = start_actor(cpus)
        return owner.actor.take.remote(parcel, places)

    def _taken(self, ready: Any, seconds: float) -> bool:
        """Wait for an actor to have its clients; False if it has not started in time."""
        ray = _ray()
        if not ray.wait([ready], timeout=seconds)[0]:
            return False
        try:
            problem = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            problem = _line(error)
        if problem:
            raise ConfigError(
                f'execution = "ray": an actor cannot load the model or method ({problem}); define '
                "them in a module that every machine of the cluster can import"
            )
        return True

    def _replace(self, owner: _Owner) -> None:
        """Put a new actor in the place of a lost one."""
        ray = _ray()
        error: Exception | None = None
        # Its CPU may be gone with its machine: then the new one shares a CPU.
        for cpus, seconds in ((1, SPARE_SECONDS), (0, START_SECONDS), (0, START_SECONDS)):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(owner.actor)
            try:
                if self._taken(self._hire(owner, cpus), seconds):
                    return
            except ray.exceptions.RayError as lost:
                error = lost
        raise StateError(
            "no Ray actor was able to start in place of a lost one "
            f"({_line(error) if error else f'{START_SECONDS} s'}); a checkpoint stays as it is"
        ) from error


def start_actor(cpus: int) -> Any:
    """A `Host` somewhere in the cluster."""
    return _ray().remote(num_cpus=cpus, max_restarts=0)(Host).remote()


def _ray() -> Any:
    """The package, which sends nothing to anyone if it starts a cluster here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it warns otherwise
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray") from error
    return ray


def _line(error: Exception) -> str:
    """What an error of Ray's, of many lines, says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _reach(address: str) -> None:
    """Raise ConfigError unless there is a cluster: Ray itself waits for minutes.

    A process that can be ended tries first: connecting to what is no Ray cluster cannot be stopped.
    """
    wrong = f'address = "{address}": '
    wanted = 'wanted "host:port" as `ray start --head` says it, or "auto"'
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "//" in host:
            raise ConfigError(wrong + wanted)
        try:
            socket.create_connection((host, int(port)), timeout=REACH_SECONDS / 4).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f"{wrong}nobody answers there ({error}); {wanted}") from error
    probe = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", probe, address],
            capture_output=True,
            text=True,
            timeout=REACH_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{wrong}no Ray cluster there that is in reach; {wanted}") from error
    if tried.returncode:
        said = [line for line in tried.stderr.splitlines() if line.strip()]
        raise ConfigError(f"{wrong}{said[-1] if said else 'no Ray cluster'}; {wanted}")
