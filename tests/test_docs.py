"""The code of README and docs runs and prints what they say."""

from __future__ import annotations

import doctest
import re
import tomllib
from pathlib import Path

import pytest

from fedmerge.algorithms import METHODS, make_method
from fedmerge.data import SETTINGS

ROOT = Path(__file__).parent.parent


def test_readme_examples_print_what_they_say() -> None:
    found = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert found.attempted > 20
    assert found.failed == 0


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_python_blocks_of_the_docs_run(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    # Dataclasses look their module up, so the first block must be importable, as its reader's is.
    namespace: dict[str, object] = {}
    for block in blocks:
        named = re.match(r"# (\w+)\.py\n", block)
        if named:
            (tmp_path / f"{named[1]}.py").write_text(block)
            monkeypatch.syspath_prepend(tmp_path)
            exec(f"from {named[1]} import *", namespace)
        else:
            exec(block, namespace)
    if page == "adding_a_method.md":
        printed = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in printed] == [
            [name, str(t)] for name in ("fedavg", "fedavgm", "fedsam") for t in (1, 2, 3)
        ]
        method = make_method("my_methods.FedAvgM:beta=0.5")
        assert method.name == "fedavgm"


def test_readme_names_every_method_and_setting() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in [*METHODS, *SETTINGS, "natural"] if f"`{name}`" not in text]
    assert not missing


def test_every_heavy_dependency_is_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"report", "flower", "ray", "lora", "data", "track", "dev", "all"} <= set(
        project["optional-dependencies"]
    )
    named = " ".join(project["dependencies"])
    assert not re.search(r"matplotlib|jinja2|flwr|ray|transformers|datasets|mlflow", named)
