"""Worker processes: the same bits as in one process, also when workers are killed; clear ends.

What the methods compute is tested elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import current_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from core_fixture import ALL_METHODS, TRAINING, equal, make_client, normal, plain, run, simulate
from fedmerge.algorithms.base import Local, Setup, Tensors
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.trainer import Trainer
from fedmerge.errors import ConfigError, FedmergeError, MissingExtraError, StateError
from fedmerge.sim import Simulation
from fedmerge.sim import processes as module
from fedmerge.sim.execute import Parcel, Task
from fedmerge.sim.mail import Answering, Asking, Bundle, pack
from fedmerge.sim.processes import Failure, Processes
from fedmerge.workers import Worker, Workers
from test_conformance import finish, short, states

SOURCE = Path(__file__).parents[1] / "src"
CLIENTS = [make_client(f"c{i:02d}", 3 + i * 7 % 17, kind=i % 2) for i in range(40)]
RAGGED: dict[str, Any] = {"participation": 0.9, "dropout": 0.2, "rounds": 3, "evaluate_every": 2}


def distributed(method: Any = "fedmerge", workers: int = 2, **options: Any) -> Simulation:
    given = {"execution": "processes", "workers": workers, **RAGGED, **options}
    return simulate(method, CLIENTS, **given)


def workers_of(made: Simulation) -> list[int]:
    assert isinstance(made._executor, Processes)
    return [worker.process.pid or 0 for worker in made._executor._workers]


def same(a: Simulation, b: Simulation) -> bool:
    return (
        plain(a.history) == plain(b.history)
        and equal(states(a), states(b))
        and a.result() == b.result()
    )


def gone(pids: list[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        # One that has ended, and that nobody has asked about yet, is a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- the same bits ---------------------------------------------------------------------------------


class InTurn:
    """A pipe to a worker that ends for it where the work of another simulation begins."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.next: object = None
        self._begun = False
        self.send, self.send_bytes = pipe.send, pipe.send_bytes

    def recv(self) -> object:
        got, self.next = self.next or self._pipe.recv(), None
        if isinstance(got, Parcel) and self._begun:
            self._begun, self.next = False, got
            raise EOFError
        self._begun = True
        return got


def serve_in_turn(pipe: Connection) -> None:
    turn: Any = InTurn(pipe)
    module._serve(turn)
    while turn.next is not None:
        module._serve(turn)


class Kept(Workers):
    """Workers for one simulation after the other: starting them anew takes seconds."""

    def dismiss(self) -> None:
        pass


@pytest.fixture(scope="module")
def pool() -> Iterator[Kept]:
    made = Kept(2, serve_in_turn)
    yield made
    Workers.dismiss(made)


