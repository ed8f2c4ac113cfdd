"""A Ray cluster of two machines: the same bits for any number of actors, also when some are lost.

The machines are two raylets on this one. What the methods compute is tested elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from core_fixture import ALL_METHODS, made_delta, make_updates, run, simulate
from fedmerge.algorithms import FedAvg, FedMerge
from fedmerge.algorithms.base import Local, Setup, Tensors
from fedmerge.algorithms.trainer import Trainer
from fedmerge.errors import ConfigError, MissingExtraError, StateError
from fedmerge.guard import Guard
from fedmerge.safety import Safety
from fedmerge.sim import Simulation
from fedmerge.sim import cluster as module
from fedmerge.sim.cluster import Cluster
from fedmerge.sim.population import Population
from fedmerge.sim.shards import Harvest, Order, Round, Shards, Tree, blocks, deal
from fedmerge.soup import Gathered, Soup
from test_conformance import finish, short, states
from test_processes import CLIENTS, RAGGED, SOURCE, Told, claimed, gone, put, same

# Ray leaves its log files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def distributed(method: Any = "fedmerge", workers: int | None = 2, **options: Any) -> Simulation:
    given = {"execution": "ray", "workers": workers, **RAGGED, **options}
    return simulate(method, CLIENTS, **given)


def cluster_of(made: Simulation) -> Cluster:
    assert isinstance(made._executor, Cluster)
    return made._executor


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two machines of one CPU each; this process is connected to the first."""
    ray = module._ray()
    from ray.cluster_utils import Cluster as Nodes

    config = {
        "worker_niceness": 0,  # Ray's 15 would starve them beside other tests
        "health_check_initial_delay_ms": 500,
        "health_check_period_ms": 300,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": config}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # methods of the tests' own
        made = Nodes(initialize_head=True, connect=True, head_node_args=head)
        made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def pool(nodes: Any) -> Iterator[list[Any]]:
    """Actors for one simulation after the other: starting them anew takes seconds."""
    actors = [module.start_actor(0) for _ in range(2)]  # no CPU of those that tests use
    yield actors
    for actor in actors:
        module._ray().kill(actor)


@pytest.fixture
def kept(pool: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take actors out of the pool in place of new ones."""
    left: list[Any] = []

    def close(self: Cluster) -> None:
        self._owners, self._shared = [], None
        left[:] = pool

    left[:] = pool
    monkeypatch.setattr(module, "start_actor", lambda cpus: left.pop(0))
    monkeypatch.setattr(Cluster, "close", close)


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_gives_the_same_in_every_execution(method: str) -> None:
    """To rounding; to the bit for any number of actors. That processes do as one process does, and
    stacks as single clients, is tested with the same clients and in `test_conformance`."""
    one = finish(distributed(short(method), 1))
    assert same(one, finish(distributed(short(method), 2)))
    other = run(short(method), CLIENTS, execution="sequential", **RAGGED)
    there = states(other)
    for name, value in states(one).items():
        # Whole numbers of a small unit may be rounded the other way.
        off = 1 if value.dtype == torch.int16 else 1e-5
        torch.testing.assert_close(value, there[name], rtol=1e-4, atol=off)
    for a, b in zip(one.history, other.history, strict=True):
        facts = ("cohort", "dropped", "refused", "bytes_up", "bytes_down")
        assert all(getattr(a, fact) == getattr(b, fact) for fact in facts)
        for model, splits in a.metrics.items():
            mean = b.metrics[model]["test"]["loss"].mean
            assert splits["test"]["loss"].mean == pytest.approx(mean, rel=1e-4)


@pytest.mark.usefixtures("kept")
def test_what_the_server_says_beside_the_models_arrives_with_them() -> None:
    one = finish(distributed(Told(), 2))
    other = run(Told(), CLIENTS, **RAGGED)
    for a, b in zip(one.history, other.history, strict=True):
        for model, splits in a.metrics.items():
            mean = b.metrics[model]["test"]["loss"].mean
            assert splits["test"]["loss"].mean == pytest.approx(mean, rel=1e-4)


@pytest.mark.usefixtures("kept")
def test_the_driver_receives_sums_and_sends_the_models_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """40 clients of 4 models: not 40 updates, but what two sums of 4 take."""
    made = distributed(
        FedMerge(d=4, sketch=8),
        model=lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 3)),
        participation=1.0,
        dropout=0.0,
        rounds=2,
        evaluate_every=9,
    )
    packed: list[int] = []
    bundle = module.Bundle.of

    def of(value: Any) -> Any:
        made = bundle(value)
        if isinstance(value, dict):
            packed.append(made.n_bytes)
        return made

    monkeypatch.setattr(module.Bundle, "of", of)
    next(made.rounds())
    size = made.soup.setup.layout.size
    received = cluster_of(made).received
    sums = 2 * 4 * size * 8
    assert sums < received < 1.2 * sums
    assert received < 0.5 * len(CLIENTS) * size * 4
    assert len(packed) == 1  # the shared state
    assert 4 * size * 4 <= packed[0] < 4.1 * size * 4


# -- shards and sums -------------------------------------------------------------------------------


def test_shards_are_every_client_once_whatever_their_order() -> None:
    population = Population.of(CLIENTS)
    shards = deal(population, 40, 16)
    assert len(shards) == 8  # of half a group
    assert sorted(place for shard in shards for place in shard) == list(range(40))
    examples = [sum(len(CLIENTS[place].train) for place in shard) for shard in shards]
    assert max(examples) - min(examples) <= max(len(client.train) for client in CLIENTS)
    turned = CLIENTS[::-1]
    named = [[turned[place].id for place in s] for s in deal(Population.of(turned), 40, 16)]
    assert named == [[CLIENTS[place].id for place in shard] for shard in shards]
    # Never more than clients, nor without any of the cohort.
    assert len(deal(Population.of(CLIENTS[:3]), 3, 1)) == 2
    assert len(deal(population, 1, 16)) == 1


def test_a_population_is_taken_apart() -> None:
    whole = Population.of(CLIENTS)
    part = whole.take([7, 2])
    assert part.ids == ("c07", "c02")
    for number, split in enumerate(part.splits.values()):
        for i, place in enumerate((7, 2)):
            own = list(CLIENTS[place].splits())[number][1]
            at = slice(split.start[i], split.start[i] + split.count[i])
            assert torch.equal(split.x[at], own.x)
            assert torch.equal(split.y[at], own.y)
    assert len(part.splits["train"].x) == sum(
        len(split) for place in (7, 2) for _, split in CLIENTS[place].splits()
    )


@pytest.mark.parametrize("measured", [None, True])
def test_a_shard_may_have_nobody_of_the_cohort(measured: bool | None) -> None:
    made = simulate("fedmerge", CLIENTS)
    places = [0, 3]
    orders = [
        Order(own, [True] * len(own), made.soup.rows([CLIENTS[i].id for i in own]), {})
        for own in ([], places, [], [])
    ]
    shards = Shards(made._side, list(range(len(CLIENTS))))
    harvest = shards.do(made.soup.shared, Round(1, 0, measured, orders))
    assert sorted(place for own, _ in harvest.found for place in own) == places
    trained = [] if measured is None else [CLIENTS[i].id for i in places]
    assert sorted(harvest.gathered.clients) == trained


@pytest.mark.parametrize("actors", [1, 2, 3, 5, 8])
def test_the_tree_is_the_same_for_any_number_of_owners(actors: int) -> None:
    """And for any order of arrival: shown with text in place of sums."""
    n = 8
    bounds = [n * i // actors for i in range(actors + 1)]
    parts = [block for i in range(actors) for block in blocks(bounds[i], bounds[i + 1])]
    assert sorted(shard for first, end in parts for shard in range(first, end)) == list(range(n))
    assert all(len(list(blocks(*bounds[i : i + 2]))) <= 2 for i in range(actors))

    class Text(Harvest):
        def __init__(self, said: str) -> None:
            self.said = said

        def join(self, other: Any) -> None:
            self.said = f"({self.said}{other.said})"

    def said(first: int, end: int) -> str:
        half = (first + end) // 2
        return str(first) if end - first == 1 else f"({said(first, half)}{said(half, end)})"

    for order in (parts, parts[::-1], parts[1::2] + parts[::2]):
        tree = Tree(n)
        found = [tree.put(block, Text(said(*block))) for block in order]
        assert found[:-1] == [None] * (len(parts) - 1)
        whole = found[-1]
        assert isinstance(whole, Text)
        assert whole.said == "(((01)(23))((45)(67)))"


def soup_of(method: Any, **options: Any) -> Soup:
    made = Soup(method, lambda: nn.Linear(5, 3), **options)
    made.join(["a", "b", "c", "d"])
    return made


def gathered(soup: Soup, names: list[str], seed: int) -> Gathered:
    """What a part of `soup` has gathered from made-up updates, one of them not finite."""
    rows = soup.rows(names)
    part = Soup.part(soup.algorithm, soup.setup, soup.shared, soup.version, names, rows)
    sent = part.send(names)
    delta = made_delta(soup, len(names), seed)
    delta[-1, 0] = torch.nan
    refusals = part.fold(make_updates(sent, delta))
    return replace(part.gathered(), refusals=refusals)


def test_a_soup_absorbs_what_its_parts_have_gathered() -> None:
    """As if it had folded all of it; refused updates are left out, and counted by the soup."""
    soup, whole = soup_of(FedMerge(d=2)), soup_of(FedMerge(d=2))
    for seed in (1, 2):
        for names in (["a", "b"], ["d", "c"]):
            soup.absorb(gathered(soup, names, seed))
            delta = made_delta(whole, 2, seed)
            delta[-1, 0] = torch.nan
            whole.fold(make_updates(whole.send(names), delta))
        assert soup.commit() == whole.commit() == ("a", "d")
    one, other = soup.state(), whole.state()
    assert one[1] == other[1]
    assert one[1]["refused_by"] == {"b": {"non-finite": 2}, "c": {"non-finite": 2}}
    for name, value in one[0].items():
        assert torch.allclose(value, other[0][name], rtol=1e-12), name


def test_what_a_soup_does_not_absorb() -> None:
    soup = soup_of(FedAvg())
    brought = gathered(soup, ["a", "b"], 1)
    soup.absorb(brought)
    with pytest.raises(StateError, match='updates of "a" twice in round 1'):
        soup.absorb(brought)
    soup.commit()
    with pytest.raises(StateError, match="updates of round 1 in round 2"):
        soup.absorb(brought)
    for safety in (Safety(guard=Guard()), Safety(trim=0.1)):
        guarded = soup_of(FedAvg(), safety=safety)
        with pytest.raises(ConfigError, match="guard, robust and privacy do not go with"):
            guarded.absorb(gathered(guarded, ["a", "b"], 1))


# -- what is lost ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hurt(FedAvg):
    """FedAvg whose clients do harm in an actor, as told by a folder of flags.

    Attributes:
        folder: each `kill...` there is one actor's end; `raise`: name of the error to raise;
            `wait`: say so in a file each, and wait for that to go.
        driver: process to spare.
    """

    name: ClassVar[str] = "hurt"
    folder: str = ""
    driver: int = 0

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        flags = Path(self.folder)
        if os.getpid() != self.driver:
            # Of one of the two actors, which alone has clients of these sizes.
            if {6, 11, 13, 18} & set(trainer.n_examples.tolist()) and claimed(flags, "kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if (flags / "raise").exists():
                raise ERRORS[(flags / "raise").read_text()]
            if (flags / "wait").exists():
                (flags / f"waiting{os.getpid()}").touch()
                until(lambda: not (flags / "wait").exists())
        return super().local(setup, message, memory, trainer)


ERRORS: dict[str, Exception] = {
    "bug": KeyError("lost"),
    "memory": MemoryError(),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."),
}


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    assert done()


def actors(made: Simulation) -> list[int]:
    ray = module._ray()
    return [ray.get(owner.actor.process.remote()) for owner in cluster_of(made)._owners]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def hurt(flags: Path) -> Hurt:
    return Hurt(folder=str(flags), driver=os.getpid())


@pytest.mark.usefixtures("kept")
def test_errors_of_an_actor_arrive(flags: Path, hurt: Hurt) -> None:
    for name in ERRORS:
        (flags / "raise").write_text(name)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            finish(distributed(hurt))
        if name == "bug":
            assert isinstance(caught.value, KeyError)
            assert "in local" in caught.value.__notes__[0]  # where it was raised, in the actor
        else:
            assert isinstance(caught.value, ConfigError)
            assert str(caught.value) == (
                "round 1: a Ray actor is out of memory; use fewer workers than 2, or a smaller "
                "model or batch size"
            )
    (flags / "raise").unlink()


def test_actors_and_a_machine_are_lost_and_nothing_changes(
    nodes: Any, flags: Path, hurt: Hurt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One killed while it works; then three in a row, which is given up; then a whole machine."""
    monkeypatch.setattr(module, "SPARE_SECONDS", 3)
    made = distributed(hurt, checkpoint=tmp_path)
    rounds = made.rounds()
    next(rounds)
    before = actors(made)
    put(flags, "kill", 1)
    next(rounds)
    assert not list(flags.glob("kill*"))
    after = actors(made)
    assert len(set(after) - set(before)) == 1
    put(flags, "kill", 3)
    with pytest.raises(StateError) as caught:
        next(rounds)
    text = str(caught.value)
    assert text.startswith("round 3, 20 clients from c")
    assert "their Ray actor was lost 3 times in a row" in text
    assert "a checkpoint stays as it is" in text
    assert "\n" not in text
    assert gone(after)
    assert cluster_of(made)._owners == []

    resumed = distributed(hurt, checkpoint=tmp_path)
    assert len(resumed.history) == 2
    (flags / "wait").touch()

    def lose_a_machine() -> None:
        until(lambda: len(list(flags.glob("waiting*"))) == 2)
        nodes.remove_node(nodes.second, allow_graceful=False)
        (flags / "wait").unlink()

    loser = threading.Thread(target=lose_a_machine)
    loser.start()
    finish(resumed)
    loser.join()
    assert gone([int(path.name.removeprefix("waiting")) for path in flags.glob("waiting*")])
    assert same(resumed, finish(distributed(hurt, 1)))


# -- what does not work ----------------------------------------------------------------------------


@pytest.mark.usefixtures("nodes")
def test_what_this_process_is_connected_to_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"workers = 8: the Ray cluster has [12] CPUs, wanted 4"):
        finish(distributed(workers=8))
    with pytest.raises(ConfigError, match=r'"head:1": this process is connected to .*: wanted th'):
        finish(distributed(address="head:1"))
    with pytest.raises(ConfigError) as caught:
        finish(distributed(model=Unsendable, workers=1))
    text = str(caught.value)
    assert text.startswith('execution = "ray": the model (Unsendable) cannot be sent to another')
    assert "\n" not in text


class Unsendable(nn.Sequential):
    """A module with a lock in it; a function of no module Ray would send."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3))
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> Unsendable:
        return Unsendable()


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="workers = 0: wanted 1 or more"):
        distributed(workers=0)
    with pytest.raises(ConfigError, match='address = "auto" is of a Ray cluster: wanted execution'):
        distributed(execution="processes", address="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "fedmerge\[ray\]"'):
        distributed()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ray://head:10001", ": wanted"),
        ("head", ": wanted"),
        ("127.0.0.1:{free}", "nobody answers there"),
        ("127.0.0.1:{taken}", "no Ray cluster there that is in reach"),
    ],
)
def test_a_cluster_out_of_reach_is_said_soon(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REACH_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ports = {"free": free.getsockname()[1], "taken": taken.getsockname()[1]}
        address = address.format(**ports)
        begun = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            module._reach(address)
    assert time.monotonic() - begun < 10
    assert str(caught.value).startswith(f'address = "{address}": ')
    assert reason in str(caught.value)
    assert 'wanted "host:port" as `ray start --head` says it, or "auto"' in str(caught.value)
    assert "\n" not in str(caught.value)


def offspring(pid: int) -> Iterator[int]:
    """Processes started by a process, and by those."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            yield child
            yield from offspring(child)


SCRIPT = """
import sys
from contextlib import closing
from core_fixture import simulate
options = {"execution": "ray", "workers": 1, "checkpoint": sys.argv[1]}
simulation = simulate("fedavg", rounds=10**6, evaluate_every=10**6, **options)
with closing(simulation.rounds()) as rounds:  # also if the signal comes while this prints
    for log in rounds:
        if log.round == 1:
            print("first", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_end_leaves_a_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    """Of a cluster of its own: neither actors nor Ray's own processes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(SOURCE), str(Path(__file__).parent)])
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "checkpoint")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        try:
            check_end(process, how)
        finally:
            process.kill()
    assert how == signal.SIGKILL or (tmp_path / "checkpoint").is_dir()


def check_end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """End a script that has begun, and see that all that it has started ends with it."""
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    end = time.monotonic() + 10
    family: dict[int, str] = {}
    # An actor is called otherwise while Ray changes its name, which it does for each task.
    while not any("ray::Host" in text for text in family.values()):
        assert time.monotonic() < end, family
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended just now
            found = offspring(process.pid)
            family = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in found}
    if how == signal.SIGKILL:  # Ray leaves two of its own for a minute
        family = {pid: text for pid, text in family.items() if "Agent" not in text}
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does, all of them
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert gone(list(family), 30)
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1
