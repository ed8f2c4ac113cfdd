"""The default rule, written literally and slowly from its formulas, in numpy and client by client.

It keeps what every client ever put into every model, in full, where the library keeps a sketch; a
client's updates so far it keeps in 8 bits for each number of a block, as the library does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations, permutations

import numpy as np

Row = np.ndarray


@dataclass
class RuleByHand:
    """Models (d, P), and per client id weights (b, d), own (d, P) and rounds taken part in."""

    models: Row
    spans: tuple[tuple[int, int], ...]
    cap: float = 0.1
    horizon: int = 60
    leave_one_out: bool = True
    pull: float = 20.0
    furthest: float = 0.2
    agreement: float = 0.2
    settle: float = 0.5
    extrapolate: float = 3.0
    round: int = 0
    weights: dict[str, Row] = field(default_factory=dict)
    own: dict[str, Row] = field(default_factory=dict)
    seen: dict[str, list[int]] = field(default_factory=dict)
    last: dict[str, tuple[Row, Row]] = field(default_factory=dict)  # update (P,), own step (b, d)
    past: dict[str, Row] = field(default_factory=dict)  # updates so far (P,), of later ones less
    kept: dict[str, Row] = field(default_factory=dict)  # the same, as it is kept till the next
    seen_past: dict[str, Row] = field(default_factory=dict)  # the same before this round
    plain: float = 0.0
    far: float = 0.0
    peak: float = 0.0
    helped: dict[str, float] = field(default_factory=dict)  # by its training, of late
    overall: float = 0.0
    means: Row | None = None  # (d, P), of the models over rounds
    heading: Row | None = None  # (d, P), of the models' mean updates
    ahead: list[float] = field(default_factory=list)
    kinds: list[tuple[list[str], list[int]]] = field(
        default_factory=list
    )  # members, homes by block

    def join(self, client: str) -> None:
        d = len(self.models)
        if client not in self.weights:
            self.weights[client] = np.full((len(self.spans), d), 1 / d)
            self.own[client] = np.zeros_like(self.models)
            self.seen[client] = []

    def merged(self, client: str) -> Row:
        """To be trained."""
        return self._merged(client, self.models)

    def used(self, client: str) -> Row:
        return self._merged(client, self.models if self.means is None else self.means)

    def _merged(self, client: str, models: Row) -> Row:
        self.join(client)
        made = np.zeros(models.shape[1])
        for b, (start, stop) in enumerate(self.spans):
            for j in range(len(models)):
                made[start:stop] += self.weights[client][b, j] * models[j, start:stop]
        return made

    def step(
        self,
        delta: dict[str, Row],
        n: dict[str, int],
        length: dict[str, float],
        said: dict[str, float] | None = None,
    ) -> None:
        """One round of the clients in `delta` (P,); length = learning rate times steps.

        `said` is what they say of their training.
        """
        stepped = {i: self._row(i, delta[i], length[i]) for i in delta}
        for i in delta:
            self.join(i)
            weight = min(1, 10 / (len(self.seen[i]) + 1)) ** 2
            self.past[i] = self.kept.get(i, 0) + weight * delta[i]
        drawn = {i: self._drawn(i, stepped[i], delta[i]) for i in delta}
        new = {i: self._settled(i, drawn[i]) for i in delta}
        said = said or dict.fromkeys(delta, 0.0)
        if not self.leave_one_out:
            for i in delta:
                before = self.helped.get(i, said[i])
                self.helped[i] = 0.7 * before + 0.3 * said[i]
            if self.round >= 16:
                own = self._own_models()
                new = {i: self._to_its_own(i, new[i], own) for i in delta}
        mean = float(np.mean([said[i] for i in delta]))
        self.overall = 0.7 * self.overall + 0.3 * mean if self.round else mean
        stride = self._stride(new, n, delta)
        before = {i: np.log(np.maximum(self.weights[i], 1e-6)) for i in delta}
        if self.means is None:
            self.means = self.models.copy()
        for b, (start, stop) in enumerate(self.spans):
            pace = self._pace(
                [row[b] for row in new.values()], b, [i for i in self.last if i not in delta]
            )
            for j in range(len(self.models)):
                total = sum(new[i][b, j] * n[i] for i in delta)
                for i in delta:
                    part = stride[j] * pace[j] * new[i][b, j] * n[i] / total * delta[i][start:stop]
                    self.models[j, start:stop] -= part
                    self.own[i][j, start:stop] += part
                here = sum(new[i][b, j] for i in delta)
                away = sum(self.weights[i][b, j] for i in self.last if i not in delta)
                way = (here / (here + away)) ** 0.5
                gap = self.models[j, start:stop] - self.means[j, start:stop]
                self.means[j, start:stop] += way * gap
        for i in delta:
            self.last[i] = (delta[i], np.log(stepped[i]) - before[i])
            self.weights[i] = new[i]
            self.seen[i].append(self.round)
            self.kept[i] = self._in_8_bits(self.past[i])
        self.round += 1
        self._tell_kinds()

    def _pace(self, cohort: list[Row], b: int, others: list[str]) -> Row:
        """How far each model goes in block b, given the new rows (d,) of the round's clients."""
        here = np.mean(cohort, axis=0)
        everywhere = np.mean(cohort + [self.weights[i][b] for i in others], axis=0)
        made: Row = np.minimum(here / everywhere, 1)
        return made

    def _stride(self, new: dict[str, Row], n: dict[str, int], delta: dict[str, Row]) -> list[float]:
        """How many times the mean of the round's updates each model goes."""
        made, means = [], np.zeros_like(self.models)
        self.ahead = self.ahead or [0.0] * len(self.models)
        for j in range(len(self.models)):
            lengths = 0.0
            for b, (start, stop) in enumerate(self.spans):
                total = sum(new[i][b, j] * n[i] for i in delta)
                for i in delta:
                    part, update = new[i][b, j] * n[i] / total, delta[i][start:stop]
                    lengths += part * float(update @ update)
                    means[j, start:stop] += part * update
            if self.heading is None:
                cosine = 0.0
            else:
                product = np.linalg.norm(means[j]) * np.linalg.norm(self.heading[j])
                cosine = float(means[j] @ self.heading[j] / product)
            self.ahead[j] = min(1.0, max(0.0, self.ahead[j] + cosine - 0.9))
            may = min(max(lengths / float(means[j] @ means[j]) / 2, 1.0), self.extrapolate)
            onward = min(1.0, max(0.0, 1 + 2 * cosine))
            made.append(min(may, 1 + max(0.0, 4 * self.overall * onward, self.ahead[j])))
        self.heading = means if self.heading is None else 0.7 * self.heading + 0.3 * means
        return made

    def _in_8_bits(self, row: Row) -> Row:
        made = row.copy()
        for start, stop in self.spans:
            unit = np.abs(row[start:stop]).max() / 127
            made[start:stop] = np.round(row[start:stop] / unit) * unit
        return made

    def _row(self, i: str, delta: Row, length: float) -> Row:
        self.join(i)
        made = np.empty_like(self.weights[i])
        for b, (start, stop) in enumerate(self.spans):
            w = self.weights[i][b]
            judged = self.models + (self.own[i] if self.leave_one_out else 0)
            score = np.array([delta[start:stop] @ model[start:stop] for model in judged])
            s = (score - w @ score) / length
            if np.abs(s).max() > self.cap:
                s = s * self.cap / np.abs(s).max()
            past = len(self.seen[i])
            missed = self.round - self.seen[i][-1] if past else 1
            s = s * min(missed, 5) * min(1, self.horizon / (past + 1)) ** 2
            late = self.cap * min(self.round, 10) ** 2 / 10
            if not past and np.abs(s).max() < late:
                s = s * late / np.abs(s).max()
            raised = np.log(np.maximum(w, 1e-6)) - s
            made[b] = np.exp(raised) / np.exp(raised).sum()
        return made

    def _drawn(self, i: str, row: Row, delta: Row) -> Row:
        """The row (b, d) of client i after those it resembles, of the rounds before, drew it."""
        made = row.copy()
        for b, (start, stop) in enumerate(self.spans):
            if not self.last:
                continue
            mean = np.mean([update[start:stop] for update, _ in self.last.values()], axis=0)
            mine = delta[start:stop] - mean
            along, away, total = np.zeros(len(self.models)), np.zeros(len(self.models)), 0.0
            logits = np.log(row[b]) - np.log(row[b]).mean()
            for k, (update, step) in self.last.items():
                if k == i:
                    continue
                theirs = update[start:stop] - mean
                cosine = mine @ theirs / (np.linalg.norm(mine) * np.linalg.norm(theirs) + 1e-30)
                alike = self.pull * max(cosine, 0) ** 4 / max(1, len(self.last) / 32)
                row_of_k = np.log(self.weights[k][b])
                along += alike * (step[b] - step[b].mean())
                away += alike * (row_of_k - row_of_k.mean() - logits)
                total += alike
            if np.abs(along).max() > self.furthest:
                along *= self.furthest / np.abs(along).max()
            raised = row[b] * np.exp(along + self.agreement * away / (1 + total))
            made[b] = raised / raised.sum()
        return made

    def _settled(self, i: str, row: Row) -> Row:
        """The row (b, d) of client i on its way home, if its kind has one."""
        if not self.kinds:
            return row
        mean = np.mean(list(self.seen_past.values()), axis=0)

        def cosine(one: Row, other: Row) -> float:
            a, b = one - mean, other - mean
            return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

        near = []
        for members, _ in self.kinds:
            others = [k for k in members if k != i]
            found = [cosine(self.past[i], self.seen_past[k]) for k in others]
            near.append(np.mean(found) if found else 0.0)
        if max(near) <= 0:
            return row
        start = self.weights[i] if len(self.seen[i]) >= 5 else row
        share = self.settle * self.far
        made = (1 - share) * start
        for b, model in enumerate(self.kinds[int(np.argmax(near))][1]):
            made[b, model] += share
        return made

    def _own_models(self) -> dict[str, list[int]]:
        """The model of each client by block, if there are as many, by the rows before the round."""
        names, d = list(self.last), len(self.models)
        if len(names) > d:
            return {}
        best = [
            max(
                permutations(range(d), len(names)),
                key=lambda p: sum(self.weights[i][b, j] for i, j in zip(names, p, strict=True)),
            )
            for b in range(len(self.spans))
        ]
        return {i: [models[at] for models in best] for at, i in enumerate(names)}

    def _to_its_own(self, i: str, row: Row, own: dict[str, list[int]]) -> Row:
        """The row (b, d) of client i on its way to a model of its own, as far as that helps."""
        if i not in own:
            return row
        often = len(self.seen[i]) + 1
        enough = 0.05 * max(1, 10 / often) ** 2
        judged = (self.helped[i] + self.overall) / 2
        share = self.settle * min(1, max(0, (judged - enough) / 0.25))
        missed = min(self.round - self.seen[i][-1], 5)
        share = 1 - (1 - share) ** missed
        made = (1 - share) * row
        for b, model in enumerate(own[i]):
            made[b, model] += share
        return made

    def _tell_kinds(self) -> None:
        """Who is of one kind, and where it is at home, from all clients' updates so far."""
        self.seen_past = dict(self.past)
        self.far, self.kinds = 0.0, []
        names = list(self.past)
        if len(names) < 5:
            return
        apart = np.stack([self.past[i] for i in names])
        apart = apart - apart.mean(0)
        apart = apart / np.linalg.norm(apart, axis=1, keepdims=True)
        cosine = apart @ apart.T
        alike = np.zeros_like(cosine)
        for i, k in combinations(range(len(names)), 2):
            others = [o for o in range(len(names)) if o not in (i, k)]
            alike[i, k] = alike[k, i] = np.corrcoef(cosine[i, others], cosine[k, others])[0, 1]
        positive = np.maximum(alike, 0)
        last = np.stack([self.last[i][0] for i in names])
        last = last - last.mean(0)
        last = last / np.linalg.norm(last, axis=1, keepdims=True)
        common = (positive**2 * (last @ last.T)).sum() / (positive**2).sum()
        self.peak = max(self.peak, common)
        groups = [[i] for i in range(len(names))]
        while len(groups) > 1:
            mean, one, other = max(
                (alike[np.ix_(a, b)].mean(), a, b) for a, b in combinations(groups, 2)
            )
            if mean < 0.5:
                break
            groups = [g for g in groups if g not in (one, other)] + [one + other]
        lead = []
        for members, i in ((g, i) for g in groups for i in g):
            mine = [alike[i, k] for k in members if k != i]
            others = [alike[i, h].mean() for h in groups if h is not members]
            lead.append(np.mean(mine) - max([0.0, *others]) if mine and others else 0.0)
        self.plain = min(1.0, max(0.0, (np.mean(lead) - 2 / 3) / (0.8 - 2 / 3)))
        far = self.plain
        if self.round >= 12:
            left = (common / self.peak - 0.75) / 0.25
            far = max(far, left)
            if left <= 0:
                self.peak = np.inf  # for good
        groups = [g for g in groups if len(g) > 1]
        d = len(self.models)
        if not 1 < len(groups) <= d:
            return
        if self.round < 5:
            so_far = self._parting([[self.past[names[i]] for i in g] for g in groups])
            lately = self._parting([[self.last[names[i]][0] for i in g] for g in groups])
            far *= min(so_far, lately)
        if far:
            self.far = far
            rows = [np.mean([self.weights[names[i]] for i in g], axis=0) for g in groups]
            best = [
                max(
                    permutations(range(d), len(groups)),
                    key=lambda p: sum(rows[g][b, j] for g, j in enumerate(p)),
                )
                for b in range(len(self.spans))
            ]
            self.kinds = [
                ([names[i] for i in members], [best[b][g] for b in range(len(self.spans))])
                for g, members in enumerate(groups)
            ]

    def _parting(self, groups: list[list[Row]]) -> float:
        """How little kinds' mean updates point the same way, given those of their members."""
        means = [np.mean(updates, axis=0) for updates in groups]
        cosines = [
            a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in combinations(means, 2)
        ]
        return float(np.clip(1 - np.mean(cosines) / 0.05, 0, 1))
