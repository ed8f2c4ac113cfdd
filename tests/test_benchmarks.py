"""The benchmarks at toy sizes: they run, compare the same work, and fit and count correctly.

How fast anything is, is not tested.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks.child import ask
from benchmarks.federation import Commits
from benchmarks.federation_memory import peak_of
from benchmarks.measure import Figure, Spread, alternate, exponent, exponents, ratios
from benchmarks.output import write
from benchmarks.peers.__main__ import Peer, figures
from benchmarks.peers.__main__ import main as run_peers
from benchmarks.rivals.__main__ import PLAIN, Pair, table
from benchmarks.rivals.__main__ import main as run_rivals
from benchmarks.rounds import BARE
from benchmarks.server import STEP
from benchmarks.simulated import Simulated, executions
from benchmarks.sizes import FULL, TINY
from benchmarks.tasks import BareLoop, Task, w1, w2
from torch import Tensor

from fedmerge import FedAvg, Soup, Updates
from fedmerge.local import batches
from fedmerge.rng import numpy_generator
from fedmerge.store import write_atomic

# Ray ends its servers without waiting for them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TASKS = [w1(TINY.w1_clients), w2(TINY.w2_clients, TINY.w2_images)]


@pytest.fixture(scope="module")
def made() -> dict[str, list[Figure]]:
    """The figures of every group, measured twice."""
    return {name: list(run(TINY, 2)) for name, run in command.GROUPS.items() if name != "start"}


def found(figures: Iterable[Figure], case: str) -> dict[str, Figure]:
    return {figure.what: figure for figure in figures if figure.case == case}


# -- the work that is compared ---------------------------------------------------------------------


def test_the_workloads_are_those_described() -> None:
    whole = w1(FULL.w1_clients)
    sizes = [len(y) for _, y in whole.data]
    assert (len(sizes), sum(sizes), min(sizes), whole.steps) == (50, 1797, 2, 170)
    assert sum(p.numel() for p in w2(1, 32).make().parameters()) == 122_268
    assert w2(2, FULL.w2_images).steps == 2 * 14


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("execution", executions())
def test_bare_loop_and_simulator_do_the_same_steps(
    task: Task, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if execution == "ray" or (execution, task.name) == ("stacked", "W2"):
        pytest.skip(f"{execution} is not for this test")
    taken: list[Tensor] = []
    fold = Soup.fold

    def counted(soup: Soup, updates: Updates) -> list[object]:
        taken.append(updates.steps)
        return list(fold(soup, updates))

    monkeypatch.setattr(Soup, "fold", counted)
    simulated = Simulated(task, FedAvg(), execution=execution)
    try:
        simulated.round()
        soup, clients = simulated.simulation.soup, simulated.simulation.clients
        got = simulated.simulation.personal([clients[0].id])[0]
    finally:
        simulated.close()

    def same_batches(i: int) -> Iterable[Tensor]:
        draw = numpy_generator(0, 1, clients[i].id, "train")
        for epoch in batches(len(task.data[i][1]), task.epochs, draw):
            yield from torch.from_numpy(epoch).split(task.batch_size)

    layout = soup.setup.layout
    loop = BareLoop(task, same_batches)
    layout.load(loop.model, soup.setup.initial(0))
    loop.load(loop.model.state_dict())
    n_examples = torch.tensor([float(len(y)) for _, y in task.data])
    ends, steps = [], 0
    for i in range(len(task.data)):
        steps += loop.client(i)
        ends.append(layout.row(loop.model))
    wanted = (n_examples / n_examples.sum()) @ torch.stack(ends)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert steps == task.steps == int(torch.cat(taken).sum())


def test_bare_loop_starts_every_client_from_the_same_model() -> None:
    task = TASKS[0]
    loop = BareLoop(task, lambda i: [torch.arange(len(task.data[i][1]))])
    loop.client(0)
    first = [p.clone() for p in loop.model.parameters()]
    loop.client(1)
    loop.client(0)
    assert all(torch.equal(a, b) for a, b in zip(first, loop.model.parameters(), strict=True))


def test_a_task_is_read_back_from_its_file(tmp_path: Path) -> None:
    task = TASKS[1]
    task.save(tmp_path / "task.npz")
    again = Task.load(tmp_path / "task.npz")
    assert (again.name, again.model, again.steps) == (task.name, task.model, task.steps)
    assert (again.lr, again.epochs, again.batch_size) == (task.lr, task.epochs, task.batch_size)
    for (x, y), (x2, y2) in zip(task.data, again.data, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


# -- statistics ------------------------------------------------------------------------------------


def test_the_exponent_of_a_power_law_is_recovered() -> None:
    sizes = [10.0, 50.0, 400.0, 9000.0]
    assert exponent(sizes, [3 * n**1.7 for n in sizes]) == pytest.approx(1.7)
    bent = {1.0: 5.0, 10.0: 5.0, 100.0: 50.0}
    fitted = [f.spread.median for f in exponents("g", "c", "w", bent) if f.spread]
    assert fitted == pytest.approx([0.5, 1.0])


def test_works_take_turns_and_the_warm_up_is_left_out() -> None:
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    assert {name: len(taken) for name, taken in alternate(works, 3).items()} == {"a": 3, "b": 3}
    assert "".join(order) == "abababab"
    order.clear()
    alternate(works, 1, settle=True)
    assert "".join(order) == "aabbaabb"


def test_ratios_are_of_pairs_not_of_medians() -> None:
    assert ratios([4.0, 1.0, 9.0], [1.0, 2.0, 3.0]) == Spread(3.0, 0.5, 4.0, 3)


# -- groups ----------------------------------------------------------------------------------------


def test_every_figure_has_a_value_or_a_reason(made: dict[str, list[Figure]]) -> None:
    for name, figures_ in made.items():
        assert figures_
        for figure in figures_:
            assert figure.group == name
            assert figure.spread or figure.note.startswith("not run: ")
            if figure.spread:
                assert figure.spread.min <= figure.spread.median <= figure.spread.max


def test_rounds_list_every_execution_and_the_bare_loop_is_the_unit(
    made: dict[str, list[Figure]],
) -> None:
    for task in TASKS:
        case = found(made["rounds"], task.name)
        assert {BARE, "auto, fedmerge", *executions()} <= set(case)
        assert case[BARE].ratio == Spread(1.0, 1.0, 1.0, 2)
        for name in ("sequential", "auto"):
            figure, share = case[name], case[f"{name}: not local SGD"]
            assert figure.spread is not None
            assert figure.spread.n == 2
            assert share.spread is not None
            assert 0 < share.spread.min <= share.spread.max < 100
    stacked = found(made["rounds"], "W2")["stacked"]
    assert stacked.spread is not None or "Conv2d" in stacked.note


def test_server_steps_are_held_to_a_floor(made: dict[str, list[Figure]]) -> None:
    case = found(made["server"], f"d={TINY.server_d} m={TINY.server_m}")
    assert {"merge", "scores", "update", "round, rule=paper", "round, default rule"} <= set(case)
    parts = [case[name].at["parameters"] for name in ("merge, into fresh memory", STEP)]
    assert parts == [case["merge"].at["parameters"]] * 2
    assert "wanted: at most" in case[STEP].note
    assert all(figure.ratio is not None and figure.ratio.min > 0 for figure in case.values())


def test_curves_have_all_their_points_and_an_exponent(made: dict[str, list[Figure]]) -> None:
    of = {figure.case.partition(",")[0]: [] for figure in made["scale"]}
    for figure in made["scale"]:
        of[figure.case.partition(",")[0]].append(figure.what)
    assert {str(d) for d in TINY.scale_d} | {"round: exponent, all sizes"} <= set(of["models d"])
    assert {f"{p:,}" for p in TINY.scale_p} <= set(of["parameters P"])
    for m in TINY.scale_clients:
        assert {f"{m:,}: set up", f"{m:,}: round", f"{m:,}: peak"} <= set(of["clients"])
    assert {"join", "load", "commit", "save"} <= set(of["row table"])


def test_memory_names_every_point(made: dict[str, list[Figure]]) -> None:
    names = {figure.what for figure in made["memory"]}
    assert {f"peak, {TINY.memory_cohort} of {m}" for m in TINY.memory_clients} <= names
    assert {f"peak, cohort of {k}" for k in TINY.memory_cohorts} <= names


def test_a_process_is_not_charged_with_its_parents_memory() -> None:
    held = torch.ones(100 * 2**20)  # 400 MiB
    found = ask("server", method="fedavg", parameters=5_000_000, cohort=2, chunk=1, rounds=2)
    assert 0 < found["before"][0] < held.nbytes
    assert found["peak"][0] > found["before"][0] + 2 * 4 * 5_000_000
    assert len(found["round"]) == 1


def test_a_job_that_fails_is_one_line() -> None:
    with pytest.raises(RuntimeError, match=r'^simulation: .*no method "nothing"'):
        ask("simulation", method="nothing", clients=4, cohort=2)


# -- the commands ----------------------------------------------------------------------------------


def test_the_command_writes_lines_and_a_table(tmp_path: Path) -> None:
    line = ["start", "--tiny", "--repeats", "1", "--out", str(tmp_path)]
    made = command.main(line)
    lines = [json.loads(text) for text in (tmp_path / "benchmarks.jsonl").read_text().splitlines()]
    assert set(lines[0]["machine"]) >= {"cpu", "cores", "memory_gib", "python", "torch"}
    assert lines[1:] == [figure.to_json() for figure in made]
    seconds = {line["what"]: line["value"]["median"] for line in lines[1:]}
    assert 0 < seconds["python, nothing else"] < seconds["fedmerge --help"]
    table = (tmp_path / "benchmarks.md").read_text()
    assert all(f"| {what} |" in table for what in seconds)


def test_an_unknown_group_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["round"])
    assert 'there is no group "round": choose from rounds, server' in capsys.readouterr().err


def test_what_could_not_be_measured_is_written_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, [Figure("g", "c", "w", "s", None, note="not run: a | b")])
    line = json.loads((tmp_path / "benchmarks.jsonl").read_text().splitlines()[1])
    assert (line["value"], line["note"]) == (None, "not run: a | b")
    assert "| c | w | - |  |  | not run: a / b |" in (tmp_path / "benchmarks.md").read_text()


def test_a_peer_takes_turns_with_the_bare_loop(tmp_path: Path) -> None:
    line = ["fedmerge", "--tiny", "--repeats", "2", "--workload", "W1", "--out", str(tmp_path)]
    run_peers(line)
    lines = [json.loads(text) for text in (tmp_path / "peers.jsonl").read_text().splitlines()]
    (peer,) = lines[1:]
    assert (peer["what"], peer["at"]) == ("fedmerge", {"steps": TASKS[0].steps, "workers": 1})
    assert peer["value"]["n"] == peer["ratio"]["n"] == 2
    assert 0.05 < peer["ratio"]["median"] < 20


def test_a_peer_that_cannot_run_is_reported(tmp_path: Path) -> None:
    (failed,) = figures(TASKS[0], "gone", Peer("run_gone"), 1, tmp_path)
    assert failed.spread is None
    assert failed.note.startswith("not run: it ended early: ")
    assert "run_gone" in failed.note


def test_the_peak_of_a_process_is_in_mib() -> None:
    code = "x = b'x' * (100 * 2**20); del x; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 100 < peak_of(child.pid) < 160
        child.communicate(b"\n")
    assert peak_of(child.pid) == 0.0


def test_seconds_go_from_commit_to_commit(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    with Commits(status) as commits:
        for number in (0, 1, 2):
            write_atomic(status, json.dumps({"round": number}).encode())  # as a server does
            time.sleep(0.3)
    (seconds,) = commits.seconds()
    assert 0.2 < seconds < 3.0


# -- the rivals beside plain implementations -------------------------------------------------------


def test_a_rival_and_its_plain_implementation_are_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--rounds", "2", "--clients", "4", "--settings", "domain", "--seeds", "5,6"]
    pairs = run_rivals(["fedrep", *few, "--out", str(tmp_path)])
    assert [(p.method, p.setting, p.seed) for p in pairs] == [
        ("fedrep", "domain", 5),
        ("fedrep", "domain", 6),
    ]
    # Both have learned something, each from draws of its own: ten classes are equally frequent.
    assert all(0.3 < value < 1.0 for p in pairs for value in (p.library, p.plain))
    assert any(p.library != p.plain for p in pairs)
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading == "| method | setting | library | plain | difference | 95 % interval |"
    library, plain = (sum(v) / 2 for v in zip(*((p.library, p.plain) for p in pairs), strict=True))
    assert row.startswith(f"| fedrep | domain | {library:.3f} | {plain:.3f} |")
    lines = (tmp_path / "rivals.jsonl").read_text().splitlines()
    assert [Pair(**json.loads(line)) for line in lines] == pairs


@pytest.mark.parametrize("method", sorted(set(PLAIN) - {"fedrep"}))
def test_every_plain_implementation_runs(method: str, tmp_path: Path) -> None:
    rounds = "6" if method == "ifca-warm" else "2"  # it is FedAvg for four
    line = [method, "--rounds", rounds, "--clients", "4", "--settings", "domain", "--seeds", "5"]
    (pair,) = run_rivals([*line, "--out", str(tmp_path)])
    assert 0.2 < pair.plain <= 1.0


def test_the_interval_of_a_difference_is_over_seeds() -> None:
    # Differences .01, .02, .03: mean .02, standard error .01 / sqrt 3, t of 2 degrees 4.303.
    pairs = [Pair("ditto", "domain", seed, 0.5 + seed / 100, 0.5) for seed in (1, 2, 3)]
    assert table(pairs).splitlines()[2] == (
        "| ditto | domain | 0.520 | 0.500 | +0.020 | -0.005 to +0.045 |"
    )


def test_a_rival_without_a_plain_implementation_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_rivals(["fedrap"])
    assert 'there is no method "fedrap": choose from fedem, fedrep' in capsys.readouterr().err
