"""The folder of a run, or of a comparison: settings, log and results, each whole at every instant.

It keeps plain JSON and arrays, and decides when a run may go on; it does not know what a run
computes, and the checkpoint inside belongs to the simulation.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError

if TYPE_CHECKING:
    import numpy as np

CONFIG = "config.json"
LOG = "log.jsonl"
RESULT = "result.json"
PROFILE = "profile.json"
WEIGHTS = "weights.npz"
CHECKPOINT = "checkpoint"
COMPARISON = "comparison.json"
LOCK = "lock"
FORMAT = 7
"""Of a comparison's folder."""
FREE = {"workers", "address", "track"}
"""Settings that no result depends on: a run may go on with others."""
OWN = FREE | {"method", "seed", "chosen", "evaluate_every", "execution", "threads"}
"""Settings in which runs that are compared with each other may differ."""


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write into it, before any work is spent.

    Raises:
        StateError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"fedmerge")
    except OSError as error:
        raise StateError(
            f"--out {folder} cannot be written ({error.strerror or error}); choose another folder"
        ) from error


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other comparisons out of `out`; the system lets go of it when this process ends.

    Raises:
        StateError: another process holds it.
    """
    with (out / LOCK).open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(
                f"another comparison is running in {out}; wait for its end, or choose another --out"
            ) from error
        except (ImportError, OSError):  # a system, or a file system, without locks
            pass
        yield


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder that holds a run with other settings; an empty folder is fine.

    Raises:
        StateError: the settings differ (the text names them), or cannot be read.
    """
    held = [name for name in (CONFIG, LOG, RESULT, CHECKPOINT) if (folder / name).exists()]
    again = f"remove {', '.join(held)} there to run it again, or choose another --out"
    stored = read_json(folder / CONFIG, again)
    if stored is None:
        if held:
            raise StateError(f"{folder} holds {held[0]} but no {CONFIG}; {again}")
        return
    differing = _differing(stored, config, {*stored, *config} - FREE)
    if differing:
        raise StateError(
            f"{folder} holds a run with other settings: {differing}; choose another --out"
        )


def check_beside(out: Path, configs: Iterable[Mapping[str, Any]]) -> None:
    """Refuse runs that would be compared in `out` with runs that were trained in another way.

    Those of other data or another setting are not compared with them.

    Raises:
        StateError: such a run is there (the text names it and the settings), or cannot be read.
    """
    asked = {(config["data"], config["setting"]): config for config in configs}
    for path in sorted(out.glob(f"runs/*/{CONFIG}")):
        stored = read_json(path, f"remove {path.parent} to run it again") or {}
        config = asked.get((stored.get("data"), stored.get("setting")))
        if config is None:
            continue
        differing = _differing(stored, config, (stored.keys() & config.keys()) - OWN)
        if differing:
            raise StateError(
                f"{path.parent} holds a run with other settings: {differing}; methods are compared "
                "after equal training only, so choose another --out"
            )


def check_examples(out: Path, found: Mapping[tuple[Any, ...], Mapping[str, Any] | None]) -> None:
    """Refuse to go on in `out` with other examples than finished runs there had.

    Args:
        found: by data, setting and seed what tells the clients' examples from others.

    Raises:
        StateError: data have changed; the text names such a run.
    """
    asked = {key: now for key, now in found.items() if now is not None}
    for path in sorted(out.glob(f"runs/*/{RESULT}")):
        if not asked:
            return
        stored = read_json(path.parent / CONFIG) or {}
        key = tuple(stored.get(name) for name in ("data", "setting", "seed"))
        if key not in asked:
            continue
        then = (read_json(path) or {}).get("examples")
        if then is None:
            continue  # of a version that did not keep it
        if not _alike(then, asked.pop(key)):
            raise StateError(
                f"{path.parent} was run with other examples than {stored['data']} has now; methods "
                "are compared on the same data only, so choose another --out, or restore the data"
            )


