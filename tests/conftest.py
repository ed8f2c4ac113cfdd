"""Settings of the whole test run: one torch thread, property tests that never flake, and who of
several workers runs what.

Builders and data are elsewhere: `core_fixture` and `report_fixture`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples in every run, however busy the machine is.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("steady")

TOGETHER = {
    "test_benchmarks.py", "test_cluster.py", "test_flower_processes.py", "test_processes.py",
    "test_report_export.py",
}  # fmt: skip
"""Files whose tests share what takes long to set up: a federation, a Ray cluster, figures."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each of those files is one worker's, and they come first; other tests go to whoever waits."""
    if config.getvalue("dist") != "load":
        return None  # somebody wants another way
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Together(config, log)


def scope_of(nodeid: str) -> str:
    """What has the same value for tests that one worker is to run: their file, or the test."""
    file = nodeid.partition("::")[0]
    return file if file.rpartition("/")[2] in TOGETHER else nodeid
