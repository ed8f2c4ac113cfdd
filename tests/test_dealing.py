"""Which worker of several runs which test: those that share a set-up stay together."""

from __future__ import annotations

from pathlib import Path

from conftest import TOGETHER, scope_of


def test_the_tests_of_some_files_stay_together() -> None:
    missing = {name for name in TOGETHER if not (Path(__file__).parent / name).is_file()}
    assert missing == set()
    assert scope_of("tests/test_cluster.py::test_a[1]") == "tests/test_cluster.py"
    assert scope_of("test_cluster.py::Group::test_a") == "test_cluster.py"
    assert scope_of("tests/test_soup.py::test_a[x/test_cluster.py]") == (
        "tests/test_soup.py::test_a[x/test_cluster.py]"
    )
