"""Options given as text, read by their types."""

from __future__ import annotations

from typing import Optional

import numpy as np
import pytest

from fedmerge.values import describe_type, is_value, read_value


@pytest.mark.parametrize(
    ("text", "wanted", "value"),
    [
        ("3", int, 3),
        ("3", int | float, 3),
        ("0.5", int | float, 0.5),
        ("3", float, 3.0),
        ("True", bool, True),
        ("false", bool | str, False),
        ("maybe", bool | str, "maybe"),
        ("7", int | None, 7),
    ],
)
def test_a_text_is_read_by_its_type(text: str, wanted: object, value: object) -> None:
    found = read_value(text, wanted)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "wanted", "words"),
    [
        ("2.5", int | None, "a whole number"),
        ("big", float, "a number"),
        ("1", bool, "true or false"),
        ("x", int | float, "a whole number or a number"),
    ],
)
def test_what_does_not_fit_is_refused_and_can_be_described(
    text: str, wanted: object, words: str
) -> None:
    with pytest.raises(ValueError, match=text):
        read_value(text, wanted)
    assert describe_type(wanted) == words


@pytest.mark.parametrize(
    ("value", "wanted", "good"),
    [
        (3, int, True),
        (np.int64(3), int | None, True),
        (None, int | None, True),
        (None, int, False),
        (2.0, int, False),
        (True, int, False),
        ("3", int, False),
        (3, float, True),
        (np.float32(0.5), float, True),
        (True, float | None, False),
        (False, bool | None, True),
        (0, bool, False),
        (True, int | bool, True),
        ("x", str, True),
        (1.5, Optional[int], False),  # noqa: UP045
        ([1], list[int], True),
        (1.5, list[int], True),
    ],
)
def test_a_value_is_held_against_its_type(value: object, wanted: object, good: bool) -> None:
    assert is_value(value, wanted) is good
