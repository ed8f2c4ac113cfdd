"""The published rule against golden numbers of the reference implementation.

The default rule is checked in `test_merging`, against its own formulas.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core_fixture import make_updates
from fedmerge import kernels
from fedmerge.algorithms import FedMergePaper
from fedmerge.merging import merge, paper_row_step, paper_server_step
from fedmerge.soup import Soup

FILES = sorted((Path(__file__).parent / "data").glob("server_step_*.npz"))
Golden = dict[str, np.ndarray]


@pytest.fixture(params=["torch", "numba"], autouse=True)
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for the torch code and for the compiled loops."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv(kernels.VARIABLE, request.param)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Golden numbers of the reference implementation, in float64 where they are floating."""
    with np.load(request.param) as stored:
        held = {name: stored[name] for name in stored.files}
    return {
        name: value.astype(np.float64) if value.dtype.kind == "f" else value
        for name, value in held.items()
    }


def steps(golden: Golden) -> range:
    return range(sum(name.startswith("delta_") for name in golden))


def agree(made: Tensor, wanted: np.ndarray) -> None:
    """Equal to 1e-6, relative; the golden numbers passed through float32."""
    largest = float(np.abs(wanted).max())
    assert float(np.abs(made.numpy() - wanted).max()) <= 1e-6 * largest
    ulp = float(np.spacing(np.float32(largest)))
    np.testing.assert_allclose(made.numpy(), wanted, rtol=1e-6, atol=ulp)


def test_the_golden_files_are_there() -> None:
    assert len(FILES) == 2


def test_the_server_step_gives_the_golden_numbers(golden: Golden) -> None:
    models, logits = torch.from_numpy(golden["models"]), torch.from_numpy(golden["logits"])
    n_examples = torch.from_numpy(golden["n_examples"])
    for t in steps(golden):
        agree(merge(models, logits), golden[f"merged_{t}"])
        before = models.clone(), logits.clone()
        moved, turned = paper_server_step(
            models,
            logits,
            torch.from_numpy(golden[f"delta_{t}"]),
            n_examples,
            logit_step=float(golden["logit_step_cap"]),
            head_start=int(golden["last_layer_start"]),
        )
        assert torch.equal(models, before[0])
        assert torch.equal(logits, before[1])
        models, logits = moved, turned
        agree(logits, golden[f"logits_{t}"])
        agree(models, golden[f"models_{t}"])


def network(golden: Golden) -> nn.Module:
    """Linear layers of the shapes that the golden models have."""
    shapes = [ast.literal_eval(str(text)) for text in golden["shapes"]]
    layers = [nn.Linear(shape[1], shape[0]) for shape in shapes if len(shape) == 2]
    return nn.Sequential(*layers).double()


def test_the_method_behind_a_server_gives_the_golden_numbers(golden: Golden) -> None:
    d = len(golden["models"])
    method = FedMergePaper(d=d, logit_step=float(golden["logit_step_cap"]))
    soup = Soup(method, lambda: network(golden))
    assert soup.setup.layout.spans[-1][0] == int(golden["last_layer_start"])
    clients = [f"c{i:02d}" for i in range(len(golden["logits"]))]
    soup.join(clients)
    tensors, facts = soup.state()
    tensors["shared.models"] = torch.from_numpy(golden["models"])
    tensors["rows.logits"] = torch.from_numpy(golden["logits"])[:, None].clone()
    soup.restore(tensors, facts, "here")
    n_examples = torch.from_numpy(golden["n_examples"])
    for t in steps(golden):
        sent = soup.send(clients)
        agree(sent.message[:, 0], golden[f"merged_{t}"])
        delta = torch.from_numpy(golden[f"delta_{t}"])
        updates = make_updates(sent, delta, n_examples=n_examples)
        # In two parts: a cohort may come in any chunks.
        assert soup.fold(updates.take([0, 1, 2])) == []
        assert soup.fold(updates.take(range(3, len(clients)))) == []
        soup.commit()
        agree(soup.rows(clients)["logits"][:, 0], golden[f"logits_{t}"])
        agree(soup.shared["models"], golden[f"models_{t}"])


def row_step(**changes: Any) -> Tensor:
    values: dict[str, Any] = {
        "logits": torch.zeros(2, 2, dtype=torch.float64),
        "scores": torch.tensor([[1.0, -1.0], [0.5, -0.5]], dtype=torch.float64),
        "n_examples": torch.tensor([10, 30]),
        "logit_step": 0.01,
    }
    values |= changes
    return paper_row_step(
        values["logits"], values["scores"], values["n_examples"], logit_step=values["logit_step"]
    )


def test_the_row_step_by_hand() -> None:
    # Gradients w (s - mean): (.5, -.5), (.25, -.25), sum of magnitudes 1.5; shares .25 and .75.
    one = 0.01 * torch.tensor([[0.25 * 0.5], [0.75 * 0.25]], dtype=torch.float64) / 1.5
    repeats = int(0.01 // 0.00125) + 1  # the larger of the two moves by 0.00125 at a time
    step = -repeats * one * torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(row_step(), step, rtol=1e-12, atol=0)
    # Never so many repeats that a tiny share would be blown up without bound.
    tiny = row_step(logit_step=1e9)
    torch.testing.assert_close(tiny, step * 10001 / repeats, rtol=1e-12, atol=0)


def test_with_one_model_or_no_gradient_nothing_moves() -> None:
    logits = torch.full((2, 1), 0.3, dtype=torch.float64)
    assert torch.equal(row_step(logits=logits, scores=torch.ones(2, 1)), logits)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(row_step(scores=zero), zero)
