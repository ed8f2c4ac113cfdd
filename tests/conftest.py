"""Settings of the whole test run: one torch thread, and property tests that never flake.

Builders and data are elsewhere: `core_fixture` and `report_fixture`.
"""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples in every run, however busy the machine is.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("steady")
