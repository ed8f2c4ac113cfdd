"""How time and memory grow with clients, models, parameters and workers, and a large row table.

Curves of whole rounds, with the exponent fitted to each; small sizes show fixed costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from fedmerge import FedAvg, FedMerge

from .child import MIB, Found, ask
from .measure import Figure, Spread, alternate, exponents, ratios
from .server import server_round
from .simulated import Failure, Simulated, executions, one_line, takes_workers
from .sizes import Sizes
from .tasks import w2

BYTES_PER_PARAMETER = 130
"""Room to ask for, for each parameter of the model, on the curve over parameters."""


def run(sizes: Sizes, repeats: int) -> Iterator[Figure]:
    """Every curve, then the row table."""
    yield from _clients(sizes)
    yield from _models(sizes, repeats)
    yield from _parameters(sizes)
    yield from _workers(sizes, repeats)
    found = ask("table", fresh=sizes.fresh, clients=sizes.table_rows, d=sizes.table_d)
    case = f"row table, {sizes.table_rows:,} x {sizes.table_d}"
    for what in ("join", "load", "commit", "save", "round"):
        yield Figure("scale", case, what, "s", Spread.of(found[what]))
    yield Figure("scale", case, "peak", "MiB", _mib(found))


def _clients(sizes: Sizes) -> Iterator[Figure]:
    for method in ("fedavg", "fedmerge"):
        found: dict[int, Found] = {}
        case = f"clients, 1% a round, {method}"
        for m in sizes.scale_clients:
            cohort = max(1, round(m / 100))
            options = {"clients": m, "cohort": cohort}
            try:
                found[m] = ask("simulation", fresh=sizes.fresh, method=method, **options)
            except RuntimeError as error:
                note = f"not run: {one_line(error)}"
                yield Figure("scale", case, f"{m:,}: round", "s", None, note=note)
        for m, one in found.items():
            at = {"clients": m}
            yield Figure("scale", case, f"{m:,}: set up", "s", Spread.of(one["set_up"]), at=at)
            yield Figure("scale", case, f"{m:,}: round", "s", Spread.of(one["round"]), at=at)
            yield Figure("scale", case, f"{m:,}: peak", "MiB", _mib(one), at=at)
        for what in ("set_up", "round", "peak"):
            curve = {m: Spread.of(one[what]).median for m, one in found.items()}
            yield from exponents("scale", case, what.replace("_", " "), curve)


def _models(sizes: Sizes, repeats: int) -> Iterator[Figure]:
    model = nn.Linear(sizes.scale_width, 1, bias=False)
    works = {
        str(d): server_round(FedMerge(d=d), model, sizes.scale_k, min(10, sizes.scale_k))
        for d in sizes.scale_d
    }
    taken = alternate(works, repeats, settle=True)
    case = f"models d, server round, {sizes.scale_k} clients, P={sizes.scale_width:,}"
    yield from _curve(case, {int(d): Spread.of(values) for d, values in taken.items()})


def _parameters(sizes: Sizes) -> Iterator[Figure]:
    case = "parameters P, server round, d=2, 4 clients"
    curve: dict[int, Spread] = {}
    peaks: dict[int, Spread] = {}
    for p in sizes.scale_p:
        needed, free = p * BYTES_PER_PARAMETER, _free()
        if free is not None and needed > free:
            note = f"not run: needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            yield Figure("scale", case, f"{p:,}", "s", None, note=note)
            continue
        options = {"parameters": p, "cohort": 4, "chunk": 1, "rounds": 4}
        try:
            found = ask("server", fresh=sizes.fresh, method="fedmerge:d=2", **options)
        except RuntimeError as error:
            yield Figure("scale", case, f"{p:,}", "s", None, note=f"not run: {one_line(error)}")
            continue
        curve[p], peaks[p] = Spread.of(found["round"]), _mib(found)
    yield from _curve(case, curve)
    for p, peak in peaks.items():
        yield Figure("scale", case, f"{p:,}: peak", "MiB", peak, at={"P": p})


def _workers(sizes: Sizes, repeats: int) -> Iterator[Figure]:
    case = "workers, round of W2"
    if "processes" not in executions() or not takes_workers():
        note = "not run: this version has no execution by worker processes"
        yield Figure("scale", case, "", "s", None, note=note)
        return
    task = w2(sizes.w2_clients, sizes.w2_images)
    started: dict[str, Simulated] = {}
    try:
        for workers in sizes.scale_workers:
            options = {"execution": "processes", "workers": workers}
            started[str(workers)] = Simulated(task, FedAvg(), **options)
        taken = alternate({name: one.round for name, one in started.items()}, repeats)
    except Failure as error:
        yield Figure("scale", case, "", "s", None, note=f"not run: {one_line(error)}")
        return
    finally:
        for one in started.values():
            one.close()
    first = next(iter(taken.values()))
    curve = {int(name): Spread.of(values) for name, values in taken.items()}
    ratio = {int(name): ratios(values, first) for name, values in taken.items()}
    yield from _curve(case, curve, ratio)


def _curve(
    case: str, curve: Mapping[int, Spread], ratio: Mapping[int, Spread] | None = None
) -> Iterator[Figure]:
    of = ratio or {}
    for size, spread in curve.items():
        yield Figure("scale", case, f"{size:,}", "s", spread, of.get(size), at={"size": size})
    yield from exponents("scale", case, "round", {s: v.median for s, v in curve.items()})


def _mib(found: Found) -> Spread:
    return Spread.of([value / MIB for value in found["peak"]])


def _free() -> int | None:
    """Bytes of memory that are free, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
