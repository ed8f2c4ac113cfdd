"""The bare loop as if it were a peer: a control for the way in which peers are measured.

It needs torch alone; see `turns` for who calls it.
"""

from __future__ import annotations

from ..tasks import BareLoop
from .turns import Turns

turns = Turns()
loop = BareLoop(turns.task)
turns.next()
for _ in range(turns.rounds):
    turns.steps = loop.round()
    turns.next()
