"""What a method's client side has at hand: the trainer of k clients, and training before use.

Methods are in the files beside this one; what carries a trainer out is the simulation's, or a
deployment's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..local import Mixture, Proximal, Weighing


class Step(Protocol):
    """One mini-batch for each of k clients: what an SGD step of a method's own is made from.

    Clients with fewer steps than others have finished in the later ones; they have no gradient.
    """

    @property
    def active(self) -> Tensor:
        """(k,) bool: which clients still have a batch."""

    @property
    def real(self) -> Tensor:
        """(k, B) bool: which places of the batch hold an example."""

    @property
    def inputs(self) -> Tensor:
        """(k, B, *features) inputs of the batch; those of places that are not real mean nothing."""

    def take(self, table: Tensor) -> Tensor:
        """(k, B) of the batch's examples from a table (k, n) over the training examples."""

    def losses(self, rows: Tensor) -> Tensor:
        """(k, B) loss of each example under rows (k, P); 0 at places that are not real.

        For rows (k, r, P), r models of each client, (k, r, B).
        """

    def gradient(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """(k, n_params) gradient at rows (k, P) of the mean over the batch of weight * loss.

        `weight` (k, B) is 1 if None. Zero for clients that are not active. For rows (k, r, P) and
        weight (k, r, B), (k, r, n_params).
        """

    def descend(
        self, rows: Tensor, lr: float | Tensor, weight: Tensor | Weighing | None = None
    ) -> None:
        """Take the step rows -= lr * gradient(rows, weight) in place, which costs less.

        `lr` is for all, or (k, 1); `rows` have no gaps in memory. `weight` may be a function that
        makes it of `losses(rows)`, so that these are not computed apart.
        """


class Trainer(Protocol):
    """Local training on the data of k clients, whoever carries it out."""

    @property
    def n_examples(self) -> Tensor:
        """(k,) int64 training examples."""

    @property
    def lr(self) -> float:
        """SGD learning rate of the run, for a rule of one's own, which takes plain steps.

        Raises ConfigError where the run's SGD has momentum, weight decay or clipping: it would be
        ignored.
        """

    def fit(
        self,
        rows: Tensor,
        *,
        epochs: int | None = None,
        proximal: Proximal | None = None,
        only: tuple[int, int] | None = None,
        lr_scale: float = 1.0,
        purpose: str = "train",
    ) -> tuple[Tensor, Tensor]:
        """Train from rows (k, P); return end rows (k, P) and steps (k,).

        `epochs` None means those of the run. `only` (start, stop) trains these parameters and
        leaves the others as they are. `lr_scale` is the learning rate in those of the run.
        `purpose` names the draws of the batches.
        """

    def steps(self, *, epochs: int | None = None, purpose: str = "train") -> Iterator[Step]:
        """The batches that `fit` would take, one step after another, for a rule of one's own."""

    def loss(self, rows: Tensor, split: str = "train") -> Tensor:
        """(k,) mean loss of rows (k, P) on a split of the clients' data, float64."""

    def wrong(self, rows: Tensor, split: str = "train") -> Tensor:
        """(k,) float64: how many wrong answers rows (k, P) give on a split of the clients' data;
        NaN without examples, and for regression."""

    def losses(self, rows: Tensor) -> Tensor:
        """(k, n) loss of each training example under rows (k, P); 0 beyond a client's last one.

        For rows (k, r, P), r models of each client, (k, r, n).
        """

    def gain(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """By how much rows `after` (k, P) lower the loss of `before`: (k,) mean over the validation
        examples, and (k,) its standard error, float64.

        NaN where it is not known: no examples, one only for the error, or models that diverged.
        """


@dataclass
class Duty:
    """How much each model of a mixture answers for an example: its share times its likelihood, of
    those of all. A `Weighing`, which keeps what it has made.

    Attributes:
        log_shares: (k, r, B). made: (k, r, B), what was made last.
    """

    log_shares: Tensor
    made: Tensor = field(init=False)

    def __call__(self, losses: Tensor) -> Tensor:
        self.made = torch.softmax(self.log_shares - losses, dim=1)
        return self.made


def tune(model: Tensor | Mixture, trainer: Trainer) -> Tensor | Mixture:
    """The clients' models after one epoch of their own; a mixture keeps its shares.

    The models of a mixture step down the gradient of its loss: each by its responsibility for an
    example, that is its share times its likelihood, of those of all.
    """
    if not isinstance(model, Mixture):
        return trainer.fit(model, epochs=1, purpose="tuned")[0]
    rows = model.rows.clone()
    for step in trainer.steps(epochs=1, purpose="tuned"):
        step.descend(rows, trainer.lr, Duty(model.log_shares(step.inputs).transpose(1, 2)))
    return replace(model, rows=rows)


def fine_tuned(start: Tensor, epochs: int, trainer: Trainer) -> Tensor:
    """Models (k, P) after some epochs at the clients before they are used; as they are for none."""
    return trainer.fit(start, epochs=epochs, purpose="finetune")[0] if epochs else start


SURE = 1.0
"""By how many standard errors fine-tuning has to lower a validation loss to have helped: less would
often be chance, with some tens of examples, and choosing by chance costs more than it wins."""
GENTLY = 0.3
"""Learning rate of fine-tuning that is to help, in those of the run: a model that is nearly right
is to be moved a little, and a rate that suits most clients is too high for some."""


def fine_tuned_while_it_helps(
    start: Tensor, epochs: int, trainer: Trainer, sure: float | Tensor = SURE
) -> Tensor:
    """Models (k, P) fine-tuned at the clients whose validation loss that lowers beyond chance.

    It goes on, to twice and to four times as many epochs, as long as the loss falls, by however
    little. Where it has not helped in the end, the model is as it was.

    Args:
        epochs: of the first stage; 0 for no fine-tuning.
        sure: by how many standard errors, for all or (k,), the loss has to be lower.
    """
    if not epochs:
        return start
    best = end = start
    going = torch.ones(len(start), dtype=torch.bool)
    for times, purpose in ((1, "finetune"), (1, "finetune to 2"), (2, "finetune to 4")):
        last = end
        end = trainer.fit(last, epochs=times * epochs, lr_scale=GENTLY, purpose=purpose)[0]
        # NaN where it is not known, or a model has diverged: that is above nothing.
        going = going & (trainer.gain(last, end)[0] > 0)
        if not going.any():
            break
        best = torch.where(going[:, None], end, best)
    mean, error = trainer.gain(start, best)
    return torch.where((mean > sure * error)[:, None], best, start)
