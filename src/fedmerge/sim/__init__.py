"""Simulation of a federation on one machine."""

from .log import RoundLog, Summary
from .rounds import Simulation

__all__ = ["RoundLog", "Simulation", "Summary"]
