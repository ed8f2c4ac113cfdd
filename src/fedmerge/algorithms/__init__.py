"""The methods, and how a text such as "ifca-warm:d=8" names one.

A method is one short file beside this one and one line in `METHODS`; see docs/adding_a_method.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass

from ..errors import ConfigError, blaming, did_you_mean
from ..values import describe_type, read_value
from .apfl import APFL
from .apple import APPLE
from .base import Algorithm, Cost, Fold, Local, Setup, Tensors, Ticket, Updates, check_method
from .cfl import CFL
from .ditto import Ditto
from .fedala import FedALA
from .fedamp import FedAMP
from .fedavg import FedAvg, FedAvgFT
from .fedbabu import FedBABU
from .fedem import FedEM
from .fedfomo import FedFomo
from .fedmerge import FedMerge
from .fedmerge_paper import FedMergePaper
from .fedper import FedPer
from .fedprox import FedProx
from .fedrep import FedRep
from .fesem import FeSEM
from .gathering import Gathering
from .ifca import IFCA
from .local_only import LocalOnly
from .moe import MoE
from .ppfl import PPFL
from .trainer import Step, Trainer, fine_tuned_while_it_helps, tune

METHODS: dict[str, tuple[type[Algorithm], Mapping[str, object]]] = {
    "fedmerge": (FedMerge, {}),
    "fedmerge-ft": (FedMerge, {"finetune": 10}),
    "fedavg": (FedAvg, {}),
    "fedavg-ft": (FedAvgFT, {}),
    "fedprox": (FedProx, {}),
    "local": (LocalOnly, {}),
    "ifca": (IFCA, {}),
    "ifca-warm": (IFCA, {"warm": 5}),
    "ditto": (Ditto, {}),
    "fedamp": (FedAMP, {}),
    "fedfomo": (FedFomo, {}),
    "fesem": (FeSEM, {}),
    "cfl": (CFL, {}),
    "fedem": (FedEM, {}),
    "ppfl": (PPFL, {}),
    "moe": (MoE, {}),
    "apfl": (APFL, {}),
    "fedper": (FedPer, {}),
    "fedrep": (FedRep, {}),
    "fedbabu": (FedBABU, {}),
    "fedala": (FedALA, {}),
    "apple": (APPLE, {}),
}
"""Each name with its class and the options that the name stands for."""

RULES: dict[str, type[Algorithm]] = {"default": FedMerge, "paper": FedMergePaper}
"""What `rule` in "fedmerge:rule=..." chooses."""


def make_method(text: str) -> Algorithm:
    """Make the method named by `text`: "name" or "name:key=value:key=value".

    A name with a dot is a class of the caller's own, imported: "my_methods.FedAvgM:beta=0.9".

    Raises:
        ConfigError: an unknown name or key, a value that does not fit or is missing, or whatever a
            class of the caller's own raises.
    """
    name, *pairs = text.split(":")
    kind, preset = _find(name)
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise ConfigError(f'method "{text}": "{pair}" is not of the form key=value')
        if key in options:
            raise ConfigError(f'method "{text}": "{key}" is given twice')
        options[key] = value
    if name == "fedmerge" and "rule" in options:
        rule = options.pop("rule")
        if rule not in RULES:
            raise ConfigError(
                f'method "{text}": there is no rule "{rule}"{did_you_mean(rule, RULES)}'
            )
        kind = RULES[rule]
    with blaming(name):
        types = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    names = [*known, "rule"] if name == "fedmerge" else known
    values: dict[str, object] = dict(preset)
    for key, value in options.items():
        if key not in known:
            hint = did_you_mean(key, names) if names else "; it has no options"
            raise ConfigError(f'method "{name}" has no option "{key}"{hint}')
        try:
            values[key] = read_value(value, types[key])
        except ValueError:
            wanted = describe_type(types[key])
            raise ConfigError(f'method "{text}": {key} = "{value}": wanted {wanted}') from None
    needed = [
        f.name
        for f in dataclasses.fields(kind)
        if f.init and f.default is f.default_factory is dataclasses.MISSING
    ]
    for key in needed:
        if key not in values:
            raise ConfigError(
                f'method "{text}": {key} has no default; write "{text}:{key}=...", or give it one '
                "in the class"
            )
    with blaming(name):
        return kind(**values)


def _find(name: str) -> tuple[type[Algorithm], Mapping[str, object]]:
    if name in METHODS:
        return METHODS[name]
    module, dot, leaf = name.rpartition(".")
    if not dot:
        raise ConfigError(f'there is no method "{name}"{did_you_mean(name, METHODS)}')
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the caller's own module raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = ": is its folder on PYTHONPATH?" if isinstance(error, ImportError) else ""
        raise ConfigError(f'method "{name}" cannot be imported ({reason}){where}') from error
    kind = getattr(found, leaf, None)
    if kind is None:
        own = [n for n, one in vars(found).items() if isinstance(one, type)]
        raise ConfigError(f'method "{name}": {module} has no class {leaf}{did_you_mean(leaf, own)}')
    if not (isinstance(kind, type) and issubclass(kind, Algorithm) and is_dataclass(kind)):
        raise ConfigError(f'method "{name}": wanted a dataclass that extends fedmerge.Algorithm')
    if not isinstance(getattr(kind, "name", None), str):
        raise ConfigError(f'method "{name}": its class has no name: wanted name = "..." in {leaf}')
    return kind, {}


__all__ = [
    "APFL",
    "APPLE",
    "CFL",
    "IFCA",
    "METHODS",
    "PPFL",
    "RULES",
    "Algorithm",
    "Cost",
    "Ditto",
    "FeSEM",
    "FedALA",
    "FedAMP",
    "FedAvg",
    "FedAvgFT",
    "FedBABU",
    "FedEM",
    "FedFomo",
    "FedMerge",
    "FedMergePaper",
    "FedPer",
    "FedProx",
    "FedRep",
    "Fold",
    "Gathering",
    "Local",
    "LocalOnly",
    "MoE",
    "Setup",
    "Step",
    "Tensors",
    "Ticket",
    "Trainer",
    "Updates",
    "check_method",
    "fine_tuned_while_it_helps",
    "make_method",
    "tune",
]
