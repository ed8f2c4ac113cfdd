"""Keeping the Hugging Face libraries' bars and remarks off the screen while they load something.

What goes wrong is not hidden: it is an exception, which the caller turns into one line.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedmerge.errors import MissingExtraError

EXTRAS = {"datasets": "data", "transformers": "text"}
"""The libraries that draw bars, and the extra that each one comes with."""


@contextmanager
def quiet(library: str = "datasets") -> Iterator[None]:
    """Keep the bars of `library`, and all remarks on each retry, off the screen.

    Raises MissingExtraError where it is not installed.
    """
    try:
        bars = importlib.import_module(f"{library}.utils.logging")
    except ImportError:
        raise MissingExtraError(EXTRAS[library]) from None
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", *EXTRAS)]
    levels = [logger.level for logger in loggers]
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            bars.enable_progress_bar()