@pytest.fixture
def kept(pool: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take workers out of the pool in place of new ones."""

    def take(size: int, work: object) -> Kept:
        some = Kept(0, serve_in_turn)
        some.here = pool.here[:size]
        return some

    monkeypatch.setattr(module, "Workers", take)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_gives_the_bits_of_one_process(method: str, workers: int) -> None:
    made = finish(distributed(short(method), workers))
    assert same(made, run(short(method), CLIENTS, **RAGGED))


@dataclass(frozen=True)
class Told(FedAvg):
    """Uses models as far off as the server says, for a client each: wrong if nothing arrives."""

    name: ClassVar[str] = "told"

    def told(self, shared: Tensors, k: int) -> Tensors:
        return {"off": shared["models"].std().expand(k)}

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return message[:, 0] + memory["off"][:, None]


@pytest.mark.usefixtures("kept")
def test_what_the_server_says_beside_the_models_arrives_with_them() -> None:
    one = run(Told(), CLIENTS, **RAGGED)
    assert same(one, finish(distributed(Told(), 2)))
    models = one.soup.shared["models"]
    wanted = (models + models.std()).expand(2, -1)
    torch.testing.assert_close(one.personal(["c00", "c07"]), wanted)


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))


def test_workers_come_with_the_rounds_and_go_with_them(tmp_path: Path) -> None:
    """Also a model that draws and counts; closed in between, and gone on with."""
    some = CLIENTS[:36]
    # One batch for all examples: BatchNorm cannot train on one of a single example.
    options = {"rounds": 4, "training": replace(TRAINING, batch_size=100)}
    made = simulate(
        "ditto",
        some,
        execution="processes",
        workers=9,
        model=dropout_net,
        checkpoint=tmp_path,
        **{**RAGGED, **options},
    )
    assert workers_of(made) == []
    rounds = made.rounds()
    next(rounds)
    first = workers_of(made)
    assert len(first) == 2  # of the nine asked for: there are two groups of clients
    assert all(map(alive, first))
    rounds.close()
    assert gone(first)
    assert workers_of(made) == []
    finish(made)
    assert workers_of(made) == []
    assert same(made, run("ditto", some, dropout_net, **{**RAGGED, **options}))


# -- what does not work ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hurt(FedAvg):
    """FedAvg whose clients do harm in a worker process, as told by a folder of flags.

    Attributes:
        folder: each `kill...` there is one worker's end; `raise`: name of the error to raise.
    """

    name: ClassVar[str] = "hurt"
    folder: str = ""

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        flags = Path(self.folder)
        if current_process().daemon and setup.seed == 0:
            # Not the group of the largest clients, so that others are on their way.
            if int(trainer.n_examples.max()) < 13 and claimed(flags, "kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if (flags / "raise").exists():
                raise ERRORS[(flags / "raise").read_text()]
        return super().local(setup, message, memory, trainer)


def put(folder: Path, name: str, count: int) -> None:
    for i in range(count):
        (folder / f"{name}{i}").touch()


def claimed(folder: Path, name: str) -> bool:
    """Take one of the flags away: only one of several processes that see it can."""
    for flag in folder.glob(f"{name}*"):
        with contextlib.suppress(FileNotFoundError):
            flag.unlink()
            return True
    return False


class LocalError(Exception):
    """An error that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("a", lambda: None)


ERRORS: dict[str, Exception] = {
    "extra": MissingExtraError("lora"),
    "bug": KeyError("lost"),
    "unpicklable": LocalError(),
    "memory": MemoryError(),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."),
}


def test_a_killed_worker_is_replaced_and_nothing_changes(tmp_path: Path) -> None:
    whole = run(Hurt(folder=str(tmp_path)), CLIENTS, **RAGGED)
    made = distributed(Hurt(folder=str(tmp_path)), 2)
    rounds = made.rounds()
    next(rounds)
    before = workers_of(made)
    # One while it works, and one that has nothing to do.
    put(tmp_path, "kill", 1)
    os.kill(before[0], signal.SIGKILL)
    next(rounds)
    assert not list(tmp_path.glob("kill*"))
    after = workers_of(made)
    assert len(after) == 2
    assert len(set(after) - set(before)) == 2
    next(rounds)
    assert same(made, whole)
    # Work that nobody waits for any more ends with its workers, not with the next results.
    tasks = [made._unsent([i, i + 1], 9) for i in (0, 2)]
    results = made._executor.train(tasks, measured=False)
    next(results)
    results.close()
    assert gone(after)
    rounds.close()


def test_it_gives_up_after_three_kills_and_the_checkpoint_goes_on(tmp_path: Path) -> None:
    flags, folder = tmp_path / "flags", tmp_path / "checkpoint"
    flags.mkdir()
    made = distributed(Hurt(folder=str(flags)), 1, checkpoint=folder)
    rounds = made.rounds()
    next(rounds)
    put(flags, "kill", 3)
    with pytest.raises(StateError) as caught:
        next(rounds)
    text = str(caught.value)
    assert text.startswith("round 2, ")
    assert "its worker process killed by signal 9, 3 times in a row; a checkpoint stays" in text
    assert "\n" not in text
    assert workers_of(made) == []
    resumed = distributed(Hurt(folder=str(flags)), execution="auto", checkpoint=folder)
    assert len(resumed.history) == 1
    assert same(finish(resumed), run(Hurt(folder=str(flags)), CLIENTS, **RAGGED))


def test_a_task_that_gets_lost_is_said_rather_than_waited_for() -> None:
    executor = distributed()._executor
    assert isinstance(executor, Processes)
    with pytest.raises(RuntimeError, match="a task is with no worker and has no result"):
        executor._hear(deque())


@pytest.mark.usefixtures("kept")
def test_errors_of_a_worker_arrive(tmp_path: Path) -> None:
    made = distributed(Hurt(folder=str(tmp_path)), 1, rounds=9)
    executor = made._executor
    assert isinstance(executor, Processes)
    task = made._unsent(list(range(9)), 1)
    found: dict[str, Exception] = {}
    for name in ERRORS:
        (tmp_path / "raise").write_text(name)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            list(executor.train([task], measured=False))
        found[name] = caught.value
    assert isinstance(found["extra"], MissingExtraError)
    assert str(found["extra"]) == str(ERRORS["extra"])
    assert isinstance(found["bug"], KeyError)
    assert "in local" in found["bug"].__notes__[0]  # where it was raised, in the worker
    assert isinstance(found["unpicklable"], RuntimeError)
    assert "LocalError: ('a'" in str(found["unpicklable"])
    for name in ("memory", "allocator"):
        assert isinstance(found[name], ConfigError)
        assert str(found[name]) == (
            "round 1, 9 clients from c00 on: a worker process is out of memory; use fewer workers "
            "than 1, or a smaller model or batch size"
        )


class Unpicklable(nn.Sequential):
    """A module with a function of no module in it."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3))
        self.scale = lambda x: 2 * x


def test_a_module_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        finish(distributed(model=Unpicklable))
    text = str(caught.value)
    assert text.startswith('execution = "processes": the model (Unpicklable) cannot be sent to')
    assert "Unpicklable.__init__.<locals>.<lambda>" in text
    assert text.endswith('or execution "stacked" or "sequential"')
    assert "\n" not in text

    class Here(FedAvg):
        pass

    with pytest.raises(ConfigError, match=r"the method \(Here\) cannot be sent"):
        finish(distributed(Here()))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="workers = 0: wanted 1 or more"):
        distributed(workers=0)
    with pytest.raises(ConfigError, match='execution = "proceses"; did you mean "processes"'):
        distributed(execution="proceses")
    with pytest.raises(ConfigError, match="choose from auto, processes"):
        distributed(execution="xyz")


def test_a_worker_does_not_start_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="inside a worker process, which may not start others"):
        finish(distributed())


SCRIPT = """
import sys
from test_processes import distributed, workers_of
{guard}
    made = distributed(rounds=10**6, evaluate_every=10**6, checkpoint=sys.argv[1])
    for log in made.rounds():
        print(*workers_of(made), flush=True)
"""


def script(tmp_path: Path, guard: str) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
    path = os.pathsep.join([str(SOURCE), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "checkpoint")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_end_leaves_a_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    process = script(tmp_path, 'if __name__ == "__main__":')
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does, all of them
    else:
        process.kill()
    _, errors = process.communicate(timeout=30)
    assert gone(pids)
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1
        assert (tmp_path / "checkpoint").is_dir()


def test_a_script_that_starts_itself_again_is_told_so(tmp_path: Path) -> None:
    process = script(tmp_path, "if True:")
    _, errors = process.communicate(timeout=180)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("fedmerge.errors.StateError: worker processes were not able to start")
    assert '`if __name__ == "__main__":`' in last


# -- mail ------------------------------------------------------------------------------------------


def test_tensors_of_every_kind_go_there_and_back_through_the_same_memory() -> None:
    from multiprocessing import Pipe

    here, there = Pipe()
    asking, answering = Asking(here, 1), Answering(there)
    value = {
        "row": normal(1, 3, 5),
        "half": normal(2, 7).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(4, 0),
        "one": torch.tensor(3),
        "expanded": normal(3, 1, 2).expand(3, 2),
        "plain": (1, "two"),
    }

    def check(got: dict[str, Any]) -> None:
        assert got.pop("plain") == (1, "two")
        assert all(torch.equal(got[name], value[name]) for name in got)
        assert all(got[name].dtype == value[name].dtype for name in got)

    buffers = set()
    for turn in range(3):
        asking.ask(0, value)
        slot, asked = answering.hear()
        answering.answer(slot, asked)
        place, heard = asking.hear()
        assert (slot, place) == (0, 0)
        check(dict(asked))
        check(dict(heard))
        if turn:
            buffers.add((asking.slots[0].question.data_ptr(), asking.slots[0].answer.data_ptr()))
        # What was heard stays when the memory is used again.
        asking.slots[0].answer.fill_(7)
        check(dict(heard))
    assert len(buffers) == 1
    for part in (value, {"none": value["none"], "plain": value["plain"]}, {"plain": (1, "two")}):
        bundle = Bundle.of(part)
        bundle.buffer.flags.writeable = False  # as it comes out of Ray's store
        found = bundle.open()
        assert all(tensor.add_(1) is tensor for name, tensor in found.items() if name == "row")
        check(dict(bundle.open()))
    here.close()
    there.close()


def test_one_model_for_many_clients_is_sent_once() -> None:
    one = normal(1, 3, 4)
    packed, tensors = pack({"many": one.expand(50, 3, 4), "some": one[:1]})
    assert packed.n_bytes == 64 + 16  # the second at a multiple of 64
    assert [tensor.shape for tensor in tensors] == [(3, 4), (1, 4)]
    found = Bundle.of({"many": one.expand(50, 3, 4)}).open()["many"]
    assert found.shape == (50, 3, 4)
    assert torch.equal(found, one.expand(50, 3, 4))


def test_work_goes_to_the_worker_with_the_least_of_it() -> None:
    """Of four tasks, the large one has a worker to itself."""
    side: Any = simulate("fedavg", CLIENTS)._side
    made = Processes(side, 2)
    given: list[tuple[str, int]] = []

    class Deaf:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, slot: int, question: Any) -> None:
            given.append((self.name, len(question[0].places)))

    none: Any = None
    made._desks = {name: module._Desk(none, Deaf(name)) for name in "ab"}  # type: ignore[arg-type, misc]
    order = sorted(range(40), key=lambda i: -len(CLIENTS[i].train))
    tasks = [order[:20], order[20:30], order[30:35], order[35:]]
    jobs = (made._job(Task(part, 1, torch.zeros(0), {}), False) for part in tasks)
    made._hand_out(jobs, deque(), deque())
    assert given == [("a", 20), ("b", 10), ("b", 5), ("a", 5)]


def test_failures_keep_what_can_be_sent() -> None:
    assert isinstance(Failure.of(ConfigError("x")).error, FedmergeError)
    assert not Failure.of(RuntimeError("size mismatch")).of_memory


def test_how_a_worker_ended() -> None:
    class Ended:
        def __init__(self, exitcode: int) -> None:
            self.exitcode = exitcode

        def join(self) -> None:
            pass

    pipe: Any = None
    for code, text in ((-9, "killed by signal 9"), (3, "ended with exit code 3")):
        ended: Any = Ended(code)
        assert Worker(ended, pipe).death() == text


def test_a_comparison_has_its_own_processes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fedmerge.cli import app

    names = ("--settings", "domain", "--methods", "fedavg", "--out", str(tmp_path))
    result = CliRunner().invoke(app, ["compare", *names, "--execution", "processes"])
    assert result.exit_code == 2
    assert "--execution processes is for `fedmerge run`" in result.stderr
    assert result.stderr.count("\n") == 1
