"""What a comparison compares: data sets with settings, methods, seeds and how much is tuned.

A preset is a comparison with a name; whatever it says can be said otherwise by an option. Nothing
is run here, and names of data sets and methods are checked by the parts that own them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from ..errors import ConfigError, did_you_mean
from .cells import Pair, parse_names, parse_seeds

NATURAL = "natural"
FIRST_TUNING_SEED = 1000
TUNED_ON = 8
"""Seeds that a point is tried with at most: with few, chance decides between points that are nearly
as good, and the race (`race`) does without most of them where it is plain which is best."""
Sizes = Mapping[str, object]
"""Settings of a run, by name."""


@dataclass(frozen=True)
class Preset:
    """A comparison with a name.

    Attributes:
        data: data sets, each with the settings of a run that are its own. A data set goes with
            those of `settings` that fit it: clients of its own, or clients that are made.
        settings, methods, seeds: as the options of `fedmerge compare`.
        trials: points that tuning tries beside each method's defaults; 0 for no tuning.
        shared: settings of a run for all data.
    """

    data: Mapping[str, Sizes]
    settings: str
    methods: str
    seeds: str
    trials: int = 0
    shared: Sizes = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        data={"digits": {}},
        settings="concept-mix,domain,dirichlet",
        methods="fedmerge,fedavg,fedavg-ft,fedprox,local,ifca-warm,ditto",
        seeds="0-2",
    ),
    # The sizes are such that two fast cores need less than an hour for all of it.
    "standard": Preset(
        data={
            "digits": {"clients": 32, "rounds": 60, "epochs": 5},
            "mnist-5k-14": {"clients": 32, "rounds": 40, "epochs": 2},
            "watch": {"rounds": 40, "epochs": 2, "train_fraction": 0.2},
            "heart": {"rounds": 40, "epochs": 2, "lr": 0.01},
            "diabetes": {"rounds": 40, "epochs": 2, "lr": 0.03},
        },
        settings="all,natural",
        methods="all,fedmerge:rule=paper",
        seeds="0-4",
        trials=3,
        shared={"evaluate_every": 5},
    ),
    # Chen et al., AAAI 2026: cluster-wise and client-wise labels, 50 clients, all in every round,
    # d = 5 models. Their test accuracy is that at the round of least validation loss: "best" in the
    # results. FedMerge with the reference rule as the authors run it, and with the default rule.
    "paper": Preset(
        data={"cifar100": {}},
        settings="cluster:groups=5:classes=30:alpha=10,dirichlet:alpha=0.1",
        methods="fedmerge:rule=paper:d=5,fedmerge:d=5,fedavg,fedprox,local,ditto,ifca:d=5,fesem:d=5,"
        "fedem:d=5",
        seeds="0-4",
        shared={
            "model": "resnet9",
            "hidden": 64,
            "clients": 50,
            "rounds": 500,
            "lr": 0.01,
            "epochs": 2,
            "batch_size": 32,
        },
    ),
}


@dataclass(frozen=True)
class Protocol:
    """A comparison, all of it said.

    Attributes:
        pairs: data set and setting, in the order of the cells.
        trials: points that tuning tries beside the defaults; 0 for no tuning.
        tuning_seeds: of the trials; none of them is in `seeds`, and none there without tuning.
    """

    preset: str | None
    pairs: tuple[Pair, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    tuning_seeds: tuple[int, ...]

    def sizes(self, data: str, setting: str, options: Sizes) -> dict[str, object]:
        """Return the settings of a run on `data` in `setting`: `options` over the preset's.

        A preset's data sets that have clients of their own keep them, whatever --clients says.
        """
        if self.preset is None:
            return dict(options)
        preset = PRESETS[self.preset]
        sizes = {**preset.shared, **preset.data.get(data, {}), **options}
        if setting.partition(":")[0] == NATURAL:
            sizes.pop("clients", None)
        return sizes

    def facts(self) -> dict[str, Any]:
        """Return what the numbers of a comparison depend on beside the settings of its runs."""
        return {
            "preset": self.preset,
            "trials": self.trials,
            "tuning_seeds": list(self.tuning_seeds),
        }


@dataclass(frozen=True)
class Names:
    """What there is to choose from.

    Attributes:
        settings, methods: what "all" stands for.
        fits: whether a data set goes with a setting.
    """

    settings: Callable[[], Iterable[str]]
    methods: Callable[[], Iterable[str]]
    fits: Callable[[str, str], bool]


def make_protocol(
    names: Names,
    *,
    preset: str | None = None,
    data: str | None = None,
    settings: str | None = None,
    methods: str | None = None,
    seeds: str | None = None,
    trials: int | None = None,
    tuning_seeds: str | None = None,
    tuning: bool = True,
) -> Protocol:
    """Return the comparison that the options of `fedmerge compare` ask for; None is not given.

    Raises:
        ConfigError: an unknown preset, something that is missing, or options that contradict each
            other.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f'--preset: there is no preset "{preset}"{did_you_mean(preset, PRESETS)}')
    base = PRESETS[preset] if preset else Preset({"digits": {}}, "", "", "0-4")
    for option, given, default in (
        ("--settings", settings, base.settings),
        ("--methods", methods, base.methods),
    ):
        if given is None and not default:
            presets = ", ".join(PRESETS)
            raise ConfigError(f"{option} is missing; name them, or take a --preset: {presets}")
    pairs = _pairs(
        parse_names("--data", _either(data, ",".join(base.data)), lambda: base.data),
        parse_names("--settings", _either(settings, base.settings), names.settings),
        names.fits,
        named=(data is not None, settings is not None),
    )
    reported = parse_seeds(_either(seeds, base.seeds))
    points = _points(base.trials, trials, tuning_seeds, tuning)
    return Protocol(
        preset,
        pairs,
        parse_names("--methods", _either(methods, base.methods), names.methods),
        reported,
        points,
        _tuning_seeds(reported, tuning_seeds) if points else (),
    )


