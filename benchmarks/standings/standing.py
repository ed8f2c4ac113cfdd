"""The runs of a comparison, as files hold them, and what they say of its methods.

It words nothing: the page is made in `page`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from fedmerge.report.statistics import Interval, holm, paired_interval, ranks

OURS = ("fedmerge", "fedmerge-ft")
"""One training, which is not counted against itself."""
COLUMNS = ("data", "setting", "method", "seed", "score", "worst_tenth", "chosen")


@dataclass(frozen=True)
class Result:
    """One run: of the model that clients would use, as merged, after the last round.

    score: mean test accuracy over clients; for values to predict the mean loss, with its sign
    turned, so that more is better. worst_tenth: mean accuracy of the worst tenth of the clients.
    chosen: what tuning chose.
    """

    data: str
    setting: str
    method: str
    seed: int
    score: float
    worst_tenth: float | None
    chosen: str

    @property
    def where(self) -> str:
        """Data and setting."""
        return f"{self.data}/{self.setting}"


class Standing:
    """All runs of a comparison, by setting, method and seed.

    accurate: the settings whose score is an accuracy. complete: the methods that are in all.

    Raises:
        ValueError: methods of a setting were run with other seeds, so that their means differ by
            more than the methods.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        self.runs: dict[tuple[str, str], dict[int, Result]] = {}
        for one in results:
            self.runs.setdefault((one.where, one.method), {})[one.seed] = one
        self.settings = tuple(dict.fromkeys(where for where, _ in self.runs))
        self.methods = tuple(dict.fromkeys(method for _, method in self.runs))
        for where in self.settings:
            seeds = {tuple(sorted(runs)) for (at, _), runs in self.runs.items() if at == where}
            if len(seeds) > 1:
                raise ValueError(f"{where}: not all methods have the same seeds: {sorted(seeds)}")
        every = self.results()
        self.complete = tuple(
            m for m in self.methods if all((where, m) in self.runs for where in self.settings)
        )
        losses = {run.where for run in every if run.worst_tenth is None}
        self.accurate = tuple(where for where in self.settings if where not in losses)

    def results(self) -> list[Result]:
        """All runs, one after another."""
        return [run for runs in self.runs.values() for run in runs.values()]

    def mean(self, where: str, method: str) -> float:
        """The mean score over seeds."""
        return mean(run.score for run in self.runs[where, method].values())

    def rivals(self, where: str, method: str) -> list[str]:
        """What `method` is held against in a setting."""
        others = [m for m in self.methods if m != method and (where, m) in self.runs]
        return [m for m in others if not {m, method} <= set(OURS)]

    def behind(
        self, where: str, method: str, of: Callable[[Result], float]
    ) -> dict[str, tuple[Interval, float]]:
        """By rival what `method` is behind it, over the seeds of both, and p, Holm's correction."""
        own, found = self.runs[where, method], {}
        for rival in self.rivals(where, method):
            other = self.runs[where, rival]
            both = sorted(own.keys() & other.keys())
            found[rival] = paired_interval([of(other[s]) - of(own[s]) for s in both])
        adjusted = holm([1.0 if i.p is None else i.p for i in found.values()])
        return {rival: (found[rival], p) for rival, p in zip(found, adjusted, strict=True)}

    def losses(self, method: str) -> dict[str, float]:
        """By setting what `method` loses to the best in it; 0 where that is it."""
        lost = {}
        for where in self.accurate:
            best = max(self.mean(where, m) for m in self.rivals(where, method))
            lost[where] = max(0.0, best - self.mean(where, method))
        return lost

    def ranks(self, twin: str) -> dict[str, float]:
        """The average rank of each complete method but `twin` over all settings, best first."""
        names = [m for m in self.complete if m != twin]
        scores = [[round(self.mean(s, m), 12) for m in names] for s in self.settings]
        found = zip(names, ranks(np.array(scores)).mean(0).tolist(), strict=True)
        return dict(sorted(found, key=lambda pair: pair[1]))


def score_of(run: Result) -> float:
    return run.score


def worst_of(run: Result) -> float:
    return -1.0 if run.worst_tenth is None else run.worst_tenth


def read(file: Path) -> Iterator[Result]:
    """The runs of one file of docs/results."""
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            worst = float(row["worst_tenth"]) if row["worst_tenth"] else None
            yield Result(
                row["data"], row["setting"], row["method"], int(row["seed"]),
                float(row["score"]), worst, row["chosen"],
            )  # fmt: skip


def read_folder(folder: Path) -> Iterator[Result]:
    """The runs of a finished comparison, of the last round and the model that clients would use.

    Raises:
        ValueError: one has diverged, so that it has no mean with others.
    """
    with (folder / "results.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if (row["at"], row["model"]) == ("last", "merged"):
                accurate = row["accuracy"] is not None
                score = row["accuracy"] if accurate else row["loss"]
                if score is None or not math.isfinite(score):
                    raise ValueError(f"{folder}: {row['method']}, seed {row['seed']}, diverged")
                yield Result(
                    row["data"], row["setting"], row["method"], row["seed"],
                    score if accurate else -score,
                    row["accuracy_worst_decile"] if accurate else None,
                    ", ".join(f"{name}={value}" for name, value in row["chosen"].items()),
                )  # fmt: skip


def write(results: Iterable[Result], file: Path) -> None:
    """Write the runs, with more digits than any difference here needs."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        out = csv.writer(lines, lineterminator="\n")
        out.writerow(COLUMNS)
        for one in results:
            worst = "" if one.worst_tenth is None else f"{one.worst_tenth:.5f}"
            score = f"{one.score:.5f}"
            out.writerow((one.data, one.setting, one.method, one.seed, score, worst, one.chosen))
