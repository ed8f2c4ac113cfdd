"""`python -m benchmarks.rivals [method ...]`: the library's rivals beside plain implementations.

Both are trained on the same federations with the same settings, from draws of their own, and
evaluated at the same moment: the model that each client would use after the last round, mean test
accuracy over clients. A difference is over seeds, paired by the federation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from scipy import stats

from fedmerge import Federation, Simulation, Training, make_federation, make_model
from fedmerge.algorithms import make_method

from . import clusters, heads, mixtures, personal
from .world import Model, World, accuracy

PLAIN: dict[str, Callable[[World, int], list[Model]]] = {
    "fedem": mixtures.fedem,
    "fedrep": heads.fedrep,
    "fedavg": heads.fedavg,
    "ditto": personal.ditto,
    "fedper": heads.fedper,
    "ifca": clusters.ifca,
    "apfl": personal.apfl,
    "fedamp": personal.fedamp,
    "fedfomo": personal.fedfomo,
    "fedbabu": heads.fedbabu,
    "cfl": clusters.cfl,
    "fesem": clusters.fesem,
    "fedala": personal.fedala,
    "apple": personal.apple,
    "ppfl": mixtures.ppfl,
    "moe": mixtures.moe,
    "ifca-warm": clusters.ifca_warm,
    "fedprox": heads.fedprox,
    "fedavg-ft": heads.fedavg_ft,
}
SETTINGS = ("concept-mix", "domain")
SEEDS = (5, 6, 7, 8, 9)
"""Not those of the comparison with all clients: what is mended here is not tuned on them."""
HEADINGS = ("method", "setting", "library", "plain", "difference", "95 % interval")


@dataclass(frozen=True)
class Pair:
    """One method on one federation: mean test accuracy over clients, of both."""

    method: str
    setting: str
    seed: int
    library: float
    plain: float


def of_library(method: str, federation: Federation, rounds: int, seed: int) -> float:
    """What the library's method reaches with its defaults."""
    model = make_model("mlp", federation.input_shape, federation.n_outputs)
    simulation = Simulation(
        make_method(method),
        federation,
        model,
        training=Training(lr=0.3, epochs=5, batch_size=16),
        rounds=rounds,
        seed=seed,
        evaluate_every=rounds,
    )
    *_, last = simulation.rounds()
    return float(last.metrics["merged"]["test"]["accuracy"].mean)


def of_plain(method: str, federation: Federation, rounds: int, seed: int) -> float:
    """What the plain implementation reaches."""
    torch.manual_seed(seed)  # of new networks
    splits = [[(s.x, s.y) for _, s in client.splits()] for client in federation.clients]
    train, validation, test = ([one[at] for one in splits] for at in range(3))
    world = World(
        train,
        validation,
        test,
        make_model("mlp", federation.input_shape, federation.n_outputs),
        torch.Generator().manual_seed(seed),
    )
    models = PLAIN[method](world, rounds)
    return mean(accuracy(model, data) for model, data in zip(models, test, strict=True))


def table(pairs: Sequence[Pair]) -> str:
    """A Markdown table: a line for each method and setting, in the order in which they came."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for method, setting in dict.fromkeys((p.method, p.setting) for p in pairs):
        here = [p for p in pairs if (p.method, p.setting) == (method, setting)]
        apart = [p.library - p.plain for p in here]
        cells = (f"{mean(p.library for p in here):.3f}", f"{mean(p.plain for p in here):.3f}")
        lines.append((method, setting, *cells, f"{mean(apart):+.3f}", _interval(apart)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(apart: Sequence[float]) -> str:
    if len(apart) < 2:
        return ""
    error = float(stats.sem(apart))
    reach = float(stats.t.ppf(0.975, len(apart) - 1)) * error
    return f"{mean(apart) - reach:+.3f} to {mean(apart) + reach:+.3f}"


def main(line: Sequence[str] | None = None) -> list[Pair]:
    """Run the methods that are asked for, all without an argument."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.add_argument("method", nargs="*", help=f"of {', '.join(PLAIN)}; all if none is given")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="separated by commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("out/rivals"), help="folder")
    given = parser.parse_args(line)
    unknown = [name for name in given.method if name not in PLAIN]
    if unknown:
        parser.error(f'there is no method "{unknown[0]}": choose from {", ".join(PLAIN)}')
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: wanted 1 or more")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    pairs: list[Pair] = []
    with (given.out / "rivals.jsonl").open("w") as file:
        for method in given.method or PLAIN:
            for setting in given.settings.split(","):
                for seed in map(int, given.seeds.split(",")):
                    made = make_federation("digits", setting, given.clients, seed=seed)
                    reached = (
                        run(method, made, given.rounds, seed) for run in (of_library, of_plain)
                    )
                    pairs.append(Pair(method, setting, seed, *reached))
                    print(json.dumps(asdict(pairs[-1])), file=file, flush=True)
                    print(pairs[-1], file=sys.stderr)
    print(table(pairs))
    return pairs


if __name__ == "__main__":
    main()
