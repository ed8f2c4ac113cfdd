"""FedMerge: one merged model for each client, with merging weights learned by the server.

The default rule: rows move by an exponentiated-gradient step per block of layers, judged with the
client's own past contributions taken out of the models, and with the steps of clients whose updates
resemble theirs; where kinds of clients are plain, or go on learning the same, the rows of a kind
settle on models of its own. Where only some clients take part in a round, rows that start late
catch up at once, and a model goes as far as the round's clients use it. Where there is a model for
every client, those whom training helps on their validation data get one of their own. What clients
use is merged from means of the models over rounds, where a round has few of a model's clients.
The setting is that of Chen, Zhou, Long, Jiang and Zhang, "FedMerge", AAAI 2026; the published rule
is in `fedmerge_paper`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kinds import SETTLING, homes, settled
from ..merging import FLOOR, block_scores, eg_row_step, merge_rows, merging_weights
from ..own import NEW, help_of, recent, share_of, towards_own
from ..pace import agreement, ahead, averaged, bounded, mean_steps, model_pace, wanted
from ..peers import Peers, centred, drawn, likeness, no_peers, remembered, renewed
from ..rng import torch_generator
from ..sketches import Sketch, from_units, in_units
from ..sums import ModelSum
from .base import Algorithm, Cost, Fold, Local, Setup, Tensors, Updates
from .trainer import SURE, Trainer, fine_tuned_while_it_helps

MOST_ROUNDS_MISSED = 5
"""A row that was away is stepped as if for the rounds it missed, up to this many."""
MOST_ROUNDS_LATE = 10
"""A row whose first round is this one or later takes a first step as long as the cap would let it
step in all the rounds before; one that comes a little late, the square of its share of that."""
PEERS = "peers."
"""How their tables are called in the shared state."""
SETTLED = "settled"
"""How far kinds should settle, there: () float64 from 0 to 1."""
HELPED = "helped"
"""What training at the clients has done for their validation data of late, there: () float64,
`own.recent`; where clients are asked for it."""
DOUBT = 4.0
"""How many standard errors more a client asks of its fine-tuning for each unit by which training
harms all: its own validation data are few, what all clients say is known better."""
HEADING = "heading"
"""Which way each model goes, there: (b, d, sketch), the `own.recent` of its steps."""
AHEAD = "ahead"
"""By how much further it goes for that, there: (d,) float64, `pace.ahead`."""
MEANS = "means"
"""The models that clients use, there: `pace.averaged`."""
PEAK = "peak"
"""Most that the updates of like clients have had in common in a round, there: () float64, infinite
once that has faded."""


@dataclass(frozen=True)
class FedMerge(Algorithm):
    """FedMerge with the default rule.

    Attributes:
        d: number of global models; None: 12, or one per client if there are fewer clients.
        init_noise: spread of the initial models about one random model, in its standard deviations.
        cap: most that a log-weight moves in a round, in nats.
        horizon: participations after which a client's steps begin to shrink.
        leave_one_out: judge models without what the client itself put into them; None: if there
            are more clients than models. Else each may have a model of its own, and be right.
            `resolve` puts in the number of clients, as a simulation does.
        sketch: numbers kept per block, client and model for that; the server keeps
            m * d * b * sketch 16-bit numbers for m clients (and a few of 8 bits for `peers`).
        peers: clients last seen whose updates' sketches and rows are kept for others to learn from;
            0: rows learn from their own clients alone, nothing settles, models go no further than
            the mean, and there are no means over rounds.
        pull: how much, in steps of a peer whose update is the same.
        settle: how far rows go in a round at most, home with their kind or, for each round missed,
            to a model of their own; 0 for never.
        extrapolate: most times the mean of its clients' updates that a model goes, as far as
            training helps them or its rounds agree; 1 for never further than the mean.
        average: whether clients use a mean of each model over rounds where a round has few of its
            clients; trained is the model itself.
        finetune: epochs of local training before the model is used, at three tenths of the run's
            learning rate and up to four times as many while the validation loss falls, by clients
            for which it falls beyond chance; 0 for none. They change what is evaluated as `merged`,
            never what is sent back.
    """

    name: ClassVar[str] = "fedmerge"
    streams: ClassVar[bool] = True
    sends_by: ClassVar[tuple[str, ...] | None] = ("logits", "count")
    d: int | None = None
    init_noise: float = 0.3
    cap: float = 0.1
    horizon: int = 60
    leave_one_out: bool | None = None
    sketch: int = 256
    peers: int = 256
    pull: float = 20.0
    settle: float = 0.5
    extrapolate: float = 3.0
    average: bool = True
    finetune: int = 0

    def __post_init__(self) -> None:
        self._need(d=1, init_noise=1e-9, cap=1e-9, horizon=1, sketch=1)
        self._need(peers=0, pull=0, settle=0, extrapolate=1, finetune=0)
        if self.settle > 1:
            raise ConfigError(f"{self.name}: settle = {self.settle:g}: wanted 0 to 1")

    def resolve(self, n_clients: int | None) -> Self:
        made = super().resolve(n_clients)
        d = made.d or min(12, n_clients or 12)
        out = made.leave_one_out
        if out is None and n_clients is not None:
            out = n_clients > d
        return replace(made, d=d, leave_one_out=out)

    @property
    def _leaves_out(self) -> bool:
        return self.leave_one_out is not False

    @property
    def _may_own(self) -> bool:
        """Whether rows may go to a model of their own each, by what training does for them."""
        return self.leave_one_out is False and self.peers > 0 and self.settle > 0

    @property
    def _asks(self) -> bool:
        """Whether clients say what training does for them."""
        return self._may_own or self._extrapolates

    @property
    def _extrapolates(self) -> bool:
        # One model is that of FedAvg, to the bit.
        return self.d != 1 and self.peers > 0 and self.extrapolate > 1

    @property
    def _averages(self) -> bool:
        return self.d != 1 and self.peers > 0 and self.average

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        d = self.d or 12
        b = len(setup.layout.blocks)
        sketch = 4 * self.sketch  # bytes
        known = min(self.peers, n_clients) * b * (2 * sketch + 16 * d + 8)
        known += d * (b * sketch + 8) * self._extrapolates
        own, past = 2 * self.sketch + 4, self.sketch + 4
        client = b * d * (8 + own * self._leaves_out) + b * past * bool(self.peers)
        said = 8 * self._asks
        row = setup.layout.n_bytes
        return Cost(
            up=1 + said / row,
            server=d * (1 + self._averages) + known / row,
            server_per_client=(client + said) / row,
        )

    def shared(self, setup: Setup) -> Tensors:
        centre = setup.initial(0)
        n, d = setup.layout.n_params, self.d or 12
        models = centre.repeat(d, 1)
        if d > 1:
            # Equal models would leave the rows without a gradient for ever.
            draw = torch_generator(setup.seed, "spread")
            noise = torch.randn(d, n, generator=draw, dtype=torch.float64).to(models.dtype)
            spread = centre[:n].std() if n > 1 else centre.new_zeros(())
            # Parameters all equal have no scale of their own.
            models[:, :n] += self.init_noise * (spread if spread > 0 else 1.0) * noise
        if not self.peers:
            return {"models": models}
        b = len(setup.layout.blocks)
        made = {"models": models, **_named(no_peers(b, d, self.sketch))}
        made |= {SETTLED: _number(0.0), PEAK: _number(0.0)}
        if self._asks:
            made[HELPED] = _number(0.0)
        if self._averages:
            made[MEANS] = models[:0]
        if self._extrapolates:
            made[HEADING] = torch.zeros(b, d, self.sketch)
            made[AHEAD] = torch.zeros(d, dtype=torch.float64)
        return made

    def rows(self, setup: Setup, k: int) -> Tensors:
        b, d = len(setup.layout.blocks), self.d or 12
        made = {
            "logits": torch.zeros(k, b, d, dtype=torch.float64),
            "last": torch.full((k,), -1, dtype=torch.int64),
            "count": torch.zeros(k, dtype=torch.int64),
        }
        if self._leaves_out:
            made["own"] = torch.zeros(k, b, d, self.sketch, dtype=torch.int16)
            made["unit"] = torch.zeros(k, b, d)  # of the numbers in `own`
        if self.peers:
            made["place"] = torch.zeros(k, dtype=torch.int64)
            made["past"] = torch.zeros(k, b, self.sketch, dtype=torch.int8)
            made["past_unit"] = torch.zeros(k, b)
        if self._may_own:
            made["helped"] = torch.zeros(k, dtype=torch.float64)
        return made

    def weights(self, setup: Setup, rows: Tensors) -> Tensor:
        return merging_weights(rows["logits"])

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return merge_rows(shared["models"], self.weights(setup, rows), setup.layout)[:, None]

    def send_into(self, setup: Setup, shared: Tensors, rows: Tensors, out: Tensor) -> Tensor:
        weights = self.weights(setup, rows)
        return merge_rows(shared["models"], weights, setup.layout, out[:, 0])[:, None]

    def used(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return merge_rows(self.mixed(shared), self.weights(setup, rows), setup.layout)[:, None]

    def told(self, shared: Tensors, k: int) -> Tensors:
        # Only where clients ask themselves whether to train further.
        return {HELPED: shared[HELPED].expand(k)} if self.finetune and self._asks else {}

    def mixed(self, shared: Tensors) -> Tensor:
        means = shared.get(MEANS, shared["models"])
        return means if len(means) else shared["models"]

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start = message[:, 0]
        end, steps = trainer.fit(start)
        said: Tensors = {}
        if self._asks:
            said["help"] = _help(start, end, trainer)
        return Local(setup.layout.update(start, end), steps, memory, end, said)

    def fits(self, shared: Tensors, extra: Tensors) -> bool:
        # A client need not say how much its training has helped it.
        said = extra.get("help")
        if said is None:
            return True
        return said.dtype == torch.float64 and not said.ndim and abs(said.item()) <= 1

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        helped = memory.get(HELPED, torch.zeros(len(message), dtype=torch.float64))
        sure = SURE - DOUBT * helped  # below 0 any lower loss will do
        return fine_tuned_while_it_helps(message[:, 0], self.finetune, trainer, sure)

    def _missed(self, rows: Tensors, version: int) -> Tensor:
        missed = (version - rows["last"]).clamp(1, MOST_ROUNDS_MISSED)
        return torch.where(rows["last"] < 0, 1, missed)

    def _pace(self, rows: Tensors, version: int) -> Tensor:
        missed = self._missed(rows, version)
        return missed * (self.horizon / (rows["count"] + 1)).clamp(max=1.0) ** 2

    def _least(self, rows: Tensors, version: int) -> Tensor:
        """How long a row's step is at least, (k,) in nats: those that start late catch up.

        Where few clients take part in a round, rows that wait for the models to differ have no time
        left: after a late first step they and the models differ at once. Not without peers: the
        noise that hides a row's step would have to be as long.
        """
        late = min(1.0, version / MOST_ROUNDS_LATE) ** 2 * MOST_ROUNDS_LATE * bool(self.peers)
        return self.cap * late * (rows["count"] == 0).double()

    def reach(self, rows: Tensors, version: int) -> Tensor:
        paced = self.cap * self._pace(rows, version).double()
        return torch.maximum(paced, self._least(rows, version))

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: Updates,
        fold: Fold,
        version: int,
    ) -> None:
        if fold.sum is None:
            fold.sum = ModelSum.for_layout(setup.layout, len(shared["models"]))
        scores = block_scores(updates.delta, shared["models"], setup.layout.spans)
        part: Tensors = {"count": rows["count"] + 1}
        if self._leaves_out or self.peers:
            sketch = Sketch.of(setup.layout.spans, self.sketch, setup.seed)
            part["sketch"] = sketch(updates.delta).float()
        if self._leaves_out:
            part["own"] = from_units(rows["own"], rows["unit"])
            scores += torch.einsum("kbs,kbds->kbd", part["sketch"].double(), part["own"].double())
        pace = self._pace(rows, version)
        length = updates.lr * updates.steps
        least = self._least(rows, version)
        logits = eg_row_step(
            rows["logits"], scores, length, pace.double(), cap=self.cap, least=least
        )
        if self.peers:
            part["place"] = rows["place"]
            before = merging_weights(rows["logits"]).clamp_min(FLOOR).log()
            part["step"] = centred(logits - before)
            past = from_units(rows["past"], rows["past_unit"])
            part["past"] = remembered(past, part["sketch"], rows["count"])
            logits = self._with_peers(shared, rows, part, logits)
        if self._asks:
            nothing = torch.zeros(len(updates), dtype=torch.float64)
            part["said"] = updates.extra.get("help", nothing)
        if self._may_own:
            part["helped"] = recent(rows["helped"], part["said"], rows["count"] == 0)
            if version >= NEW:
                missed = self._missed(rows, version)
                share = share_of(part["helped"], shared[HELPED], part["count"], missed, self.settle)
                logits = towards_own(logits, share, rows["place"], _peers(shared))
        part["logits"] = logits
        share = merging_weights(logits) * updates.n_examples.double()[:, None, None]
        fold.sum.add(share, updates.delta)
        fold.parts.append({"share": share, **part})

    def _with_peers(self, shared: Tensors, rows: Tensors, part: Tensors, logits: Tensor) -> Tensor:
        """The rows (k, b, d) after their own step, moved by what the peers' show."""
        known, place = _peers(shared), rows["place"]
        if not len(known["place"]):
            return logits
        logits = drawn(logits, likeness(part["sketch"], place, known), known, self.pull)
        share = self.settle * float(shared[SETTLED])
        if not share:
            return logits
        # What leads astray once a kind has learned what it shares is a late step's noise: rows that
        # have taken part less often go home and make their own steps as well.
        late = (rows["count"] >= SETTLING)[:, None, None]
        start = torch.where(late, rows["logits"].double(), logits)
        return settled(logits, start, part["past"], place, known, share)

    def commit(
        self, setup: Setup, shared: Tensors, fold: Fold, version: int
    ) -> tuple[Tensors, Tensors]:
        if fold.sum is None:
            return shared, {}
        count = fold.gathered("count")
        rows = {
            "logits": fold.gathered("logits"),
            "count": count,
            "last": torch.full_like(count, version),
        }
        made = dict(shared)
        if self.peers:
            known = _peers(shared)
            others = ~torch.isin(known["place"], fold.gathered("place"))
            weights = merging_weights(rows["logits"]), merging_weights(known["logits"][others])
            pace = model_pace(*weights)
            order = fold.gathered("place").argsort()  # in whatever order clients came
            if self._asks:
                said = fold.gathered("said")[order].mean()
                made[HELPED] = recent(shared[HELPED], said, version == 0)
            if self._extrapolates:
                share, updates = fold.gathered("share")[order], fold.gathered("sketch")[order]
                step, heading = mean_steps(share, updates), shared[HEADING].double()
                agrees = agreement(step, heading)
                made[AHEAD] = ahead(shared[AHEAD], agrees)
                made[HEADING] = recent(heading, step, version == 0).float()
                wish = wanted(made[HELPED], made[AHEAD], agrees)
                pace = pace * bounded(share, updates, step, wish, self.extrapolate)
            fold.sum.pace = pace
        if self._leaves_out:
            taken = fold.gathered("share") / fold.sum.mass.clamp_min(1e-300)
            taken = (taken if fold.sum.pace is None else taken * fold.sum.pace).float()
            gained = fold.gathered("sketch")[:, :, None]
            own = fold.gathered("own").addcmul_(taken[..., None], gained)
            rows["own"], rows["unit"] = in_units(own)
        made["models"] = fold.sum.step(shared["models"])
        if self._averages:
            means = self.mixed(shared)
            made[MEANS] = averaged(means, made["models"], *weights, setup.layout.spans)
        if self.peers:
            rows["place"] = fold.gathered("place")
            rows["past"], rows["past_unit"] = in_units(fold.gathered("past"), torch.int8)
            seen = {name: fold.gathered(name) for name in ("place", "sketch", "step", "past")}
            seen["logits"] = centred(rows["logits"])
            seen["home"] = torch.full(rows["logits"].shape[:2], -1)
            known = renewed(_peers(shared), seen, self.peers)
            far, peak = 0.0, 0.0
            if self.settle:
                far, peak, known["home"] = homes(known, version + 1, float(shared[PEAK]))
            if self._may_own:
                rows["helped"] = fold.gathered("helped")
            made |= {SETTLED: _number(far), PEAK: _number(peak), **_named(known)}
        return made, rows


def _help(start: Tensor, end: Tensor, trainer: Trainer) -> Tensor:
    """(k,) float64: what training from start to end has done for the clients' validation data.

    Answers are counted, not their losses: at a high learning rate training makes a model surer than
    it should be, and its loss is no lower where its answers are better.
    """
    before, after = (trainer.wrong(model, "validation") for model in (start, end))
    if not before.isnan().all():
        return help_of(before, after, 1.0)
    before, after = (trainer.loss(model, "validation") for model in (start, end))
    return help_of(before, after, 1e-3)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _named(known: Peers) -> Tensors:
    return {f"{PEERS}{name}": table for name, table in known.items()}


def _peers(shared: Tensors) -> Peers:
    return {n.removeprefix(PEERS): t for n, t in shared.items() if n.startswith(PEERS)}
