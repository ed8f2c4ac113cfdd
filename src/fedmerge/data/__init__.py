"""Clients and their data: the guard, the settings in which methods are compared, own files.

It trains nothing and knows no method; a `Federation` is all that the other parts see of it.
"""

from fedmerge.data.clients import (
    Client,
    ClientRow,
    Federation,
    Split,
    check_federation,
    describe,
    sample_images,
)
from fedmerge.data.files import load_csv, load_npz_folder
from fedmerge.data.partition import partition_cluster, partition_dirichlet
from fedmerge.data.settings import SETTINGS, make_federation
from fedmerge.data.shifts import partition_concept, partition_concept_mix, partition_domain
from fedmerge.data.sources import SOURCES, Dataset, load_digits, load_gaussian, load_source
from fedmerge.data.splits import from_tensors
from fedmerge.data.teachers import partition_latent

__all__ = [
    "SETTINGS",
    "SOURCES",
    "Client",
    "ClientRow",
    "Dataset",
    "Federation",
    "Split",
    "check_federation",
    "describe",
    "from_tensors",
    "load_csv",
    "load_digits",
    "load_gaussian",
    "load_npz_folder",
    "load_source",
    "make_federation",
    "partition_cluster",
    "partition_concept",
    "partition_concept_mix",
    "partition_dirichlet",
    "partition_domain",
    "partition_latent",
    "sample_images",
]