def _alike(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two summaries of examples are the same, but for rounding."""
    if then.get("digest") != now["digest"] or then.keys() != now.keys():
        return False
    return all(
        math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6 * size)
        for name in ("sums", "sizes")
        for one, other, size in zip(then[name], now[name], now["sizes"], strict=True)
    )


def _differing(stored: Mapping[str, Any], config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """In what two runs differ, of `keys`: "" for nothing."""
    return "; ".join(
        f"{key} is {_show(stored, key)} there and {_show(config, key)} here"
        for key in sorted(keys)
        if (key in stored, stored.get(key)) != (key in config, config.get(key))
    )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Claim `folder` for the run that `config` describes."""
    write_json(folder / CONFIG, config)


def claim_comparison(out: Path, facts: Mapping[str, Any]) -> None:
    """Claim `out` for a comparison with these `facts`; raises as `check_facts`."""
    check_facts(out, facts)
    write_json(out / COMPARISON, {"format": FORMAT, **facts})


def check_facts(out: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder of a comparison that cannot go on with these `facts`.

    Raises:
        StateError: a comparison of another version, or one that was tuned in another way.
    """
    stored = check_comparison(out, facts)
    for key in ("trials", "tuning_seeds"):
        if stored is not None and stored.get(key) != facts[key]:
            raise StateError(
                f"{out} holds a comparison that was tuned in another way: {key} is "
                f"{_show(stored, key)} there and {_show(facts, key)} here; choose another --out"
            )


def check_comparison(out: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return what comparison.json in `out` holds; None for an empty folder or that of one run.

    Args:
        facts: of the comparison that is to go on there, or None.

    Raises:
        StateError: the comparison there is of another version, or comparison.json is damaged.
    """
    mend = "`fedmerge compare` with the options that made it says how to mend it"
    if facts is not None:
        text = json.dumps({"format": FORMAT, **facts})
        mend = f"if it was made with these options, write {text} into {out / COMPARISON}"
    stored = read_json(out / COMPARISON, mend)
    if stored is None:
        # The folder of one run may hold tables, made from its result.
        tables = (out / "results.jsonl").exists() and not (out / RESULT).is_file()
        if (out / "runs").exists() or tables:
            raise StateError(
                f"{out} holds a comparison of an older version of fedmerge, which cannot go on, or "
                f"its {COMPARISON} is lost; choose another --out, or the version that made it, or "
                f"{mend}"
            )
    elif stored.get("format") != FORMAT:
        raise StateError(
            f"{out} holds a comparison in format {_show(stored, 'format')}, and this version of "
            f"fedmerge writes {FORMAT}; choose another --out, or the version that made it"
        )
    return stored


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of the finished run in `folder`, or None while it is not finished."""
    return read_json(folder / RESULT)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the result, which marks the run as finished."""
    write_json(folder / RESULT, result)


def write_log(folder: Path, rounds: Iterable[Mapping[str, Any]]) -> None:
    """Replace the log by `rounds`: one line for each, none cut in half, none twice."""
    write_lines(folder / LOG, rounds)


def append_log(folder: Path, log: Mapping[str, Any]) -> None:
    """Add one round; a line that a kill cuts in half is repaired by `write_log` on resuming."""
    with (folder / LOG).open("ab") as file:
        file.write(_line(log).encode())


def settle_log(folder: Path) -> None:
    """Make the log survive a power cut, before a result says that the run is finished."""
    with (folder / LOG).open("ab") as file:
        os.fsync(file.fileno())


def read_json(
    path: Path, advice: str = "remove it or choose another --out"
) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None where there is no such file.

    Raises:
        StateError: the file cannot be read, or does not hold a JSON object: then `advice` is given.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise StateError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise StateError(f"{path} is damaged (not an object); {advice}")
    return value


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by `values`, each a line of JSON, whole or not at all."""
    write_bytes(path, "".join(map(_line, values)).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value` as JSON, whole or not at all."""
    write_bytes(path, _line(value).encode())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Replace `path` by `arrays` in an npz file, whole or not at all."""
    import numpy as np

    buffer = io.BytesIO()
    save: Callable[..., None] = np.savez_compressed
    save(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all."""
    from ..store import write_atomic  # here, as it takes a second: reading needs no torch

    write_atomic(path, data)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Null for numbers that JSON cannot hold: the infinite loss of a run that diverged."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _show(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "missing"
