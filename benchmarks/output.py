"""The machine in words, and figures as a table on the screen, JSON lines and Markdown.

It rounds for the eye only: the JSON lines hold the numbers as they were measured.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .measure import Figure, Spread

HEADINGS = ("what", "median (min to max)", "n", "of reference (min to max)", "note")


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, versions, threads."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "fedmerge": _version("fedmerge"),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cells(figure: Figure) -> list[str]:
    value = _spread(figure.spread, figure.unit) if figure.spread else "-"
    n = str(figure.spread.n) if figure.spread else ""
    ratio = _spread(figure.ratio, "") if figure.ratio else ""
    return [figure.what, value, n, ratio, figure.note]


def _spread(spread: Spread, unit: str) -> str:
    scale, shown = (1000, "ms") if unit == "s" and abs(spread.median) < 1 else (1, unit)
    median, least, most = (_number(scale * v) for v in (spread.median, spread.min, spread.max))
    between = "" if spread.n == 1 or least == most else f" ({least} to {most})"
    return f"{median} {shown}".strip() + between


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show(group: str, figures: Sequence[Figure], console: Console) -> None:
    """Print one group's figures as a table."""
    table = Table(title=group, title_justify="left")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if 1 <= i <= 3 else "left", overflow="fold")
    for case in dict.fromkeys(figure.case for figure in figures):
        table.add_section()
        if case:
            table.add_row(f"[bold]{escape(case)}[/bold]")
        for figure in figures:
            if figure.case == case:
                table.add_row(*(escape(cell) for cell in _cells(figure)))
    console.print(table)


def write(folder: Path, figures: Sequence[Figure], stem: str = "benchmarks") -> None:
    """Write `stem`.jsonl (the machine, then a line for each figure) and `stem`.md to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    described = machine()
    lines = [json.dumps({"machine": described}), *(json.dumps(f.to_json()) for f in figures)]
    (folder / f"{stem}.jsonl").write_text("\n".join(lines) + "\n")
    text = ["# Benchmarks", "", ", ".join(f"{k} {v}" for k, v in described.items()), ""]
    for group in dict.fromkeys(figure.group for figure in figures):
        headings = ("case", *HEADINGS)
        text += [f"## {group}", "", _line(headings), _line(["---"] * len(headings))]
        text += [_line([f.case, *_cells(f)]) for f in figures if f.group == group]
        text.append("")
    (folder / f"{stem}.md").write_text("\n".join(text))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
