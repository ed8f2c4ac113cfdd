"""Who may import whom: every module has a layer, and imports from its own or lower ones only.

Read off the source; nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedmerge"
LAYERS = (
    ("errors", "rng", "params", "store", "values", "workers", "codec", "guard", "kernels", "loops"),
    ("merging", "pace", "sums", "sketches", "local", "ops", "stack", "network", "engine", "steps",
     "robust", "privacy", "peers", "kinds", "own"),
    ("soup", "tickets", "roster", "storage", "safety", "algorithms", "models", "data"),
    ("sim",),
    ("compare", "report", "flower", "deploy"),
    ("config", "comparison", "cli", "lines", "__main__"),
)  # fmt: skip
"""Modules and packages by layer. The package's own `__init__`, its public face, is exempt."""
HEAVY = {
    "matplotlib",
    "jinja2",
    "flwr",
    "dp_accounting",
    "cryptography",
    "ray",
    "numba",
    "peft",
    "transformers",
    "datasets",
    "mlflow",
    "tensorboard",
}
"""Of the extras: imported where they are used, so that fedmerge works without them."""
LEVEL = {name: level for level, names in enumerate(LAYERS, start=1) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def part(path: Path) -> str:
    """The module or package directly below `fedmerge` that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names of all that `tree`, in the file `path`, imports."""
    package = ("fedmerge", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` names a module; of `from .x import y` the module is x.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: not inside functions, not for the type checker only."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
            continue
        yield node
        todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def imported_parts(path: Path) -> set[str]:
    """Parts of fedmerge that a file imports, anywhere in it."""
    names = imports(path, ast.parse(path.read_text()))
    return {name.split(".")[1] for name in names if name.split(".")[0] == "fedmerge"}


def check(path: Path) -> list[str]:
    """What is wrong with the imports of a file, in words."""
    own = part(path)
    if own == "__init__":
        return []
    if own not in LEVEL:
        return [f"{path.name} is in no layer: add it to LAYERS"]
    # A name that is no module comes from the public face, which stands above all layers.
    return [
        f"{path.relative_to(SOURCE)} (layer {LEVEL[own]}) imports {name}"
        for name in imported_parts(path)
        if LEVEL.get(name, len(LAYERS) + 1) > LEVEL[own]
    ]


def test_every_layer_is_there() -> None:
    assert {part(path) for path in FILES} == {*LEVEL, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_from_its_own_layer_or_lower_ones(path: Path) -> None:
    assert check(path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    if path.name == "loops.py":  # itself imported where it is used
        return
    for node in module_level(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = {name.split(".")[0] for name in imports(path, node)}
            assert not roots & HEAVY


def test_the_imports_that_this_test_sees() -> None:
    """Relative, absolute and inside a function: none of them is missed."""
    assert {"errors", "store"} <= imported_parts(SOURCE / "compare" / "folder.py")
    assert "errors" in imported_parts(SOURCE / "data" / "clients.py")
    assert "algorithms" in imported_parts(SOURCE / "config.py")
    text = "from . import soup\nfrom ..sim import log\nimport fedmerge.cli\ndef f():\n import ray\n"
    found = set(imports(SOURCE / "sim" / "x.py", ast.parse(text)))
    assert found == {"fedmerge.sim.soup", "fedmerge.sim.log", "fedmerge.cli", "ray"}
    lazy = ast.parse(
        "if TYPE_CHECKING:\n import ray\ndef f():\n import ray\ntry:\n import flwr\n"
        "finally:\n pass\n"
    )
    assert [ast.unparse(n) for n in module_level(lazy) if isinstance(n, ast.Import)] == [
        "import flwr"
    ]