def _either(given: str | None, default: str) -> str:
    """What is given, be it empty: that is a slip to be told, not the default."""
    return default if given is None else given


def _pairs(
    data: tuple[str, ...],
    settings: tuple[str, ...],
    fits: Callable[[str, str], bool],
    named: tuple[bool, bool],
) -> tuple[Pair, ...]:
    """Each data set with the settings that fit it; a name that was asked for must have one."""
    pairs = tuple((one, setting) for one in data for setting in settings if fits(one, setting))
    for place, (option, kind, values) in enumerate(
        (("--data", "setting", data), ("--settings", "data set", settings))
    ):
        others = (settings, data)[place]
        alone = next((v for v in values if v not in {pair[place] for pair in pairs}), None)
        if alone is not None and (named[place] or not pairs):
            raise ConfigError(
                f"{option} {alone} fits no {kind} of this comparison ({', '.join(others)}): data "
                f'sets with clients of their own go with "{NATURAL}", others with the settings '
                "that make clients, and files of yours with all that they allow"
            )
    return pairs


def _points(default: int, trials: int | None, seeds: str | None, tuning: bool) -> int:
    if not tuning and trials:
        raise ConfigError(f"--no-tuning and --trials {trials} contradict each other; leave one out")
    points = default if trials is None else trials
    points = points if tuning else 0
    if seeds is not None and not points:
        raise ConfigError("--tuning-seeds without tuning; say how much to try with --trials")
    return points


def _tuning_seeds(reported: tuple[int, ...], text: str | None) -> tuple[int, ...]:
    if text is None:
        return tuple(islice((s for s in count(FIRST_TUNING_SEED) if s not in reported), TUNED_ON))
    seeds = parse_seeds(text, "--tuning-seeds")
    both = [seed for seed in seeds if seed in reported]
    if both:
        raise ConfigError(
            f"--tuning-seeds: seed {both[0]} is reported as well (--seeds); what was tuned on a "
            "seed would look better there than it is, so take others"
        )
    return seeds
