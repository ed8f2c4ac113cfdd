"""Client-level differential privacy: clipped updates, Gaussian noise, and what they add up to.

It protects what one client's data do to the models that others receive. It does not hide the update
from the server, which learns the client's row from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, MissingExtraError
from .sums import ModelSum


@dataclass(frozen=True)
class Privacy:
    """How much is clipped and how much noise is added in a round.

    A client gives, to all models together, the parts w_ibj delta_ib of an update of length `clip`
    at most; as the weights of a block sum to 1, adding or leaving out one client changes the sum
    over the cohort by at most `clip`, and the sum of the weights by at most the root of the number
    of blocks. Both get Gaussian noise of `noise` times that, as two mechanisms of one round. Every
    client counts as one example, since sizes would have to be protected as well.

    Attributes:
        clip: longest update, in parameter units. noise: multiplier of the models' noise.
        row_noise: multiplier of the noise on a row's step; 0 where rows are never shown to others.
        delta: probability with which epsilon may fail; below 1 / number of clients.
        seed: of the noise; None draws it from the operating system, as it must be in earnest.
    """

    clip: float
    noise: float
    row_noise: float = 0.0
    delta: float = 1e-5
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("clip", 0 < self.clip < math.inf, "a positive number"),
            ("noise", 0 < self.noise < math.inf, "a positive number"),
            ("row_noise", 0 <= self.row_noise < math.inf, "0 or more"),
            ("delta", 0 < self.delta < 1, "more than 0, less than 1"),
        ):
            if not good:
                raise ConfigError(f"{name} = {getattr(self, name)}: wanted {wanted}")

    def generator(self, *names: int) -> torch.Generator:
        """A source of noise; of its own for each `names` if there is a seed."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()  # from the operating system
            return generator
        from .rng import derive

        return generator.manual_seed(derive(self.seed, "noise", *names))

    def clipped(self, delta: Tensor) -> Tensor:
        """Updates (k, P), each scaled down to the length `clip` if it is longer."""
        length = torch.linalg.vector_norm(delta.double(), dim=1, keepdim=True)
        scale = (self.clip / length.clamp_min(1e-300)).clamp(max=1.0)
        clipped: Tensor = (delta.double() * scale).to(delta.dtype)
        return clipped

    def epsilon(self, rounds: int) -> float:
        """Epsilon at `delta` after a client has taken part in `rounds` rounds.

        By Renyi differential privacy (Mironov, 2017) with the accountant of dp-accounting; without
        amplification by sampling, so it holds whoever takes part.

        Raises:
            MissingExtraError: dp-accounting is not installed.
        """
        try:
            import dp_accounting
            from dp_accounting import rdp
        except ImportError as error:
            raise MissingExtraError("privacy") from error
        if not rounds:
            return 0.0
        each = [self.noise, self.noise] + ([self.row_noise] if self.row_noise else [])
        accountant = rdp.RdpAccountant()
        for multiplier in each:
            accountant.compose(dp_accounting.GaussianDpEvent(multiplier), rounds)
        return float(accountant.get_epsilon(self.delta))


@dataclass
class PrivateSum(ModelSum):
    """A `ModelSum` to which noise is added before it is used; updates must be clipped already."""

    privacy: Privacy | None = None
    round: int = 0

    def add_noise(self) -> None:
        """Add the round's noise, once; from then on the sums may be shown.

        A model with less weight than the noise may hide is given infinite weight, so that it stays.
        """
        if self.privacy is None:
            return
        draw = self.privacy.generator(self.round)
        scale = self.privacy.noise * self.privacy.clip
        self.total += scale * torch.randn(self.total.shape, generator=draw, dtype=torch.float64)
        spread = self.privacy.noise * math.sqrt(len(self.mass))
        mass = self.mass + spread * torch.randn(
            self.mass.shape, generator=draw, dtype=torch.float64
        )
        self.mass = torch.where(mass > spread, mass, math.inf)


def noisy_rows(logits: Tensor, reach: Tensor, privacy: Privacy, number: int) -> Tensor:
    """Log-weights (k, b, d) after Gaussian noise on the step that led to them.

    A step is at most `reach` (k,) for each of the b * d log-weights of a client, which bounds its
    length by reach times the root of b * d.
    """
    scale = privacy.row_noise * reach * math.sqrt(logits.shape[1] * logits.shape[2])
    draw = privacy.generator(number, 1)
    noise = torch.randn(logits.shape, generator=draw, dtype=torch.float64)
    return torch.log_softmax(logits + scale[:, None, None] * noise, dim=-1)
