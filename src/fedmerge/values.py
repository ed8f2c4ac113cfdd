"""Values of options, read from text and checked by the type that takes them.

Where an option stands, and what an error says of it, is the caller's.
"""

from __future__ import annotations

import typing
from numbers import Integral, Real
from types import NoneType, UnionType

WORDS = {"true": True, "false": False}


def read_value(value: str, wanted: object) -> object:
    """Return the number, truth value or text that `value` spells.

    Args:
        wanted: int, float, bool, str or a union of them, as a type hint.

    Raises:
        ValueError: it is of none of these.
    """
    kinds = typing.get_args(wanted) or (wanted,)
    if bool in kinds and value.lower() in WORDS:
        return WORDS[value.lower()]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    if str in kinds:
        return value
    raise ValueError(value)


def is_value(value: object, wanted: object) -> bool:
    """Return whether `value` is of a type hint as `read_value` takes it, or None where that is one.

    What other hints say is not looked at. A truth value is no number.
    """
    union = typing.get_origin(wanted) in (typing.Union, UnionType)
    kinds = typing.get_args(wanted) if union else (wanted,)
    known: dict[object, type] = {
        int: Integral, float: Real, bool: bool, str: str, NoneType: NoneType,
    }  # fmt: skip
    if isinstance(value, bool):
        kinds = tuple(kind for kind in kinds if kind not in (int, float))
    return any(kind not in known or isinstance(value, known[kind]) for kind in kinds)


def describe_type(wanted: object) -> str:
    """Return what a type hint takes, in words: "a whole number or a number"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    kinds = typing.get_args(wanted) or (wanted,)
    return " or ".join(names[kind] for kind in kinds if kind in names)
