"""States on disk: whole after a kill at any instant, and damage told in one line.

What is in a state, and resuming from one, is tested with the server and the simulation.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fedmerge.errors import StateError
from fedmerge.store import INDEX, has_state, load_state, save_state, write_atomic

SAVE = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from fedmerge.errors import StateError
from fedmerge.store import load_state, save_state
folder = Path(sys.argv[1])
def save(i):
    rows = torch.full((20_000,), float(i), dtype=torch.float64)
    save_state(folder, {"rows": rows}, {"round": i, "history": [i] * 500})
"""


def script(body: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", SAVE + textwrap.dedent(body), str(folder)]


def state(i: int) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    return {"rows": torch.full((50,), float(i)), "n": torch.tensor([i])}, {"round": i, "x": 0.1}


def check_refused(folder: Path, text: str) -> None:
    with pytest.raises(StateError, match=text) as caught:
        load_state(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_state(tmp_path / "state", *state(1))
    return tmp_path / "state"


def test_what_was_saved_is_loaded_to_the_bit(folder: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        "wide": torch.arange(4).expand(3, 4),
        "none": torch.zeros(0, 2),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    facts = {"round": 3, "third": 1 / 3, "names": ["é", "b"], "empty": {}, "nothing": None}
    save_state(folder, tensors, facts)
    loaded, found = load_state(folder)
    assert found == facts
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].contiguous().numpy().tobytes() == value.contiguous().numpy().tobytes()


def test_a_newer_state_replaces_the_older_and_leaves_nothing_behind(folder: Path) -> None:
    (folder / ".tensors-abc.safetensors.xyz").write_bytes(b"left by a save that was killed")
    (folder / f".{INDEX}.xyz").write_bytes(b"the same")
    save_state(folder, *state(2))
    assert load_state(folder)[1]["round"] == 2
    assert len(list(folder.iterdir())) == 2
    save_state(folder, *state(2))
    assert load_state(folder)[1]["round"] == 2
    assert len(list(folder.iterdir())) == 2


KILL = """
seen, halfway = set(), 0
for attempt in range(60):
    child = os.fork()
    if not child:
        for i in range(1_000_000):
            save(attempt * 1_000_000 + i)
    while attempt == 0 and not (folder / "state.json").exists():
        time.sleep(0.01)
    time.sleep(random.Random(attempt).uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors, facts = load_state(folder)
    assert tensors["rows"].eq(facts["round"]).all() and facts["history"] == [facts["round"]] * 500
    assert facts["round"] >= max(seen, default=0)
    seen.add(facts["round"])
    halfway += len(list(folder.iterdir())) > 2
save(-1)
print(len(seen), halfway, len(list(folder.iterdir())))
"""


def test_a_kill_at_any_instant_leaves_one_of_the_saved_states(tmp_path: Path) -> None:
    done = subprocess.run(script(KILL, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen, halfway, left = map(int, done.stdout.split())
    # The kills came at many instants, some in the middle of a save; and nothing piles up.
    assert seen > 5
    assert halfway > 5
    assert left == 2


def test_a_full_disk_keeps_the_old_state_and_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    body = """
    save(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(2)
    except StateError as error:
        print(error)
    """
    done = subprocess.run(script(body, folder), capture_output=True, text=True, check=True)
    assert "cannot be written: File too large" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    tensors, facts = load_state(folder)
    assert facts["round"] == 1
    assert tensors["rows"].eq(1).all()
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateError, match="cannot be written: ") as caught:
        save_state(tmp_path / "file", *state(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(StateError, match="cannot be written: Is a directory"):
        write_atomic(tmp_path, b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_keeps_its_state(folder: Path) -> None:
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(StateError, match="Permission denied"):
            save_state(folder, *state(2))
    finally:
        folder.chmod(0o700)
    assert load_state(folder)[1]["round"] == 1


def test_a_missing_state_is_told(tmp_path: Path) -> None:
    assert not has_state(tmp_path)
    check_refused(tmp_path, "state.json cannot be read: No such file")


def test_missing_tensors_are_told(folder: Path) -> None:
    assert has_state(folder)
    next(folder.glob("*.safetensors")).unlink()
    check_refused(folder, "safetensors cannot be read: No such file.*restore it from a copy")


def test_truncated_files_are_told(folder: Path) -> None:
    for path in list(folder.iterdir()):
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            check_refused(folder, "is damaged.*restore it from a copy, or remove")
        path.write_bytes(whole)
    assert load_state(folder)[1] == state(1)[1]


def test_every_flipped_byte_is_noticed(folder: Path) -> None:
    for path in list(folder.iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), 1 if path.name == INDEX else 7):
            for bit in (1, 16):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
                # Either the damage is told, or it is outside of the text's meaning.
                with contextlib.suppress(StateError):
                    tensors, facts = load_state(folder)
                    assert facts == state(1)[1]
                    assert tensors["rows"].eq(1).all()
        path.write_bytes(whole)


def test_a_state_of_another_version_is_told(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"format": 1}))
    check_refused(folder, "has format 1, this version reads 2; use the version that wrote it")


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": 1}', "no json"])
def test_a_file_of_another_kind_is_told(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    check_refused(folder, r"state\.json is damaged")
