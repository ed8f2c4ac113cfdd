"""Personalised federated learning by model merging.

A server keeps a few global models; every client gets one model, merged for it with learned weights.
Names are imported when they are first used, so that `import fedmerge` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .algorithms import (
        IFCA,
        Algorithm,
        Ditto,
        FedAvg,
        FedMerge,
        FedMergePaper,
        FedProx,
        LocalOnly,
        Ticket,
        Updates,
        make_method,
    )
    from .config import RunConfig
    from .data import (
        Client,
        Dataset,
        Federation,
        Split,
        from_tensors,
        load_csv,
        load_digits,
        load_gaussian,
        load_npz_folder,
        make_federation,
        partition_cluster,
        partition_concept,
        partition_concept_mix,
        partition_dirichlet,
        partition_domain,
        partition_latent,
    )
    from .errors import (
        ConfigError,
        DataError,
        FedmergeError,
        MissingExtraError,
        ModelError,
        StateError,
    )
    from .local import Training
    from .merging import merge
    from .models import make_model
    from .params import Layout
    from .sim import RoundLog, Simulation
    from .soup import Sent, Soup
    from .tickets import Refusal

__version__ = "0.1.0"

_MODULES = {
    "algorithms": (
        "Algorithm Ditto FedAvg FedMerge FedMergePaper FedProx IFCA LocalOnly Ticket Updates "
        "make_method"
    ),
    "config": "RunConfig",
    "data": (
        "Client Dataset Federation Split from_tensors load_csv load_digits load_gaussian "
        "load_npz_folder make_federation partition_cluster partition_concept "
        "partition_concept_mix partition_dirichlet partition_domain partition_latent"
    ),
    "errors": ("ConfigError DataError FedmergeError MissingExtraError ModelError StateError"),
    "local": "Training",
    "merging": "merge",
    "models": "make_model",
    "params": "Layout",
    "sim": "RoundLog Simulation",
    "soup": "Sent Soup",
    "tickets": "Refusal",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "IFCA",
    "Algorithm",
    "Client",
    "ConfigError",
    "DataError",
    "Dataset",
    "Ditto",
    "FedAvg",
    "FedMerge",
    "FedMergePaper",
    "FedProx",
    "Federation",
    "FedmergeError",
    "Layout",
    "LocalOnly",
    "MissingExtraError",
    "ModelError",
    "Refusal",
    "RoundLog",
    "RunConfig",
    "Sent",
    "Simulation",
    "Soup",
    "Split",
    "StateError",
    "Ticket",
    "Training",
    "Updates",
    "__version__",
    "from_tensors",
    "load_csv",
    "load_digits",
    "load_gaussian",
    "load_npz_folder",
    "make_federation",
    "make_method",
    "make_model",
    "merge",
    "partition_cluster",
    "partition_concept",
    "partition_concept_mix",
    "partition_dirichlet",
    "partition_domain",
    "partition_latent",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f'fedmerge has no "{name}"')
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
